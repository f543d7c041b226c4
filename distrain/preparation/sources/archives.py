"""Image files: whole files, and members of tar and zip archives, which are listed first and read later.

Members of tar and zip archives are read where they are. Compressed tars cannot be read from the middle, so the bytes of
their files are copied to one temporary file. No file is ever written under a member's name.
"""

from __future__ import annotations

import bz2
import gzip
import logging
import lzma
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from distrain.errors import DataError
from distrain.files import open_regular
from distrain.preparation.sources import UnreadableError
from distrain.text import printable

log = logging.getLogger("distrain")

MAX_FILE_BYTES = 2**30
"""Size of the largest file that is read: no image needs more, and each worker reads one into memory."""

_MAX_PATH_BYTES = 4096  # of Linux: a longer name could not be unpacked anywhere
_MAX_HEADER_BYTES = 2**26
_MAX_RATIO = 200
_RATIO_FROM_BYTES = 2**30  # small archives of flat images may be compressed better than _MAX_RATIO

_COMPRESSIONS: dict[bytes, Callable[[str], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_OTHER_FORMATS = {
    b"7z\xbc\xaf\x27\x1c": "7z archive",
    b"Rar!": "RAR archive",
    b"\x28\xb5\x2f\xfd": "file compressed with zstd",
    b"PAR1": "Parquet file",
    b"\x89HDF": "HDF5 file",
    b"\x89PNG": "single image",
    b"\xff\xd8\xff": "single image",
}


@dataclass(frozen=True, slots=True)
class File:
    """One image file: a whole file, or a part of an archive or of the temporary file."""

    name: str
    """The path in messages, printable and not too long."""
    path: str
    size: int
    """Bytes of the image file; -1: it is not a regular file."""
    offset: int | None = None
    """Start of the bytes, or of a zip member's header; None: the whole file."""
    archive: tuple[int, int] | None = None
    """Size and time of modification of the archive when it was listed."""
    crc: int | None = None
    """The checksum of a zip member."""
    packed: int | None = None
    """Compressed bytes of a zip member that is compressed."""


Member = tuple[tuple[str, ...], File | None]
"""The parts of a path below a given folder or archive, and the file there; None: a folder."""


def size_text(count: int) -> str:
    """Return a number of bytes for messages."""
    power = min(4, max(0, (count.bit_length() - 1) // 10))
    return f"{count / 1024**power:.{1 if power else 0}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def read(file: File) -> bytes:
    """Return the bytes of an image file.

    Raises:
        UnreadableError: it is not a regular file, too large or damaged, or its archive has changed since it was listed.
    """
    try:
        stream = open_regular(file.path)
    except OSError as error:
        raise UnreadableError(f"not a file that can be read ({error.strerror})") from error
    try:
        with stream:
            status = os.fstat(stream.fileno())
            if file.archive is not None and file.archive != _version(status):
                raise UnreadableError("its archive has changed while it was read")
            size = status.st_size if file.offset is None else file.size
            if size > MAX_FILE_BYTES:
                raise UnreadableError(f"has {size_text(size)}; an image file may have {size_text(MAX_FILE_BYTES)}")
            if file.offset is None:
                return stream.read(size)
            stream.seek(file.offset)
            return stream.read(size) if file.crc is None else _read_zip_member(stream, file)
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error


def _read_zip_member(stream: BinaryIO, file: File) -> bytes:
    header = stream.read(30)
    try:
        name_bytes, extra_bytes = struct.unpack("<4x22x2H", header)
        stream.seek(name_bytes + extra_bytes, os.SEEK_CUR)
        if file.packed is None:
            data = stream.read(file.size)
        else:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream.read(file.packed), file.size + 1)
    except (struct.error, zlib.error) as error:
        raise UnreadableError(f"damaged in its archive ({error})") from error
    if len(data) != file.size or zlib.crc32(data) != file.crc:
        raise UnreadableError("damaged in its archive (its checksum differs)")
    return data


class Spool:
    """The temporary file for the images of compressed tars. It exists only if there is one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: BinaryIO | None = None

    def announce(self, archive: Path) -> None:
        """Log that an archive is copied; check that at least its compressed size is free."""
        size = archive.stat().st_size
        free = self._check_free(size, str(archive))
        log.info(
            "%s is compressed (%s): its images are copied to a temporary file in --out first (%s free)",
            printable(archive),
            size_text(size),
            size_text(free),
        )

    def add(self, content: Any, size: int, name: str) -> int:
        """Append a file's bytes; return their offset."""
        self._check_free(size, name)
        if self._stream is None:
            self._stream = self.path.open("wb")
        offset = self._stream.tell()
        shutil.copyfileobj(content, self._stream)
        return offset

    def close(self) -> None:
        """Write everything to the file."""
        if self._stream is not None:
            self._stream.close()

    def _check_free(self, size: int, name: str) -> int:
        free = shutil.disk_usage(self.path.parent).free
        if size > free:
            raise DataError(
                f"{printable(name)}: {size_text(size)} or more are copied to --out, where {size_text(free)} are free;"
                " choose another --out, or unpack the archive and give the folder"
            )
        return free


def list_archive(path: Path, spool: Spool) -> Iterator[Member]:
    """Yield the members of a tar or zip archive.

    Raises:
        DataError: it is damaged or not such an archive, or a member is a link or device, or points outside.
    """
    last_name = ""
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
        for magic, kind in _OTHER_FORMATS.items():
            if start.startswith(magic):
                raise DataError(f"{printable(path)}: is a {kind}; give a folder, or a tar or zip archive of it")
        for parts, file in _list_zip(path) if start.startswith(b"PK") else _list_tar(path, spool):
            last_name = "/".join(parts)
            yield parts, file
    except (DataError, MemoryError):
        raise
    except Exception as error:  # the parsers raise many types for damaged archives
        if isinstance(error, OSError) and error.errno is not None:  # a problem of the disk, not of the archive
            raise
        where = f" in or after {printable(last_name)}" if last_name else ", or neither a tar nor a zip archive"
        raise DataError(f"{printable(path)}: is damaged or truncated{where}; copy or download it again") from error


def _version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _parts(archive: Path, name: str) -> tuple[str, ...]:
    """Return the parts of a member's path."""
    path = PurePosixPath(name)
    if ".." in path.parts or path.is_absolute():
        raise DataError(f"{_label(archive, name)}: points outside the archive; refused")
    if len(os.fsencode(name)) > _MAX_PATH_BYTES:
        raise DataError(f"{_label(archive, name)}: has a path of more than {_MAX_PATH_BYTES} bytes; rename it")
    return path.parts


def _label(archive: Path, name: str) -> str:
    return printable(f"{archive}: {name}")


def _check_size(label: str, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise DataError(
            f"{label}: has {size_text(size)}; an image file may have {size_text(MAX_FILE_BYTES)}. Delete it from the"
            " archive, or pack only the images"
        )


def _expands_too_much(archive: Path) -> DataError:
    return DataError(
        f"{printable(archive)}: expands to more than {_MAX_RATIO} times its size, as no images do; refused. If it is"
        " right, unpack it and give the folder"
    )


class _BoundedReader:
    """A file that refuses reads that only a malicious tar causes: huge headers, and endless compressed data."""

    def __init__(self, stream: Any, archive: Path, limit: float) -> None:
        self._stream, self._archive, self._limit = stream, archive, limit
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        if size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        if self._stream.tell() > self._limit:
            raise _expands_too_much(self._archive)
        return cast(bytes, self._stream.read(size))


def _list_tar(path: Path, spool: Spool) -> Iterator[Member]:
    version = _version(path.stat())
    with path.open("rb") as raw:
        start = raw.read(8)
    opener = next((opener for magic, opener in _COMPRESSIONS.items() if start.startswith(magic)), None)
    if opener is not None:
        spool.announce(path)
    limit = float("inf") if opener is None else max(_RATIO_FROM_BYTES, _MAX_RATIO * version[0])
    with opener(str(path)) if opener else path.open("rb") as stream:
        reader = _BoundedReader(stream, path, limit)
        with tarfile.open(fileobj=cast(Any, reader), mode="r:", encoding="utf-8") as archive:
            while (member := archive.next()) is not None:
                cast(Any, archive).members = []  # it would keep all members
                name = _label(path, member.name)
                parts = _parts(path, member.name)
                if member.isdir():
                    yield parts, None
                    continue
                _check_kind(name, member)
                _check_size(name, member.size)
                if opener is None:
                    yield parts, File(name, str(path), member.size, member.offset_data, version)
                else:
                    offset = spool.add(archive.extractfile(member), member.size, name)
                    yield parts, File(name, str(spool.path), member.size, offset)
            _check_end(reader.read)


def _check_kind(name: str, member: tarfile.TarInfo) -> None:
    """Check that a member is a regular file."""
    if member.issym() or member.islnk():
        option = "--dereference" if member.issym() else "--hard-dereference"
        raise DataError(f"{name}: is a link or a device; refused. Pack the files themselves: tar {option}")
    if not member.isreg():
        raise DataError(f"{name}: is a link or a device; refused. Pack only folders and files")
    if member.issparse():
        raise DataError(f"{name}: is stored as a sparse file; pack it again without --sparse")


def _check_end(read: Callable[[int], bytes]) -> None:
    """Check that an archive ends with blocks of zeros: tarfile treats a truncated or damaged header as the end.

    tarfile has read the first of two such blocks. Reading to the end also makes gzip compare its checksum.
    """
    zeros = 0
    while data := read(2**20):
        if data.strip(b"\0"):
            raise tarfile.ReadError("damaged, or has data after its end")
        zeros += len(data)
    if zeros < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("truncated")


def _list_zip(path: Path) -> Iterator[Member]:
    version = _version(path.stat())
    expanded = 0
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = _zip_name(info)
            parts, label = _parts(path, name), _label(path, name)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir():
                yield parts, None
                continue
            if kind not in (0, stat.S_IFREG):
                raise DataError(f"{label}: is a link or a device; refused. Pack the files themselves, without zip -y")
            if info.flag_bits & 1:
                raise DataError(f"{label}: is encrypted; unpack the archive and give the folder")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(
                    f"{label}: is compressed by method {info.compress_type}; pack it again with the usual one (deflate)"
                )
            _check_size(label, info.file_size)
            if info.header_offset + info.compress_size > version[0]:
                raise zipfile.BadZipFile("a member ends after the archive")
            expanded += info.file_size
            if expanded > max(_RATIO_FROM_BYTES, _MAX_RATIO * version[0]):
                raise _expands_too_much(path)
            packed = info.compress_size if info.compress_type == zipfile.ZIP_DEFLATED else None
            yield parts, File(label, str(path), info.file_size, info.header_offset, version, info.CRC, packed)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Return a member's name. macOS writes UTF-8 without the flag that says so; zipfile then decodes code page 437."""
    if info.flag_bits & 0x800:
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename
