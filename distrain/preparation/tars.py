"""Reading one tar file of a WebDataset, from its first byte to its last: its samples, labels and digests.

A sample is what webdataset makes of it: consecutive regular files whose names are equal up to the first dot of the last
part. webdataset reads some tar files only in part, without an error; these are refused here.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import xxhash
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from distrain.data.index import SAMPLE, digest
from distrain.data.pillow import Decoding, UnreadableError, header_size
from distrain.errors import ConfigError, DataError, UserError
from distrain.text import printable, shown

MAX_IMAGE_BYTES = 2**30
"""Size of the largest image that is read: it is read into memory."""

MAX_LABEL_BYTES = 2**24
"""Size of the largest member with a label that is read."""

MAX_NAME = 1000
"""Characters of the longest label that is a name: a longer text is no name of a class."""

_CHUNK_BYTES = 2**20
_MAX_HEADER_BYTES = 2**24
_EXAMPLES = 3
_MAX_KINDS = 50
"""Kinds of what is passed over: keys with dots in them can make as many fields as there are samples."""

_COMPLETE = 3
"""A sample has an image (1) and a label (2)."""

_MAGIC = slice(257, 262)
_END = bytes(tarfile.BLOCKSIZE)
"""The block that ends a tar file."""

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gzip -d"),
    b"BZh": ("bzip2", "bzip2 -d"),
    b"\xfd7zXZ\x00": ("xz", "xz -d"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
}
"""First bytes of compressed files: the format, and the command that decompresses them."""

_DAMAGE = (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError)
"""Exceptions of tarfile for damaged headers. Errors of the stream are OSErrors, or the caller's own."""

_META = re.compile(r"__[^/]*__($|/)")
"""Names that webdataset passes over."""

_COPY = "copy or download it again"
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Code points that JSON's escapes can name and no UTF-8 file can hold."""
_NUMBER = re.compile(r"[0-9]{1,18}")
_EXTENSION = re.compile(r"[^./\s;:][^/\s;:]*")


@dataclass(frozen=True)
class Fields:
    """The members of a sample that are its image and its label.

    Attributes:
        image: extensions of images in order of preference, in lower case.
        label: extension of labels. `json` is parsed; `txt` is a name; any other is a number if it looks like one.
        path: for json: keys, or positions in lists, from the top to the label.
    """

    image: tuple[str, ...]
    label: str
    path: tuple[str, ...] = ()

    @classmethod
    def parse(cls, image: str, label: str) -> Fields:
        """Return the fields that two options name, such as `jpg;jpeg;png` and `json:annotation.class`.

        Raises:
            ConfigError: an extension or path is empty or cannot be one.
        """
        extensions = tuple(_extension("--image", each, "jpg or jpg;jpeg;png") for each in image.split(";"))
        name, colon, path = label.partition(":")
        extension = _extension("--label", name, "cls, txt or json:path.to.label")
        if extension in extensions:
            raise ConfigError(f"--label {shown(label)}: is an extension of --image too; name the label's, such as cls")
        if colon and not _is_kind(extension, "json"):
            raise ConfigError(f"--label {shown(label)}: only json has a path; give {extension}, or json:{path}")
        keys = tuple(path.split(".")) if colon else ()
        if "" in keys:
            raise ConfigError(f"--label {shown(label)}: has an empty key in its path; give one such as json:class.id")
        return cls(extensions, extension, keys)


@dataclass(frozen=True)
class Contents:
    """A tar file's samples, and what was passed over.

    Attributes:
        bytes: size of the tar file.
        sha256: its digest, in hexadecimal.
        samples: `SAMPLE` [n]: ids are 0 … n-1, labels -1; height and width are those of the upright image.
        labels: label of each sample: a number or a name.
        keys: uint64 [n]: xxh3_64 of each sample's key.
        unreadable: key and reason of each sample whose image cannot be read. They are not among the samples.
        passed_over: how many members or samples were passed over and the names of the first three, by what they are.
    """

    bytes: int
    sha256: str
    samples: NDArray[np.void]
    labels: list[int | str]
    keys: NDArray[np.uint64]
    unreadable: list[tuple[str, str]]
    passed_over: dict[str, tuple[int, list[str]]]


