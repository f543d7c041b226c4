"""Remarks on the images of a new data set: counted, and logged with the names of the first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from warnings import WarningMessage

import numpy as np
from numpy.typing import NDArray

from distrain.data.pillow import DepthWarning
from distrain.text import counted, named

log = logging.getLogger("distrain")

Remark = str | DepthWarning
Sample = tuple[str, int]
"""Split of the source, and index."""

FLAT = "has one flat colour"
_DARK = 16
"""Images whose largest pixel is below 1/16 of the range are almost black."""


def remarks_on(image: NDArray[np.uint8], caught: Sequence[WarningMessage]) -> list[Remark]:
    """Return the remarks on an image [H, W, C], whose decoding has caused these warnings; each once."""
    messages = [warning.message for warning in caught]
    remarks: list[Remark] = [message if isinstance(message, DepthWarning) else str(message) for message in messages]
    if _is_flat(image):
        remarks.append(FLAT)
    return list(dict.fromkeys(remarks))


def _is_flat(image: NDArray[np.uint8]) -> bool:
    """Whether all pixels of an image [H, W, C] are the same."""
    return image.shape[0] * image.shape[1] > 1 and bool((image == image[:1, :1]).all())


def report(
    remarks: Mapping[Sample, Sequence[Remark]],
    name: Callable[[Sample], str],
    total: int,
    brightest: int,
    source_options: Mapping[str, Any],
) -> None:
    """Log what was remarked on `total` samples, and the options of their decoding that had no effect.

    `brightest` is the largest value of a pixel in all of them.
    """
    every = [(remark, sample) for sample, of_sample in remarks.items() for remark in of_sample]
    texts = [(remark, sample) for remark, sample in every if isinstance(remark, str) and remark != FLAT]
    lines = counted(texts, name)
    if lines:
        log.warning("%s", "\n  ".join([f"remarks on the {total:,} images:", *lines]))
    flat = [sample for remark, sample in every if remark == FLAT]
    if flat:
        cure = "; if they are transparent, choose another --background" if "background" in source_options else ""
        log.warning(
            "%s of %s images have one flat colour: %s%s", f"{len(flat):,}", f"{total:,}", named(flat, name), cure
        )
    depths = [(remark, sample) for remark, sample in every if isinstance(remark, DepthWarning)]
    for adjustable in (True, False):
        _report_dark([(depth, sample) for depth, sample in depths if depth.adjustable == adjustable], name)
    if not depths and brightest * _DARK < 2**8:
        log.warning(
            "all images are almost black: the largest pixel has the value %d of 255. Numbers such as 0 … 1 or classes"
            " were probably saved as pixels; multiply them before they are saved",
            brightest,
        )
    shown_on_background = any("--background" in text for text, _ in texts)
    if source_options.get("background", "#ffffff") != "#ffffff" and not shown_on_background:
        log.warning("--background has no effect: no image has transparent pixels")
    if source_options.get("bit_depth", 16) != 16 and not any(depth.adjustable for depth, _ in depths):
        log.warning("--bit-depth has no effect: no image has pixels of 16 bits without saying how many it uses")


def _report_dark(depths: Sequence[tuple[DepthWarning, Sample]], name: Callable[[Sample], str]) -> None:
    """Log which images of 16 bits are almost black. If all are, they probably have fewer bits."""
    dark = [(depth, sample) for depth, sample in depths if depth.maximum * _DARK < 2**depth.bits]
    if not dark:
        return
    largest = max(depth.maximum for depth, _ in dark)
    cure = ""
    if len(dark) == len(depths) and dark[0][0].adjustable:
        bits = max(1, largest.bit_length())
        cure = f"; if they have {bits} bits, use --bit-depth {bits} and another --out"
    elif len(dark) == len(depths):
        cure = "; if they have fewer bits, convert them to 8 bits"
    log.warning(
        "%s of %s images of 16 bits are almost black, below 1/%d of their range (at most %d): %s%s",
        f"{len(dark):,}",
        f"{len(depths):,}",
        _DARK,
        largest,
        named([sample for _, sample in dark], name),
        cure,
    )
