"""The examples: killed, resumed on another number of processes, with the same ids in each step."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist
from group import fork_server

import distrain
from distrain.data.manifest import Dataset

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS, BATCH, SAVED, KILLED = 60, 50, 24, 30
"""An epoch has 20 steps of 50 samples; a checkpoint is saved every 8 steps."""
SECONDS = 120
"""Longest time that an example may take."""

pytestmark = pytest.mark.ranks


class Attempt(NamedTuple):
    """The steps with their ids that each rank took, and the output of rank 0."""

    ids: list[list[tuple[int, list[int]]]]
    output: str

    def of_steps(self) -> dict[int, list[int]]:
        """The ids of each step that all ranks have taken, sorted."""
        by_step = [dict(of_rank) for of_rank in self.ids]
        assert [len(each) for each in by_step] == [len(of_rank) for of_rank in self.ids]  # no step twice
        common = set.intersection(*map(set, by_step))
        return {step: sorted(sum((each[step] for each in by_step), [])) for step in sorted(common)}


def start(name: str, size: int, data: Dataset, folder: Path, killed_at: int | None = None) -> Attempt:
    """Run an example on `size` processes, forked from one that has imported torch; rank 0 is killed in a step."""
    context = fork_server()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder.mkdir(exist_ok=True)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
              "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "OMP_NUM_THREADS": 1}  # fmt: skip
    records = [folder / f"ids-{os.urandom(4).hex()}-{rank}" for rank in range(size)]
    arguments = ["--data", str(data.root), "--out", str(folder / "out"), "--steps", str(STEPS), "--batch", str(BATCH),
                 "--save-every", "8"]  # fmt: skip
    processes = [
        context.Process(
            target=_run,
            args=(str(EXAMPLES / name), arguments, {**common, "RANK": rank, "LOCAL_RANK": rank}, records[rank],
                  killed_at if rank == 0 else None),
        )
        for rank in range(size)
    ]  # fmt: skip
    for process in processes:
        process.start()
    try:
        processes[0].join(SECONDS)
    finally:
        for process in processes:  # as torchrun does, once one has failed
            if processes[0].exitcode == 0:
                process.join(SECONDS)
            process.kill()
            process.join()
    output = records[0].with_suffix(".out").read_text()
    codes = [process.exitcode for process in processes]
    assert codes == [0] * size if killed_at is None else codes[0] == -signal.SIGKILL, output
    return Attempt([[tuple(json.loads(line)) for line in each.read_text().splitlines()] for each in records], output)


def _run(path: str, arguments: list[str], variables: dict[str, Any], record: Path, killed_at: int | None) -> None:
    """Run an example in this process; record the ids of each step that it takes."""
    os.environ.update({name: str(value) for name, value in variables.items()})
    sys.stdout = sys.stderr = record.with_suffix(".out").open("w", buffering=1)
    original = distrain.batches

    def batches(data: Any, *, steps: range, **options: Any) -> Iterator[Any]:
        with record.open("w", buffering=1) as lines:
            for step, item in zip(steps, original(data, steps=steps, **options), strict=True):
                if step == killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                of_ranks = item if isinstance(item, list) else [item]
                print(json.dumps([step, [int(each) for batch in of_ranks for each in batch.ids]]), file=lines)
                yield item

    distrain.batches = batches
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(EXAMPLES))  # as for a script
    runpy.run_path(path, run_name="__main__")


@pytest.fixture(scope="module")
def expected(small: Dataset) -> dict[int, list[int]]:
    """The ids of each step, read by a single process."""
    steps = range(STEPS)
    batches = distrain.batches(small.root, global_batch_size=BATCH, steps=steps, rank=0, world_size=1)
    return {step: sorted(batch.ids.tolist()) for step, batch in zip(steps, batches, strict=True)}


def check_ids(killed: Attempt, resumed: Attempt, expected: dict[int, list[int]]) -> None:
    """Both attempts trained the expected ids; the second one from the checkpoint on, in the middle of an epoch."""
    before, after = killed.of_steps(), resumed.of_steps()
    assert list(before) == list(range(KILLED))
    assert list(after) == list(range(SAVED, STEPS))
    for ids in (before, after):
        assert ids == {step: expected[step] for step in ids}


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("plain_loop.py", 2, 3), ("accelerate_loop.py", 3, 2), ("lightning_module.py", 2, 1)],
)
def test_an_example_is_killed_and_resumes_on_another_number_of_processes(
    name: str, first: int, second: int, small: Dataset, tmp_path: Path, expected: dict[int, list[int]]
) -> None:
    killed = start(name, first, small, tmp_path, KILLED)
    resumed = start(name, second, small, tmp_path)
    check_ids(killed, resumed, expected)
    correct, samples = map(int, re.search(r"(\d+) of (\d+) test images are correct", resumed.output).groups())
    assert samples == 203
    assert correct > 203 * 0.3  # chance is 0.1


def test_the_weights_of_same_bits_are_equal_on_any_number_of_processes(
    small: Dataset, tmp_path: Path, expected: dict[int, list[int]]
) -> None:
    killed = start("same_bits_loop.py", 2, small, tmp_path / "resumed", KILLED)
    resumed = start("same_bits_loop.py", 3, small, tmp_path / "resumed")
    check_ids(killed, resumed, expected)
    alone = start("same_bits_loop.py", 1, small, tmp_path / "alone")
    assert re.search("sha256 [0-9a-f]{64}", alone.output)
    assert resumed.output == alone.output


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80
