"""Classes of labels as they are in tar files: numbers or names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrain import files
from distrain.errors import ConfigError, DataError
from distrain.text import named, plural, printable, shown

Label = int | str
_MAX_CLASSES = 2**20
_MAX_BYTES = 2**26
"""Maximum size of a file of class names."""


def read_classes(path: Path) -> list[str]:
    """Return the class names of a file, one a line; a line's number, from 0, is the number of the class.

    Raises:
        ConfigError: it cannot be read, a line is empty, or a name occurs twice.
    """
    where = f"--classes {printable(path)}"
    try:
        lines = files.read(path, _MAX_BYTES).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}; give a text file with a class name in each line") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: is not UTF-8; give a text file with a class name in each line") from None
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise ConfigError(f"{where}: has no line; write a class name in each")
    numbers: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise ConfigError(f"{where}: line {number} is empty; each line is the name of a class")
        if name in numbers:
            raise ConfigError(f"{where}: lines {numbers[name]} and {number} are both {shown(name)}; names differ")
        numbers[name] = number
    return names


def to_classes(
    labels: Mapping[str, Sequence[Label]], names: Sequence[str] | None, describe: Callable[[str, int], str]
) -> tuple[list[str], dict[str, NDArray[np.int64]]]:
    """Return the names of the classes, and the class of each sample of each split: int64 [N].

    Args:
        labels: label of each sample, for each split.
        names: names of the classes (`--classes`). None: the numbers 0 … largest, or the sorted names, of train.
        describe: returns the name of a sample for messages: split, number.

    Raises:
        DataError: labels are partly numbers and partly names, or one is not a class.
    """
    distinct = {split: dict.fromkeys(of_split) for split, of_split in labels.items()}
    kinds = {type(label) for of_split in distinct.values() for label in of_split}

    def example(matches: Callable[[Label], bool]) -> str:
        for split, of_split in labels.items():
            for number, label in enumerate(of_split):
                if matches(label):
                    return f"{describe(split, number)} has {shown(label)}"
        raise AssertionError("no sample has such a label")

    if len(kinds) > 1:
        raise DataError(
            f"labels are partly numbers and partly names: {example(lambda label: isinstance(label, int))},"
            f" {example(lambda label: isinstance(label, str))}; choose another --label, or write one kind alone"
        )
    classes = list(names) if names is not None else _classes(distinct["train"], example)
    number_of: dict[Label, int] = (
        {name: number for number, name in enumerate(classes)}
        if kinds == {str}
        else dict(enumerate(range(len(classes))))
    )
    for split, of_split in distinct.items():
        unknown = [label for label in of_split if label not in number_of]
        if unknown:
            raise DataError(_unknown(split, unknown, classes, names is not None, example(unknown[0].__eq__)))
    return classes, {
        split: np.fromiter((number_of[label] for label in of_split), np.int64, len(of_split))
        for split, of_split in labels.items()
    }


def _classes(labels: Iterable[Label], example: Callable[[Callable[[Label], bool]], str]) -> list[str]:
    texts = [label for label in labels if isinstance(label, str)]
    if texts:
        return sorted(texts)
    numbers = [label for label in labels if isinstance(label, int)]
    for wrong in (min(numbers), max(numbers)):
        if not 0 <= wrong < _MAX_CLASSES:
            raise DataError(
                f"{example(wrong.__eq__)} as its label; labels that are numbers should be 0 … {_MAX_CLASSES - 1:,}:"
                " choose another --label"
            )
    return [str(number) for number in range(max(numbers) + 1)]


def _unknown(split: str, unknown: Sequence[Label], classes: Sequence[str], from_file: bool, example: str) -> str:
    count = f"{plural(len(unknown), 'label')} of {split} ({named(unknown, shown)})"
    if not from_file:
        return f"{count} have no sample in train: {example}; add such samples to train, or remove these from {split}"
    hint = ""
    if isinstance(unknown[0], int):
        hint = f", whose classes are 0 … {len(classes) - 1}"
        if list(unknown) == [len(classes)]:
            hint += "; if labels are counted from 1, add a first line to it, such as: unused"
    return f"{count}: not in --classes{hint}: {example}; correct the file, or choose another --label"
