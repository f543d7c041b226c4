"""A thread that makes the items of an iterator before they are needed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

_CLOSE_SECONDS = 5.0
"""Longest wait for the thread to end: a file system or a server that does not answer must not delay a stop."""


class Background(Generic[T]):
    """Iterator that runs another iterator in a thread, up to `ahead` items before the item in use.

    A request for the next item releases the previous one: the thread may then reuse its memory. `close` sets `closed`,
    so that an iterator that waits for the network can end at once.

    Args:
        items: the iterator.
        ahead: number of items.
        closed: set by `close`.
        gpu: the GPU that `items` use.
        spare: work in small steps for the time in which the thread may make no further item; it yields whether to
            continue before the next item.
    """

    def __init__(
        self,
        items: Iterator[T],
        ahead: int,
        closed: threading.Event | None = None,
        gpu: torch.device | None = None,
        spare: Iterable[bool] = (),
    ) -> None:
        self._items, self._gpu, self._spare = items, gpu, iter(spare)
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._permits = threading.Semaphore(ahead + 1)
        self._in_use = self._ended = False
        self._error: BaseException | None = None
        self._closed = closed or threading.Event()
        self._thread = threading.Thread(target=self._work, name="distrain-read", daemon=True)
        self._thread.start()

    def wait(self, count: int, timeout: float | None) -> bool:
        """Wait up to `timeout` seconds (None: without limit) for `count` items, or for all remaining ones.

        Returns:
            Whether they are ready.

        Raises:
            Exception: the iterator raised it before there were `count` items.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._ready) >= count or self._ended, timeout):
                return False
            if len(self._ready) < count and self._error is not None:
                raise self._error
            return True

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._in_use:
            self._permits.release()
            self._in_use = False
        self.wait(1, None)
        with self._changed:
            if not self._ready:
                raise StopIteration
            self._in_use = True
            return self._ready.popleft()

    def close(self) -> None:
        """End the thread after its current item; a thread that does not return from it is abandoned."""
        self._closed.set()
        self._permits.release()
        self._thread.join(_CLOSE_SECONDS)

    def _work(self) -> None:
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)  # GPU 0 in a new thread: every process would use memory there
            while True:
                self._wait_for_permit()
                if self._closed.is_set():
                    break
                item = next(self._items)
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
        except StopIteration:
            pass
        except BaseException as error:
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _wait_for_permit(self) -> None:
        """Wait until an item may be made; use the time."""
        while not self._permits.acquire(blocking=False):
            if not next(self._spare, False):
                self._permits.acquire()
                return
