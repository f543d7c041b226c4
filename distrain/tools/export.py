"""`distrain export`: write a run's model as one file for use without distrain, or as a folder to share it with others.

A file is written by torch.export, or as ONNX. The exported program takes images as float32 [N, C, H, W] in 0 … 1, of
any N, normalises them, and gives logits [N, K]. Its outputs are compared with the model's before the file is put in
place.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from distrain import files
from distrain.errors import ConfigError
from distrain.models import weight_files
from distrain.models.mirror_average import as_evaluated
from distrain.runs import bundle
from distrain.text import printable
from distrain.tools import loaded_model, model_card
from distrain.tools.loaded_model import LoadedModel

KINDS = {".pt2": "torch.export", ".onnx": "ONNX"}
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_BATCH_SIZES = (1, 2, 5)
"""Sizes of the batches on which the model and the exported program are compared."""
_TOLERANCE = 1e-3
"""Largest allowed difference of a logit, relative to the largest logit or to 1, whichever is larger."""


class Program(nn.Module):
    """The normalisation followed by the model as it is evaluated: what is exported."""

    mean: Tensor
    std: Tensor

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.model = as_evaluated(loaded.model, loaded.flip)
        self.register_buffer("mean", loaded.mean.float()[:, None, None])
        self.register_buffer("std", loaded.std.float()[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, K] of images float32 [N, C, H, W] in 0 … 1."""
        logits: Tensor = self.model((images - self.mean) / self.std)
        return logits


def export(run: Path, out: Path, which: str | None, force: bool) -> dict[str, Any]:
    """Export a run's model; the file is read back and compared with the model before it is put in place.

    Args:
        run: the run's folder.
        out: the file to write; its suffix selects the format (`KINDS`).
        which: best, last, or a folder's name; None: the checkpoint that the run's result is of.
        force: replace a file that exists.

    Returns:
        `checkpoint`: its name; `kind`; `classes`; `image_shape`; `difference`: the largest difference of a logit.

    Raises:
        ConfigError: the suffix is unknown, the file exists, a package is missing, the model cannot be exported, or the
            exported program computes something else. Nothing is written then.
        DataError: the run has no checkpoint.
    """
    if out.suffix not in KINDS:
        raise ConfigError(f"--out {printable(out)}: should end with {' or '.join(KINDS)}")
    if out.exists() and not (force and out.is_file()):
        cure = ", or give --force" if out.is_file() else ""  # a folder or device is never replaced
        raise ConfigError(f"--out {printable(out)}: exists already; choose another file{cure}")
    missing = [name for name in _ONNX_PACKAGES if out.suffix == ".onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"ONNX needs {', '.join(missing)}: pip install 'distrain[onnx]'")
    loaded = loaded_model.load(run, which, precision="fp32")  # with TF32, the comparison would be of rounding
    program = Program(loaded).eval()
    height, width, channels = loaded.image_shape
    with torch.inference_mode():
        loaded.check_logits(program(torch.rand(2, channels, height, width)))
    metadata = {
        "classes": json.dumps(loaded.classes),
        "image_shape": json.dumps([channels, height, width]),
        "resize": json.dumps(loaded.resize),
        "checkpoint": loaded.checkpoint,
    }
    work = out.with_name(f".{uuid.uuid4().hex}{out.suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _quiet():
            convert, run_file = (_to_torch, _run_torch) if out.suffix == ".pt2" else (_to_onnx, _run_onnx)
            images = torch.rand(2, channels, height, width)
            content = _with_one_line_errors(lambda: convert(program, images, metadata), out)
            files.write(work, content)
            difference = _compare(program, lambda images: run_file(work, images), (channels, height, width), out)
        os.replace(work, out)
        files.sync(out.parent)
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}; make room there, or choose another file"
        raise ConfigError(f"--out {printable(out)}: {reason}") from error
    finally:
        work.unlink(missing_ok=True)
    return {**metadata, "classes": loaded.classes, "kind": KINDS[out.suffix], "difference": difference}


def export_bundle(run: Path, out: Path, which: str | None) -> str:
    """Write a run's model as a bundle, which `load_model` reads; see `distrain.runs.bundle`.

    Args:
        run: the run's folder.
        out: the folder to write; it must not exist, or be empty.
        which: best, last, or a folder's name; None: the checkpoint that the run's result is of.

    Returns:
        Name of the checkpoint.

    Raises:
        ConfigError: the folder is not empty or cannot be written, or the model cannot be built here. Nothing is there
            then.
        DataError: the run has no checkpoint, or its weights are damaged.
    """
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--bundle {printable(out)}: exists already and is not an empty folder; choose another one")
    description, saved = loaded_model.describe(run, which)
    loaded = loaded_model.build(description, saved.model, saved.path, "cpu", "fp32")
    height, width, channels = loaded.image_shape
    with torch.inference_mode():
        loaded.check_logits(loaded(torch.zeros(1, height, width, channels, dtype=torch.uint8)))
    card = model_card.write(out.resolve().name, model_card.read_facts(run, description, saved))
    weights = safetensors.torch.save(saved.model, {weight_files.CLASSES: json.dumps(description.classes)})
    try:
        bundle.write(out, bundle.contents(description, weights, card))
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}; make room there, or choose another folder"
        raise ConfigError(f"--bundle {printable(out)}: {reason}") from error
    return description.checkpoint


