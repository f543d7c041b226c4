"""The layout of image files: which folders are splits and classes. Pure functions of paths.

In each given folder or archive, a *split* is a folder with the name of one (`names.split_of`) and folders below it;
these are its classes. All splits have one parent, at any depth. If there are none, the folder or archive is itself a
split if it has the name of one; otherwise its folders are the classes, and their images become `train`. Images in
folders below a class belong to it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from distrain.errors import DataError
from distrain.preparation.sources.archives import File
from distrain.preparation.sources.names import (
    classes_in,
    is_archive,
    is_image,
    normal,
    other_kind,
    similar_splits,
    split_of,
)
from distrain.preparation.sources.tree import Parts, Tree
from distrain.text import plural, printable, shortened

SPLITS = ("train", "val", "test")

_LABEL_FOLDERS = {"labels", "label", "annotations", "annotation"}
_MAX_NAME_BYTES = 255  # of Linux's file systems
_DETECTION = "data sets for object detection have their labels in files; distrain needs one class for each image"
_WRITE_A_SOURCE = "write a source (prepare source, docs/extending.md)"
OUTSIDE = "no images, and outside the class folders"
_EMPTY = "empty folders"


@dataclass(frozen=True, slots=True)
class Image:
    """An image file and its path below its class folder."""

    parts: Parts
    file: File


@dataclass
class Layout:
    """The images of each split and class, and how they were recognised."""

    where: str
    """All given paths."""
    images: dict[tuple[str, str], list[Image]] = field(default_factory=dict)
    """Keys are (split, class); the list of a class folder without images is empty."""
    folders: dict[str, list[str]] = field(default_factory=dict)
    """The folders that were recognised as each split."""
    spellings: dict[str, set[str]] = field(default_factory=dict)
    """The names of the folders of each class; Unicode has several forms of some."""

    @property
    def splits(self) -> list[str]:
        """The splits, in the usual order."""
        return [split for split in SPLITS if any(part == split for part, _ in self.images)]

    @property
    def classes(self) -> list[str]:
        """The names of all classes, sorted."""
        return sorted({name for _, name in self.images})


def arrange(trees: Sequence[Tree]) -> Layout:
    """Return the splits and classes of all trees.

    Raises:
        DataError: the layout is ambiguous, images are outside classes, or a class lacks images.
    """
    layout = Layout(_list([tree.label() for tree in trees], 4))
    _check_not_empty(trees, layout.where)
    for tree in trees:
        _check_splits(tree)
    _check_together(trees)
    for tree in trees:
        _assign(tree, layout)
    if "" in layout.folders:  # no tree has splits
        layout.images = {("train", name): images for (_, name), images in layout.images.items()}
        layout.folders = {"train": layout.folders[""]}
    _check_classes(layout, trees)
    return layout


def describe(layout: Layout, trees: Sequence[Tree]) -> Iterator[str]:
    """Yield the lines that say what was recognised and what was passed over."""
    classes = layout.classes
    yield f"{layout.where}: {len(classes)} classes: {_list(classes, 10)}"
    for split in layout.splits:
        counts = {name: len(layout.images[split, name]) for name in classes}
        total = plural(sum(counts.values()), "image")
        yield f"{split}: {total}, {_counts(counts)}; from {_list(layout.folders[split], 3)}"
    if "test" not in layout.splits:
        yield "no test/: --test-fraction is the part of train that becomes test"
        single = [name for name in classes if len(layout.images["train", name]) == 1]
        if single:
            yield f"one image alone cannot be in train and in test; add some to {_list(single, 3)}, or a folder test/"
    similar: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        similar[name.strip().casefold()].append(repr(name))
    for quoted in similar.values():
        if len(quoted) > 1:
            yield f"classes that differ only in capital letters or spaces: {_list(quoted, 3)}"
    for name, spellings in layout.spellings.items():
        if len(spellings) > 1:
            yield f"class {name!r}: folders with this name in different Unicode forms are one class"
    deep = [image.file.name for images in layout.images.values() for image in images if len(image.parts) > 1]
    if deep:
        yield f"images in folders below a class belong to it: {len(deep):,} ({_list(deep, 2)})"
    passed_over: dict[str, list[str]] = defaultdict(list)
    for tree in trees:
        for reason, names in tree.passed_over.items():
            passed_over[reason] += names
    for reason, names in passed_over.items():
        yield f"passed over, {reason}: {len(names):,} ({_list(names, 3)})"


def _counts(counts: dict[str, int]) -> str:
    """Return the number of images of each class, or of the smallest and largest."""
    smallest, largest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[smallest] == counts[largest]:
        return f"{counts[smallest]:,} per class"
    if len(counts) <= 5:
        return ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"{counts[smallest]:,} ({smallest}) to {counts[largest]:,} ({largest}) per class"


def _list(items: Sequence[str], limit: int) -> str:
    return ", ".join(shortened(items, limit))


# Splits and classes


def _assign(tree: Tree, layout: Layout) -> None:
    """Add a tree's images to their classes."""
    loose: list[Parts] = []
    for parts, file in tree.files.items():
        split, below = _split_and_below(tree, parts)
        if split is not None and len(below) > 1:
            layout.spellings.setdefault(normal(below[0]), set()).add(below[0])
            layout.images.setdefault((split, normal(below[0])), []).append(Image(below[1:], file))
        elif is_image(parts[-1]):
            loose.append(parts)
        else:
            tree.pass_over(OUTSIDE, tree.label(parts))
    if loose:
        raise DataError(_loose(tree, sorted(loose)))
    not_empty = {parts[:length] for parts in {parts[:-1] for parts in tree.files} for length in range(len(parts) + 1)}
    for parts in tree.folders:
        split, below = _split_and_below(tree, (*parts, ""))
        if split is not None and len(below) == 2 and (split or not split_of(below[0])):
            layout.images.setdefault((split, normal(below[0])), [])
        elif parts not in not_empty:
            tree.pass_over(_EMPTY, tree.label(parts))
    for parts in tree.split_folders():
        layout.folders.setdefault(split_of(parts[-1]) or "", []).append(tree.label(parts))
    if not tree.parents:
        layout.folders.setdefault(tree.split or "", []).append(tree.label())


