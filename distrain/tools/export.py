"""`distrain export`: a run's model as one file for use elsewhere, by torch.export or as ONNX, compared with itself.

The exported program takes images as float32 [N, C, H, W] in 0 … 1, of any N, normalises them, and gives logits [N, K].
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distrain import files
from distrain.errors import ConfigError
from distrain.tools import loaded_model
from distrain.tools.loaded_model import LoadedModel

KINDS = {".pt2": "torch.export", ".onnx": "ONNX"}
_ONNX = ("onnx", "onnxscript", "onnxruntime")
_TRIED = (1, 2, 5)
"""Sizes of the batches that both are compared on."""
_MOST = 1e-3
"""Largest difference of a logit, as part of the largest logit (or of 1)."""


class Program(nn.Module):
    """The model behind its normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, found: LoadedModel) -> None:
        super().__init__()
        self.model = found.model
        self.register_buffer("mean", found.mean.float()[:, None, None])
        self.register_buffer("std", found.std.float()[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K] of images float32 [N, C, H, W] in 0 … 1."""
        logits: Tensor = self.model((images - self.mean) / self.std)
        return logits


def export(run: Path, out: Path, which: str | None, force: bool) -> dict[str, Any]:
    """Write the program to `out`, whose suffix says how (`KINDS`); it is read back and compared first.

    Returns:
        The checkpoint's name, the kind, the classes, and the largest difference of a logit.

    Raises:
        ConfigError: no such kind, a file that is there already, a missing package, a model that cannot be exported, or
            one that gives something else once it is exported; nothing is written then.
        DataError: the run has no checkpoint.
    """
    if out.suffix not in KINDS:
        raise ConfigError(f"--out {out}: should end with {' or '.join(KINDS)}")
    if out.exists() and not force:
        raise ConfigError(f"--out {out}: is there already; choose another, or give --force")
    missing = [name for name in _ONNX if out.suffix == ".onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"ONNX needs {', '.join(missing)}: pip install 'distrain[onnx]'")
    found = loaded_model.load(run, which)
    program = Program(found).eval()
    height, width, channels = found.image_shape
    about = {
        "classes": json.dumps(found.classes),
        "image_shape": json.dumps([channels, height, width]),
        "checkpoint": found.checkpoint,
    }
    work = out.with_name(f".{uuid.uuid4().hex}{out.suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _quiet():
            write, run_again = (_write_torch, _run_torch) if out.suffix == ".pt2" else (_write_onnx, _run_onnx)
            _told(lambda: write(program, torch.rand(2, channels, height, width), about, work), out)
            difference = _compare(program, lambda images: run_again(work, images), (channels, height, width), out)
        files.sync(work)
        os.replace(work, out)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    finally:
        work.unlink(missing_ok=True)
    return {**about, "classes": found.classes, "kind": KINDS[out.suffix], "difference": difference}


def _write_torch(program: Program, images: Tensor, about: dict[str, str], path: Path) -> None:
    exported = torch.export.export(program, (images,), dynamic_shapes=({0: torch.export.Dim("N")},))
    torch.export.save(exported, path, extra_files=dict(about))


def _run_torch(path: Path, images: Tensor) -> Tensor:
    # Not torch.load: torch.export reads weights without running what is pickled.
    logits: Tensor = torch.export.load(path).module()(images)
    return logits


def _write_onnx(program: Program, images: Tensor, about: dict[str, str], path: Path) -> None:
    import onnx

    torch.onnx.export(
        program, (images,), path, input_names=["images"], output_names=["logits"], dynamo=True, external_data=False,
        dynamic_shapes=({0: torch.export.Dim("N")},), verbose=False,
    )  # fmt: skip
    model = onnx.load(path)
    onnx.helper.set_model_props(model, about)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _compare(program: Program, again: Callable[[Tensor], Tensor], shape: tuple[int, int, int], out: Path) -> float:
    """The largest difference of a logit, over batches of several sizes."""
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for size in _TRIED:
        images = torch.rand(size, *shape, generator=generator)
        with torch.inference_mode():
            wanted = program(images)
        found = _told(lambda images=images: again(images), out)  # type: ignore[misc]
        difference = float((found - wanted).abs().max())
        scale = max(1.0, float(wanted.abs().max()))
        if found.shape != wanted.shape or not difference <= _MOST * scale:
            raise ConfigError(
                f"{out}: the exported program gives something else: a logit differs by {difference:.3g} for {size}"
                " images; the model cannot be exported in this way"
            )
        largest = max(largest, difference)
    return largest


def _told(action: Callable[[], Any], out: Path) -> Any:
    """torch's exporters raise nearly anything for a model that they do not understand."""
    try:
        return action()
    except (OSError, MemoryError):
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{out}: the model cannot be exported: {type(error).__name__}: {line}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' pages of progress and warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
