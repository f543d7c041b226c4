"""An exception is the loss of another process, or a fault of the model: tried with two real processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from group import fork_server
from harness import arguments, small_run

from distrain import config

pytestmark = pytest.mark.ranks


def _train(pipe: Connection, rank: int, store: str, fault: str, tree: dict[str, Any]) -> None:
    import torch.distributed as dist

    import distrain

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", FAULT=fault)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        distrain.train(tree)
        pipe.send("done")
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")
    os._exit(0)


@pytest.fixture
def ends(data: Path, tmp_path: Path) -> Callable[[str], list[str | None]]:
    """`ends(fault)`: the exceptions of ranks 0 and 1, of which rank 1 has the fault; None if it was ended."""
    context = fork_server()

    def train(fault: str) -> list[str | None]:
        tree = small_run(data, tmp_path / "run", model={"name": "models_for_ends:Ending"})
        resolved = config.load(None, arguments(tree)).model_dump()
        ours, processes = [], []
        for rank in range(2):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_train, args=(there, rank, str(tmp_path / "store"), f"{fault}:1:8", resolved), daemon=True
            )
            process.start()
            there.close()
            ours.append(here)
            processes.append(process)
        try:
            answers = []
            for pipe in ours:
                assert pipe.poll(60), f"{fault}: no end within a minute"
                try:
                    answers.append(pipe.recv())
                except EOFError:
                    answers.append(None)
            return answers
        finally:
            for process in processes:
                process.kill()
                process.join(30)

    return train


MESSAGES = {
    "forward-skip": "RuntimeError: skip connection mismatch",
    "backward-timeout": "RuntimeError: the socket timed out: NCCL, gloo, TCPStore",
    "hook-refused": "ConnectionRefusedError: [Errno 111] Connection refused",
    "forward-value": "ValueError: broken pipe",
    "backward-shapes": "RuntimeError: mm: mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)",
    # Raised by autograd's engine, which raises DDP's errors too.
    "backward-gradient": "RuntimeError: Function _EndBackwardBackward returned an invalid gradient at index 0 - got"
    " [8, 3] but expected shape compatible with [8, 10]",
}


@pytest.mark.parametrize("fault", MESSAGES)
def test_an_error_of_the_model_is_its_fault_whatever_it_says(
    ends: Callable[[str], list[str | None]], fault: str
) -> None:
    first, second = ends(fault)
    assert second == MESSAGES[fault]
    assert first is not None
    assert first.startswith("PeerFailedError: rank 1 on ")
    assert first.endswith(f" failed: {MESSAGES[fault]}")


def test_an_error_of_the_model_is_its_fault_though_another_process_is_gone(
    ends: Callable[[str], list[str | None]],
) -> None:
    assert ends("forward-outlive") == [None, "RuntimeError: skip connection mismatch"]


@pytest.mark.parametrize("fault", ["forward-kill", "backward-kill", "forward-leave"])
def test_a_process_that_is_gone_is_named(ends: Callable[[str], list[str | None]], fault: str) -> None:
    assert ends(fault) == ["PeerLostError: another process is gone: rank 1", None]


def test_a_model_that_calls_sys_exit_ends_all(ends: Callable[[str], list[str | None]]) -> None:
    first, second = ends("backward-exit")
    assert second == "SystemExit: 0"
    assert first is not None
    assert first.endswith("failed: sys.exit(0) was called before the command was done")
