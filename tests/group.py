"""Real processes for tests: a group of W ranks (gloo, over a file store: no ports) that trains one run after another.

Starting a process with torch costs seconds, so a group is kept for the whole session and is only ended by a test that
kills it. The parent sends one JSON line per call to every rank and reads one JSON line back from each.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent
ANSWER = "<answer> "
SECONDS = 300


class GroupError(Exception):
    """A rank answered with an exception: `kinds` and `messages`, one of each rank."""

    def __init__(self, answers: list[dict[str, Any]]) -> None:
        self.kinds = [answer.get("error") for answer in answers]
        self.messages = [answer.get("message", "") for answer in answers]
        super().__init__(json.dumps(answers, indent=1))


class Group:
    """W processes that share one torch.distributed group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="distrain-group-")
        store = Path(self._folder.name, "store")
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-u", __file__, str(store)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=REPO,
                env={
                    **os.environ,
                    **_place(rank, size),
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": f"{REPO}:{REPO / 'tests'}",
                },
            )
            for rank in range(size)
        ]

    def start(self, name: str, *arguments: Any) -> None:
        """Send a call (see `_CALLS`) to all ranks."""
        for process in self._ranks:
            assert process.stdin is not None
            process.stdin.write(json.dumps([name, *arguments]) + "\n")
            process.stdin.flush()

    def answers(self) -> list[Any]:
        """What each rank answers to the last call, bounded in time; the output before it goes to ours."""
        alarm = threading.Timer(SECONDS, self.kill)
        alarm.start()
        try:
            found = [self._answer(rank) for rank in range(self.size)]
        finally:
            alarm.cancel()
        if any("error" in answer for answer in found):
            raise GroupError(found)
        return [answer["value"] for answer in found]

    def call(self, name: str, *arguments: Any) -> list[Any]:
        """Send a call and wait for the answers."""
        self.start(name, *arguments)
        return self.answers()

    def train(self, config: dict[str, Any]) -> dict[str, Any]:
        """Train a run; the result of rank 0."""
        return self.call("train", config)[0]

    def kill(self) -> None:
        """SIGKILL to all ranks, and wait for them."""
        for process in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        for process in self._ranks:
            process.wait(60)

    def close(self) -> None:
        """End of input ends the ranks."""
        for process in self._ranks:
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self._ranks:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(30)
            process.stdout.close()
        self._folder.cleanup()

    def _answer(self, rank: int) -> dict[str, Any]:
        process = self._ranks[rank]
        for line in process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
            print(f"[{rank}/{self.size}] {line}", end="")
        raise AssertionError(f"rank {rank} of {self.size} ended with {process.wait(60)}")


def _place(rank: int, size: int) -> dict[str, str]:
    """What a launcher tells a rank; one process alone is told nothing."""
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

    return distrain.train(config)


def _evaluate(run: str, split: str) -> Any:
    from distrain.environment import Environment
    from distrain.tools import evaluate as scoring

    scores, checkpoint, classes = scoring.evaluate_run(Path(run), split, [], None, Environment.read(os.environ))
    return {**scores.as_dict(classes), "checkpoint": checkpoint}


def _train_each(configs: list[dict[str, Any]]) -> Any:
    """Each rank has a configuration of its own."""
    return _train(configs[int(os.environ["RANK"])])


_CALLS = {"train": _train, "train_each": _train_each, "evaluate": _evaluate}


def _serve(store: str) -> None:
    import torch.distributed as dist

    if "RANK" in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"value": _CALLS[name](*arguments)}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
