"""A class of the user's own as a source: whatever it lacks or does otherwise than `Source` says is one message."""

from __future__ import annotations

import operator
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrain import plugins
from distrain.data.sources import UnreadableError
from distrain.errors import ConfigError, DataError

_SPLITS = ("train", "val", "test")


class Own:
    """A class named `package.module:Class`, called with keyword arguments; each image that it gives is checked."""

    def __init__(self, name: str, arguments: Mapping[str, str]) -> None:
        """Import the class, call it and look at what it made.

        Raises:
            ConfigError: there is no such class, its code raises, or it does not fit `Source`.
        """
        self._asked = f"prepare source {name}"
        self._source: Any = plugins.make(self._asked, name, **arguments)
        with plugins.telling(self._asked):  # its attributes may be properties
            wrong = list(_wrong(self._source)) or list(_unsendable(self._source))
            if not wrong:
                self.classes: list[str] = self._source.classes
                self.image_shape = tuple(map(operator.index, self._source.image_shape))
                self.labels = {split: np.array(labels, np.int64) for split, labels in dict(self._source.labels).items()}
        if wrong:
            raise ConfigError("\n  ".join([f"{self._asked}: does not fit distrain.data.sources.Source:", *wrong]))

    def name(self, split: str, index: int) -> str:
        """What the class calls the sample; its number where that fails, as this is asked when a message is due."""
        try:
            return str(self._source.name(split, index))
        except Exception as error:
            return f"{split} sample {index} (its name() raises {plugins.told(error)})"

    def load(self, split: str, index: int) -> NDArray[np.uint8]:
        """One image: uint8 [H, W, C].

        Raises:
            UnreadableError: as the class says.
            DataError: the class raises something else, or gives no such image.
        """
        try:
            image = self._source.load(split, index)
        except (UnreadableError, MemoryError):
            raise
        except plugins.CATCHABLE as error:
            raise self._failed(split, index, f"load() raises {plugins.told(error)}") from error
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != self.image_shape:
            given = _array(image) if isinstance(image, np.ndarray) else type(image).__name__
            raise self._failed(split, index, f"load() gives {given}, should give uint8 {list(self.image_shape)}")
        return image

    def _failed(self, split: str, index: int, why: str) -> DataError:
        return DataError(f"{self._asked}: {self.name(split, index)}: {why}")


def _wrong(source: Any) -> Iterator[str]:
    """One line for each attribute that a source lacks, or has otherwise."""
    missing = [name for name in ("classes", "image_shape", "labels", "name", "load") if not hasattr(source, name)]
    if missing:
        yield f"has no {', '.join(missing)}"
    for name in ("name", "load"):
        if name not in missing and not callable(getattr(source, name)):
            yield f"{name}: should be a method, called with split and index"
    if "classes" not in missing:
        yield from _wrong_classes(source.classes)
    if "image_shape" not in missing:
        yield from _wrong_shape(source.image_shape)
    if "labels" not in missing:
        yield from _wrong_labels(source.labels)


def _wrong_classes(classes: Any) -> Iterator[str]:
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        yield f"classes: should be a list of names (str), is {_shown(classes)}"
    elif len(set(classes)) < len(classes):
        yield f"classes: {max(classes, key=classes.count)!r} stands there twice"


def _wrong_shape(shape: Any) -> Iterator[str]:
    try:
        sides = [operator.index(side) for side in shape]
    except TypeError:
        sides = []
    if len(sides) != 3 or min(sides) < 1:
        yield f"image_shape: should be (height, width, channels), is {_shown(shape)}"


def _wrong_labels(labels: Any) -> Iterator[str]:
    if not isinstance(labels, Mapping):
        yield f"labels: should map each split to its samples' labels, is {_shown(labels)}"
        return
    if "train" not in labels:
        yield "labels: has no split 'train'"
    for split, found in labels.items():
        if split not in _SPLITS:
            yield f"labels: has a split {split!r}; there are train, val and test"
            continue
        array = np.asarray(found)
        if array.dtype.kind not in "iu" or array.ndim != 1:
            yield f"labels[{split!r}]: should be numbers of classes, int64 [N], are {_array(array)}"


def _unsendable(source: Any) -> Iterator[str]:
    """Why a source does not reach the worker processes. Arrays are passed over: only what surrounds them is written."""

    class Nowhere:
        def write(self, data: Any) -> int:
            return len(data)

    try:
        pickle.Pickler(Nowhere(), 5, buffer_callback=lambda _buffer: None).dump(source)
    except Exception as error:
        yield f"cannot be sent to worker processes ({plugins.told(error)}); open files in load(), not before"


def _array(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
