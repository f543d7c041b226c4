"""`manifest.json`: the description of a data set, with digests of its files.

It is written last, so a folder without it is not a data set. There are two formats: blocks of images of one size, which
`distrain prepare` has written (`Manifest`), and an index of tar files that hold encoded images (`IndexManifest`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distrain import files
from distrain.config import Data
from distrain.data.fetch import FetchError, FetchOptions, Remote, locate
from distrain.errors import ConfigError, DataError
from distrain.text import printable, shown

NAME = "manifest.json"
_MAX_BYTES = 2**28
"""Maximum size of a manifest: a million shards."""
VERSION = 1
TARS = "tars.json"
"""File beside an index's manifest: {"location": folder or address of its tar files}. It is not part of the data set:
the tar files may be moved."""
SplitName = Literal["train", "val", "test"]
IMAGES, LABELS, IDS = "images.npy", "labels.npy", "ids.npy"
"""Names of a block's arrays: uint8 [N, H, W, C], int64 [N], and int64 [N] (index in the source's split)."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Shard(_Record):
    """One tar file. Its name is a path in the data set's folder, which the pattern cannot leave."""

    name: Annotated[str, Field(pattern=r"^[a-z]+/[0-9]{5,}\.tar$")]
    samples: Annotated[int, Field(ge=1)]
    bytes: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    xxh3_128: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Split(_Record):
    """The shards of train, val or test. Sizes differ by at most one sample; the number is a multiple of `lanes`."""

    samples: int
    lanes: Annotated[int, Field(ge=1)]
    shards: Annotated[list[Shard], Field(min_length=1)]

    @model_validator(mode="after")
    def _adds_up(self) -> Split:
        sizes = [shard.samples for shard in self.shards]
        if sum(sizes) != self.samples:
            raise ValueError(f"{self.samples} samples, but the shards have {sum(sizes)}")
        if len(sizes) % self.lanes:
            raise ValueError(f"{self.lanes} lanes do not divide {len(sizes)} shards")
        if max(sizes) - min(sizes) > 1:
            raise ValueError("shard sizes differ by more than one sample")
        if len({shard.name for shard in self.shards}) != len(sizes):
            raise ValueError("a shard is named twice")
        return self

    @functools.cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Number of samples of each shard: int64 [S]."""
        return np.array([shard.samples for shard in self.shards], np.int64)


class File(_Record):
    """A file beside the manifest."""

    name: Annotated[str, Field(pattern=r"^[a-z]+\.npy$")]
    bytes: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Tar(_Record):
    """A tar file of an index. Its name is a path below the location of the tar files, which it cannot leave.

    `samples` is the number of its samples in the split.
    """

    name: Annotated[str, Field(min_length=1, max_length=4095)]
    bytes: Annotated[int, Field(ge=1)]
    samples: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @model_validator(mode="after")
    def _is_below(self) -> Tar:
        if "\0" in self.name or any(part in ("", ".", "..") for part in self.name.split("/")):
            raise ValueError("a tar file's name is not a path below their location")
        return self


class IndexSplit(_Record):
    """The samples of train, val or test in tar files, in the order of the tar files.

    They are cut into `shards` virtual shards: consecutive samples, whose numbers differ by one at most. `bytes` is the
    size of all encoded images.
    """

    samples: Annotated[int, Field(ge=1)]
    bytes: Annotated[int, Field(ge=1)]
    lanes: Annotated[int, Field(ge=1)]
    shards: Annotated[int, Field(ge=1)]
    index: File
    tars: Annotated[list[Tar], Field(min_length=1)]

    @model_validator(mode="after")
    def _adds_up(self) -> IndexSplit:
        if sum(tar.samples for tar in self.tars) != self.samples:
            raise ValueError(f"{self.samples} samples, but the tar files have {sum(tar.samples for tar in self.tars)}")
        if self.shards % self.lanes:
            raise ValueError(f"{self.lanes} lanes do not divide {self.shards} shards")
        if self.shards > self.samples:
            raise ValueError(f"{self.shards} shards for {self.samples} samples")
        if len({tar.name for tar in self.tars}) != len(self.tars):
            raise ValueError("a tar file is named twice")
        return self

    @functools.cached_property
    def tar_ends(self) -> NDArray[np.int64]:
        """Number of samples in each tar file and those before it: int64 [T]."""
        return np.cumsum([tar.samples for tar in self.tars], dtype=np.int64)

    @functools.cached_property
    def starts(self) -> NDArray[np.int64]:
        """First sample of each virtual shard, and the number of samples: int64 [S + 1]."""
        return np.arange(self.shards + 1) * self.samples // self.shards

    @functools.cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Number of samples of each virtual shard: int64 [S]."""
        return np.diff(self.starts)


