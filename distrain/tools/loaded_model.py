"""A run's model with its weights, ready for inference in one process; the data set is not needed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distrain import models
from distrain.errors import DataError
from distrain.runs import checkpoint, folder
from distrain.runs.checkpoint import Checkpoint
from distrain.training.augment import normalize

log = logging.getLogger("distrain")


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
        DataError: the folder holds no run, the checkpoint cannot be read, or it is not of this run.
        ConfigError: the model cannot be built here.
    """
    config, data = folder.configuration(run), folder.read_setup(run)["data"]
    path, skipped = choose(run, which)
    for line in skipped:
        log.warning("skipped %s", line)
    saved = checkpoint.load(path)
    height, width, channels = data["image_shape"]
    classes, settings = data["classes"], config.model
    model = models.from_config(settings, len(classes), (height, width, channels), config.run.seed)
    models.load(model, saved.model, settings.name, path)
    mean, std = (_normalization(saved, key, channels).to(device) for key in ("mean", "std"))
    return LoadedModel(model.float().to(device).eval(), classes, (height, width, channels), mean, std, path.name)


def _normalization(saved: Checkpoint, key: str, channels: int) -> Tensor:
    values = saved.state["identity"].get(f"data.{key}")
    if not isinstance(values, list) or len(values) != channels or not all(isinstance(each, float) for each in values):
        raise DataError(f"{saved.path}: has no {key} for images of {channels} channels; choose another checkpoint")
    return torch.tensor(values)


def choose(run: Path, which: str | None) -> tuple[Path, list[str]]:
    """Choose a checkpoint of a run.

    Args:
        run: the run's folder.
        which: best, last, or a folder's name; None: the checkpoint that the run's result is of.

    Returns:
        Its path, and one message for each newer one that is not readable.

    Raises:
        DataError: there is none.
    """
    checkpoints = run / checkpoint.FOLDER
    if which is not None and which not in ("best", "last"):
        if not (checkpoints / which).is_dir():
            names = ", ".join(checkpoint.path_of(checkpoints, step).name for step in checkpoint.steps(checkpoints)[:5])
            raise DataError(f"{checkpoints / which}: no such checkpoint; there are {names or 'none'}")
        return checkpoints / which, []
    saved, skipped = checkpoint.newest(checkpoints)
    if saved is None:
        raise DataError("\n  ".join([f"{run}: has no readable checkpoint", *skipped]))
    best = _best(run, saved) if which != "last" else None
    if best is None and which == "best":
        raise DataError(f"{run}: has no best checkpoint, as its data set has no val split; use last")
    return (best if best is not None else saved.path), skipped


def _best(run: Path, last: Checkpoint) -> Path | None:
    """Return the path of the best checkpoint on val; None without a val split.

    The result takes precedence if `last` is the run's last checkpoint: the last evaluation may come after it.
    """
    result = folder.read_result(run) or {}
    if result.get("steps") == last.step and result["val_accuracy"] is not None:
        return run / checkpoint.FOLDER / str(result["checkpoint"])
    best = last.state["best"]
    return checkpoint.path_of(run / checkpoint.FOLDER, best["step"]) if best is not None else None
