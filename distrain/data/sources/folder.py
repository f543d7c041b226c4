"""People's own images: one folder per class under train/ and test/ (and val/), or classes alone, as folders on disk
or straight from tar archives. Nothing of an archive is unpacked under the names it brings: the bytes of its regular
files go to one spool file.
"""

from __future__ import annotations

import io
import lzma
import os
import shutil
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from distrain.data.sources import UnreadableError
from distrain.errors import DataError

_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class _File:
    """The bytes of one image: a stretch of a file, or all of it (length -1). A folder has no file."""

    name: str
    path: Path
    offset: int = 0
    length: int = -1


class Folder:
    """Images in class folders, resized to cover `image_size` and cropped to its middle, as RGB."""

    def __init__(self, paths: Sequence[Path], image_size: int, work: Path) -> None:
        """List the folders and archives; spool the archives to `work`.

        Raises:
            DataError: a path that is missing or no archive, a member that is refused, a class with no image.
        """
        self.image_shape = (image_size, image_size, 3)
        if len({path.resolve() for path in paths}) < len(paths):
            raise DataError("a folder or archive is named twice; each image would be in the data set twice")
        found: dict[tuple[str, str], list[_File]] = {}
        for name, parts, file in _listing(paths, work):
            images = found.setdefault(_place(name, parts, is_file=file is not None), [])
            if file is not None:
                images.append(file)
        found.pop(("", ""), None)
        _check(found, paths)
        self.classes = sorted({name for _, name in found})
        _check_names(self.classes)
        self._files: dict[str, list[_File]] = {}
        self.labels: dict[str, NDArray[np.int64]] = {}
        for split in [s for s in _SPLITS if any(part == s for part, _ in found)]:
            by_class = [sorted(found[split, name], key=lambda file: file.name) for name in self.classes]
            self._files[split] = [file for files in by_class for file in files]
            self.labels[split] = np.repeat(np.arange(len(by_class)), [len(files) for files in by_class])

    def name(self, split: str, index: int) -> str:
        """The file's path, as the folder or archive has it."""
        return self._files[split][index].name

    def load(self, split: str, index: int) -> NDArray[np.uint8]:
        """Decode one image: uint8 [image_size, image_size, 3].

        Raises:
            UnreadableError: not an image, damaged, of more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, or of pixels
                that have no known white.
        """
        file = self._files[split][index]
        if not file.path.is_file():  # a pipe would never end
            raise UnreadableError("not a file")
        try:
            with file.path.open("rb") as stream:
                stream.seek(file.offset)
                data = stream.read(file.length)
        except OSError as error:
            raise UnreadableError(str(error)) from error
        return read_image(data, self.image_shape)


def read_image(data: bytes, image_shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """An image file's content as uint8 [H, W, C], C 1 or 3: resized to cover it, and cropped to its middle.

    Raises:
        UnreadableError: as `Folder.load`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                return _fitted(image, *image_shape)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError("not an image of a known format") from error
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        raise UnreadableError(str(error)) from error


def _fitted(image: Image.Image, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # PIL would clip these to 0 … 255
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.mode in ("I", "F"):
        raise ValueError(f"pixels of PIL's mode {upright.mode}; convert them to 8 bits")
    upright = upright.convert("RGB" if channels == 3 else "L")
    if upright.size != (width, height):
        upright = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(upright).reshape(height, width, channels)


def _place(name: str, parts: tuple[str, ...], is_file: bool) -> tuple[str, str]:
    """(split, class) of a file or folder; ("", "") for what belongs to no class."""
    if any(part.startswith(".") for part in parts):
        return "", ""
    depth = 1 if is_file else 0  # a file needs its own name behind the class
    for at, part in enumerate(parts[:2]):
        if part in _SPLITS:
            if len(parts) > at + 1 + depth:
                return part, parts[at + 1]
            if is_file:
                raise DataError(f"{name}: lies in no class folder; move or delete it")
            return "", ""
    return ("", parts[0]) if len(parts) > depth else ("", "")


def _check(found: dict[tuple[str, str], list[_File]], paths: Sequence[Path]) -> None:
    """Classes outside train/, val/ and test/ become train, where there are no such folders; none may be empty."""
    where = ", ".join(str(path) for path in paths)
    if not found:
        raise DataError(f"{where}: no class folders; put images into train/CLASS/ and test/CLASS/")
    loose = [key for key in found if not key[0]]
    if loose and len(loose) == len(found):
        for key in loose:
            found["train", key[1]] = found.pop(key)
    else:
        # Beside train/ and test/ only what holds no image is passed over (an archive's top folder, say).
        for key in loose:
            files = found.pop(key)
            if files:
                raise DataError(f"{files[0].name}: lies outside train/, val/ and test/; move or delete it")
    splits = [split for split in _SPLITS if any(part == split for part, _ in found)]
    if "train" not in splits:
        raise DataError(f"{where}: has {' and '.join(splits)} but no train/")
    names = sorted({name for _, name in found})
    if len(names) == 1:
        raise DataError(
            f"{where}: one class alone, {names[0]!r}; class folders go right into the folder or archive that is named,"
            " or into its train/ and test/"
        )
    for name in names:
        for split in splits:
            if not found.get((split, name)):
                raise DataError(f"{where}: class {name!r} has no image in {split}/; add some or delete the folder")


def _check_names(classes: Sequence[str]) -> None:
    """Bytes that are no UTF-8 could not be written down after hours of preparing; others would break a terminal."""
    for name in classes:
        if not name.isprintable():
            raise DataError(f"class {name!r}: its folder's name has letters that no screen shows; rename it")


def _listing(paths: Sequence[Path], work: Path) -> Iterator[tuple[str, tuple[str, ...], _File | None]]:
    """(name for messages, path parts, file or None for a folder) of everything in folders and archives."""
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
    # `prepare folder images/train images/test` names the splits themselves.
    prefix = (top.resolve().name,) if top.resolve().name in _SPLITS else ()

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}") from error

    for folder, folders, files in os.walk(top, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [path for path in (Path(folder, name) for name in folders) if path.is_symlink()]
        if links:
            raise DataError(f"{links[0]}: is a link, which is not followed; put the folder itself there or delete it")
        parts = prefix + Path(folder).relative_to(top).parts
        yield folder, parts, None
        for file in files:
            path = Path(folder, file)
            yield str(path), (*parts, file), _File(str(path), path)


def _list_archive(path: Path, spool_path: Path, spool: BinaryIO) -> Iterator[tuple[str, tuple[str, ...], _File | None]]:
    last = ""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = f"{path}: {member.name}"
                parts = PurePosixPath(member.name).parts
                if ".." in parts or PurePosixPath(member.name).is_absolute():
                    raise DataError(f"{name}: leads out of the archive's folder; refused")
                last = member.name
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
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the archive's
            raise
        where = f" in or behind {last}" if last else ", or no tar archive"
        raise DataError(f"{path}: is damaged or cut short{where}; copy or download it again") from error


def _check_end(read: Callable[[int], bytes]) -> None:
    """tarfile takes a cut or damaged header for the end; an archive ends with two blocks of zeros, of which it has
    read one. Reading on also lets gzip compare its checksum.
    """
    zeros = 0
    while data := read(2**20):
        if data.strip(b"\0"):
            raise tarfile.ReadError("damaged, or more behind its end")
        zeros += len(data)
    if zeros < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("cut off")
