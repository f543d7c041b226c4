"""A stand-in for torch.cuda: streams do their work in threads of their own, later than the host gives it to them.

A copy reads its source when it is done, not when it begins: what is overwritten too early arrives wrong.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

COPY_SECONDS = 0.0005


class Stream:
    """A queue of work, and the thread that does it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def submit(self, work: Callable[[], object] | None) -> None:
        """Add work; None ends the stream."""
        self._work.put(work)

    def wait_stream(self, other: Stream) -> None:
        """Do no further work until another stream has done its work so far."""
        done = threading.Event()
        other.submit(done.set)
        self.submit(done.wait)

    def synchronize(self) -> None:
        """Wait for all work so far."""
        done = threading.Event()
        self.submit(done.set)
        assert done.wait(60)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


class SimulatedGpu:
    """Replaces what distrain uses of torch.cuda.

    Attributes:
        calls: (name of the thread, its current GPU, call), in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, index: int = 0) -> None:
        self.calls: list[tuple[str, int, str]] = []
        self.device = torch.device("cuda", index)
        self._thread = threading.local()
        self._streams: list[Stream] = []
        self._pinned: dict[int, torch.Tensor] = {}
        self._empty, self._to = torch.empty, torch.Tensor.to
        self.compute = self._new_stream()
        self._thread.device = index
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self._done: threading.Event | None = None

            def record(self, stream: Stream | None = None) -> None:
                gpu.note("Event.record")
                self._done = done = threading.Event()

                def pass_by() -> None:
                    self._seconds = time.perf_counter()
                    done.set()

                (stream or gpu.current_stream()).submit(pass_by)

            def query(self) -> bool:
                gpu.note("Event.query")
                return self._done is None or self._done.is_set()

            def elapsed_time(self, end: Event) -> float:
                assert self.query()
                assert end.query()
                return (end._seconds - self._seconds) * 1000

        def to(tensor: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
            return gpu._copy(tensor, *args, **more)

        for name, value in {
            "Event": Event,
            "Stream": self._new_stream,
            "stream": self._use_stream,
            "current_stream": self.current_stream,
            "set_device": self._set_device,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "empty", self._allocate)
        monkeypatch.setattr(torch.Tensor, "to", to)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)

    @property
    def pinned_sizes(self) -> list[int]:
        """Bytes of each tensor in pinned memory."""
        return [each.numel() * each.element_size() for each in self._pinned.values()]

    def close(self) -> None:
        """End the streams' threads."""
        for stream in self._streams:
            stream.submit(None)
            stream.thread.join(60)

    def note(self, call: str) -> None:
        """Record a call of this thread."""
        self.calls.append((threading.current_thread().name, self._current_device(), call))

    def current_stream(self, device: torch.device | None = None) -> Stream:
        """The stream that this thread uses."""
        return getattr(self._thread, "stream", self.compute)

    def _current_device(self) -> int:
        return getattr(self._thread, "device", 0)

    def _set_device(self, device: torch.device) -> None:
        self._thread.device = device.index
        self.note("set_device")

    def _new_stream(self, device: torch.device | None = None) -> Stream:
        self._streams.append(Stream(self.device))
        return self._streams[-1]

    @contextlib.contextmanager
    def _use_stream(self, stream: Stream) -> Iterator[None]:
        before, device = self.current_stream(), self._current_device()
        self.note("stream")
        self._thread.stream, self._thread.device = stream, stream.device.index
        yield
        self._thread.stream, self._thread.device = before, device

    def _allocate(self, *args: Any, pin_memory: bool = False, device: Any = None, **more: Any) -> torch.Tensor:
        on_gpu = device is not None and torch.device(device).type == "cuda"
        tensor = self._empty(*args, **more, **({} if on_gpu else {"device": device}))
        if pin_memory:
            self.note("pinned memory")
            self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def _copy(self, tensor: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        if not (args and isinstance(args[0], torch.device) and args[0].type == "cuda"):
            return self._to(tensor, *args, **more)
        pinned = more.get("non_blocking") and tensor.untyped_storage().data_ptr() in self._pinned
        self.note("copy" if pinned or not tensor.numel() else "copy that the host waits for")
        target = torch.zeros_like(tensor)

        def copy() -> None:
            time.sleep(COPY_SECONDS)
            target.copy_(tensor)

        self.current_stream().submit(copy)
        return target
