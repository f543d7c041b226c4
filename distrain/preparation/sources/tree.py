"""One given folder or archive: its files and folders, what is passed over, and the folders that have splits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from distrain.preparation.sources.archives import File, Member
from distrain.preparation.sources.names import DOT, is_image, never_has_images, passed_over, split_of
from distrain.text import printable

Parts = tuple[str, ...]
"""The parts of a path below the given folder or archive."""

_REPLACED = "a later member of the archive has the same path"


@dataclass
class Tree:
    """A given folder or archive, without what is passed over."""

    path: str
    name: str
    """The last part of the path, which may be that of a split."""
    is_archive: bool
    files: dict[Parts, File] = field(default_factory=dict)
    folders: list[Parts] = field(default_factory=list)
    parents: list[Parts] = field(default_factory=list)
    """The folders that have splits."""
    passed_over: dict[str, list[str]] = field(default_factory=dict)
    """Reason → paths, for messages."""
    warnings: list[str] = field(default_factory=list)

    @property
    def split(self) -> str | None:
        """The split that the whole tree is, because of its name."""
        return None if self.parents else split_of(self.name)

    def label(self, parts: Sequence[str] = ()) -> str:
        """Return the path of something in it, for messages."""
        if not parts:
            return printable(self.path)
        inside = "/".join(parts)
        return printable(f"{self.path}: {inside}" if self.is_archive else os.path.join(self.path, inside))

    def split_folders(self) -> list[Parts]:
        """Return the folders that are splits: those with a split's name in a parent, and folders with files below."""
        folders = set()
        for parent in self.parents:
            depth = len(parent)
            for parts in self.files:
                if len(parts) > depth + 2 and parts[:depth] == parent and split_of(parts[depth]):
                    folders.add(parts[: depth + 1])
        return sorted(folders)

    def pass_over(self, reason: str, label: str) -> None:
        """Record that something is passed over."""
        self.passed_over.setdefault(reason, []).append(label)


def read_tree(path: str, name: str, is_archive: bool, members: Iterable[Member]) -> Tree:
    """Return the tree of a folder's or an archive's members."""
    tree = Tree(path, name, is_archive)
    hidden: dict[Parts, str] = {}
    images: dict[Parts, int] = {}
    for parts, file in members:
        reason, length = passed_over(parts)
        if reason:
            hidden[parts[:length]] = reason
            if file is not None and length < len(parts) and is_image(parts[-1]) and not parts[-1].startswith("."):
                images[parts[:length]] = images.get(parts[:length], 0) + 1
        elif file is None:
            tree.folders.append(parts)
        else:
            if parts in tree.files:
                tree.pass_over(_REPLACED, tree.label(parts))
            tree.files[parts] = file
    for parts, reason in sorted(hidden.items()):
        tree.pass_over(reason, tree.label(parts))
        if reason == DOT and images.get(parts) and not never_has_images(parts[-1]):
            tree.warnings.append(
                f"{tree.label(parts)}: its name begins with a dot, so its images ({images[parts]:,}) are passed over;"
                " rename it if it is a class"
            )
    tree.parents = _parents(tree.files)
    return tree


def _parents(files: Iterable[Parts]) -> list[Parts]:
    """Return the folders that have splits: a folder with the name of a split, and a folder with files below it."""
    parents = set()
    for folder in {parts[:-1] for parts in files}:
        position = next((position for position, part in enumerate(folder[:-1]) if split_of(part)), None)
        if position is not None:
            parents.add(folder[:position])
    return sorted(parents)
