"""Image files, decoded to the pixels that are stored and predicted."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from distrain.data.sources import UnreadableError


def read_image(data: bytes, image_shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Decode an image file to uint8 [H, W, C], C = 1 or 3; resize it so that it covers H×W and crop it to the centre.

    Raises:
        UnreadableError: it is damaged or not an image, has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, or has pixels
            without a defined maximum.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                return _resize(image, *image_shape)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError("not an image of a known format") from error
    except Exception as error:  # PIL's decoders raise many types for damaged files
        raise UnreadableError(str(error)) from error


def _resize(image: Image.Image, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # PIL would clip these pixels to 0 … 255
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.mode in ("I", "F"):
        raise ValueError(f"its pixels have PIL's mode {upright.mode}; convert them to 8 bits")
    upright = upright.convert("RGB" if channels == 3 else "L")
    if upright.size != (width, height):
        upright = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(upright).reshape(height, width, channels)