def _split_and_below(tree: Tree, parts: Parts) -> tuple[str | None, Parts]:
    """Return the split of a path and the path below the split's folder.

    The split is "" if the tree has none, and None if only this path is in none.
    """
    if not tree.parents:
        return tree.split or "", parts
    depth = len(tree.parents[0])
    if parts[:depth] != tree.parents[0] or len(parts) < depth + 2:
        return None, parts
    return split_of(parts[depth]), parts[depth + 1 :]


# Layouts that are refused


def _check_not_empty(trees: Sequence[Tree], where: str) -> None:
    """Check that there are images, or at least files in folders."""
    files = [parts for tree in trees for parts in tree.files]
    if any(is_image(parts[-1]) or (len(parts) > 1 and not is_archive(parts[-1])) for parts in files):
        return
    names = sorted({parts[-1] for parts in files})
    archives = [printable(name) for name in names if is_archive(name)]
    if "manifest.json" in names:
        raise DataError(f"{where}: seems to be a prepared data set already; train on it with data.dir={where}")
    if archives:
        raise DataError(
            f"{where}: has archives ({_list(archives, 3)}), which are not opened; unpack each into a folder with the"
            " name of its class or split, and give the folder above"
        )
    passed_over = [label for tree in trees for labels in tree.passed_over.values() for label in labels]
    but = f" (passed over: {_list(passed_over, 3)})" if passed_over else ""
    raise DataError(f"{where}: no class folders; put images into train/CLASS/ and test/CLASS/{but}")


def _check_splits(tree: Tree) -> None:
    """Check that the splits of a tree have one parent, one folder each, and that classes are not splits."""
    if len(tree.parents) > 1:
        names = [tree.label(parent) for parent in tree.parents]
        raise DataError(
            f"{tree.label()}: {len(names)} folders have splits (train/, val/ or test/): {_list(names, 4)}. Images might"
            " be there several times, or in two splits; give only the right one. If these folders are classes, put the"
            " splits above them: train/CLASS/"
        )
    folders: dict[str | None, list[str]] = defaultdict(list)
    for parts in tree.split_folders():
        folders[split_of(parts[-1])].append(tree.label(parts))
    for split, names in folders.items():
        if len(names) > 1:
            raise DataError(f"{_list(names, 4)}: are both names of the split {split}; merge them, or move one away")
    _check_inner_splits(tree)
    if not tree.parents and not tree.split:
        _check_plain(tree)


