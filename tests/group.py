"""Real processes for tests: a group of W ranks (gloo, over a file store: no ports) that trains one run after another.

A process that imports torch takes seconds to start. One process, the fork server, imports it once; the ranks are forked
from there. A group is kept for the whole session, unless a test kills it. The parent sends each rank a call
through a pipe, and receives one answer from each.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

from runs import as_record

SECONDS = 300
"""Longest wait for an answer."""
_IMPORTED = ["torch", "torch._dynamo", "accelerate", "distrain.api.training", "distrain.api.evaluation", "pytest"]
"""Modules of the fork server; none of them starts a thread or looks for GPUs."""


class GroupError(Exception):
    """A rank answered with an exception: `kinds` and `messages`, one of each rank."""

    def __init__(self, answers: list[dict[str, Any]]) -> None:
        self.kinds = [answer.get("error") for answer in answers]
        self.messages = [answer.get("message", "") for answer in answers]
        super().__init__(json.dumps(answers, indent=1))


def fork_server() -> ForkServerContext:
    """Return the context of processes that are forked from the fork server, which is started first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


class Group:
    """W processes that share one torch.distributed group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="distrain-group-")
        self._pipes: list[Connection] = []
        self._ranks: list[multiprocessing.process.BaseProcess] = []
        context = fork_server()
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, size, str(Path(self._folder.name, "store")))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._ranks.append(process)

    def start(self, name: str, *arguments: Any) -> None:
        """Send a call (see `_CALLS`) to all ranks."""
        for pipe in self._pipes:
            pipe.send((name, arguments))

    def answers(self) -> list[Any]:
        """Wait for each rank's answer to the last call, for a limited time."""
        deadline = time.monotonic() + SECONDS
        answers = [self._answer(rank, deadline) for rank in range(self.size)]
        if any("error" in answer for answer in answers):
            raise GroupError(answers)
        return [answer["value"] for answer in answers]

    def call(self, name: str, *arguments: Any) -> list[Any]:
        """Send a call and wait for the answers."""
        self.start(name, *arguments)
        return self.answers()

    def train(self, config: dict[str, Any]) -> dict[str, Any]:
        """Train a run; the result of rank 0."""
        return self.call("train", config)[0]

    def kill(self) -> None:
        """Send SIGKILL to all ranks, and wait for them."""
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.join(60)

    def close(self) -> None:
        """Close the pipes, which ends the ranks."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._ranks:
            process.join(30)
        self.kill()
        self._folder.cleanup()

    def _answer(self, rank: int, deadline: float) -> dict[str, Any]:
        with contextlib.suppress(EOFError, ConnectionResetError):
            if self._pipes[rank].poll(max(0.0, deadline - time.monotonic())):
                answer: dict[str, Any] = self._pipes[rank].recv()
                return answer
            self.kill()
            raise AssertionError(f"rank {rank} of {self.size}: no answer within {SECONDS} s")
        self._ranks[rank].join(60)
        raise AssertionError(f"rank {rank} of {self.size} ended with {self._ranks[rank].exitcode}")


def _launcher_environ(rank: int, size: int) -> dict[str, str]:
    """The variables that a launcher sets for a rank; none for a single process."""
    if size == 1:
        return {}
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}


def wait_for(path: Path, seconds: float = 120) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear within {seconds} s"
        time.sleep(0.002)


def _train(config: dict[str, Any]) -> Any:
    import distrain

    return as_record(distrain.train({**config, "log": {"report": False, **config.get("log", {})}}))


def _evaluate(run: str, split: Any) -> Any:
    import distrain

    return as_record(distrain.evaluate(run, split))


def _train_each(configs: list[dict[str, Any]]) -> Any:
    """Each rank has a configuration of its own."""
    return _train(configs[int(os.environ["RANK"])])


def _train_mutated(config: dict[str, Any], mutation: str) -> Any:
    """Train with a part of the code replaced."""
    import mutations

    with mutations.applied(mutation):
        return _train(config)


def _function(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a test's module."""
    return function(*arguments)


def _train_with_cuda_graphs(config: dict[str, Any]) -> Any:
    """Train with the stand-in for CUDA graphs; return the events that it recorded."""
    import cuda_graphs

    with cuda_graphs.simulated() as recorder:
        _train(config)
    return recorder.events


_CALLS = {
    "train": _train,
    "train_each": _train_each,
    "train_mutated": _train_mutated,
    "train_with_cuda_graphs": _train_with_cuda_graphs,
    "evaluate": _evaluate,
    "function": _function,
}


def _serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    import torch.distributed as dist

    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(_launcher_environ(rank, size))
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:  # the parent has closed its end, or is gone
            return
        try:
            answer = {"value": _CALLS[name](*arguments)}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        pipe.send(answer)
