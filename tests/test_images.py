"""The decoder and the resizer: pixels equal to Pillow's and torchvision's, in several threads; damaged files."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import v2

from distrain.data import images, pillow
from distrain.data.images import Box, UnreadableError, decode, read_image, resize, resize_and_crop
from distrain.data.pillow import Decoding

REPO = Path(__file__).parent.parent
ORIENTATION = 0x0112


def picture(width: int, height: int, seed: int = 0, amplitude: int = 20) -> Image.Image:
    """Smooth colours with noise: no part is equal to another."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8)).resize((width, height))
    noise = random.integers(-amplitude, amplitude + 1, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def by_pillow(data: bytes, channels: int = 3) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image.convert("RGB" if channels == 3 else "L"))
    return np.asarray(upright).reshape(upright.height, upright.width, channels)


def with_sampling(data: bytes, factors: int) -> bytes:
    """Replace the sampling factors of the first component, 0x22 for 4:2:0."""
    frame = data.index(b"\xff\xc0")
    return data[: frame + 11] + bytes([factors]) + data[frame + 12 :]


SQUARE = picture(64, 64)
XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
FILES = {
    "CMYK": encoded(picture(61, 47).convert("CMYK")),
    "CMYK, noise": encoded(Image.frombytes("CMYK", (40, 30), np.random.default_rng(0).bytes(4800))),
    "RGB, not YCbCr": encoded(picture(61, 47), keep_rgb=True),
    "restart markers": encoded(picture(61, 47), restart_marker_blocks=3),
    "4:4:0": with_sampling(encoded(SQUARE, subsampling="4:2:2"), 0x12),
    "4:1:1": with_sampling(encoded(SQUARE, subsampling="4:2:0"), 0x41),
    "comment": encoded(picture(61, 47), comment=b"\xff\xd9 \xff\xda"),
    "a thumbnail in EXIF": encoded(picture(61, 47), exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + encoded(SQUARE)),
    "damaged EXIF": encoded(picture(61, 47), exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "orientation in XMP": encoded(picture(61, 47), xmp=XMP.split(b"\0")[1]),
    "two images": encoded(picture(61, 47), "MPO", save_all=True, append_images=[picture(61, 47, 1)]),
    "bytes behind its end": encoded(picture(61, 47)) + b"\xff\xd8 more",
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore")
def test_jpeg_files_of_all_kinds_have_the_pixels_of_pillow(name: str, channels: int) -> None:
    data = FILES[name]
    expected = by_pillow(data, channels)
    for given_data in (data, memoryview(data)):
        pixels = decode(given_data, channels=channels)
        assert pixels.is_contiguous()
        assert np.array_equal(pixels.numpy(), expected)
    if name == "orientation in XMP":
        assert expected.shape[:2] == (61, 47)


@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 200)),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    progressive=st.booleans(),
    quality=st.integers(1, 100),
    orientation=st.integers(0, 9),
    grey=st.booleans(),
    channels=st.sampled_from([1, 3]),
)
@settings(max_examples=60, deadline=None)
def test_a_jpeg_file_has_the_pixels_of_pillow(
    size: tuple[int, int],
    subsampling: str,
    progressive: bool,
    quality: int,
    orientation: int,
    grey: bool,
    channels: int,
) -> None:
    image = picture(*size).convert("L" if grey else "RGB")
    data = encoded(image, quality=quality, subsampling=subsampling, progressive=progressive, exif=turned(orientation))
    assert np.array_equal(decode(data, channels=channels).numpy(), by_pillow(data, channels))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fraction", [2, 4, 8])
