"""Image files decoded by Pillow: 16 bits, palettes, transparency, frames."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from distrain.errors import DataError
from distrain.text import shown

_PNG_DEPTH = 24
"""Position of a PNG file's bit depth."""

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
"""Tags of TIFF."""

_PNG_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
"""Names in a PNG file that has EXIF data, which may say that the image is turned."""

_CONVERT = "convert it to 8 bits"

_FORMATS = (
    "JPEG", "PNG", "AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG2000", "PCX", "PPM", "QOI", "SGI", "SUN", "TGA",
    "TIFF", "WEBP",
)  # fmt: skip
"""Formats that are read. Of Pillow's others, EPS runs Ghostscript on the file, and some hold no pixels."""


class UnreadableError(Exception):
    """A sample cannot be read; the message says why."""


class ImageWarning(UserWarning):
    """A decision about an image; the message says which."""


class DepthWarning(ImageWarning):
    """An image has 16 bits per channel: `maximum` is its largest pixel value, in `bits` bits.

    `adjustable`: `--bit-depth` decides how it is scaled to 8 bits.
    """

    def __init__(self, maximum: int, bits: int, adjustable: bool) -> None:
        super().__init__(maximum, bits, adjustable)
        self.maximum, self.bits, self.adjustable = maximum, bits, adjustable

    def __str__(self) -> str:
        return f"has pixels of {self.bits} bits, at most {self.maximum}"


@contextlib.contextmanager
def recorded_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Record all warnings of the block instead of printing them, however often they are repeated."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield caught


def ignore_warnings() -> None:
    """Ignore warnings of image files in this process from now on, in all threads: they were reported before."""
    warnings.simplefilter("ignore", ImageWarning)
    warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Decoding:
    """The decoding of image files to pixels: options of `prepare folder`, and entries of the manifest's `source`.

    Attributes:
        background: colour behind transparent pixels, `#rrggbb`.
        bit_depth: bits of a pixel in files of 16 bits that do not state fewer themselves.
        max_pixels: an image with more pixels is refused.
    """

    background: str = "#ffffff"
    bit_depth: int = 16
    max_pixels: int = 89_478_485

    @classmethod
    def of(cls, source: Mapping[str, Any]) -> Decoding:
        """Return the decoding that a manifest's `source` records; the default for sources without image files.

        Raises:
            DataError: a value is not of its type.
        """
        values = {field.name: source[field.name] for field in fields(cls) if field.name in source}
        for name, value in values.items():
            if type(value) is not type(getattr(cls, name)):
                raise DataError(f"source.{name}: {shown(value)} in setup.json is damaged; restore the file")
        return cls(**values)


DEFAULT_DECODING = Decoding()


