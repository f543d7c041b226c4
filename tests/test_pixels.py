"""Decoding of image files: transparency, depths, frames and sizes; each decision is in a message."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from distrain import cli
from distrain.data import images as decoding_module
from distrain.data import manifest, shards
from distrain.data.images import Decoding, UnreadableError, read_image

Capture = pytest.CaptureFixture[str]
WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(rows: np.ndarray, depth: int = 16, colour_type: int = 0, **chunks: bytes) -> bytes:
    """A PNG file of rows that are packed already, with chunks that Pillow does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    data = b"".join(b"\0" + row.tobytes() for row in rows)
    width = rows.shape[1] * (8 // depth if depth < 8 else 1)
    header = struct.pack(">IIBBBBB", width, rows.shape[0], depth, colour_type, 0, 0, 0)
    middle = b"".join(chunk(name.encode(), content) for name, content in chunks.items())
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + middle
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def tiff(pixels: np.ndarray, photometric: int) -> bytes:
    """A grey TIFF file of 16 bits in which 0 is white (photometric 0) or black (1)."""
    data = pixels.astype("<u2").tobytes()
    height, width = pixels.shape
    values = {256: width, 257: height, 258: 16, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(values)) + tags + b"\0\0\0\0"


def big_endian(*values: int) -> np.ndarray:
    return np.full((4, 4), values[0], ">u2") if len(values) == 1 else np.array([values] * 2, ">u2")


def first_pixel(data: bytes, **decoding: Any) -> tuple[int, ...]:
    """The pixel in the upper left corner, of an image that is not resized."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    with Image.open(io.BytesIO(data)) as image:
        shape = (image.height, image.width, 3)
    Image.MAX_IMAGE_PIXELS = limit
    return tuple(read_image(data, shape, Decoding(**decoding))[0, 0].tolist())


def folder(top: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(data)
    return top


def every_class(data: bytes, suffix: str = "png", each: int = 3) -> dict[str, bytes]:
    return {f"{split}/{name}/{n}.{suffix}": data for split in ("train", "test") for name in "ab" for n in range(each)}


def prepare(*arguments: Any) -> int:
    return cli.main(["prepare", "folder", *map(str, arguments)])


def pixels(out: Path) -> np.ndarray:
    dataset = manifest.read(out)
    content = dataset.manifest
    blocks = [shards.read(out, shard, content.image_shape, 2) for shard in dataset.split("train").shards]
    return np.concatenate([block.images for of_shard in blocks for block in of_shard])


ICON = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
ImageDraw.Draw(ICON).rectangle((4, 0, 7, 7), (0, 0, 0, 255))
PALETTE = Image.new("P", (4, 4), 0)
PALETTE.putpalette([200, 0, 0, 0, 200, 0])

TRANSPARENT: dict[str, bytes] = {
    "RGBA": encoded(ICON),
    "LA": encoded(ICON.convert("LA")),
    "webp": encoded(ICON, "WEBP", lossless=True),
    "tiff": encoded(ICON, "TIFF"),
    "palette": encoded(PALETTE, transparency=0),
    "palette with alpha": encoded(PALETTE, transparency=b"\x00\x80"),
    "gif": encoded(PALETTE, "GIF", transparency=0),
    "grey": encoded(Image.new("L", (4, 4), 9), transparency=9),
    "colour": encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)),
    "1 bit": png(np.zeros((4, 1), np.uint8), 1, 0, tRNS=b"\0\0"),
    "4 bits": png(np.full((4, 2), 0x55, np.uint8), 4, 0, tRNS=b"\0\5"),
    "grey of 16 bits": png(big_endian(4000), 16, tRNS=struct.pack(">H", 4000)),
    "colour of 16 bits": png(np.array([[[65535, 0, 300]]], ">u2"), 16, 2, tRNS=struct.pack(">HHH", 65535, 0, 300)),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
@pytest.mark.filterwarnings("ignore")
def test_transparent_pixels_show_the_background(kind: str) -> None:
    assert first_pixel(TRANSPARENT[kind]) == WHITE
    assert first_pixel(TRANSPARENT[kind], background="#ff0000") == RED


@pytest.mark.filterwarnings("ignore")
def test_half_transparent_pixels_are_mixed_and_opaque_ones_stay() -> None:
    half = encoded(Image.new("RGBA", (4, 4), (0, 100, 200, 51)))
    assert first_pixel(half) == (204, 224, 244)
    assert first_pixel(half, background="#000000") == (0, 20, 40)
    assert first_pixel(encoded(Image.new("RGBA", (4, 4), (0, 100, 200, 255)))) == (0, 100, 200)
    assert first_pixel(encoded(Image.new("P", (4, 4), 0), transparency=1)) == (0, 0, 0)


def test_icons_stay_visible_and_the_background_is_said_and_recorded(tmp_path: Path, capsys: Capture) -> None:
    top = folder(tmp_path / "icons", every_class(TRANSPARENT["RGBA"]))
    for background, value in (("white", 255), ("#00f", 0)):
        out = tmp_path / background
        assert prepare(top, "--image-size", 8, "--background", background, "--out", out) == 0
        assert (pixels(out)[:, :, :4, 0] == value).all()
        assert (pixels(out)[:, :, 4:] == 0).all()
    assert manifest.read(tmp_path / "#00f").manifest.source["background"] == "#0000ff"
    error = capsys.readouterr().err
    shown = f"{top}/test/a/0.png, {top}/test/a/1.png, {top}/test/a/2.png and 9 more"
    assert f"12 × has transparent pixels; they are shown on --background #0000ff: {shown}" in error
    assert prepare(top, "--background", "greenish", "--out", tmp_path / "no") == 78
    assert "--background greenish: should be a colour like white or #ffffff" in capsys.readouterr().err


DEPTHS: list[tuple[str, bytes, int, int]] = [
    ("full range", png(big_endian(90 * 257), 16), 16, 90),
    ("white", png(big_endian(65535), 16), 16, 255),
    ("12 bits", png(big_endian(4095), 16), 12, 255),
    ("12 bits, middle", png(big_endian(2048), 16), 12, 128),
    ("10 bits", png(big_endian(1023), 16), 10, 255),
    ("12 bits in TIFF", tiff(np.full((4, 4), 4095), 1), 12, 255),
    ("white is zero", tiff(np.full((4, 4), 0), 0), 16, 255),
    ("white is zero, black", tiff(np.full((4, 4), 65535), 0), 16, 0),
    ("sBIT, not scaled", png(big_endian(4095, 2048, 77), 16, sBIT=b"\x0c"), 16, 255),
    ("sBIT, scaled as PNG says", png(big_endian(0x8008, 0xFFFF), 16, sBIT=b"\x0c"), 16, 128),
    ("sBIT, shifted", png(big_endian(0x8000, 0xFFF0), 16, sBIT=b"\x0c"), 16, 128),
    ("sBIT before --bit-depth", png(big_endian(1023, 512, 7), 16, sBIT=b"\x0a"), 12, 255),
    ("maxval", b"P5 2 1 4095\n" + big_endian(4095, 100).tobytes()[:4], 16, 255),
    ("maxval before --bit-depth", b"P5 2 1 1023\n" + big_endian(1023, 100).tobytes()[:4], 12, 255),
    ("maxval of 16 bits", b"P5 2 1 65535\n" + big_endian(4095, 0).tobytes()[:4], 12, 255),
]


@pytest.mark.parametrize(("data", "bits", "expected"), [case[1:] for case in DEPTHS], ids=[case[0] for case in DEPTHS])
@pytest.mark.filterwarnings("ignore")
def test_16_bits_are_scaled_by_what_the_file_says_or_by_the_bit_depth(data: bytes, bits: int, expected: int) -> None:
    assert first_pixel(data, bit_depth=bits) == (expected,) * 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(big_endian(4096), 16), "has pixels up to 4096, above the 4095 of 12 bits; use a larger --bit-depth"),
        (png(np.array([[[4095, 0, 0]]], ">u2"), 16, 2), "16 bits per colour, where --bit-depth has no effect; convert"),
        (encoded(Image.new("I", (4, 4)), "TIFF"), "its pixels have PIL's mode I; convert them to 8 bits"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "its pixels have PIL's mode F; convert them to 8 bits"),
    ],
    ids=["above", "colour", "32 bits", "float"],
)
def test_pixels_without_a_known_maximum_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableError, match=reason):
        first_pixel(data, bit_depth=12)


@pytest.mark.parametrize(
    ("data", "cure"),
    [
        (png(big_endian(2500, 3000)), "; if they have 12 bits, use --bit-depth 12 and another --out\n"),
        (
            png(np.array([[[3000, 0, 77], [9, 9, 9]]], ">u2"), 16, 2),
            "; if they have fewer bits, convert them to 8 bits\n",
        ),
    ],
    ids=["grey", "colour"],
)
def test_a_message_names_images_that_use_little_of_their_16_bits(
    data: bytes, cure: str, tmp_path: Path, capsys: Capture
) -> None:
    top = folder(tmp_path / "scans", every_class(data))
    assert prepare(top, "--out", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert "12 of 12 images of 16 bits are almost black, below 1/16 of their range (at most " in error
    assert f"{top}/test/a/0.png, {top}/test/a/1.png, {top}/test/a/2.png and 9 more{cure}" in error
    if "--bit-depth" in cure:
        assert prepare(top, "--bit-depth", 12, "--out", tmp_path / "good") == 0
        assert "almost black" not in capsys.readouterr().err
        assert pixels(tmp_path / "good").max() == 187
        (top / "train/a/bright.png").write_bytes(png(big_endian(65535, 0)))
        assert prepare(top, "--out", tmp_path / "mixed") == 0
        error = capsys.readouterr().err
        assert "12 of 13 images of 16 bits are almost black" in error
        assert "--bit-depth" not in error


def test_messages_name_images_of_one_colour_and_options_without_effect(tmp_path: Path, capsys: Capture) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    top = folder(tmp_path / "photos", every_class(encoded(Image.fromarray(noise))))
    (top / "train/b/1.png").write_bytes(encoded(Image.new("RGB", (9, 9), BLUE)))
    assert prepare(top, "--out", tmp_path / "out", "--bit-depth", 12, "--background", "black") == 0
    error = capsys.readouterr().err
    assert f"warning: 1 of 12 images have one flat colour: {top}/train/b/1.png; if they are transparent" in error
    assert "--background has no effect: no image has transparent pixels" in error
    assert "--bit-depth has no effect: no image has pixels of 16 bits" in error


@pytest.mark.parametrize(("brightest", "said"), [(1, True), (15, True), (16, False)])
def test_a_message_says_that_no_pixel_of_the_set_is_bright(
    brightest: int, said: bool, tmp_path: Path, capsys: Capture
) -> None:
    numbers = np.arange(64, dtype=np.uint8).reshape(8, 8) % (brightest + 1)
    top = folder(tmp_path / "photos", every_class(encoded(Image.fromarray(numbers))))
    assert prepare(top, "--image-size", 8, "--out", tmp_path / "out") == 0
    message = f"all images are almost black: the largest pixel has the value {brightest} of 255"
    assert (message in capsys.readouterr().err) == said


def test_warnings_of_the_decoder_are_counted_with_names_not_printed(tmp_path: Path, capfd: Any) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\xff\xff\0\0\0\x10\0\0\0\0\0\0"  # a tag beyond the end
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    frames = [noise, noise.rotate(90)]
    top = folder(tmp_path / "photos", every_class(encoded(noise, "JPEG", exif=exif), "jpg"))
    (top / "train/a/moving.gif").write_bytes(encoded(noise, "GIF", save_all=True, append_images=frames))
    (top / "train/a/pages.tif").write_bytes(encoded(noise, "TIFF", save_all=True, append_images=frames))
    assert prepare(top, "--out", tmp_path / "out") == 0
    error = capfd.readouterr().err
    assert "warning: remarks on the 14 images:\n  12 × " in error
    assert f": {top}/test/a/0.jpg, {top}/test/a/1.jpg, {top}/test/a/2.jpg and 9 more\n" in error
    named = f"{top}/train/a/moving.gif, {top}/train/a/pages.tif"
    assert f"2 × has several frames or pages; the first one is used: {named}\n" in error
    assert "UserWarning" not in error
    assert "warnings.warn" not in error


def test_the_limit_of_pixels_can_be_raised_and_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    large = encoded(Image.new("1", (10_000, 9_000)))
    with pytest.raises(UnreadableError, match="has 90,000,000 pixels, more than --max-pixels 89478485"):
        read_image(large, (4, 4, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own
    assert first_pixel(encoded(Image.new("L", (24, 24))), max_pixels=576) == (0, 0, 0)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(UnreadableError, match="has 576 pixels, more than --max-pixels 575"):
        first_pixel(encoded(Image.new("L", (24, 24))), max_pixels=575)


def photo(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (height // 100, width // 100, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", [(1600, 1200), (1203, 1601)])
def test_large_photos_are_decoded_at_a_fraction_of_their_size_upright_and_alike(
    size: tuple[int, int], orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(*size), "JPEG", quality=95, exif=exif)
    fast = read_image(data, (32, 32, 3))
    assert (fast == read_image(data, (32, 32, 3))).all()
    monkeypatch.setattr(decoding_module, "_DRAFT", 10**6)
    whole = read_image(data, (32, 32, 3)).astype(int)
    assert np.abs(fast - whole).max() <= 8
    assert np.abs(fast - whole).mean() <= 1.5
    assert np.abs(np.rot90(fast) - whole).mean() > 10, "the picture looks the same when it is turned"


def test_decoding_a_large_photo_is_much_cheaper_than_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(3000, 2000), "JPEG", quality=90)

    def seconds() -> float:
        start = time.perf_counter()
        read_image(data, (64, 64, 3))
        return time.perf_counter() - start

    fast = min(seconds() for _ in range(3))
    monkeypatch.setattr(decoding_module, "_DRAFT", 10**6)
    assert min(seconds() for _ in range(3)) > 1.5 * fast  # measured: 4 to 5 times


def test_a_file_that_another_program_would_interpret_is_not_read() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(postscript)).format == "EPS"
    with pytest.raises(UnreadableError, match="not an image of a known format"):
        read_image(postscript, (8, 8, 3))
