"""The user's own images: one folder per class, in train/ and test/ (and val/) or without splits.

They are read from folders or from tar and zip archives (`archives`). Which folders are splits and classes is decided by
their paths alone (`layout`); what was recognised is logged.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrain import address
from distrain.data.images import Decoding, read_image
from distrain.errors import DataError
from distrain.preparation.sources import UnreadableError
from distrain.preparation.sources.archives import File, Member, Spool, list_archive, read
from distrain.preparation.sources.duplicates import digest, equal_files
from distrain.preparation.sources.layout import Image, Layout, arrange, describe
from distrain.preparation.sources.names import never_has_images, other_kind, split_of
from distrain.preparation.sources.tree import Tree, read_tree
from distrain.text import plural, printable, shortened

log = logging.getLogger("distrain")

_COPIES = "repeated (delete the copies: one may be trained on, and another evaluated)"
_LEAK = "also in {} (delete them from one split: accuracy should not count images that were trained on)"
_CONTRADICTION = "also in another class (delete them from the wrong one)"


class Folder:
    """Images in class folders, as RGB, resized so that the shorter side is `image_size` and cropped to the centre."""

    def __init__(
        self,
        paths: Sequence[Path],
        image_size: int,
        work: Path,
        decoding: Decoding = Decoding(),  # noqa: B008 - frozen
    ) -> None:
        """List the images of folders and archives, and log what was recognised.

        The order of the samples depends on the paths below the class folders and on the images, not on the order or
        the names of the given paths. Images of compressed tars are copied to a file in `work`.

        Raises:
            DataError: a path is missing or not an archive, a member is refused, or the layout is ambiguous.
        """
        self.image_shape = (image_size, image_size, 3)
        self._decoding = decoding
        _check_paths(paths)
        spool = Spool(work / "spool")
        seen = _Seen(work)
        try:
            trees = [_tree(path, spool, seen) for path in paths]
        finally:
            spool.close()
        recognised = arrange(trees)
        self.classes = recognised.classes
        self._files: dict[str, list[File]] = {}
        self.labels: dict[str, NDArray[np.int64]] = {}
        for split in recognised.splits:
            by_class = [_in_order(recognised.images[split, name]) for name in self.classes]
            self._files[split] = [file for files in by_class for file in files]
            self.labels[split] = np.repeat(np.arange(len(by_class)), [len(files) for files in by_class])
        _log(recognised, trees)
        _warn_of_equal_files(self)

    def name(self, split: str, index: int) -> str:
        """Return the path of an image, with the archive's path in front if it is in one."""
        return self._files[split][index].name

    def load(self, split: str, index: int) -> NDArray[np.uint8]:
        """Decode one image: uint8 [image_size, image_size, 3].

        Raises:
            UnreadableError: the file is damaged or not an image, has more pixels than `--max-pixels`, or
                has pixels without a defined maximum.
        """
        file = self._files[split][index]
        data = read(file)
        try:
            return read_image(data, self.image_shape, self._decoding)
        except UnreadableError as error:
            suffix = other_kind(file.name)
            if suffix:
                raise UnreadableError(f"a {suffix} file, no image; move it out of the class folder") from error
            raise

    def files(self) -> Iterator[tuple[str, int, File]]:
        """Yield (split, class, file) of all images."""
        for split, files in self._files.items():
            yield from ((split, label, file) for label, file in zip(self.labels[split].tolist(), files, strict=True))


def _check_paths(paths: Sequence[Path]) -> None:
    """Check that all paths are folders or regular files, and none is in another one."""
    resolved: dict[Path, Path] = {}
    for path in paths:
        name = printable(path)
        if address.is_address(path):
            raise DataError(f"{name}: is an address; download it first, and give the folder or archive")
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise DataError(f"{name}: no such folder or archive ({error.strerror})") from error
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise DataError(f"{name}: is neither a folder nor an archive, but a pipe, socket or device; give a file")
        if path.resolve() in resolved:
            raise DataError(f"{name}: this folder or archive is given twice; each image would be in the data set twice")
        resolved[path.resolve()] = path
    for path, given in resolved.items():
        outer = next((parent for parent in path.parents if parent in resolved), None)
        if outer is not None:
            raise DataError(
                f"{printable(given)}: is inside {printable(resolved[outer])}, which is given too; each image"
                " would be in the data set twice. Give one of them"
            )


