"""Models that tests name in the configuration."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrain.models.small import Small


class ThreeClasses(nn.Sequential):
    """Has three outputs for any number of classes."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(nn.Flatten(), nn.Linear(prod(image_shape), 3))


class BatchNormAndDropout(nn.Sequential):
    """Has BatchNorm, which depends on the other samples of the batch, and Dropout, which draws random numbers."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        hidden = nn.Linear(prod(image_shape), 20)
        super().__init__(
            nn.Flatten(), hidden, nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, num_classes)
        )


class FromImages(nn.Sequential):
    """Computes initial weights from images; kernels and a matrix for Muon, and biases."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(
            nn.Conv2d(image_shape[0], 4, 2),
            nn.Conv2d(4, 8, 3, stride=4),
            nn.BatchNorm2d(8),
            nn.Flatten(),
            nn.LazyLinear(10),
            nn.Tanh(),
            nn.Linear(10, num_classes),
        )
        self(torch.zeros(2, *image_shape))

    def initialize_from_images(self, images: Tensor) -> None:
        with torch.no_grad():
            self[0].weight.copy_(images.mean(0)[None, :, :2, :2])  # type: ignore[arg-type]


class Normed(nn.Sequential):
    """Has BatchNorm of one and of two dimensions; for images of 16×16 pixels."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(
            nn.Conv2d(image_shape[0], 6, 3, stride=2),
            nn.BatchNorm2d(6),
            nn.Tanh(),
            nn.AvgPool2d(2),  # AdaptiveAvgPool2d has no deterministic gradient on GPUs
            nn.Flatten(),
            nn.Linear(54, 16),
            nn.BatchNorm1d(16, momentum=None),
            nn.Tanh(),
            nn.Linear(16, num_classes),
        )


class FixedNorm(Normed):
    """Keeps its first BatchNorm in evaluation mode; its `train` returns nothing, as people often write it."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self[1].eval()


class Mixed(nn.Sequential):
    """Has layers whose result could depend on which process computes what: BatchNorm, dropout, other buffers."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(
            nn.Conv2d(image_shape[0], 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout2d(0.1),
            nn.Flatten(),
            nn.utils.parametrizations.spectral_norm(
                nn.Linear(8 * ((image_shape[1] - 1) // 2) * ((image_shape[2] - 1) // 2), 24)
            ),
            nn.BatchNorm1d(24, momentum=None),
            nn.ReLU(),
            nn.Dropout(0.3),
            Newest(),
            nn.Linear(24, num_classes),
        )


class Newest(nn.Module):
    """Adds a moving average of the newest batch's mean, which each pass changes, one buffer in place and one not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("newest", torch.zeros(24))
        self.register_buffer("replaced", torch.zeros(24))

    def forward(self, values: Tensor) -> Tensor:
        if self.training and len(values):
            mean = values.detach().to(self.newest.dtype).mean(0)
            self.newest.lerp_(mean, 0.1)
            self.replaced = self.replaced * 0.9 + mean
        return values + self.newest + 0.1 * self.replaced


class Sometimes(Small):
    """Changes a buffer in its tenth training pass alone."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(num_classes, image_shape)
        self.register_buffer("seen", torch.zeros(1))
        self.pass_count = 0

    def forward(self, images: Tensor) -> Tensor:
        self.pass_count += self.training
        if self.training and self.pass_count == 10:
            self.seen += 1
        return super().forward(images)


class Differing(Small):
    """Draws initial weights that no seed determines."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(num_classes, image_shape)
        with torch.no_grad():
            next(self.parameters()).add_(os.getpid())


class Projected(nn.Module):
    """Draws a tensor that no checkpoint has."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(prod(image_shape), 32) / prod(image_shape) ** 0.5, False)
        self.head = nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K]."""
        return self.head(images.flatten(1) @ self.projection)


class Broken(nn.Module):
    """Raises an exception when it is built."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.nothing = 1 / 0


class Heavy(nn.Sequential):
    """Has 2 GB of weights, which take long to save."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(nn.Flatten(), nn.Linear(prod(image_shape), num_classes))
        self.register_buffer("ballast", torch.zeros(500_000_000))


class Picky(nn.Sequential):
    """Fails on images of the size of the data set."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(nn.Flatten(), nn.Linear(7, num_classes))


_SLOW = {"slow": 0.2, "unhurried": 0.04}


class Faulty(nn.Sequential):
    """A linear model; FAULT=KIND:RANK:N in the environment makes the N-th forward pass of a rank fail."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(nn.Flatten(), nn.Linear(prod(image_shape), num_classes))
        # Makes writing a checkpoint slower; does not change the result of training.
        self.register_buffer("ballast", torch.zeros(1_000_000))
        kind, rank, number = os.environ.get("FAULT", "none:0:0").split(":")
        self.kind = kind if os.environ.get("RANK", "0") == rank else "none"
        self.fault_pass, self.pass_count = int(number), 0

    def forward(self, images: Tensor) -> Tensor:
        # The passes that try a new model, without gradients, count as one, however many they are.
        self.pass_count = self.pass_count + 1 if torch.is_grad_enabled() or self.pass_count > 1 else 1
        if self.pass_count == self.fault_pass:
            if self.kind == "raise":
                raise RuntimeError("a fault of the model")
            if self.kind == "cannot":
                raise RuntimeError("this operation has no deterministic form")
            if self.kind == "hang":
                time.sleep(1000)
            if self.kind == "hold":  # holds the interpreter's lock: no other thread of the process runs
                ctypes.PyDLL(None).sleep(1000)
            if self.kind == "stop":
                os.kill(os.getpid(), signal.SIGUSR1)
            if self.kind == "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
            if self.kind == "lose":
                os.unlink(os.environ["FAULT_FILE"])
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
        if self.kind in _SLOW and self.pass_count >= self.fault_pass:
            time.sleep(_SLOW[self.kind])
        logits: Tensor = super().forward(images)
        return logits