def _to_torch(program: Program, images: Tensor, metadata: dict[str, str]) -> bytes:
    exported = torch.export.export(program, (images,), dynamic_shapes=({0: torch.export.Dim("N")},))
    content = io.BytesIO()  # not a file: torch's writer aborts the process on a full disk
    torch.export.save(exported, content, extra_files=dict(metadata))
    return content.getvalue()


def _run_torch(path: Path, images: Tensor) -> Tensor:
    # Unlike torch.load, torch.export reads weights without running code from a pickle.
    logits: Tensor = torch.export.load(path).module()(images)
    return logits


def _to_onnx(program: Program, images: Tensor, metadata: dict[str, str]) -> bytes:
    import onnx

    exported = torch.onnx.export(
        program, (images,), input_names=["images"], output_names=["logits"], dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("N")},), verbose=False,
    )  # fmt: skip
    assert exported is not None
    model = exported.model_proto
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def _run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _compare(program: Program, exported: Callable[[Tensor], Tensor], shape: tuple[int, int, int], out: Path) -> float:
    """Return the largest difference of a logit, over batches of several sizes.

    Raises:
        ConfigError: it is too large.
    """
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for size in _BATCH_SIZES:
        images = torch.rand(size, *shape, generator=generator)
        with torch.inference_mode():
            expected = program(images)
        actual = _with_one_line_errors(lambda images=images: exported(images), out)  # type: ignore[misc]
        difference = float((actual - expected).abs().max())
        scale = max(1.0, float(expected.abs().max()))
        if actual.shape != expected.shape or not difference <= _TOLERANCE * scale:
            raise ConfigError(
                f"{printable(out)}: the exported program computes something else: a logit differs by {difference:.3g}"
                f" for {size} images; the model cannot be exported in this format"
            )
        largest = max(largest, difference)
    return largest


def _with_one_line_errors(action: Callable[[], Any], out: Path) -> Any:
    """Run `action`; an exporter's error becomes a ConfigError of one line: exporters raise many kinds of exceptions."""
    try:
        return action()
    except (OSError, MemoryError):
        raise
    except Exception as error:
        line = printable((str(error).strip().splitlines() or [type(error).__name__])[0])
        raise ConfigError(f"{printable(out)}: the model cannot be exported: {type(error).__name__}: {line}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the long output of the exporters: prints, warnings and log messages."""
    disabled_level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled_level)
