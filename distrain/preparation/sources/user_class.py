"""The user's own class as a source. All differences from the protocol `Source` are reported in one message."""

from __future__ import annotations

import operator
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrain import plugins
from distrain.errors import ConfigError, DataError
from distrain.preparation.sources import UnreadableError

_SPLITS = ("train", "val", "test")


class UserSource:
    """A source whose images come from the user's class `package.module:Class`. Each image is checked."""

    def __init__(self, name: str, arguments: Mapping[str, str]) -> None:
        """Import the class, call it with the arguments and check the attributes of the object.

        Raises:
            ConfigError: there is no such class, its code raises, or it does not implement `Source`.
        """
        self._subject = f"prepare source {name}"
        self._source: Any = plugins.make(self._subject, name, **arguments)
        with plugins.user_code(self._subject):  # attributes may be properties
            problems = list(_check(self._source)) or list(_check_pickle(self._source))
            if not problems:
                self.classes: list[str] = self._source.classes
                self.image_shape = tuple(map(operator.index, self._source.image_shape))
                self.labels = {split: np.array(labels, np.int64) for split, labels in dict(self._source.labels).items()}
        if problems:
            header = f"{self._subject}: does not implement distrain.preparation.sources.Source:"
            raise ConfigError("\n  ".join([header, *problems]))

    def name(self, split: str, index: int) -> str:
        """Return the class's name of a sample, or its index if that fails: the name is needed for an error message."""
        try:
            return str(self._source.name(split, index))
        except Exception as error:
            return f"{split} sample {index} (its name() raises {plugins.describe(error)})"

    def load(self, split: str, index: int) -> NDArray[np.uint8]:
        """Return one image: uint8 [H, W, C].

        Raises:
            UnreadableError: the class raises it.
            DataError: the class raises another exception, or returns something else than such an image.
        """
        try:
            image = self._source.load(split, index)
        except (UnreadableError, MemoryError):
            raise
        except plugins.CATCHABLE as error:
            raise self._error(split, index, f"load() raises {plugins.describe(error)}") from error
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != self.image_shape:
            actual = _array(image) if isinstance(image, np.ndarray) else type(image).__name__
            raise self._error(split, index, f"load() returns {actual}, should return uint8 {list(self.image_shape)}")
        return image

    def _error(self, split: str, index: int, reason: str) -> DataError:
        return DataError(f"{self._subject}: {self.name(split, index)}: {reason}")


def _check(source: Any) -> Iterator[str]:
    """Yield one line for each attribute of a source that is missing or wrong."""
    missing = [name for name in ("classes", "image_shape", "labels", "name", "load") if not hasattr(source, name)]
    if missing:
        yield f"has no {', '.join(missing)}"
    for name in ("name", "load"):
        if name not in missing and not callable(getattr(source, name)):
            yield f"{name}: should be a method, called with split and index"
    if "classes" not in missing:
        yield from _check_classes(source.classes)
    if "image_shape" not in missing:
        yield from _check_shape(source.image_shape)
    if "labels" not in missing:
        yield from _check_labels(source.labels)


def _check_classes(classes: Any) -> Iterator[str]:
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        yield f"classes: should be a list of names (str), is {_shown(classes)}"
    elif len(set(classes)) < len(classes):
        yield f"classes: {max(classes, key=classes.count)!r} is listed twice"


def _check_shape(shape: Any) -> Iterator[str]:
    try:
        sides = [operator.index(side) for side in shape]
    except TypeError:
        sides = []
    if len(sides) != 3 or min(sides) < 1:
        yield f"image_shape: should be (height, width, channels), is {_shown(shape)}"


def _check_labels(labels: Any) -> Iterator[str]:
    if not isinstance(labels, Mapping):
        yield f"labels: should map each split to its samples' labels, is {_shown(labels)}"
        return
    if "train" not in labels:
        yield "labels: has no split 'train'"
    for split, values in labels.items():
        if split not in _SPLITS:
            yield f"labels: has a split {split!r}, should have only train, val and test"
            continue
        array = np.asarray(values)
        if array.dtype.kind not in "iu" or array.ndim != 1:
            yield f"labels[{split!r}]: should be numbers of classes, int64 [N], are {_array(array)}"


def _check_pickle(source: Any) -> Iterator[str]:
    """Yield the reason why a source cannot be pickled, if there is one. The content of arrays is not copied."""

    class NullFile:
        def write(self, data: Any) -> int:
            return len(data)

    try:
        pickle.Pickler(NullFile(), 5, buffer_callback=lambda _buffer: None).dump(source)
    except Exception as error:
        yield f"cannot be sent to worker processes ({plugins.describe(error)}); open files in load(), not before"


def _array(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