class _Description(_Record):
    """Entries of `manifest.json` in both formats.

    `mean` and `std` are those of the train split, per channel, with images in 0 … 1. A std of 0 is recorded as 1.
    """

    version: Literal[1]
    source: dict[str, Any]
    classes: Annotated[list[str], Field(min_length=1)]
    mean: list[float]
    std: list[float]

    @model_validator(mode="after")
    def _is_possible(self) -> _Description:
        if not all(0 < value < math.inf for value in self.std) or not all(map(math.isfinite, self.mean)):
            raise ValueError("means and stds must be finite, stds above 0")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("a class is named twice")
        return self


ImageShape = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]


class IndexManifest(_Description):
    """An index of tar files that hold encoded images.

    Attributes:
        image_shape: [H, W, 3] if all images have one size; else null.
        smallest: smallest height and smallest width of an image, upright.
        largest: largest height and largest width.
        normalization: where mean and std are from: text.
    """

    format: Literal["distrain-index"]
    image_shape: ImageShape | None
    smallest: Annotated[list[int], Field(min_length=2, max_length=2)]
    largest: Annotated[list[int], Field(min_length=2, max_length=2)]
    normalization: str
    splits: Annotated[dict[SplitName, IndexSplit], Field(min_length=1)]

    @model_validator(mode="after")
    def _has_three_channels(self) -> IndexManifest:
        if not len(self.mean) == len(self.std) == 3 or (self.image_shape or [0, 0, 3])[2] != 3:
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} stds for 3 channels")
        return self


class Manifest(_Description):
    """A data set of blocks of images, which have one size."""

    format: Literal["distrain-blocks"]
    image_shape: ImageShape
    splits: Annotated[dict[SplitName, Split], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Manifest:
        channels = self.image_shape[2]
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} stds for {channels} channels")
        for name, split in self.splits.items():
            if not all(shard.name.startswith(f"{name}/") for shard in split.shards):
                raise ValueError(f"{name} has shards of another split")
            if any(shard.bytes < shard.samples * math.prod(self.image_shape) for shard in split.shards):
                raise ValueError(f"a shard of {name} is smaller than its samples")
        return self


_FORMATS: dict[str, type[Manifest] | type[IndexManifest]] = {
    "distrain-blocks": Manifest,
    "distrain-index": IndexManifest,
}


@dataclass(frozen=True)
class Dataset:
    """A data set.

    Attributes:
        root: its folder, local or remote.
        manifest: content of `manifest.json`.
        digest: sha256 of `manifest.json`.
        tars: folder of an index's tar files, local or remote; for blocks that of the data set.
        image_size: height and width that a run gives to the images of an index; None: all have one size.
    """

    root: Path | Remote
    manifest: Manifest | IndexManifest
    digest: str
    tars: Path | Remote
    image_size: int | None = None

    @property
    def image_shape(self) -> list[int]:
        """[H, W, C] of the images that are trained.

        Raises:
            ConfigError: images have several sizes, and no size was chosen.
        """
        shape = self.manifest.image_shape
        if self.image_size is not None:
            return [self.image_size, self.image_size, 3]
        if shape is None:
            assert isinstance(self.manifest, IndexManifest)
            smallest, largest = ("×".join(map(str, each)) for each in (self.manifest.smallest, self.manifest.largest))
            raise ConfigError(
                f"{self.root}: its images have sizes from {smallest} to {largest}: set data.image_size, such as 224"
            )
        return shape

    def with_image_size(self, size: int | None) -> Dataset:
        """Return the data set with images of this height and width; None: as they are.

        Raises:
            ConfigError: its images cannot be resized, or have several sizes.
        """
        if size is not None and isinstance(self.manifest, Manifest):
            if self.manifest.image_shape[:2] != [size, size]:
                shape = "×".join(map(str, self.manifest.image_shape))
                raise ConfigError(
                    f"data.image_size={size}: {self.root} has images of {shape}, which were resized when it was"
                    " prepared; prepare it with another size, or set data.image_size=null"
                )
            return self
        dataset = replace(self, image_size=size)
        _ = dataset.image_shape
        return dataset

    def split(self, name: str) -> Split | IndexSplit:
        """Return the split of this name.

        Raises:
            DataError: there is no such split.
        """
        split = {str(key): value for key, value in self.manifest.splits.items()}.get(name)
        if split is None:
            raise DataError(
                f"{printable(self.root)}: has no split {shown(name)}, only {', '.join(self.manifest.splits)}"
            )
        return split

    def blocks(self, name: str) -> Split:
        """Return the split of this name of a data set of blocks."""
        split = self.split(name)
        assert isinstance(split, Split)
        return split

    def indexed(self, name: str) -> IndexSplit:
        """Return the split of this name of an index."""
        split = self.split(name)
        assert isinstance(split, IndexSplit)
        return split

    @property
    def is_index(self) -> bool:
        """Whether the samples are encoded images in tar files; else they are blocks of images of one size."""
        return isinstance(self.manifest, IndexManifest)

    @property
    def sample_bytes(self) -> int:
        """Bytes of an image that is trained: H · W · C."""
        height, width, channels = self.image_shape
        return height * width * channels

    def missing(self, splits: Sequence[str]) -> Iterator[str]:
        """Yield one line for each shard of the splits that is missing or has a wrong size.

        A remote data set is not checked: a request for each shard would take minutes, and a failing fetch is reported.
        """
        if isinstance(self.tars, Remote):
            return
        for name in splits:
            split = self.split(name)
            for file in split.shards if isinstance(split, Split) else split.tars:
                try:
                    size = os.stat(self.tars / file.name).st_size
                except OSError as error:
                    yield f"{file.name}: {error.strerror}"
                    continue
                if size != file.bytes:
                    yield f"{file.name}: {size} bytes instead of {file.bytes}"


