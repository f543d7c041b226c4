"""Shards: what is written is what is read, and nothing else is read."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.data import shards
from distrain.data.manifest import Dataset, Shard
from distrain.data.shards import Block
from distrain.errors import ShardError
from distrain.preparation.sources.synthetic import Synthetic

SHAPE = [4, 5, 3]
CLASSES = 10
NAME = "train/00000.tar"


def block(samples: int, seed: int = 0) -> Block:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (samples, *SHAPE), np.uint8)
    return Block(images, random.integers(0, CLASSES, samples), random.permutation(10 * samples)[:samples])


def written(root: Path, content: Block, block_samples: int = 1024) -> Shard:
    path = root / NAME
    path.parent.mkdir(exist_ok=True)
    shards.write(path, content, block_samples)
    return shards.describe(path, NAME, len(content.ids))


def crafted(root: Path, members: dict[str, bytes], samples: int) -> Shard:
    """A tar of these members with matching digests: only its content can be wrong."""
    path = root / NAME
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return shards.describe(path, NAME, samples)


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def members(samples: int = 6, **replaced: bytes | None) -> dict[str, bytes]:
    """Members of one valid block; `images`, `labels` and `ids` replace them, or None drops them."""
    content = {name: npy(array) for name, array in block(samples)._asdict().items()} | replaced
    return {f"00000000.{name}.npy": data for name, data in content.items() if data is not None}


def read(root: Path, shard: Shard, *digests: Any) -> Block:
    blocks = shards.read(root, shard, SHAPE, CLASSES, digests or ("xxh3_128", "sha256"))
    return Block(*(np.concatenate(arrays) for arrays in zip(*blocks, strict=True)))


def refused(root: Path, shard: Shard, *digests: Any) -> str:
    with pytest.raises(ShardError) as caught:
        read(root, shard, *digests)
    assert shard.name in str(caught.value)
    return str(caught.value)


def same(a: Block, b: Block) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(1, 70), block_samples=st.integers(1, 80), seed=st.integers(0, 99))
def test_what_is_written_is_read(
    samples: int, block_samples: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("shard")
    content = block(samples, seed)
    shard = written(root, content, block_samples)
    blocks = shards.read(root, shard, SHAPE, CLASSES)
    assert [len(block.ids) for block in blocks[:-1]] == [block_samples] * ((samples - 1) // block_samples)
    assert same(read(root, shard), content)


def test_same_block_gives_the_same_bytes(tmp_path: Path) -> None:
    content = block(50)
    strided = Block(
        np.asfortranarray(content.images), np.repeat(content.labels, 2)[::2], content.ids[::-1].copy()[::-1]
    )
    paths = [tmp_path / folder / "train/00000.tar" for folder in "abc"]
    for path in paths:
        path.parent.mkdir(parents=True)
    shards.write(paths[0], content, 16)
    shards.write(paths[1], strided, 16)
    shards.write(paths[2], block(50, seed=1), 16)
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again
    assert first != other


def test_a_shard_does_not_record_who_wrote_it_or_when(tmp_path: Path) -> None:
    shard = written(tmp_path, block(3))
    with tarfile.open(tmp_path / shard.name) as tar:
        for member in tar:
            assert (member.mtime, member.uname, member.gname, member.uid, member.gid) == (0, "", "", 0, 0)


# Damaged files


def member_ends(data: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [member.offset_data + -(-member.size // 512) * 512 for member in tar]


def cut_at_a_member(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: member_ends(data)[2]])  # after the first of three blocks
    (sample,) = wds.WebDataset([str(path)], shardshuffle=False)  # the reader itself sees nothing wrong
    assert "ids.npy" in sample


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes instead of"),
        (lambda path: path.write_bytes(b""), "0 bytes instead of"),
        (cut_at_a_member, "bytes instead of"),
        (lambda path: flip(path, 700), "changed since it was prepared"),
        (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    ],
    ids=["missing", "truncated", "longer", "empty", "cut", "flipped", "folder"],
)
def test_a_damaged_shard_is_named_with_the_cure(damage: Callable[[Path], Any], reason: str, tmp_path: Path) -> None:
    shard = written(tmp_path, block(30), 10)
    path = tmp_path / shard.name
    read(tmp_path, shard)
    damage(path)
    message = refused(tmp_path, shard)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert "restore the file or prepare the data set again" in message
    assert "distrain verify" in message


@pytest.mark.parametrize("digest", ["xxh3_128", "sha256"])
@settings(max_examples=40, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True))
def test_one_changed_byte_shows_in_either_digest(
    where: float, digest: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("shard")
    shard = written(root, block(5))
    flip(root / shard.name, int(where * shard.bytes))
    assert f"its {digest} differs" in refused(root, shard, digest)


@pytest.mark.parametrize(("digest", "other"), [("xxh3_128", "sha256"), ("sha256", "xxh3_128")])
def test_each_digest_is_checked_if_it_is_requested(digest: str, other: str, tmp_path: Path) -> None:
    shard = written(tmp_path, block(5))
    value = getattr(shard, digest)
    wrong = shard.model_copy(update={digest: ("1" if value[0] == "0" else "0") + value[1:]})
    assert f"its {digest} differs" in refused(tmp_path, wrong, digest)
    assert f"its {digest} differs" in refused(tmp_path, wrong, other, digest)
    assert same(read(tmp_path, wrong, other), block(5))


def test_the_faster_digest_is_checked_by_default(tmp_path: Path) -> None:
    shard = written(tmp_path, block(5))
    flip(tmp_path / shard.name, 1000)
    with pytest.raises(ShardError, match="xxh3_128"):
        shards.read(tmp_path, shard, SHAPE, CLASSES)


# Files whose digests match and whose content is wrong


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_a_crafted_block_without_errors_is_read(tmp_path: Path) -> None:
    assert same(read(tmp_path, crafted(tmp_path, members(6), 6)), block(6))


@pytest.mark.parametrize("promised", [7, 5, 0, -1, 2**31, 2**61, 10**15, 10**30])
def test_a_header_with_a_wrong_length_fails_before_memory_is_allocated(promised: int, tmp_path: Path) -> None:
    wrong_images = header((promised, *SHAPE)) + block(6).images.tobytes()
    shard = crafted(tmp_path, members(images=wrong_images), 6)
    tracemalloc.start()
    try:
        message = refused(tmp_path, shard)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert f"header says {promised * 60} bytes, but there are 360" in message
    assert "block 00000000.images.npy" in message
    assert peak < 2**20


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY\x01\x00",
        b"no npy file at all",
        npy(np.zeros(6, np.int64)).replace(b"\x93NUMPY\x01", b"\x93NUMPY\x02"),
        b"\x93NUMPY\x01\x00" + struct.pack("<H", 60000) + b" " * 60000,
        b"\x93NUMPY\x01\x00" + struct.pack("<H", 30) + b"{'descr': '<i8', 'shape': (6,".ljust(30),
        b"\x93NUMPY\x01\x00" + struct.pack("<H", 30) + b"__import__('os').getcwd()".ljust(30),
    ],
    ids=["empty", "no header", "text", "version 2", "long header", "cut header", "code"],
)
def test_a_member_that_is_no_npy_array_is_refused(data: bytes, tmp_path: Path) -> None:
    assert "not an npy array" in refused(tmp_path, crafted(tmp_path, members(labels=data), 6))


@pytest.mark.parametrize(
    ("replaced", "reason"),
    [
        ({"images": npy(np.zeros((6, 5, 4, 3), np.uint8))}, r"is uint8 [6, 5, 4, 3], expected uint8 [N, 4, 5, 3]"),
        ({"images": npy(np.zeros((6, 60), np.uint8))}, "is uint8 [6, 60]"),
        ({"images": npy(np.zeros((6, *SHAPE), np.int8))}, "is int8"),
        ({"images": npy(np.zeros((6, *SHAPE), np.float32))}, "is float32"),
        ({"images": npy(np.asfortranarray(block(6).images))}, "is uint8 [6, 4, 5, 3], expected"),
        ({"labels": npy(np.zeros(6, np.int32))}, "is int32 [6], expected int64 [N]"),
        ({"labels": npy(np.zeros(6, ">i8"))}, "is >i8 [6], expected int64 [N]"),
        ({"labels": npy(np.zeros((6, 1), np.int64))}, "is int64 [6, 1], expected int64 [N]"),
        ({"labels": npy(np.int64(3))}, "is int64 [], expected int64 [N]"),
        ({"ids": npy(np.array([None] * 6), allow_pickle=True)}, "is object [6], expected int64 [N]"),
        ({"ids": npy(np.zeros(6, np.float64))}, "is float64"),
        ({"images": None}, "has no images.npy"),
        ({"labels": None}, "has no labels.npy"),
        ({"ids": None}, "has no ids.npy"),
        ({"labels": npy(np.zeros(5, np.int64))}, "6 images, 5 labels, 6 ids"),
        ({"ids": npy(np.zeros(7, np.int64))}, "6 images, 6 labels, 7 ids"),
        ({"labels": npy(np.array([0, 1, 2, 3, 4, 10]))}, "labels 0 to 10, the data set has 10 classes"),
        ({"labels": npy(np.array([0, 1, 2, 3, 4, -1]))}, "labels -1 to 4, the data set has 10 classes"),
    ],
)
def test_wrong_content_is_named(replaced: dict[str, bytes | None], reason: str, tmp_path: Path) -> None:
    message = refused(tmp_path, crafted(tmp_path, members(**replaced), 6))
    assert reason in message
    assert "block 00000000" in message


def test_highest_and_lowest_label_are_read(tmp_path: Path) -> None:
    labels = np.array([0, 9, 0, 9, 0, 9])
    content = read(tmp_path, crafted(tmp_path, members(labels=npy(labels)), 6))
    assert content.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("promised", [5, 7])
def test_another_number_of_samples_than_the_manifest_says_is_refused(promised: int, tmp_path: Path) -> None:
    message = refused(tmp_path, crafted(tmp_path, members(6), promised))
    assert f"has 6 samples, the manifest says {promised}" in message


def test_a_cut_shard_is_refused_even_if_size_and_digests_match(tmp_path: Path) -> None:
    written(tmp_path, block(30), 10)
    cut_at_a_member(tmp_path / NAME)
    message = refused(tmp_path, shards.describe(tmp_path / NAME, NAME, 30))
    assert "has 10 samples, the manifest says 30" in message


def test_a_file_that_is_no_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.parent.mkdir()
    path.write_bytes(b"no tar" * 1000)
    assert "not a shard of blocks" in refused(tmp_path, shards.describe(path, NAME, 6))


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_beside_the_arrays_are_never_loaded(tmp_path: Path) -> None:
    proof = tmp_path / "loaded"
    data = pickle.dumps(Payload(proof))
    evil = {f"00000000.{extension}": data for extension in ("pyd", "pickle", "extra.pyd", "pth")}
    assert same(read(tmp_path, crafted(tmp_path, members(6) | evil, 6)), block(6))
    assert not proof.exists()
    pickle.loads(data)
    assert proof.exists(), "the payload does nothing, so the test proves nothing"


def test_pickles_inside_an_array_are_never_loaded(tmp_path: Path) -> None:
    proof = tmp_path / "loaded"
    data = npy(np.array([Payload(proof)] * 6, dtype=object), allow_pickle=True)
    refused(tmp_path, crafted(tmp_path, members(labels=data), 6))
    assert not proof.exists()
    np.load(io.BytesIO(data), allow_pickle=True)
    assert proof.exists(), "the payload does nothing, so the test proves nothing"


# Read by stock webdataset: from here to `stock` nothing of distrain is used.


def stock(folder: Path) -> tuple[list[np.ndarray], list[int], list[int]]:
    """Images, labels and ids of all tars of a folder."""
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    images: list[np.ndarray] = []
    labels: list[int] = []
    ids: list[int] = []
    for sample in wds.WebDataset(urls, shardshuffle=False).decode():
        images.extend(sample["images.npy"])
        labels.extend(sample["labels.npy"].tolist())
        ids.extend(sample["ids.npy"].tolist())
    return images, labels, ids


@pytest.mark.parametrize(("split", "samples"), [("train", 1003), ("test", 203)])
def test_stock_webdataset_reads_every_sample(split: str, samples: int, small: Dataset) -> None:
    source = Synthetic(1003, 203, 16, 10, 0)
    images, labels, ids = stock(small.root / split)
    assert sorted(ids) == list(range(samples))
    assert labels == source.labels[split][ids].tolist()
    for image, index in zip(images, ids, strict=True):
        assert image.dtype == np.uint8
        assert np.array_equal(image, source.load(split, index))


def test_stock_webdataset_reads_several_blocks_in_their_order(tmp_path: Path) -> None:
    content = block(25)
    written(tmp_path, content, 4)
    images, labels, ids = stock(tmp_path / "train")
    assert np.array_equal(images, content.images)
    assert labels == content.labels.tolist()
    assert ids == content.ids.tolist()