class _Seen:
    """The folders and archives that were listed: links and mounts may lead to one on two paths."""

    def __init__(self, work: Path) -> None:
        self._paths: dict[tuple[int, int], str] = {}
        self._above_work = {_identity(path) for path in work.resolve().parents}

    def add(self, path: str) -> bool:
        """Add a folder or archive; return whether it is above the folder that this command writes.

        Raises:
            DataError: it was listed before.
        """
        identity = _identity(path)
        if identity in self._paths:
            raise DataError(
                f"{printable(path)}: is the same as {printable(self._paths[identity])}; each image would be in the data"
                " set twice. Give one of them"
            )
        self._paths[identity] = path
        return identity in self._above_work


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _tree(path: Path, spool: Spool, seen: _Seen) -> Tree:
    name = path.name if split_of(path.name) else path.resolve().name
    is_archive = not path.is_dir()
    if is_archive:
        seen.add(str(path))
    return read_tree(str(path), name, is_archive, list_archive(path, spool) if is_archive else _list_folder(path, seen))


def _list_folder(top: Path, seen: _Seen) -> Iterator[Member]:
    """Yield the files and folders below a folder. Links to folders are refused, links to files are read."""
    pending: list[tuple[str, ...]] = [()]
    while pending:
        parts = pending.pop()
        folder = os.path.join(top, *parts)
        try:
            if not seen.add(folder):
                yield parts, None
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
            for entry in entries:
                below = (*parts, entry.name)
                if not entry.is_dir():
                    yield below, File(printable(entry.path), entry.path, _size(entry))
                elif never_has_images(entry.name):
                    yield below, None
                elif entry.is_symlink():
                    raise DataError(
                        f"{printable(entry.path)}: is a link, which is not followed; replace it by the folder or"
                        " delete it"
                    )
                else:
                    pending.append(below)
        except OSError as error:
            raise DataError(f"{printable(folder)}: {error.strerror}") from error


def _size(entry: os.DirEntry[str]) -> int:
    """Return the size of a regular file, -1 for anything else."""
    try:
        status = entry.stat()
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _in_order(images: Sequence[Image]) -> list[File]:
    """Return the files sorted by their paths below the class folder, and those of equal paths by their bytes."""

    def path(image: Image) -> str:
        return "/".join(image.parts)

    files: list[File] = []
    for _, group in groupby(sorted(images, key=path), path):
        same = [image.file for image in group]
        files += same if len(same) == 1 else sorted(same, key=lambda file: (file.size, digest(file) or b""))
    return files


def _log(recognised: Layout, trees: Sequence[Tree]) -> None:
    for tree in trees:
        for warning in tree.warnings:
            log.warning("%s", warning)
    log.info("%s", "\n  ".join(describe(recognised, trees)))


def _warn_of_equal_files(source: Folder) -> None:
    """Warn of images that are there several times: in a split, in two splits, in two classes."""
    images = list(source.files())
    pairs: dict[tuple[str, str], list[str]] = defaultdict(list)
    for group in equal_files([file for *_, file in images]):
        first_split, first_label, first_file = images[group[0]]
        first_of: dict[str, File] = {}
        for split, label, file in (images[index] for index in group):
            if split in first_of:
                pairs[_COPIES, split].append(f"{file.name} equals {first_of[split].name}")
            elif first_of:
                pairs[_LEAK.format(first_split), split].append(f"{file.name} equals {first_file.name}")
            first_of.setdefault(split, file)
            if label != first_label:
                pairs[_CONTRADICTION, split].append(f"{file.name} equals {first_file.name}")
    for (what, split), names in pairs.items():
        count = f"{plural(len(names), 'image')} of {split}"
        log.warning("%s", f"{count} {what}: {', '.join(shortened(names, 2))}")
