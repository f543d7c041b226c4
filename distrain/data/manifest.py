"""`manifest.json`: the description of a data set, with a digest of each shard.

It is written last, so a folder without it is not a data set.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distrain import files
from distrain.config import Data
from distrain.data.fetch import FetchError, FetchOptions, Remote, locate
from distrain.errors import DataError, UnreachableError
from distrain.text import printable, shown

NAME = "manifest.json"
_MAX_BYTES = 2**28
"""Maximum size of a manifest: a million shards."""
FORMAT = "distrain-blocks"
VERSION = 1
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


class Manifest(_Record):
    """The content of `manifest.json`.

    `mean` and `std` are those of the train split, per channel, with images in 0 … 1. A std of 0 is recorded as 1.
    """

    format: Literal["distrain-blocks"]
    version: Literal[1]
    source: dict[str, Any]
    classes: Annotated[list[str], Field(min_length=1)]
    image_shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]
    mean: list[float]
    std: list[float]
    splits: Annotated[dict[Literal["train", "val", "test"], Split], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Manifest:
        channels = self.image_shape[2]
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} stds for {channels} channels")
        if not all(0 < value < math.inf for value in self.std) or not all(map(math.isfinite, self.mean)):
            raise ValueError("means and stds must be finite, stds above 0")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("a class is named twice")
        for name, split in self.splits.items():
            if not all(shard.name.startswith(f"{name}/") for shard in split.shards):
                raise ValueError(f"{name} has shards of another split")
            if any(shard.bytes < shard.samples * self.sample_bytes for shard in split.shards):
                raise ValueError(f"a shard of {name} is smaller than its samples")
        return self

    @property
    def sample_bytes(self) -> int:
        """Bytes of one image: H · W · C."""
        height, width, channels = self.image_shape
        return height * width * channels


@dataclass(frozen=True)
class Dataset:
    """A data set: its folder, local or remote, its manifest and the sha256 of `manifest.json`."""

    root: Path | Remote
    manifest: Manifest
    digest: str

    def split(self, name: str) -> Split:
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

    def missing(self, splits: Sequence[str]) -> Iterator[str]:
        """Yield one line for each shard of the splits that is missing or has a wrong size.

        A remote data set is not checked: a request for each shard would take minutes, and a failing fetch is reported.
        """
        if isinstance(self.root, Remote):
            return
        for name in splits:
            for shard in self.split(name).shards:
                try:
                    size = os.stat(self.root / shard.name).st_size
                except OSError as error:
                    yield f"{shard.name}: {error.strerror}"
                    continue
                if size != shard.bytes:
                    yield f"{shard.name}: {size} bytes instead of {shard.bytes}"


def read(folder: str | Path, options: FetchOptions | None = None) -> Dataset:
    """Open the data set in a folder or at an address.

    Args:
        folder: its path, or an address as in `data.dir`.
        options: how a remote data set is fetched. None means the defaults of the configuration, without a cache.

    Raises:
        ConfigError: the address cannot be opened.
        DataError: there is no folder or manifest, or the manifest has another format or version, or is inconsistent.
    """
    root = locate(folder, options or FetchOptions.of(Data(), cached=False))
    raw = _fetch(root) if isinstance(root, Remote) else _read_file(root)
    where, cure = printable(root / NAME), "prepare the data set again"
    reason = _check_json(raw)
    if reason is not None:
        raise DataError(f"{where}: {reason}; {cure}")
    tree = json.loads(raw)
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise DataError(f"{where}: not a manifest of distrain; {cure}")
    version = tree.get("version")
    if version != VERSION:
        raise DataError(f"{where}: version {shown(version)}, this distrain reads version {VERSION}; {cure}")
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = printable(".".join(str(part) for part in first["loc"]), 100)
        message = printable(first["msg"].removeprefix("Value error, "))
        raise DataError(f"{where}: {f'{key}: ' if key else ''}{message}; {cure}") from None
    return Dataset(root, manifest, hashlib.sha256(raw).hexdigest())


def _read_file(root: Path) -> bytes:
    try:
        return files.read(root / NAME, _MAX_BYTES)
    except FileNotFoundError as error:
        reason = "is not a data set (no manifest.json)" if root.is_dir() else error.strerror
        raise DataError(f"{printable(root)}: {reason}; make one with `distrain prepare`, or set data.dir") from None
    except OSError as error:
        cure = "make one with `distrain prepare`, or set data.dir"
        raise DataError(f"{printable(root / NAME)}: {error.strerror}; {cure}") from None


def _fetch(root: Remote) -> bytes:
    try:
        return root.fetch(NAME, _MAX_BYTES, _check_json)
    except FetchError as error:
        cure = error.cure or "upload a folder that `distrain prepare` made, or set data.dir"
        error_type = UnreachableError if error.unreachable else DataError
        raise error_type(f"{root / NAME}: {error.reason}; {cure}") from None


def _check_json(raw: bytes) -> str | None:
    """Return what is wrong with a manifest, or None. There is no digest for it, but a truncated one does not parse."""
    try:
        json.loads(raw)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return None


def to_json(manifest: Manifest) -> str:
    """Return the text of a manifest. The same manifest always gives the same bytes."""
    return json.dumps(manifest.model_dump(), indent=1, ensure_ascii=False) + "\n"
