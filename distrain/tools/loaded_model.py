"""A run's model with its weights, ready to be used: without its data set, and in one process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distrain import models
from distrain.errors import DataError
from distrain.runs import checkpoint, folder
from distrain.runs.checkpoint import Saved
from distrain.runs.folder import RESULT
from distrain.training.augment import normalize


@dataclass(frozen=True)
class LoadedModel:
    """`model` in fp32, for evaluation; `image_shape` (H, W, C) of its images; `checkpoint`: its folder's name."""

    model: nn.Module
    classes: list[str]
    image_shape: tuple[int, int, int]
    mean: Tensor
    std: Tensor
    checkpoint: str

    def probabilities(self, images: Tensor) -> Tensor:
        """fp32 [N, K] of images uint8 [N, H, W, C]."""
        with torch.inference_mode():
            logits: Tensor = self.model(normalize(images.to(self.mean.device), self.mean, self.std))
            return logits.softmax(1).cpu()


def load(run: Path, which: str | None, device: str = "cpu") -> LoadedModel:
    """The model of a run's checkpoint.

    Args:
        run: the run's folder.
        which: best, last, a folder's name; None: the one that its result is of.
        device: cpu or cuda.

    Raises:
        DataError: the folder holds no run, or none of its checkpoints is readable.
        ConfigError: its model cannot be built here.
    """
    record = folder.read_begun(run)
    path, _ = choose(run, which)
    saved = checkpoint.load(path)
    height, width, channels = record.setup["data"]["image_shape"]
    classes, wanted = record.classes, record.config.model
    model = models.build(wanted.name, wanted.activation, len(classes), (channels, height, width))
    models.load(model, saved.model, wanted.name, path)
    mean, std = (torch.tensor(saved.state["identity"][f"data.{key}"], device=device) for key in ("mean", "std"))
    return LoadedModel(model.float().to(device).eval(), classes, (height, width, channels), mean, std, path.name)


def choose(run: Path, which: str | None) -> tuple[Path, list[str]]:
    """The checkpoint that was asked for, and why newer ones were passed over.

    Raises:
        DataError: there is none.
    """
    place = run / checkpoint.FOLDER
    if which is not None and which not in ("best", "last"):
        return place / which, []
    saved, skipped = checkpoint.newest(place)
    if saved is None:
        raise DataError("\n  ".join([f"{run}: has no readable checkpoint", *skipped]))
    best = _best(run, saved)
    if best is None and which == "best":
        raise DataError(f"{run}: has no best checkpoint, as its data set has no val split; take last")
    return (best if best is not None and which != "last" else saved.path), skipped


def _best(run: Path, last: Saved) -> Path | None:
    """The best checkpoint on val: the result's, where it is of this checkpoint; its last evaluation may be newer."""
    try:
        result = json.loads((run / RESULT).read_text(encoding="utf-8"))
    except OSError:
        result = {}
    if result.get("steps") == last.step and result["val_accuracy"] is not None:
        return run / checkpoint.FOLDER / str(result["checkpoint"])
    best = last.state["best"]
    return checkpoint.path_of(run / checkpoint.FOLDER, best["step"]) if best is not None else None