class FaultyAtAnySize(Faulty):
    """The same for images of any size, which are averaged to 16×16 pixels."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(num_classes, (image_shape[0], 16, 16))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = super().forward(F.adaptive_avg_pool2d(images, 16))
        return logits


class Linear(nn.Sequential):
    """A linear model for images of any shape."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(nn.Flatten(), nn.Linear(prod(image_shape), num_classes))


class Branching(Linear):
    """Branches on the value of a tensor, which no exporter supports."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits if float(logits.sum()) < 1e9 else logits * 2


class Idle(Linear):
    """Has a layer that is not used."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(num_classes, image_shape)
        self.head = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self[1](self[0](images))
        return logits


class OnlyOnRank0(Linear):
    """Raises an exception when it is built on another rank than 0."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        if os.environ.get("RANK", "0") != "0":
            raise RuntimeError("not on this node")
        super().__init__(num_classes, image_shape)


class NormedPixels(nn.Sequential):
    """Has BatchNorm of many pixels."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(nn.BatchNorm2d(image_shape[0]), nn.Flatten(), nn.Linear(prod(image_shape), num_classes))


class Collapsing(Small):
    """Loses its weights in the thirtieth forward pass of training."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(num_classes, image_shape)
        self.pass_count = 0

    def forward(self, images: Tensor) -> Tensor:
        self.pass_count += self.training
        if self.training and self.pass_count == 30:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.zero_()
        return super().forward(images)


class TwoNames(nn.Module):
    """Has a SyncBatchNorm under two names, and uses it twice."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.first = self.second = nn.SyncBatchNorm(image_shape[0])
        self.head = nn.Linear(prod(image_shape), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K]."""
        return self.head(self.second(self.first(images)).flatten(1))


class Drawing(Small):
    """Draws random numbers with Python's generator and numpy's."""

    def forward(self, images: Tensor) -> Tensor:
        scale = 1 + 0.1 * (random.random() + np.random.rand()) if self.training else 1
        return super().forward(images * scale)


class DrawingAlways(Small):
    """Has dropout in evaluation too, as for estimates of uncertainty."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(images, 0.3, training=True))


class Counting(Small):
    """Counts its passes without a buffer, and depends on their number."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(num_classes, image_shape)
        self.pass_count = 0

    def forward(self, images: Tensor) -> Tensor:
        self.pass_count += self.training
        return super().forward(images) * (1 + 0.01 * self.pass_count)


class CountingTensor(Small):
    """Counts its passes in a tensor that is no buffer, and depends on their number."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(num_classes, image_shape)
        self.pass_count = torch.zeros(())

    def forward(self, images: Tensor) -> Tensor:
        self.pass_count += self.training
        return super().forward(images) * (1 + 0.01 * self.pass_count)


class Codebook(Small):
    """Updates a parameter in the forward pass."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(num_classes, image_shape)
        self.code = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.code.data.lerp_(images.mean(), 0.1)
        return super().forward(images)


class Limited(Small):
    """Has no memory for more than five images in training."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) > 5:
            raise RuntimeError("out of memory")
        return super().forward(images)


class Newborn(Small):
    """Registers a buffer in its first training pass."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training and not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(1))
        return super().forward(images)


class Reshaped(Small):
    """Has a buffer with a value of each image of the newest batch."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(num_classes, image_shape)
        self.register_buffer("newest", torch.zeros(0))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.newest = images.detach().mean((1, 2, 3))
        return super().forward(images)


class Retyped(Small):
    """Replaces a buffer of integers by one of fractions."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(num_classes, image_shape)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + 0.5
        return super().forward(images)


class Twice(nn.Module):
    """Uses one BatchNorm for two inputs of other means."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.first, self.second = (nn.Linear(prod(image_shape), 8) for _ in range(2))
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        logits: Tensor = self.head(self.norm(self.first(flat)) + self.norm(self.second(flat) + 10))
        return logits


class Sparse(nn.Module):
    """Has an embedding with sparse gradients."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.table = nn.Embedding(2, num_classes, sparse=True)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.table((images.flatten(1).sum(1) > 0).long())
        return logits


class ChannelsLast(nn.Sequential):
    """Has weights whose memory layout is channels last, as all models have on a GPU."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(
            nn.Conv2d(image_shape[0], 8, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, num_classes),
        )
        self.to(memory_format=torch.channels_last)


class Attentive(nn.Module):
    """A small vision transformer: one layer of attention over patches of 4×4 pixels."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(image_shape[0], 16, 4, stride=4)
        self.attention = nn.Linear(16, 48)
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        query, key, value = self.attention(tokens).chunk(3, 2)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        logits: Tensor = self.head(nn.functional.layer_norm(tokens + attended, (16,)).mean(1))
        return logits
