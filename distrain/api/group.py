"""The processes that read a data set together: the rank of this one, and what all of them agree on."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch.distributed as dist
from torch.utils.data import get_worker_info

from distrain.distributed.collectives import Collectives
from distrain.environment import Environment, World, integer
from distrain.errors import ConfigError


def check_process(function: str) -> None:
    """Check that this process is not a worker of a DataLoader.

    All workers would read the same samples, and would send a batch when the next one may have replaced it.

    Raises:
        ConfigError: it is one.
    """
    if get_worker_info() is not None:
        raise ConfigError(
            f"{function}: called in a worker of a DataLoader; it reads ahead by threads of its own: set num_workers=0"
        )


def in_group() -> bool:
    """Whether torch.distributed is initialised."""
    return dist.is_available() and dist.is_initialized()


def world_of(rank: int | None, world_size: int | None) -> World:
    """Return the given rank and number of processes; if they are None those of torch.distributed or the environment.

    Raises:
        ConfigError: only one of them is given, or they are impossible.
    """
    if rank is not None and world_size is not None:
        if not (isinstance(rank, Integral) and isinstance(world_size, Integral)):
            raise ConfigError(f"rank={rank!r}, world_size={world_size!r}: should be whole numbers")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank}, world_size={world_size}: rank should be 0 to world_size - 1")
        return World(rank, world_size)
    if rank is not None or world_size is not None:
        raise ConfigError(f"rank={rank}, world_size={world_size}: give both, or none of them")
    if in_group():
        return World(dist.get_rank(), dist.get_world_size())
    return Environment.read(os.environ).world


def local_processes() -> int:
    """Return the number of processes on this machine, which share its cores and memory: LOCAL_WORLD_SIZE, or 1."""
    return integer(os.environ, "LOCAL_WORLD_SIZE", 1) or 1


def collectives_for(world_size: int | None) -> Collectives:
    """Return the collectives of the processes that read together; a collective itself.

    They are those of torch.distributed's default group, if it is initialised and has `world_size` processes (None: any
    number). Otherwise this process agrees with itself alone.
    """
    if not in_group() or world_size not in (None, dist.get_world_size()):
        return Collectives(World(), None)
    return Collectives(World(dist.get_rank(), dist.get_world_size()), _control_group(dist.group.WORLD))


@functools.lru_cache(maxsize=1)
def _control_group(default: Any) -> Any:
    """Return the default group if it is of gloo; else a group of gloo, made once, that waits for no GPU."""
    return default if dist.get_backend(default) == "gloo" else dist.new_group(backend="gloo")


def check_same(collectives: Collectives, function: str, world: World, arguments: Mapping[str, Any]) -> None:
    """Check that all processes call a function with the same arguments, each with a rank of its own; a collective.

    Raises:
        ConfigError: on all processes.
    """
    everyone = collectives.from_all((world, dict(arguments)))
    first = everyone[0][1]
    for number, (_, other) in enumerate(everyone):
        unlike = [f"{key}={value!r}, rank 0 {first[key]!r}" for key, value in other.items() if value != first[key]]
        if unlike:
            raise ConfigError(f"{function}: rank {number} has {'; '.join(unlike[:3])}; give all processes the same")
    ranks = sorted(each.rank for each, _ in everyone)
    if len(everyone) > 1 and ranks != list(range(len(everyone))):
        raise ConfigError(f"{function}: the processes have rank={ranks}: give each a rank of its own")