def read(stream: BinaryIO, name: str, fields: Fields, decoding: Decoding, progress: Callable[[int], None]) -> Contents:
    """Read a tar file once, from its first byte to its last; no more than one member is in memory.

    Args:
        stream: the tar file; it is only read, never sought.
        name: its name in messages, without secrets.
        fields: the members that are images and labels.
        decoding: its `max_pixels` limits the images.
        progress: is called with the number of bytes read so far, about once for each MiB.

    Raises:
        DataError: it is compressed, no tar file, damaged or truncated, has data after its end, sparse members, or two
            members of the same name; or the members of a sample are not adjacent.
    """
    tar = _Tar(stream, progress)
    shown_name = printable(name)
    _check_start(tar.start, shown_name)
    samples = _Samples(tar, shown_name, fields, decoding)
    for member in _members(tar, shown_name):
        samples.add(member)
    samples.end_sample()
    _check_end(tar, shown_name)
    return samples.contents()


class _Tar:
    """The bytes of a tar file in their order, hashed and counted; a file for tarfile, which seeks only forward."""

    def __init__(self, stream: BinaryIO, progress: Callable[[int], None]) -> None:
        self._stream, self._progress = stream, progress
        self._hash = hashlib.sha256()
        self._chunk, self._position, self._chunk_start = b"", 0, 0
        self._load()
        self.start = self._chunk[: tarfile.BLOCKSIZE]
        """First bytes of the file."""
        self.last = b""
        """Result of the last `read`."""
        self.is_short = False
        """Whether a read went beyond the end of the file."""

    def tell(self) -> int:
        """Return the position in the file."""
        return self._chunk_start + self._position

    def seek(self, position: int) -> None:
        """Skip the bytes before a position."""
        if position < self.tell():
            raise tarfile.ReadError("a member begins within the one before it")
        while position > self._chunk_start + len(self._chunk) and self._load():
            pass
        self._position = min(position - self._chunk_start, len(self._chunk))

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, which are a header's; fewer only at the end of the file."""
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self.read_data(size)
        return self.last

    def read_data(self, size: int) -> bytes:
        """Return the next `size` bytes; fewer only at the end of the file."""
        end = self._position + size
        if end <= len(self._chunk):
            data = self._chunk[self._position : end]
            self._position = end
            return data
        parts = [self._chunk[self._position :]]
        missing = size - len(parts[0])
        while missing and self._load():
            parts.append(self._chunk[:missing])
            self._position = len(parts[-1])
            missing -= self._position
        self.is_short = self.is_short or missing > 0
        return b"".join(parts)

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """Yield the rest of the file: the position of each part, and its bytes."""
        yield self.tell(), self._chunk[self._position :]
        while self._load():
            yield self._chunk_start, self._chunk

    def sha256(self) -> str:
        """Return the digest of what was read from the stream, in hexadecimal."""
        return self._hash.hexdigest()

    def _load(self) -> bool:
        """Replace the chunk by the next one; return False at the end of the file. A stream may return less at once."""
        self._chunk_start += len(self._chunk)
        self._chunk, self._position = b"", 0
        while len(self._chunk) < _CHUNK_BYTES and (data := self._stream.read(_CHUNK_BYTES - len(self._chunk))):
            self._hash.update(data)
            self._chunk = self._chunk + data if self._chunk else data
        if self._chunk:
            self._progress(self._chunk_start + len(self._chunk))
        return bool(self._chunk)


def _check_start(start: bytes, name: str) -> None:
    for magic, (kind, command) in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{name}: is compressed with {kind}, so single images cannot be read from it; decompress it"
                f" (`{command}`), and give the .tar"
            )
    if not start:
        raise DataError(f"{name}: is empty, no tar file; {_COPY}")


