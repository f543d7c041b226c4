"""Saving while training continues: copies of tensors in the memory of the host, and a thread that writes them."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


class HostBuffers:
    """Copies of tensors in the memory of the host, in buffers that are reused from one save to the next.

    Buffers for tensors of a GPU are pinned: the GPU copies into them at the speed of the bus.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, str], Tensor] = {}

    def copy(self, groups: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return copies of groups of tensors. The next call overwrites them.

        Raises:
            OSError: the host has no memory for them.
        """
        tensors = {(number, name): tensor for number, group in enumerate(groups) for name, tensor in group.items()}
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if _fits(buffer, tensors.get(key))}
        try:
            for key in tensors.keys() - self._buffers.keys():
                self._buffers[key] = _new_buffer(tensors[key])
        except OSError:
            self._buffers = {}  # training needs the memory more
            raise
        for key, tensor in tensors.items():
            self._buffers[key].copy_(tensor.detach(), non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()
        return [{name: self._buffers[number, name] for name in group} for number, group in enumerate(groups)]


def _fits(buffer: Tensor, tensor: Tensor | None) -> bool:
    return tensor is not None and (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype)


def _new_buffer(tensor: Tensor) -> Tensor:
    """Return host memory for a tensor, in its layout, so that a copy from a GPU needs no memory there.

    Raises:
        OSError: there is none.
    """
    try:
        return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda", requires_grad=False)
    except (MemoryError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        reason = f"has no room for a copy of the weights and the optimizer's state ({why})"
        raise OSError(errno.ENOMEM, reason, "memory of the host") from error


class BackgroundSave:
    """A save that a thread writes.

    Args:
        step: steps done when it began.
        write: what the thread calls.
    """

    def __init__(self, step: int, write: Callable[[], object]) -> None:
        self.step = step
        self._write = write
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="distrain-save", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the thread is still at work."""
        return self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the thread, at most so long; return whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> None:
        """Wait for the thread; raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            self._write()
        except BaseException as error:
            self._error = error