def _check_inner_splits(tree: Tree) -> None:
    """Check that not all folders of a split are splits, such as training_set/training_set/CLASS/."""
    for folder in tree.split_folders():
        depth = len(folder)
        below = {parts[depth] for parts in tree.files if parts[:depth] == folder and len(parts) > depth + 1}
        with_folders = {parts[depth] for parts in tree.files if parts[:depth] == folder and len(parts) > depth + 2}
        same = len(below) == 1 and split_of(min(below)) == split_of(folder[-1])
        if same or (len(below) > 1 and below == with_folders and all(map(split_of, below))):
            inner = " ".join(tree.label((*folder, name)) for name in sorted(below))
            cure = "pack these alone" if tree.is_archive else f"give the inner folders: {inner}"
            raise DataError(f"{tree.label(folder)}: has only folders that are splits themselves; {cure}")


def _check_plain(tree: Tree) -> None:
    """Check that the class folders of a tree without splits are not splits, and have none."""
    images = [parts for parts in tree.files if is_image(parts[-1])]
    below = sorted({parts[:2] for parts in images if len(parts) > 2 and split_of(parts[1])})
    if below:
        names = [tree.label(parts) for parts in below]
        labels = any(parts[0].lower() in _LABEL_FOLDERS for parts in tree.files)
        cure = _DETECTION if labels else "put them above: train/CLASS/, test/CLASS/"
        raise DataError(f"{_list(names, 3)}: splits are below the classes; {cure}")
    classes = {parts[0] for parts in images if len(parts) > 1}
    splits = sorted(name for name in classes if split_of(name))
    if splits and len(splits) == len(classes):
        raise DataError(_loose(tree, sorted(parts for parts in images if parts[0] in splits)))
    similar = similar_splits(classes)
    if similar:
        raise DataError(f"{tree.label()}: {_list(similar, 4)} seem to be splits, not classes; call them train and test")
    _warn_of_repeated_folders(tree, images)
    if not splits:
        return
    raise DataError(
        f"{tree.label((splits[0],))}: has the name of a split, but is beside the classes. If it is a class, put all"
        f" class folders into train/, such as train/{printable(splits[0])}/; if it is a split, put its classes into it"
    )


def _warn_of_repeated_folders(tree: Tree, images: Sequence[Parts]) -> None:
    """Warn if the classes consist of folders with the same names, such as amazon/chair/ and webcam/chair/."""
    folders: dict[str, set[str]] = defaultdict(set)
    for parts in images:
        folders[parts[0]].add(parts[1] if len(parts) > 2 else "")
    counts = Counter(name for names in folders.values() for name in names)
    repeated = {name for name, count in counts.items() if count > 1}
    if len(repeated) > 1 and "" not in counts and all(names & repeated for names in folders.values()):
        outer = _list([printable(name) for name in sorted(folders)], 4)
        inner = _list([printable(name) for name in sorted(repeated)], 4)
        tree.warnings.append(
            f"{tree.label()}: {outer} become the classes, but have the same folders {inner}; if those are the classes,"
            " give the folders above them one by one"
        )


def _check_together(trees: Sequence[Tree]) -> None:
    """Check that several trees fit together."""
    plain = [tree for tree in trees if not tree.parents and not tree.split]
    if plain and len(plain) < len(trees):
        other = next(tree for tree in trees if tree not in plain)
        raise DataError(
            f"{plain[0].label()}: has no train/, val/ or test/, as {other.label()} has or is; put its class folders"
            " into such a folder, or prepare it alone"
        )
    similar = similar_splits(tree.name for tree in plain)
    if similar:
        raise DataError(
            f"{_list(similar, 4)}: seem to be splits, but have no train/ or test/ in them; call them train and test, or"
            " train.tar and test.tar"
        )