def test_a_jpeg_file_decoded_at_a_fraction_is_upright_and_of_its_size(fraction: int, orientation: int) -> None:
    data = encoded(picture(336, 208, amplitude=0), exif=turned(orientation), quality=95, subsampling="4:4:4")
    small = decode(data, fraction=fraction)
    whole = Image.fromarray(by_pillow(data))
    expected = np.asarray(whole.reduce(fraction)).astype(int)
    assert np.abs(small.numpy() - expected).max() <= 3
    assert np.abs(small.flip(0, 1).numpy() - expected).mean() > 20, "the picture looks the same when it is turned"
    odd = decode(encoded(picture(331, 203), exif=turned(orientation)), fraction=fraction)
    assert sorted(odd.shape) == [3, 203 // fraction, 331 // fraction]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}], ids=str)
def test_a_jpeg_file_cut_anywhere_is_unreadable(options: dict[str, Any]) -> None:
    data = encoded(picture(48, 40), quality=60, **options)
    assert decode(data).shape == (40, 48, 3)
    for length in range(len(data)):
        with pytest.raises(UnreadableError):
            decode(data[:length])


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_jpeg_file_is_unreadable_or_has_the_pixels_of_pillow() -> None:
    random = np.random.default_rng(0)
    outcomes = {"pixels": 0, "unreadable": 0}
    for progressive in (False, True):
        data = encoded(picture(48, 40), quality=60, progressive=progressive)
        for _ in range(500):
            damaged = bytearray(data)
            for position in random.integers(2, len(data), random.integers(1, 4)):
                damaged[position] = random.integers(256)
            try:
                pixels = decode(bytes(damaged), Decoding(max_pixels=10**5))
            except UnreadableError:
                outcomes["unreadable"] += 1
            else:
                outcomes["pixels"] += 1
                assert np.array_equal(pixels.numpy(), by_pillow(bytes(damaged)))
    assert min(outcomes.values()) > 100, outcomes


def test_warnings_of_images_can_be_ignored() -> None:
    transparent = encoded(Image.new("RGBA", (4, 4)), "PNG")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(transparent)
        decode(FILES["damaged EXIF"])
        assert len(caught) == 2
        pillow.ignore_warnings()
        decode(transparent)
        decode(FILES["damaged EXIF"])
        assert len(caught) == 2


def test_the_message_of_a_damaged_file_names_no_file_of_the_library() -> None:
    with pytest.raises(UnreadableError, match="^a damaged JPEG file: Image is incomplete or truncated$"):
        decode(encoded(picture(48, 40))[:-2])


def test_threads_with_different_limits_of_pixels_decode_the_same_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 77)  # Pillow's own
    files = [encoded(picture(60 + n, 50, n), kind) for n in range(6) for kind in ("JPEG", "PNG", "GIF")]
    expected = [decode(data) for data in files]
    start = threading.Barrier(6)

    def work(number: int) -> None:
        limit = 60 * 50 - number
        start.wait()
        for _ in range(30):
            for data, pixels in zip(files, expected, strict=True):
                if number < 4:
                    assert torch.equal(decode(data), pixels)
                else:
                    with pytest.raises(UnreadableError, match=f"more than --max-pixels {limit}"):
                        decode(data, Decoding(max_pixels=limit))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert Image.MAX_IMAGE_PIXELS == 77


BOXES = st.tuples(st.integers(1, 90), st.integers(1, 70)).flatmap(
    lambda size: st.tuples(
        st.just(size), st.integers(0, size[0] - 1), st.integers(0, size[1] - 1), st.integers(1, 90), st.integers(1, 90)
    ).map(
        lambda drawn: (
            drawn[0],
            Box(drawn[1], drawn[2], min(drawn[3], drawn[0][0] - drawn[1]), min(drawn[4], drawn[0][1] - drawn[2])),
        )
    )
)


def noise(height: int, width: int, channels: int) -> torch.Tensor:
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), np.uint8)
    return torch.from_numpy(pixels)


@given(BOXES, st.tuples(st.integers(1, 80), st.integers(1, 80)), st.sampled_from([1, 3]))
@settings(max_examples=150, deadline=None)
def test_resize_is_torchvisions_resized_crop(
    image_and_box: tuple[tuple[int, int], Box], size: tuple[int, int], channels: int
) -> None:
    (height, width), box = image_and_box
    pixels = noise(height, width, channels)
    expected = v2.functional.resized_crop(pixels.permute(2, 0, 1), *box, list(size), antialias=True).permute(1, 2, 0)
    alone = resize(pixels, box, size)
    assert torch.equal(alone, expected)
    assert alone.is_contiguous()
    batch = torch.full((3, *size, channels), 7, dtype=torch.uint8)
    assert resize(pixels, box, size, batch[1]).data_ptr() == batch[1].data_ptr()
    assert torch.equal(batch[1], expected)
    assert (batch[[0, 2]] == 7).all()


