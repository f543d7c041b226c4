"""The user's own images: one folder per class, in train/ and test/ (and val/) or without splits.

They are read from folders or from tar archives. An archive is never unpacked under its members' names: the bytes of its
regular files are copied to one temporary file.
"""

from __future__ import annotations

import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from distrain.data.sources import UnreadableError
from distrain.data.sources.images import read_image
from distrain.errors import DataError

_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class _File:
    """The bytes of one image: a part of a file, or the whole file (length -1)."""

    name: str
    path: Path
    offset: int = 0
    length: int = -1


class Folder:
    """Images in class folders, as RGB, resized so that the shorter side is `image_size` and cropped to the centre."""

    def __init__(self, paths: Sequence[Path], image_size: int, work: Path) -> None:
        """List the images of folders and archives; copy those of archives to a file in `work`.

        Raises:
            DataError: a path is missing or not an archive, a member is refused, or a class has no image.
        """
        self.image_shape = (image_size, image_size, 3)
        if len({path.resolve() for path in paths}) < len(paths):
            raise DataError("a folder or archive is given twice; each image would be in the data set twice")
        images: dict[tuple[str, str], list[_File]] = {}  # by (split, class)
        for name, parts, file in _list_all(paths, work):
            files = images.setdefault(_split_and_class(name, parts, is_file=file is not None), [])
            if file is not None:
                files.append(file)
        images.pop(("", ""), None)
        _check(images, paths)
        self.classes = sorted({name for _, name in images})
        _check_names(self.classes)
        self._files: dict[str, list[_File]] = {}
        self.labels: dict[str, NDArray[np.int64]] = {}
        for split in [s for s in _SPLITS if any(part == s for part, _ in images)]:
            by_class = [sorted(images[split, name], key=lambda file: file.name) for name in self.classes]
            self._files[split] = [file for files in by_class for file in files]
            self.labels[split] = np.repeat(np.arange(len(by_class)), [len(files) for files in by_class])

    def name(self, split: str, index: int) -> str:
        """Return the path of an image, with the archive's path in front if it is in one."""
        return self._files[split][index].name

    def load(self, split: str, index: int) -> NDArray[np.uint8]:
        """Decode one image: uint8 [image_size, image_size, 3].

        Raises:
            UnreadableError: the file is damaged or not an image, has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, or
                has pixels without a defined maximum.
        """
        file = self._files[split][index]
        if not file.path.is_file():  # reading a pipe would never end
            raise UnreadableError("not a file")
        try:
            with file.path.open("rb") as stream:
                stream.seek(file.offset)
                data = stream.read(file.length)
        except OSError as error:
            raise UnreadableError(str(error)) from error
        return read_image(data, self.image_shape)


def _split_and_class(name: str, parts: tuple[str, ...], is_file: bool) -> tuple[str, str]:
    """Return (split, class) of a file or folder: ("", class) outside the splits' folders, ("", "") without a class."""
    if any(part.startswith(".") for part in parts):
        return "", ""
    depth = 1 if is_file else 0  # a file's own name comes after its class
    for position, part in enumerate(parts[:2]):
        if part in _SPLITS:
            if len(parts) > position + 1 + depth:
                return part, parts[position + 1]
            if is_file:
                raise DataError(f"{name}: is not in a class folder; move or delete it")
            return "", ""
    return ("", parts[0]) if len(parts) > depth else ("", "")


def _check(images: dict[tuple[str, str], list[_File]], paths: Sequence[Path]) -> None:
    """Check that all splits have images of all classes. Without folders for splits, all classes become train."""
    where = ", ".join(str(path) for path in paths)
    if not images:
        raise DataError(f"{where}: no class folders; put images into train/CLASS/ and test/CLASS/")
    outside_splits = [key for key in images if not key[0]]
    if outside_splits and len(outside_splits) == len(images):
        for key in outside_splits:
            images["train", key[1]] = images.pop(key)
    else:
        # Folders without images are allowed beside train/ and test/, such as the top folder of an archive.
        for key in outside_splits:
            files = images.pop(key)
            if files:
                raise DataError(f"{files[0].name}: is not in train/, val/ or test/; move or delete it")
    splits = [split for split in _SPLITS if any(part == split for part, _ in images)]
    if "train" not in splits:
        raise DataError(f"{where}: has {' and '.join(splits)} but no train/")
    names = sorted({name for _, name in images})
    if len(names) == 1:
        raise DataError(
            f"{where}: has only one class, {names[0]!r}; put the class folders directly into the given folder or"
            " archive, or into its train/ and test/"
        )
    for name in names:
        for split in splits:
            if not images.get((split, name)):
                raise DataError(f"{where}: class {name!r} has no image in {split}/; add some or delete the folder")


def _check_names(classes: Sequence[str]) -> None:
    """Check that class names are printable: others could break a terminal, or could not be written to the manifest."""
    for name in classes:
        if not name.isprintable():
            raise DataError(f"class {name!r}: its folder's name has characters that cannot be printed; rename it")


def _list_all(paths: Sequence[Path], work: Path) -> Iterator[tuple[str, tuple[str, ...], _File | None]]:
    """Yield (name for messages, parts of the path, file or None for a folder) of all entries."""
    spool_path = work / "spool"
    with spool_path.open("wb") as spool:
        for path in paths:
            if path.is_dir():
                yield from _list_folder(path)
            elif path.is_file():
                yield from _list_archive(path, spool_path, spool)
            else:
                raise DataError(f"{path}: no such folder or archive")


def _list_folder(top: Path) -> Iterator[tuple[str, tuple[str, ...], _File | None]]:
    # With `prepare folder images/train images/test` the given folders are the splits.
    prefix = (top.resolve().name,) if top.resolve().name in _SPLITS else ()

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}") from error

    for folder, folders, files in os.walk(top, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [path for path in (Path(folder, name) for name in folders) if path.is_symlink()]
        if links:
            raise DataError(f"{links[0]}: is a link, which is not followed; replace it by the folder or delete it")
        parts = prefix + Path(folder).relative_to(top).parts
        yield folder, parts, None
        for file in files:
            path = Path(folder, file)
            yield str(path), (*parts, file), _File(str(path), path)


def _list_archive(path: Path, spool_path: Path, spool: BinaryIO) -> Iterator[tuple[str, tuple[str, ...], _File | None]]:
    last_name = ""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = f"{path}: {member.name}"
                parts = PurePosixPath(member.name).parts
                if ".." in parts or PurePosixPath(member.name).is_absolute():
                    raise DataError(f"{name}: points outside the archive; refused")
                last_name = member.name
                if member.isdir():
                    yield name, parts, None
                    continue
                content = archive.extractfile(member) if member.isreg() else None
                if content is None:
                    raise DataError(f"{name}: is a link or a device; refused")
                offset = spool.tell()
                shutil.copyfileobj(content, spool)
                yield name, parts, _File(name, spool_path, offset, spool.tell() - offset)
            assert archive.fileobj is not None
            _check_end(archive.fileobj.read)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # a problem of the disk, not of the archive
            raise
        where = f" in or after {last_name}" if last_name else ", or not a tar archive"
        raise DataError(f"{path}: is damaged or truncated{where}; copy or download it again") from error


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