def read(folder: str | Path, options: FetchOptions | None = None, tars: str | None = None) -> Dataset:
    """Open the data set in a folder or at an address.

    Args:
        folder: its path, or an address as in `data.dir`.
        options: how a remote data set is fetched. None means the defaults of the configuration, without a cache.
        tars: folder or address of an index's tar files; None: that of `tars.json`.

    Raises:
        ConfigError: the address cannot be opened.
        DataError: there is no folder or manifest, or the manifest has another format or version, or is inconsistent.
    """
    options = options or FetchOptions.of(Data(), cached=False)
    root = locate(folder, options)
    raw = _read_file(root, NAME)
    where, cure = printable(root / NAME), "prepare the data set again"
    reason = _check_json(raw)
    if reason is not None:
        raise DataError(f"{where}: {reason}; {cure}")
    tree = json.loads(raw)
    if not isinstance(tree, dict) or tree.get("format") not in _FORMATS:
        raise DataError(f"{where}: not a manifest of distrain; {cure}")
    version = tree.get("version")
    if version != VERSION:
        raise DataError(f"{where}: version {shown(version)}, this distrain reads version {VERSION}; {cure}")
    try:
        manifest = _FORMATS[tree["format"]].model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = printable(".".join(str(part) for part in first["loc"]), 100)
        message = printable(first["msg"].removeprefix("Value error, "))
        raise DataError(f"{where}: {f'{key}: ' if key else ''}{message}; {cure}") from None
    location = root if isinstance(manifest, Manifest) else _locate_tars(root, options, tars)
    return Dataset(root, manifest, hashlib.sha256(raw).hexdigest(), location)


def _locate_tars(root: Path | Remote, options: FetchOptions, tars: str | None) -> Path | Remote:
    if tars is None:
        content = json.loads(_read_file(root, TARS))
        tars = content.get("location") if isinstance(content, dict) else None
        if not isinstance(tars, str) or not tars:
            raise DataError(f"{printable(root / TARS)}: has no location of the tar files; set data.tars")
    return locate(tars, options, "data.tars")


def _read_file(root: Path | Remote, name: str) -> bytes:
    if isinstance(root, Remote):
        return _fetch(root, name)
    cure = "set data.tars" if name == TARS else "make one with `distrain prepare`, or set data.dir"
    try:
        return files.read(root / name, _MAX_BYTES)
    except FileNotFoundError as error:
        problem = f"has no {name}" if name == TARS else f"is not a data set (no {name})"
        reason = problem if root.is_dir() else error.strerror
        raise DataError(f"{printable(root)}: {reason}; {cure}") from None
    except OSError as error:
        raise DataError(f"{printable(root / name)}: {error.strerror}; {cure}") from None


def _fetch(root: Remote, name: str) -> bytes:
    try:
        return root.fetch(name, _MAX_BYTES, _check_json)
    except FetchError as error:
        uploaded = "upload a folder that `distrain prepare` made, or set data.dir"
        raise error.explained(root / name, DataError, "set data.tars" if name == TARS else uploaded) from None


def _check_json(raw: bytes) -> str | None:
    """Return what is wrong with a manifest, or None. There is no digest for it, but a truncated one does not parse."""
    try:
        json.loads(raw)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return None


def to_json(manifest: Manifest | IndexManifest) -> str:
    """Return the text of a manifest. The same manifest always gives the same bytes."""
    return json.dumps(manifest.model_dump(), indent=1, ensure_ascii=False) + "\n"