@pytest.mark.parametrize("long_axis", [0, 1])
def test_of_a_very_long_image_only_the_centre_is_resized(long_axis: int) -> None:
    pixels = torch.zeros(2_000_000, 1, 3, dtype=torch.uint8)
    pixels[1_000_000:] = 255
    # Resized as a whole, the image would need 393 GB.
    result = resize_and_crop(pixels.movedim(0, long_axis).contiguous(), 256, (224, 224))
    lines = result.movedim(long_axis, 0)
    assert (lines == lines[:, :1]).all()
    assert lines[0].max() < lines[112].min() < lines[-1].min()


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.data(), st.sampled_from([1, 3]))
@settings(max_examples=100, deadline=None)
def test_resize_and_crop_is_torchvisions_resize_and_center_crop(
    height: int, width: int, shorter: int, data: st.DataObject, channels: int
) -> None:
    size = data.draw(st.tuples(st.integers(1, shorter), st.integers(1, shorter)))
    pixels = noise(height, width, channels)
    transform = v2.Compose([v2.Resize(shorter, antialias=True), v2.CenterCrop(size)])
    expected = transform(pixels.permute(2, 0, 1)).permute(1, 2, 0)
    assert torch.equal(resize_and_crop(pixels, shorter, size), expected)
    out = torch.empty(2, *size, channels, dtype=torch.uint8)
    assert torch.equal(resize_and_crop(pixels, shorter, size, out[1]), expected)
    assert torch.equal(out[1], expected)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("shape", [(32, 32, 3), (24, 40, 1), (120, 80, 3)], ids=str)
def test_a_prepared_image_is_cropped_and_resized_as_by_torchvision_and_almost_as_by_pillow(
    shape: tuple[int, int, int], kind: str, orientation: int
) -> None:
    data = encoded(picture(103, 80), kind, exif=turned(orientation))
    height, width, channels = shape
    pixels = read_image(data, shape)
    assert pixels.shape == shape
    whole = Image.fromarray(by_pillow(data, channels).squeeze())
    box = images.centred_box(whole.height, whole.width, (height, width))
    assert min(whole.height - box.height, whole.width - box.width) == 0
    assert abs(box.height / box.width - height / width) < 0.02
    tensor = torch.from_numpy(np.array(whole).reshape(whole.height, whole.width, channels)).permute(2, 0, 1)
    by_torchvision = v2.functional.center_crop(tensor, [box.height, box.width])
    by_torchvision = v2.functional.resize(by_torchvision, [height, width], antialias=True)
    assert np.array_equal(pixels, by_torchvision.permute(1, 2, 0))
    part = whole.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    expected = np.asarray(part.resize((width, height), Image.Resampling.BILINEAR)).reshape(shape)
    assert np.abs(pixels.astype(int) - expected).max() <= 1


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from distrain.data import images
data = Path(sys.argv[1]).read_bytes()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20,) * 2)
try:
    images.decode(data)
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_a_lack_of_memory_is_no_fault_of_the_file(tmp_path: Path) -> None:
    # Not in this process: memory that earlier tests have freed would be used before the limit counts.
    (tmp_path / "large.jpg").write_bytes(encoded(Image.new("RGB", (6000, 5000))))
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, tmp_path / "large.jpg"],
        env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "MemoryError\n", done.stderr


def test_a_lack_of_memory_while_an_image_is_turned_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(images, "_upright", fails)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        decode(encoded(picture(40, 30), exif=turned(6)))


FORK = """
import sys, torch
from distrain.data import images
from distrain.preparation import pool
torch.set_num_threads(2)
torch.rand(2000, 2000).exp().sum()  # OpenMP's threads are started

def work(data, task, report):
    return images.read_image(data, (224, 224, 3)).shape

print(list(pool.run(work, open(sys.argv[1], "rb").read(), [0, 1, 2], 2)))
"""


def test_worker_processes_decode_though_their_parent_has_used_openmp(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(encoded(picture(500, 400), "PNG"))
    (tmp_path / "fork.py").write_text(FORK)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(REPO)
    done = subprocess.run(
        [sys.executable, tmp_path / "fork.py", tmp_path / "0.png"],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == f"{[(224, 224, 3)] * 3}\n", done.stderr


def test_the_version_names_the_libraries_without_their_builds() -> None:
    version = images.decoder_version()
    assert version.startswith(
        f"torchvision {torchvision.__version__.split('+')[0]}, torch {torch.__version__.split('+')[0]}, Pillow "
    )
