"""Models that tests name in the configuration."""

from __future__ import annotations

from math import prod

from torch import nn


class ThreeClasses(nn.Sequential):
    """Gives three logits, whatever it is asked for."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(nn.Flatten(), nn.Linear(prod(image_shape), 3))


class Coupled(nn.Sequential):
    """Couples the samples of a share, and draws random numbers."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        hidden = nn.Linear(prod(image_shape), 20)
        super().__init__(
            nn.Flatten(), hidden, nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, num_classes)
        )


class Broken(nn.Module):
    """Cannot be built."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.nothing = 1 / 0


class Picky(nn.Sequential):
    """Takes images of another size."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(nn.Flatten(), nn.Linear(7, num_classes))
