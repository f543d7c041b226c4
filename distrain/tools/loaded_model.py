"""A run's model with its weights, ready for inference in one process; the data set is not needed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distrain import models
from distrain.data import images
from distrain.data.images import Decoding, read_image
from distrain.distributed.numerics import NEED_GPU, autocast, set_numerics
from distrain.errors import DataError
from distrain.runs import checkpoint, folder
from distrain.runs.checkpoint import Checkpoint
from distrain.runs.choice import choose
from distrain.training.augment import normalize

log = logging.getLogger("distrain")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and what is needed to use it."""

    model: nn.Module
    """The model, on its device; fp64 if that is the precision, else fp32."""
    precision: str
    """`train.precision`, in which logits are computed."""
    classes: list[str]
    image_shape: tuple[int, int, int]
    """(H, W, C) of the images that are evaluated."""
    resize: int | None
    """Length of the shorter side before the crop to `image_shape`, of a run on an index; else None."""
    mean: Tensor
    std: Tensor
    source: dict[str, Any]
    """The manifest's `source` of its data set: how it was prepared."""
    checkpoint: str
    """Name of the checkpoint's folder."""

    def pixels(self, data: bytes) -> Tensor:
        """Decode an image file as for evaluation: uint8 [H, W, C].

        Raises:
            UnreadableError: it cannot be decoded.
        """
        decoding = Decoding.of(self.source)
        if self.resize is None:
            return torch.from_numpy(read_image(data, self.image_shape, decoding))
        return images.resize_and_crop(images.decode(data, decoding), self.resize, self.image_shape[:2])

    def probabilities(self, images: Tensor) -> Tensor:
        """Return the probabilities [N, K] of the classes for images uint8 [N, H, W, C], computed as in evaluation.

        Raises:
            DataError: logits are not finite.
        """
        with torch.inference_mode():
            with autocast(self.mean.device, self.precision):
                logits: Tensor = self.model(normalize(images.to(self.mean.device), self.mean, self.std))
            logits = logits.to(self.mean.dtype)
            self.check_logits(logits)
            return logits.softmax(1).cpu()

    def check_logits(self, logits: Tensor) -> None:
        """Check that logits are finite: finite weights can be so large that they are not.

        Raises:
            DataError: they are not.
        """
        if not logits.isfinite().all():
            raise DataError(f"{self.checkpoint}: its model gives logits that are not finite; use another checkpoint")


def load(run: Path, which: str | None, device: str = "cpu", precision: str | None = None) -> LoadedModel:
    """Load the model of a run's checkpoint, and set how this process computes.

    Args:
        run: the run's folder.
        which: best, last, or a folder's name; None: the checkpoint that the run's result is of.
        device: cpu or cuda.
        precision: a value of `train.precision`; None: that of the run, or fp32 where it needs a GPU and there is none.

    Raises:
        DataError: the folder holds no run, the checkpoint cannot be read, or it is not of this run.
        ConfigError: the model cannot be built here.
    """
    config, data = folder.configuration(run), folder.read_setup(run)["data"]
    path, skipped = choose(run, which)
    for line in skipped:
        log.warning("skipped %s", line)
    saved = checkpoint.load(path)
    if saved.state["identity"].get("data.manifest") != data["manifest"]:
        raise DataError(
            f"{path}: was not trained on the data set that {run / folder.SETUP} describes: its classes may be others;"
            " choose another checkpoint, or bring back the one that was here"
        )
    height, width, channels = data["image_shape"]
    classes, settings = data["classes"], config.model
    chosen = precision or _precision_of(config.train.precision, device)
    set_numerics(chosen, config.train.deterministic)
    dtype = torch.float64 if chosen == "fp64" else torch.float32
    model = models.from_config(settings, len(classes), (height, width, channels), config.run.seed, dtype)
    models.load(model, saved.model, settings.name, path)
    mean, std = (_normalization(saved, key, channels).to(device, dtype) for key in ("mean", "std"))
    evaluation = data.get("evaluation") or {"crop": [height, width], "resize": None}
    image_shape, source = (*evaluation["crop"], channels), data.get("source", {})
    return LoadedModel(
        model.to(device).eval(), chosen, classes, image_shape, evaluation["resize"], mean, std, source, path.name
    )


def _precision_of(trained: str, device: str) -> str:
    if device == "cpu" and trained in NEED_GPU:
        log.warning("train.precision=%s needs a GPU: fp32 is used on the CPU; probabilities differ slightly", trained)
        return "fp32"
    return trained


def _normalization(saved: Checkpoint, key: str, channels: int) -> Tensor:
    values = saved.state["identity"].get(f"data.{key}")
    if not isinstance(values, list) or len(values) != channels or not all(isinstance(each, float) for each in values):
        raise DataError(f"{saved.path}: has no {key} for images of {channels} channels; choose another checkpoint")
    return torch.tensor(values, dtype=torch.float64)
