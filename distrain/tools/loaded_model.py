"""A run's model with its weights, ready for inference in one process; the data set is not needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distrain import models
from distrain.runs import checkpoint, folder
from distrain.runs.choice import choose
from distrain.training.augment import normalize


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and what is needed to use it."""

    model: nn.Module
    """The model, in fp32."""
    classes: list[str]
    image_shape: tuple[int, int, int]
    """(H, W, C)."""
    mean: Tensor
    std: Tensor
    checkpoint: str
    """Name of the checkpoint's folder."""

    def probabilities(self, images: Tensor) -> Tensor:
        """Return the probabilities fp32 [N, K] of the classes for images uint8 [N, H, W, C]."""
        with torch.inference_mode():
            logits: Tensor = self.model(normalize(images.to(self.mean.device), self.mean, self.std))
            return logits.softmax(1).cpu()


def load(run: Path, which: str | None, device: str = "cpu") -> LoadedModel:
    """Load the model of a run's checkpoint.

    Args:
        run: the run's folder.
        which: best, last, or a folder's name; None: the checkpoint that the run's result is of.
        device: cpu or cuda.

    Raises:
        DataError: the folder holds no run, or none of its checkpoints is readable.
        ConfigError: the model cannot be built here.
    """
    record = folder.read_started(run)
    path, _ = choose(run, which)
    saved = checkpoint.load(path)
    height, width, channels = record.setup["data"]["image_shape"]
    classes, settings = record.classes, record.config.model
    model = models.from_config(settings, len(classes), (height, width, channels), record.config.run.seed)
    models.load(model, saved.model, settings.name, path)
    mean, std = (torch.tensor(saved.state["identity"][f"data.{key}"], device=device) for key in ("mean", "std"))
    return LoadedModel(model.float().to(device).eval(), classes, (height, width, channels), mean, std, path.name)
