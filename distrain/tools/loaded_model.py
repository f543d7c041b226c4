"""The model of a run or of a bundle, ready for inference in one process; the data set is not needed."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from distrain import files, models
from distrain.data import images
from distrain.data.images import Decoding, UnreadableError, read_image
from distrain.data.pillow import as_png
from distrain.distributed import devices, gpu_errors
from distrain.distributed.numerics import NEED_GPU, autocast, numerics_restored, set_numerics, torch_defaults
from distrain.errors import ConfigError, DataError
from distrain.models.mirror_average import as_evaluated
from distrain.runs import bundle, checkpoint, folder
from distrain.runs.checkpoint import Checkpoint
from distrain.runs.choice import choose
from distrain.runs.records import Description
from distrain.text import printable, shown
from distrain.training.augment import normalize

log = logging.getLogger("distrain")

MAX_BYTES = 2**30
"""Maximum size of an image file."""

ImageFile: TypeAlias = str | os.PathLike[str] | bytes | Image.Image
"""The path of an image file, its content, or an image of Pillow."""


class Preprocessing(NamedTuple):
    """Decoding of image files, and the length of the shorter side before the crop; None: as `prepare` resizes."""

    decoding: Decoding
    resize: int | None


class LoadedModel(nn.Module):
    """A run's model in evaluation mode, with its classes and its preprocessing.

        model = distrain.load_model("runs/first")
        images = torch.stack([model.preprocess("photo.jpg"), model.preprocess("other.png")])
        logits = model(images)
        model.predict("photo.jpg")  # {"cat": 0.93, "dog": 0.05, …}

    It is called with images as they are, uint8: the normalisation, the precision and the settings of the GPU are those
    of the evaluation, so the logits are the same. Gradients are computed unless `torch.no_grad()` or `inference_mode()`
    is active.

    Attributes:
        model: the model alone, for normalised images [N, C, H, W]; its weights are fp64 if that is the precision, else
            fp32.
        classes: names of the classes, in the order of the logits.
        image_shape: (H, W, C) of the images that are evaluated.
        resize: of a run on an index, shorter side of an image before the crop to `image_shape`; else None.
        checkpoint: name of the checkpoint's folder.
        precision: `train.precision`, in which logits are computed.
        flip: `eval.flip`: whether logits are the mean of those of an image and of its mirror image.
        mean: of each channel, with pixels in 0 … 1: [C].
        std: the same.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        classes: list[str],
        image_shape: tuple[int, int, int],
        preprocessing: Preprocessing,
        normalization: tuple[Tensor, Tensor],
        precision: str,
        deterministic: bool,
        checkpoint: str,
        flip: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.classes, self.image_shape, self.checkpoint, self.precision = classes, image_shape, checkpoint, precision
        self.flip = flip
        self._decoding, self.resize = preprocessing
        self._deterministic = deterministic
        for name, values in zip(("mean", "std"), normalization, strict=True):
            self.register_buffer(name, values, persistent=False)

    if TYPE_CHECKING:

        def __call__(self, images: Tensor) -> Tensor:
            """Return `forward(images)`; torch's own declaration has no types."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, K] of images.

        Args:
            images: uint8 [N, H, W, C] with the `image_shape` of this model, on any device.

        Raises:
            DataError: the images have another type or shape.
        """
        expected = (*images.shape[:1], *self.image_shape)
        if images.dtype != torch.uint8 or images.shape != expected:
            raise DataError(
                f"images: should be uint8 [N, {', '.join(map(str, self.image_shape))}], as `preprocess` returns them"
                f" and `torch.stack` joins them; got {str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            )
        device = self.mean.device
        with numerics_restored():
            set_numerics(self.precision, self._deterministic)
            with autocast(device, self.precision):
                model = as_evaluated(self.model, self.flip)
                logits: Tensor = model(normalize(images.to(device), self.mean, self.std))
        return logits.to(self.mean.dtype)

    def preprocess(self, image: ImageFile) -> Tensor:
        """Decode, resize and crop an image as for evaluation: uint8 [H, W, C], on the CPU.

        Args:
            image: path of an image file, its content, or an image of Pillow. A large JPEG file is decoded at a fraction
                of its size, so the image that Pillow makes of it gives pixels that differ a little.

        Raises:
            DataError: it cannot be read or decoded.
        """
        data, name = _read(image)
        try:
            return self.pixels(data)
        except UnreadableError as error:
            raise DataError(f"{name}: {printable(error)}") from error

    def predict(self, image: ImageFile) -> dict[str, float]:
        """Return the probability of each class for an image, the most probable one first.

        Args:
            image: as for `preprocess`.

        Raises:
            DataError: it cannot be read or decoded, or its logits are not finite.
        """
        return self.by_class(self.probabilities(self.preprocess(image)[None])[0])

    def probabilities(self, images: Tensor) -> Tensor:
        """Return the probabilities [N, K] of the classes for images uint8 [N, H, W, C], on the CPU.

        Raises:
            DataError: logits are not finite, or the images have another type or shape.
        """
        with torch.inference_mode():
            logits = self(images)
            self.check_logits(logits)
            return logits.softmax(1).cpu()

    def pixels(self, data: bytes) -> Tensor:
        """Decode the content of an image file as for evaluation: uint8 [H, W, C].

        Raises:
            UnreadableError: it cannot be decoded.
        """
        if self.resize is None:
            return torch.from_numpy(read_image(data, self.image_shape, self._decoding))
        return images.resize_and_crop(images.decode(data, self._decoding), self.resize, self.image_shape[:2])

    def by_class(self, probabilities: Tensor) -> dict[str, float]:
        """Return probabilities [K] by the names of the classes, the most probable one first."""
        order, values = probabilities.argsort(descending=True, stable=True).tolist(), probabilities.tolist()
        return {self.classes[k]: values[k] for k in order}

    def check_logits(self, logits: Tensor) -> None:
        """Check that logits are finite: finite weights can be so large that they are not.

        Raises:
            DataError: they are not.
        """
        if not logits.isfinite().all():
            raise DataError(f"{self.checkpoint}: its model gives logits that are not finite; use another checkpoint")


def _read(image: ImageFile) -> tuple[bytes, str]:
    """Return the content of an image file, and its name for messages."""
    if isinstance(image, bytes):
        return image, "the image"
    if isinstance(image, (str, os.PathLike)):
        name = printable(os.fspath(image))
        try:
            return files.read(Path(image), MAX_BYTES), name
        except OSError as error:
            raise DataError(f"{name}: {error.strerror or error}") from error
    if isinstance(image, Image.Image):
        return as_png(image), "the image"
    raise DataError(
        f"image: should be the path of an image file, its content (bytes), or an image of Pillow; got {shown(image)}"
    )


def load_on(device: str, key: str, run: Path, which: str | None) -> LoadedModel:
    """Load the model of a run's checkpoint, or of a bundle.

    Args:
        device: auto, cpu or cuda.
        key: what sets `device`, as `--device `, for messages.
        run: the run's folder, or a bundle.
        which: best, last, or a folder's name; None: the checkpoint that the run's result is of.

    Raises:
        DataError: as `load`.
        ConfigError: the device cannot be used, or its memory is too small; or as `load`.
        GpuError: the GPU failed.
    """
    with gpu_errors.explained(devices.describe(0), "predict"):
        return load(run, which, "cpu" if devices.on_cpu(device, os.environ, key) else "cuda")


@torch_defaults()
def load(run: Path, which: str | None, device: str = "cpu", precision: str | None = None) -> LoadedModel:
    """Load the model of a run's checkpoint, or of a bundle.

    Args:
        run: the run's folder, or a bundle.
        which: best, last, or a folder's name; None for a bundle, and for the checkpoint that the run's result is of.
        device: cpu or cuda.
        precision: a value of `train.precision`; None: that of the run, or fp32 where it needs a GPU and there is none.

    Raises:
        DataError: the folder holds no run, the checkpoint cannot be read, or it is not of this run; or the bundle is
            damaged.
        ConfigError: the model cannot be built here, or `which` is given for a bundle.
    """
    if not bundle.is_one(run):
        description, saved = describe(run, which)
        return build(description, saved.model, saved.path, device, precision)
    if which is not None:
        raise ConfigError(f"{run}: is a bundle, which has one model; omit the name of the checkpoint")
    loaded = build(*bundle.read(run), run, device, precision)
    _try_one_image(loaded, run / bundle.CONFIG)
    return loaded


def _try_one_image(loaded: LoadedModel, path: Path) -> None:
    """Check that a bundle's model can compute an image of the size that its config.json names.

    Raises:
        DataError: it cannot.
    """
    try:
        with torch.inference_mode():
            loaded(torch.zeros(1, *loaded.image_shape, dtype=torch.uint8))
    except RuntimeError as error:
        if gpu_errors.explain(error, devices.describe(0), "predict") is not None:
            raise
        height, width, _ = loaded.image_shape
        reason = printable(str(error).splitlines()[0], 200)
        raise DataError(
            f"{path}: its model cannot compute an image of evaluation.crop, {height}×{width} pixels ({reason});"
            f" {bundle.CURE}"
        ) from error


def describe(run: Path, which: str | None) -> tuple[Description, Checkpoint]:
    """Return what is needed to build a run's model and to prepare its images, and the checkpoint with its weights.

    Args:
        run: the run's folder.
        which: best, last, or a folder's name; None: the checkpoint that the run's result is of.

    Raises:
        DataError: the folder holds no run, the checkpoint cannot be read, or it is not of this run.
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
    mean, std = (_normalization(saved, key, channels) for key in ("mean", "std"))
    description = {
        "model": config.model,
        "seed": config.run.seed,
        "classes": data["classes"],
        "image_shape": data["image_shape"],
        "evaluation": data.get("evaluation") or {"crop": [height, width], "resize": None},
        "flip": config.eval.flip,
        "decoding": asdict(Decoding.of(data.get("source", {}))),
        "mean": mean,
        "std": std,
        "precision": config.train.precision,
        "deterministic": config.train.deterministic or config.train.virtual_ranks is not None,
        "checkpoint": path.name,
    }
    return Description.model_validate(description), saved


def build(
    description: Description, weights: Mapping[str, Tensor], path: Path, device: str, precision: str | None
) -> LoadedModel:
    """Build a model and load its weights.

    Args:
        description: of the model and its images.
        weights: by name.
        path: their file or folder, for messages.
        device: as for `load`.
        precision: as for `load`.

    Raises:
        DataError: weights are not finite.
        ConfigError: the model cannot be built here, or has other weights.
    """
    chosen = precision or _precision_of(description.precision, device)
    dtype = torch.float64 if chosen == "fp64" else torch.float32
    settings, classes, shape = description.model, description.classes, description.image_shape
    model = models.from_config(settings, len(classes), shape, description.seed, dtype)
    models.load(model, weights, settings.name, path)
    height, width = description.evaluation.crop
    mean, std = (
        torch.tensor(each, dtype=torch.float64).to(device, dtype) for each in (description.mean, description.std)
    )
    return LoadedModel(
        model.to(device),
        classes,
        (height, width, shape[2]),
        Preprocessing(Decoding(**description.decoding.model_dump()), description.evaluation.resize),
        (mean, std),
        chosen,
        description.deterministic,
        description.checkpoint,
        description.flip,
    ).eval()


def _precision_of(trained: str, device: str) -> str:
    if device == "cpu" and trained in NEED_GPU:
        log.warning("train.precision=%s needs a GPU: fp32 is used on the CPU; probabilities differ slightly", trained)
        return "fp32"
    return trained


def _normalization(saved: Checkpoint, key: str, channels: int) -> list[float]:
    values = saved.state["identity"].get(f"data.{key}")
    numbers = values if isinstance(values, list) else []
    if len(numbers) != channels or not all(isinstance(each, float) and math.isfinite(each) for each in numbers):
        raise DataError(f"{saved.path}: has no {key} for images of {channels} channels; choose another checkpoint")
    return numbers