def _loose(tree: Tree, loose: list[Parts]) -> str:
    """Return the message for images that are in no class folder."""
    first = loose[0]
    others = f" ({len(loose):,} such images)" if len(loose) > 1 else ""
    head = f"{tree.label(first)}: is not in a class folder{others}; move or delete it"
    if "\\" in first[-1] and tree.is_archive:
        return f"{tree.label(first)}: backslashes are not folders, as some Windows programs have it; pack it again"
    classes = classes_in(parts[-1] for parts in loose)
    if classes:
        names = _list([f"{name}/" for name in classes], 3)
        return f"{head}. If its name begins with its class, move all into folders of the classes ({names})"
    split = None
    if tree.parents:
        depth = len(tree.parents[0])
        split = first[depth] if len(first) > depth + 1 and first[:depth] == tree.parents[0] else ""
        if not split_of(split):
            splits = " ".join(tree.label(parts) for parts in tree.split_folders())
            return (
                f"{tree.label(first)}: is not in train/, val/ or test/{others}; move or delete it. If these alone are"
                f" meant, give them: {splits}"
            )
    if split and split_of(split) != "train":
        return f"{head}, or move {printable(split)}/ away: images without a class cannot be evaluated"
    if any(parts[-1].endswith(".cls") for parts in tree.files):
        return f"{head}. WebDataset shards have no class folders: use `distrain prepare webdataset`"
    if all(len(parts) == 1 for parts in tree.files):
        head = f"{tree.label(first)}: no class folders; put images into train/CLASS/ and test/CLASS/{others}"
    return f"{head}. If the classes are in a table, {_WRITE_A_SOURCE} that reads it"


def _check_classes(layout: Layout, trees: Sequence[Tree]) -> None:
    """Check the names of the classes, and that all splits have images of all classes."""
    names = layout.classes
    for name in names:
        if not name.isprintable():  # it could break a terminal, or could not be written to the manifest
            raise DataError(f"class {name[:80]!r}: its folder's name has characters that cannot be printed; rename it")
        size = len(name.encode())
        if size > _MAX_NAME_BYTES:
            raise DataError(
                f"class {name[:40]!r}…: has a name of {size} bytes; rename it ({_MAX_NAME_BYTES} are allowed)"
            )
    if "train" not in layout.splits:
        splits = " and ".join(layout.splits)
        folders = _list([folder for split in layout.splits for folder in layout.folders.get(split, [])], 3)
        raise DataError(
            f"{layout.where}: has {splits} but no train/; add it, or rename what is not meant as a split ({folders})"
        )
    _check_labels_in_files(layout)
    if len(names) == 1:
        raise DataError(_single_class(layout, trees))
    for split in layout.splits:
        missing = [name for name in names if not layout.images.get((split, name))]
        if missing:
            raise DataError(_missing(layout, split, missing))


def _check_labels_in_files(layout: Layout) -> None:
    """Check that no class consists of files such as labels/1.txt only."""
    labels_first = sorted(layout.images.items(), key=lambda item: item[0][1].lower() not in _LABEL_FOLDERS)
    for (split, name), images in labels_first:
        kinds = {other_kind(image.parts[-1]) for image in images}
        if not kinds or None in kinds:
            continue
        suffixes = _list(sorted(kind for kind in kinds if kind), 3)
        if name.lower() in _LABEL_FOLDERS:
            raise DataError(
                f"{layout.where}: class {name!r} has only {suffixes} files; {_DETECTION}. If it has, {_WRITE_A_SOURCE}"
                " that reads them"
            )
        raise DataError(
            f"{layout.where}: class {name!r} has no image in {split}/, only {suffixes} ({images[0].file.name}); move or"
            " delete its folder"
        )


def _single_class(layout: Layout, trees: Sequence[Tree]) -> str:
    name = layout.classes[0]
    head = (
        f"{layout.where}: has only one class, {name!r}; put the class folders directly into the given folder or"
        " archive, or into its train/ and test/"
    )
    below = sorted({parts[1] for tree in trees for parts in tree.files if len(parts) > 2 and not tree.parents})
    if len(trees) == 1 and len(below) > 1:
        parent = trees[0].label((name,))
        cure = f"pack them with tar -C {name} ." if trees[0].is_archive else f"give {parent}"
        return f"{head}. If {_list([printable(part) for part in below], 3)} are the classes, {cure}"
    return f"{head}. If the classes are in a table, {_WRITE_A_SOURCE} that reads it"


def _missing(layout: Layout, split: str, missing: list[str]) -> str:
    name = missing[0]
    others = f" (nor have {len(missing) - 1} others)" if len(missing) > 1 else ""
    head = f"{layout.where}: class {name!r} has no image in {split}/{others}; add some or delete the folder"
    similar = [other for other in layout.classes if other.casefold() == name.casefold() and other != name]
    if similar:
        return f"{head}. It differs from {similar[0]!r} only in capital letters: are they one class?"
    present = [f"{part}/" for part in layout.splits if layout.images.get((part, name))]
    if present:
        head += f" of this class in {' and '.join(present)} too"
        head += f", or move {' and '.join(present) if split == 'train' else f'{split}/'} away"
    return head
