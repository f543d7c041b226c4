"""The loss of other processes, by two facts: an exception was raised by a collective, and connections are broken.

An exception's text says nothing: a model's own error may speak of connections, and gloo has no type for its errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from distrain.distributed import gpu_errors
from distrain.environment import World

_COLLECTIVES = ("torch.distributed.", "torch.nn.parallel.distributed", "torch.autograd.", "torch._tensor")
"""Modules of torch that wait for other processes. Autograd's engine runs DDP's all-reduce."""


def raised_by_collective(error: BaseException) -> bool:
    """Whether torch raised an exception, or one that caused it, where it waits for other processes.

    torch raises exactly a RuntimeError there, or a `DistError`. The innermost Python frame is then torch's own, never
    one of a model, a hook or a data set. NCCL also raises a `DistError` if the GPU of this process fails.
    """
    return not gpu_errors.is_one(error) and any(
        (type(each) is RuntimeError or isinstance(each, dist.DistError)) and _module(each).startswith(_COLLECTIVES)
        for each in _with_causes(error)
    )


def lost_ranks(world: World, group: Any) -> list[int]:
    """Return the ranks to which the connection of a gloo group is broken; waits for nothing."""
    return [rank for rank in range(world.size) if rank != world.rank and not _is_connected(rank, group)]


def _is_connected(rank: int, group: Any) -> bool:
    message = torch.zeros(1, device="cpu")  # nobody receives it: this process is about to end
    try:
        dist.isend(message, dst=rank, group=group)
    except RuntimeError:
        return False
    return True


def _module(error: BaseException) -> str:
    """Return the name of the module whose frame is the innermost one."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those during whose handling it was raised."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
