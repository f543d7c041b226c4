"""The decoder and the resizer of image files: for data sets, training and predictions.

JPEG files are decoded by torchvision, all others by Pillow, which also reads the header of every file. For a JPEG file
both give the same pixels; torchvision is faster. Images are resized by torch, as in torchvision's transforms.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags
from torch import Tensor

from distrain.data import crops, pillow
from distrain.data.pillow import DEFAULT_DECODING, Decoding, UnreadableError
from distrain.errors import ConfigError

__all__ = [
    "Box", "Decoding", "UnreadableError", "centred_box", "decode", "decoder_version", "evaluation_size", "read_image",
    "resize", "resize_and_crop",
]  # fmt: skip

_GREY, _RGB = 1, 3
"""Values of torchvision's `ImageReadMode`."""

_DRAFT = 2
"""A JPEG file is decoded at 1/2, 1/4 or 1/8 of its size if that leaves this multiple of the target, as in Pillow."""

_LONGEST = 100
"""Largest ratio of the two sides of an image that is resized as a whole; of others, only the centre is.

Nothing else of it can be in the crop, and whole it would need memory without limit: 3 GB for 20,000 × 1 pixels.
"""

_MODES = {("RGB", 3): _RGB, ("L", 3): _RGB, ("L", 1): _GREY}
"""Pillow's mode of a JPEG file, and the number of channels, for which torchvision decodes to Pillow's pixels.

For files in CMYK, and for the grey of a colour image, the two may differ.
"""

_TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (1,)), 3: (False, (0, 1)), 4: (False, (0,)),
    5: (True, ()), 6: (True, (1,)), 7: (True, (0, 1)), 8: (True, (0,)),
}  # fmt: skip
"""Turns by orientation of EXIF: whether rows and columns are exchanged, and which axes are reversed then."""


def _jpeg_decoder() -> Callable[[Tensor, int, bool], Tensor]:
    """Return torchvision's decoder of JPEG files, from its library of image files.

    `import torchvision.io` loads the same library, but with the whole package it takes two seconds and 160 MiB.
    """
    package = importlib.util.find_spec("torchvision")
    folders = package.submodule_search_locations if package is not None else None
    try:
        for library in (path for folder in folders or () for path in sorted(Path(folder).glob("image*.so"))):
            torch.ops.load_library(library)
        decoder: Callable[[Tensor, int, bool], Tensor] = torch.ops.image.decode_jpeg
    except (AttributeError, OSError) as error:
        raise ConfigError(
            f"torchvision {version('torchvision')} decodes no JPEG files; install another version, such as 0.29"
        ) from error
    return decoder


_decode_jpeg_file = _jpeg_decoder()


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def decode(
    data: bytes | memoryview, decoding: Decoding = DEFAULT_DECODING, channels: int = 3, fraction: int = 1
) -> Tensor:
    """Decode an image file: uint8 [H, W, C], upright. Several threads may call this at the same time.

    What is decided about the image (its transparency, its frames) is a `warnings.warn`, like Pillow's own;
    `pillow.ignore_warnings` silences them.

    Args:
        data: content of the file.
        decoding: options.
        channels: C: 3, or 1 for grey.
        fraction: 1, 2, 4 or 8: a JPEG file is decoded at this fraction of its size; other files are decoded in full.

    Raises:
        UnreadableError: it is damaged or not an image, has more pixels than `decoding.max_pixels`, or has pixels
            without a defined maximum.
    """
    return _decode(data, decoding, channels, lambda height, width: fraction)


def resize(pixels: Tensor, box: Box, size: tuple[int, int], out: Tensor | None = None) -> Tensor:
    """Return uint8 [h, w, C]: the box of the image, resized (bilinear, antialiased); a plain crop if sizes are equal.

    Args:
        pixels: uint8 [H, W, C].
        box: a part of the image.
        size: h and w.
        out: uint8 [h, w, C], contiguous: the pixels are written here, which is faster than a copy, and it is returned.
    """
    if out is None:
        out = torch.empty(*size, pixels.shape[2], dtype=torch.uint8, device=pixels.device)
    top, left, height, width = box
    part = pixels[top : top + height, left : left + width]
    if (height, width) == tuple(size):
        return out.copy_(part)
    if pixels.device.type != "cpu":  # no kernel of a GPU takes uint8
        resized = F.interpolate(_planes(part).float(), list(size), mode="bilinear", antialias=True)
        return out.copy_(resized[0].permute(1, 2, 0).round_().clamp_(0, 255))
    # `torch.nn.functional.interpolate` without `out`, whose result is in planes and would have to be copied.
    torch.ops.aten._upsample_bilinear2d_aa.out(_planes(part), list(size), False, out=_planes(out))
    return out