def _members(tar: _Tar, name: str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file up to its end marker, each before its data is read.

    Raises:
        DataError: a header is damaged, or the file is truncated.
    """
    last = ""
    try:
        with tarfile.open(fileobj=cast(Any, tar), mode="r:", encoding="utf-8") as archive:
            # Python 3.10 would look for a member before the beginning if there is none.
            while tar.last != _END and (member := archive.next()) is not None:
                cast(Any, archive).members = []  # it would retain all members
                last = member.name
                yield member
    except UserError:
        raise
    except _DAMAGE:
        if not last and tar.start[_MAGIC] != b"ustar":
            raise DataError(f"{name}: is not a tar file; give the tar files of a WebDataset") from None
        raise _damaged(tar, name, last) from None
    # tarfile ends without an error at a damaged header, and at the end of a truncated file.
    if tar.last != _END:
        raise _damaged(tar, name, last)


def _damaged(tar: _Tar, name: str, last: str) -> DataError:
    where = f"after the member {printable(last)}" if last else "at its beginning"
    if tar.is_short:
        return DataError(f"{name}: is truncated {where}: it has no end marker; {_COPY}")
    return DataError(f"{name}: has a damaged header {where}, near byte {tar.tell():,}; {_COPY}")


def _check_end(tar: _Tar, name: str) -> None:
    """Read to the end of a tar file, and check that nothing is behind its end marker."""
    for position, data in tar.chunks():
        if data.count(0) < len(data):
            begin = position + len(data) - len(data.lstrip(b"\0"))
            raise DataError(
                f"{name}: has data behind its end marker (at byte {begin:,}), as joined tar files have; webdataset"
                " would not read it. Unpack it with `tar --ignore-zeros -xf`, and pack it again with `tar --sort=name`"
            )


def parse_label(data: bytes, fields: Fields) -> int | str:
    """Return the label in a member's bytes: a number or a name.

    Raises:
        UnreadableError: there is none.
    """
    if _is_kind(fields.label, "json"):
        return _json_label(data, fields.path)
    try:
        name = _name(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UnreadableError("is not UTF-8 text") from None
    is_number = _NUMBER.fullmatch(name) and not _is_kind(fields.label, "txt")
    return int(name) if is_number else name


def _json_label(data: bytes, path: tuple[str, ...]) -> int | str:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise UnreadableError("is not JSON") from None
    for key in path:
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and _NUMBER.fullmatch(key) and int(key) < len(value):
            value = value[int(key)]
        else:
            raise UnreadableError(f"has no {'.'.join(path)}")
    if type(value) is int:
        return value
    if isinstance(value, str):
        return _name(value)
    raise UnreadableError(f"has neither a number nor a name: {shown(value)}")


def _name(text: str) -> str:
    name = text.strip()
    if not name:
        raise UnreadableError("is empty")
    if len(name) > MAX_NAME:
        raise UnreadableError(f"has more than {MAX_NAME:,} characters")
    if _SURROGATE.search(name):
        raise UnreadableError("has half a character (a surrogate)")
    return sys.intern(name)  # the same few names come again and again


def _is_kind(extension: str, kind: str) -> bool:
    """Whether an extension is one of a kind: those of `meta.json` and `json` are JSON."""
    return extension.rpartition(".")[2] == kind


def _extension(option: str, text: str, example: str) -> str:
    extension = text.strip().lower()
    if not _EXTENSION.fullmatch(extension):
        raise ConfigError(
            f"{option}: {shown(text)} is no extension; give the part of the names behind KEY., as {example}"
        )
    return extension


class _Image(NamedTuple):
    """An image: its extension, entries of `SAMPLE`, and why it cannot be read (empty: it can)."""

    extension: str
    offset: int
    digest: int
    bytes: int
    size: tuple[int, int]
    problem: str


class _Samples:
    """The samples of a tar file, collected member by member."""

    def __init__(self, tar: _Tar, tar_name: str, fields: Fields, decoding: Decoding) -> None:
        self._tar, self._tar_name, self._fields, self._decoding = tar, tar_name, fields, decoding
        self._images: list[_Image] = []
        self._labels: list[int | str] = []
        self._keys: list[int] = []
        self._unreadable: list[tuple[str, str]] = []
        self._passed_over: dict[str, tuple[int, list[str]]] = {}
        self._parts: dict[int, int] = {}
        """Parts seen of each key, by its digest: an image is 1, a label 2."""
        self._begin(None)

    def add(self, member: tarfile.TarInfo) -> None:
        """Add a member to its sample, which is the current or the next one.

        Raises:
            DataError: it is a sparse file or truncated, or its sample has such a member already.
        """
        if member.issparse():
            cure = "pack it again without --sparse"
            raise DataError(f"{self._tar_name}: {printable(member.name)} is stored as a sparse file; {cure}")
        if not member.isreg():
            self._pass_over_special(member)
            return
        key, extension = base_plus_ext(member.name)
        if key is None or _META.match(member.name):
            self._pass_over("members without a field", member.name)
            return
        if key != self._key:
            self.end_sample()
            self._begin(key)
        extension = extension.lower()
        if extension in self._extensions:
            raise DataError(
                f"{self._tar_name}: {printable(member.name)} is the second .{printable(extension)} of its sample, which"
                " webdataset refuses too; pack the tar file again without one of them"
            )
        self._extensions.add(extension)
        if extension in self._fields.image:
            self._add_image(member, extension)
        elif extension == self._fields.label:
            self._add_label(member)
        else:
            self._pass_over_field(extension, member.name)

    def end_sample(self) -> None:
        """Complete the current sample, if there is one.

        Raises:
            DataError: its image and its label are not adjacent.
        """
        key, image, label = self._key, self._image, self._label
        if key is None:
            return
        digest_of_key = xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogateescape"))
        self._compare_parts(key, digest_of_key)
        if image is None:
            self._pass_over("samples without an image", key)
        elif isinstance(label, UnreadableError):
            self._pass_over("samples without a label", f"{key} ({label})")
        elif image.problem:
            self._unreadable.append((key, image.problem))
        else:
            self._images.append(image)
            self._labels.append(label)
            self._keys.append(digest_of_key)

    def contents(self) -> Contents:
        """Return what was collected, after the tar file was read to its end."""
        samples = np.zeros(len(self._images), SAMPLE)
        for name in ("offset", "digest", "bytes"):
            samples[name] = [getattr(image, name) for image in self._images]
        for position, name in enumerate(("height", "width")):
            samples[name] = [image.size[position] for image in self._images]
        samples["id"], samples["label"] = np.arange(len(samples)), -1
        keys = np.array(self._keys, np.uint64)
        size, sha256 = self._tar.tell(), self._tar.sha256()
        return Contents(size, sha256, samples, self._labels, keys, self._unreadable, self._passed_over)

    def _begin(self, key: str | None) -> None:
        self._key = key
        self._extensions = {"__key__", "__url__"}  # webdataset's own entries of a sample
        self._image: _Image | None = None
        self._label: int | str | UnreadableError = UnreadableError(f"no .{self._fields.label}")

    def _add_image(self, member: tarfile.TarInfo, extension: str) -> None:
        if self._image is not None:
            first, second = sorted((self._image.extension, extension), key=self._fields.image.index)
            self._pass_over_field(second, f"{self._key}.{second}")
            if first != extension:
                return
        size, problem, image_digest = (0, 0), "", 0
        try:
            data = self._read(member, MAX_IMAGE_BYTES)
            image_digest, size = digest(data), header_size(data, self._decoding)
        except UnreadableError as error:
            problem = str(error)
        self._image = _Image(extension, member.offset_data, image_digest, member.size, size, problem)

    def _add_label(self, member: tarfile.TarInfo) -> None:
        try:
            self._label = parse_label(self._read(member, MAX_LABEL_BYTES), self._fields)
        except UnreadableError as error:
            self._label = UnreadableError(f"its .{self._fields.label} {error}")

    def _read(self, member: tarfile.TarInfo, limit: int) -> bytes:
        if member.size > limit:
            raise UnreadableError(f"has {member.size:,} bytes, more than {limit:,}")
        data = self._tar.read_data(member.size)
        if len(data) < member.size:
            raise DataError(f"{self._tar_name}: is truncated within the member {printable(member.name)}; {_COPY}")
        return data

    def _compare_parts(self, key: str, digest_of_key: int) -> None:
        """Compare a sample with earlier ones of its key: two halves, or two samples."""
        parts = (self._image is not None) + 2 * (self._fields.label in self._extensions)
        before = self._parts.get(digest_of_key, 0)
        self._parts[digest_of_key] = before | parts
        if before == parts == _COMPLETE:
            self._pass_over("duplicate keys", key)
        elif before | parts == _COMPLETE and _COMPLETE not in (before, parts):
            raise DataError(
                f"{self._tar_name}: the image and the label of {printable(key)} are not adjacent, so webdataset reads"
                " them as two samples; unpack the tar file, and pack it again with `tar --sort=name`"
            )

    def _pass_over_special(self, member: tarfile.TarInfo) -> None:
        if member.islnk():
            self._pass_over("hard links", member.name)
        elif member.issym():
            self._pass_over("symbolic links", member.name)
        elif not member.isdir():
            self._pass_over("devices and other special members", member.name)

    def _pass_over_field(self, extension: str, name: str) -> None:
        field = f"field .{printable(extension)}"
        if field not in self._passed_over and len(self._passed_over) >= _MAX_KINDS:
            field = "other fields"
        self._pass_over(field, name)

    def _pass_over(self, kind: str, name: str) -> None:
        count, names = self._passed_over.get(kind, (0, []))
        if count < _EXAMPLES:
            names.append(printable(name))
        self._passed_over[kind] = count + 1, names
