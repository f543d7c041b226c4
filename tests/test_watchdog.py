"""A failed process ends the others, whatever their main threads wait for."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from group import fork_server
from torch._C._distributed_c10d import ErrorType

from distrain.distributed import peers as peers_module
from distrain.distributed import watchdog as module
from distrain.distributed.peer_store import PeerStore
from distrain.distributed.peers import Peers, communicator_error
from distrain.distributed.watchdog import Watchdog, may_end
from distrain.environment import Environment, World
from distrain.training.background_save import BackgroundSave
from distrain.worker_status import PHASES

SECONDS = 60


def _process(pipe: Connection, rank: int, size: int, nodes: int, role: str, port: int, folder: str) -> None:
    """One of several ranks: it does what its role says when the parent sends a message."""
    from distrain.distributed import runtime

    local_size = size // nodes
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % local_size), GROUP_RANK=str(rank // local_size))
    os.environ.update(WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(local_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    environment = Environment.read(os.environ)
    watchdog = Watchdog({}, Path(folder), environment)
    watchdog.enter("train")
    try:
        with runtime.start(runtime.Options("cpu", "fp32", 1, False, SECONDS), environment, watchdog) as rt:
            if role == "done":
                rt.leave_peers(is_loss=False)
            thread_may_end = threading.Event()
            if role == "write":
                watchdog.saving(BackgroundSave(7, thread_may_end.wait))
            with watchdog.phase("save" if role == "save" else "train"):
                pipe.send("ready")
                pipe.recv()  # a read that does not return, as a wait for the GPU
                if role == "fail":
                    raise ZeroDivisionError("a fault of this rank")
                Path(folder, role).touch()
            thread_may_end.set()
            if role in ("save", "write"):
                pipe.recv()  # of the thread, the end is seen here
    finally:
        os._exit(1 if role == "fail" else 0)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """`start(roles, nodes)`: pipes and processes by role, once all have joined their group."""
    context = fork_server()
    processes: dict[str, Any] = {}

    def start_all(roles: list[str], nodes: int = 1) -> tuple[dict[str, Connection], dict[str, Any]]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        pipes = {}
        for rank, role in enumerate(roles):
            pipes[role], theirs = context.Pipe()
            arguments = (theirs, rank, len(roles), nodes, role, port, str(tmp_path))
            processes[role] = context.Process(target=_process, args=arguments, daemon=True)
            processes[role].start()
            theirs.close()
        for role, pipe in pipes.items():
            assert pipe.poll(SECONDS), role
            assert pipe.recv() == "ready"
        return pipes, processes

    yield start_all
    for process in processes.values():
        process.kill()
        process.join(30)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "roles",
    [
        pytest.param(["fail", "block", "save", "done"], id="rank0"),
        pytest.param(["block", "fail", "done", "write"], id="rank1"),
    ],
)
def test_a_failure_ends_the_others_wherever_they_wait(start: Any, roles: list[str], tmp_path: Path) -> None:
    pipes, processes = start(roles)
    began = time.monotonic()
    pipes["fail"].send("now")
    processes["block"].join(SECONDS)
    assert time.monotonic() - began < 3.5  # 3 s, and the end of the process itself
    assert processes["block"].exitcode == 1
    saves = roles[-1] if roles[-1] == "write" else "save"  # a thread writes, or the main thread itself
    others = [processes[saves].sentinel, processes["done"].sentinel]
    assert not wait(others, 1.5)  # one tick later than the others at most
    pipes[saves].send("saved")
    processes[saves].join(SECONDS)
    assert processes[saves].exitcode == 1
    assert (tmp_path / saves).exists()
    pipes["done"].send("done")
    processes["done"].join(SECONDS)
    assert processes["done"].exitcode == 0


@pytest.mark.ranks
@pytest.mark.parametrize("roles", [["kill", "block", "done"], ["block", "kill", "done"]], ids=["rank0", "rank1"])
def test_a_process_killed_on_another_node_ends_the_others(start: Any, roles: list[str]) -> None:
    pipes, processes = start(roles, nodes=3)
    pipes["done"].send("done")  # this end is no loss
    processes["done"].join(SECONDS)
    assert processes["done"].exitcode == 0
    assert not wait([processes["block"].sentinel], 2.5)
    began = time.monotonic()
    processes["kill"].kill()
    processes["block"].join(SECONDS)
    assert time.monotonic() - began < 6  # 2 s to connect again, and up to 2.5 s until the process ends
    assert processes["block"].exitcode == 75


def test_a_save_is_completed_and_the_end_belongs_to_each_process_alone() -> None:
    def may(waits: bool, saves: bool) -> list[str]:
        return [phase for phase in PHASES if may_end(phase, waits, saves)]

    assert may(waits=False, saves=False) == ["start", "first step", "train", "evaluate"]
    assert may(waits=True, saves=False) == [*PHASES[:-1]]
    assert may(waits=True, saves=True) == may(waits=False, saves=True) == []


class _Backend:
    """Stands for NCCL's backend, which only a GPU has."""

    def __init__(self) -> None:
        self.error = ErrorType.SUCCESS

    def get_error(self) -> ErrorType:
        return self.error


def test_an_error_of_the_communicator_alone_ends_a_process_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    codes: list[int] = []
    ended, backend, environment = threading.Event(), _Backend(), Environment(world=World(1, 2))

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(module.os, "_exit", end)
    monkeypatch.setattr(peers_module, "_UNKNOWN_SECONDS", 2.0)
    peers = Peers(PeerStore(dist.HashStore(), environment.world), environment)
    watchdog = Watchdog({}, tmp_path, environment)
    watchdog.connect(peers)
    peers.use_backend(backend)
    watchdog.enter("train")
    assert communicator_error(backend) is None
    assert not ended.wait(1.1)
    backend.error = ErrorType.REMOTE_ERROR
    assert not ended.wait(1.4)  # an error of this process's own GPU comes before
    assert ended.wait(SECONDS)
    watchdog.close()
    peers.close()
    assert set(codes) == {75}
    assert "this GPU, another process or the network between them failed: NCCL reports REMOTE_ERROR" in caplog.text