def is_plain_jpeg(data: bytes | memoryview, decoding: Decoding = DEFAULT_DECODING) -> bool:
    """Whether a file is a JPEG image in colour or grey, upright, and not larger than allowed."""
    try:
        with pillow.opened(data, decoding.max_pixels) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in _TURNS
            return pillow.is_jpeg(image) and (image.mode, 3) in _MODES and not turned
    except UnreadableError:
        return False


def evaluation_size(height: int, width: int, resize: int) -> tuple[int, int]:
    """Return height and width whose shorter side is `resize`, as torchvision's `Resize(resize)` computes them."""
    longer = int(resize * max(height, width) / min(height, width))
    return (resize, longer) if height <= width else (longer, resize)


def resize_and_crop(pixels: Tensor, shorter: int, size: tuple[int, int], out: Tensor | None = None) -> Tensor:
    """Return uint8 [h, w, C]: the image as by torchvision's `Resize(shorter, antialias=True)` and `CenterCrop(size)`.

    If one side is more than 100 times as long as the other, only the centre of the image is resized.

    Args:
        pixels: uint8 [H, W, C].
        shorter: length of the shorter side after resizing: at least h and w.
        size: h and w.
        out: as for `resize`.
    """
    height, width = (min(length, _LONGEST * min(pixels.shape[:2])) for length in pixels.shape[:2])
    middle = Box((pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2, height, width)
    resized = evaluation_size(height, width, shorter)
    top, left = (round((length - target) / 2) for length, target in zip(resized, size, strict=True))
    return resize(resize(pixels, middle, resized), Box(top, left, *size), size, out)


def read_image(
    data: bytes | memoryview,
    image_shape: tuple[int, int, int],
    decoding: Decoding = DEFAULT_DECODING,
) -> NDArray[np.uint8]:
    """Decode an image file to uint8 [H, W, C], C = 1 or 3: its largest centred part with this aspect ratio, resized.

    Large JPEG files are decoded at a fraction of their size, which is faster and differs a little.

    Raises:
        UnreadableError: as `decode`.
    """
    height, width, channels = image_shape

    def fraction(image_height: int, image_width: int) -> int:
        multiple = min(image_height, image_width) / (_DRAFT * max(height, width))
        return next((fraction for fraction in (8, 4, 2) if fraction <= multiple), 1)

    pixels = _decode(data, decoding, channels, fraction)
    box = centred_box(pixels.shape[0], pixels.shape[1], (height, width))
    return resize(pixels, box, (height, width)).numpy()


def centred_box(height: int, width: int, size: tuple[int, int]) -> Box:
    """Return the largest box in the centre of an image that has the aspect ratio of `size`."""
    return Box(*crops.covering_boxes(np.array([[height, width]]), *size)[0].tolist())


def decoder_version() -> str:
    """Return the versions of what decides the pixels of decoded and resized images."""
    versions = {"torchvision": version("torchvision"), "torch": torch.__version__, "Pillow": PIL.__version__}
    return ", ".join(f"{name} {version.split('+')[0]}" for name, version in versions.items())


def _decode(data: bytes | memoryview, decoding: Decoding, channels: int, fraction: Callable[[int, int], int]) -> Tensor:
    """Decode an image file. `fraction` returns that of a JPEG file of this height and width."""
    with pillow.opened(data, decoding.max_pixels) as image:
        if not pillow.is_jpeg(image):
            return torch.from_numpy(pillow.decode(image, data, decoding, channels))
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        divisor = fraction(image.height, image.width)
        mode = _MODES.get((image.mode, channels))
        if divisor > 1 or mode is None:
            pixels = torch.from_numpy(pillow.decode_jpeg(image, channels, divisor))
        else:
            pixels = _decode_whole_jpeg(data, mode)
    return _upright(pixels, orientation)  # not above: a lack of memory here is no fault of the file


def _decode_whole_jpeg(data: bytes | memoryview, mode: int) -> Tensor:
    """Decode a JPEG file by torchvision: uint8 [H, W, C], not turned."""
    file = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # of bytes without a copy, torch warns
    try:
        planes: Tensor = _decode_jpeg_file(file, mode, False)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        if "can't allocate memory" in message:
            raise MemoryError(message) from error
        # Such as "decode_jpeg, …/decode_jpeg.cpp:171, Image is incomplete or truncated".
        raise UnreadableError(f"a damaged JPEG file: {message.split(', ')[-1]}") from error
    return planes.permute(1, 2, 0)


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Turn an image [H, W, C] of this orientation of EXIF."""
    exchanged, reversed_axes = _TURNS.get(orientation, (False, ()))
    if exchanged:
        pixels = pixels.transpose(0, 1)
    return pixels.flip(reversed_axes).contiguous() if exchanged or reversed_axes else pixels


def _planes(pixels: Tensor) -> Tensor:
    """View an image [h, w, C] as a batch [1, C, h, w]."""
    return pixels.permute(2, 0, 1)[None]