class _PixelLimit:
    """Pillow's limit of pixels. It is a variable of Pillow's module: threads with another limit wait for each other."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._users = 0
        self._limit = 0
        self._before: Any = None

    @contextlib.contextmanager
    def __call__(self, max_pixels: int) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._users or self._limit == max_pixels)
            if not self._users:
                self._before, self._limit = Image.MAX_IMAGE_PIXELS, max_pixels
                Image.MAX_IMAGE_PIXELS = _Strict(max_pixels)
            self._users += 1
        try:
            yield
        finally:
            with self._condition:
                self._users -= 1
                if not self._users:
                    Image.MAX_IMAGE_PIXELS = self._before
                    self._condition.notify_all()


class _Strict(int):
    """A limit whose double is itself: Pillow warns of images above its limit, and refuses those above its double."""

    def __rmul__(self, _: int) -> _Strict:
        return self


_pixel_limit = _PixelLimit()


@contextlib.contextmanager
def opened(data: bytes | memoryview, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image file whose pixels are decoded in the block. Threads may do this at the same time.

    Raises:
        UnreadableError: it is damaged or not an image, or has more pixels; or the block raised an exception.
    """
    try:
        with _pixel_limit(max_pixels), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            yield image
    except (MemoryError, UnreadableError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError("not an image of a known format") from error
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        size = f"{int(pixels[0]):,} pixels" if pixels else str(error)
        raise UnreadableError(f"has {size}, more than --max-pixels {max_pixels}") from error
    except Exception as error:  # decoders raise many types for damaged files
        raise UnreadableError(str(error) or type(error).__name__) from error


def header_size(data: bytes, decoding: Decoding) -> tuple[int, int]:
    """Return the height and width of an image file's upright image, from its header: no pixels are decoded.

    Raises:
        UnreadableError: it is not an image, its header is damaged, or it has more pixels than `decoding.max_pixels`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # decoding repeats them
        with opened(data, decoding.max_pixels) as image:
            width, height = image.size
            # Pillow turns the size of a TIFF itself. It decodes a PNG, as EXIF data may be behind the pixels.
            upright = image.format == "TIFF" or (image.format == "PNG" and not any(name in data for name in _PNG_EXIF))
            turned = not upright and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def as_png(image: Image.Image) -> bytes:
    """Return an image as the content of a PNG file, which `decode` reads like the file that the image is from."""
    if image.mode not in ("1", "L", "LA", "I;16", "I;16B", "I", "P", "RGB", "RGBA"):
        image = image.convert("RGB")
    content = io.BytesIO()
    image.save(content, "PNG", exif=image.getexif(), compress_level=1)
    return content.getvalue()


def is_jpeg(image: Image.Image) -> bool:
    """Whether an open image is a JPEG file, alone or with further images behind it (MPO)."""
    return image.format in ("JPEG", "MPO")


def decode_jpeg(image: Image.Image, channels: int, fraction: int) -> NDArray[np.uint8]:
    """Decode a JPEG file at a fraction (1, 2, 4 or 8) of its size: uint8 [H // fraction, …], not turned."""
    height, width = (max(1, length // fraction) for length in (image.height, image.width))
    image.draft(image.mode, (width, height))
    # Where it does not divide a side, the last row or column holds fewer pixels than the others.
    return _as_array(image, channels)[:height, :width]


def decode(image: Image.Image, data: bytes | memoryview, decoding: Decoding, channels: int) -> NDArray[np.uint8]:
    """Decode an open image that is no JPEG file: uint8 [H, W, C], upright.

    Raises:
        UnreadableError: it has pixels without a defined maximum.
    """
    if getattr(image, "is_animated", False):
        warnings.warn(ImageWarning("has several frames or pages; the first one is used"), stacklevel=2)
    upright = _in_8_bits(image, data, decoding)
    if upright.has_transparency_data:
        upright = _composed(upright, decoding.background)
    return _as_array(upright, channels)


def _as_array(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    pixels = np.array(image.convert("RGB" if channels == 3 else "L"))
    return pixels.reshape(image.height, image.width, channels)


def _composed(image: Image.Image, background: str) -> Image.Image:
    """Return an image with transparent pixels in front of a colour."""
    if image.mode == "La":  # Pillow converts it to LA alone
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return rgba.convert("RGB")
    warnings.warn(ImageWarning(f"has transparent pixels; they are shown on --background {background}"), stacklevel=2)
    canvas = Image.new("RGB", rgba.size, background)
    canvas.paste(rgba.convert("RGB"), mask=alpha)
    return canvas


def _in_8_bits(image: Image.Image, data: bytes | memoryview, decoding: Decoding) -> Image.Image:
    """Return an image upright and in a mode with 8 bits per channel.

    Raises:
        UnreadableError: its pixels have no defined maximum, or are above it.
    """
    is_16_bit_grey = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if is_16_bit_grey:
        return _grey_in_8_bits(image, data, decoding)
    if image.mode in ("I", "F"):
        raise UnreadableError(f"its pixels have PIL's mode {image.mode}; convert them to 8 bits")
    if "transparency" in image.info:
        image.info["transparency"] = _transparency_in_8_bits(image, data)
    has_16_bits = _has_16_bit_channels(image, data)
    upright = ImageOps.exif_transpose(image)
    if has_16_bits:
        if decoding.bit_depth < 16:
            raise UnreadableError(f"has 16 bits per colour, where --bit-depth has no effect; {_CONVERT}")
        brightest = int(np.asarray(upright.convert("RGB")).max())
        warnings.warn(DepthWarning(257 * brightest, 16, False), stacklevel=2)
    return upright


def _grey_in_8_bits(image: Image.Image, data: bytes | memoryview, decoding: Decoding) -> Image.Image:
    """Return a grey image of 16 bits upright and scaled to 8 bits: by what the file states, else by `bit_depth`.

    Never by the largest pixel: the same brightness must have the same value in all images.
    """
    # These facts are lost when the image is loaded.
    stated_bits = _stated_bits(image, data)
    tile = getattr(image, "tile", None) or [None]
    scaled_by_pillow = image.format == "PPM" and isinstance(getattr(tile[0], "args", None), tuple)  # by its maxval
    inverted = image.format == "TIFF" and _tag(image, _PHOTOMETRIC, 1) == 0  # which Pillow does for 8 bits only
    transparent = image.info.pop("transparency", None)
    pixels = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
    bits, adjustable = 16, False
    if stated_bits < 16:
        scaled = image.format == "PNG" and _is_scaled(pixels, stated_bits)
        bits = 16 if scaled else stated_bits
    elif not scaled_by_pillow:
        bits, adjustable = decoding.bit_depth, True
    largest, maximum = 2**bits - 1, int(pixels.max())
    if maximum > largest:
        cure = "use a larger --bit-depth" if adjustable else _CONVERT
        raise UnreadableError(f"has pixels up to {maximum}, above the {largest} of {bits} bits; {cure}")
    warnings.warn(DepthWarning(maximum, bits, adjustable), stacklevel=2)
    brightness = largest - pixels if inverted else pixels
    grey = Image.fromarray(((brightness * 255 + largest // 2) // largest).astype(np.uint8))
    if transparent is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8))))


def _stated_bits(image: Image.Image, data: bytes | memoryview) -> int:
    """Return the bits per pixel that a grey file of 16 bits says it uses: PNG's sBIT, TIFF's BitsPerSample; else 16."""
    if image.format == "PNG":
        significant = _png_chunk(data, b"sBIT")
        return significant[0] if len(significant) == 1 and 0 < significant[0] < 16 else 16
    if image.format == "TIFF":
        return min(16, _tag(image, _BITS_PER_SAMPLE, 16))
    return 16


def _is_scaled(pixels: NDArray[np.int64], bits: int) -> bool:
    """Whether pixels of 16 bits are samples of `bits` bits that were scaled to the full range, as PNG demands.

    Some programs write sBIT and leave the samples as they are.
    """
    samples = pixels >> (16 - bits)
    return bool((np.abs(pixels - (samples * 65535 + 2 ** (bits - 1)) // (2**bits - 1)) <= 1).all()) or bool(
        (pixels == samples << (16 - bits)).all()
    )


def _transparency_in_8_bits(image: Image.Image, data: bytes | memoryview) -> Any:
    """Return the transparent colour of an image in the range of its pixels. Pillow gives it in that of the file."""
    value = image.info["transparency"]
    if image.format != "PNG":
        return value
    depth = data[_PNG_DEPTH]
    if image.mode == "L" and depth < 8:
        return value * 255 // (2**depth - 1)
    if image.mode == "RGB" and depth == 16:
        return tuple(channel >> 8 for channel in value)
    return value


def _has_16_bit_channels(image: Image.Image, data: bytes | memoryview) -> bool:
    """Whether this is a file of several channels of 16 bits, of which Pillow reads only the higher 8."""
    if image.format == "PNG":
        return data[_PNG_DEPTH] == 16
    return image.format == "TIFF" and _tag(image, _BITS_PER_SAMPLE, 8) == 16


def _tag(image: Image.Image, number: int, default: int) -> int:
    assert isinstance(image, TiffImageFile)
    value = image.tag_v2.get(number, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _png_chunk(data: bytes | memoryview, name: bytes) -> bytes:
    """Return the content of the first chunk of this name before a PNG file's pixels; empty without one."""
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind in (name, b"IDAT"):
            return bytes(data[position + 8 : position + 8 + length]) if kind == name else b""
        position += length + 12
    return b""
