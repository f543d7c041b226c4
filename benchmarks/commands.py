"""Commands run in processes of their own: `distrain train`, and the programs of this package."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # it takes 190 MiB, which a program whose memory is measured must not have
    from benchmarks.context import Context

TIMEOUT_SECONDS = 3600
"""Time limit of one command."""


class CommandError(RuntimeError):
    """A command failed, or did not end in time; the message has the end of its output."""

    def __init__(self, command: Sequence[str], reason: str, output: str) -> None:
        super().__init__(f"{' '.join(command)}\n{reason}:\n{output[-4000:]}")


def environment(threads: int | None, **variables: str) -> dict[str, str]:
    """Return this process's environment with `variables`; `threads` is OMP_NUM_THREADS, None unsets it."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**inherited, **({"OMP_NUM_THREADS": str(threads)} if threads else {}), **variables}


def call(command: Sequence[str], threads: int | None = 1) -> str:
    """Run a command and return its standard output.

    Raises:
        CommandError: the command failed, or did not end in time.
    """
    try:
        done = subprocess.run(
            command, env=environment(threads), capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise CommandError(command, f"did not end within {TIMEOUT_SECONDS} s", str(error.stderr or "")) from None
    if done.returncode:
        raise CommandError(command, f"exit code {done.returncode}", done.stderr)
    return done.stdout


def call_program(name: str, *arguments: object, threads: int | None = 1) -> dict[str, Any]:
    """Run a program of this package, and return the JSON object that it prints.

    Raises:
        CommandError: the program failed, or did not end in time.
    """
    output: dict[str, Any] = json.loads(
        call([sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)], threads)
    )
    return output


def call_all(commands: Sequence[Sequence[str]], gpus: bool) -> None:
    """Run commands at the same time, each with one thread; with `gpus`, each with a GPU of its own.

    Raises:
        CommandError: for the first that failed, or did not end in time.
    """
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as log:

        def failure(command: Sequence[str], reason: str) -> CommandError:
            log.seek(0)
            return CommandError(command, reason, log.read().decode(errors="replace"))

        try:
            for number, command in enumerate(commands):
                variables = environment(1, **({"CUDA_VISIBLE_DEVICES": str(number)} if gpus else {}))
                processes.append(subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=log))
            for process, command in zip(processes, commands, strict=True):
                try:
                    code = process.wait(TIMEOUT_SECONDS)
                except subprocess.TimeoutExpired:
                    raise failure(command, f"did not end within {TIMEOUT_SECONDS} s") from None
                if code:
                    raise failure(command, f"exit code {code}")
        finally:
            for process in processes:
                process.kill()
                process.wait()


def train_command(context: Context, run: Path, keys: Mapping[str, object], processes: int = 1) -> list[str]:
    """Return a `distrain train` command without periodic checkpoints and evaluations.

    If there are several processes, it runs under `distrain launch`.
    """
    defaults = {
        "data.dir": context.dataset.root,
        "run.dir": run,
        "run.device": context.device,
        "checkpoint.every_steps": 0,
        "checkpoint.every_minutes": 0,
        "eval.every_steps": 0,
    }
    launch = ["launch", "--nproc", str(processes), "--"] if processes > 1 else []
    overrides = [f"{key}={value}" for key, value in {**defaults, **keys}.items()]
    return [sys.executable, "-m", "distrain", *launch, "train", *overrides]


def train(context: Context, run: Path, keys: Mapping[str, object], processes: int = 1) -> None:
    """Train a new run in the folder `run`; an earlier run there is deleted."""
    shutil.rmtree(run, ignore_errors=True)
    call(train_command(context, run, keys, processes))


def timed_steps(context: Context, batch: int) -> int:
    """Return the number of steps of a timed run, a multiple of 5."""
    return 5 * max(2, context.timed_images // batch // 5)


def timed_keys(context: Context, model: str, batch: int, processes: int = 1) -> dict[str, object]:
    """Return the keys of a timed run with `batch` samples per process.

    It is the recipe of configs/cifar10.yaml, without the cache, with a line of metrics for each fifth of the steps.
    """
    steps = timed_steps(context, batch)
    return {
        "model.name": model,
        "train.precision": context.precision,
        "train.epochs": "null",
        "train.max_steps": steps,
        "train.global_batch_size": batch * processes,
        "train.lr": 0.01,
        "train.nesterov": "true",
        "train.weight_decay": 1e-3,
        "augment.flip": "true",
        "data.cache": "off",
        "log.every_steps": steps // 5,
    }


class Speed(NamedTuple):
    """The speed of a run: images per second, and the fraction of the time that it waits for data."""

    images_per_second: float
    waiting: float


def speed_after_warm_up(run: Path) -> Speed:
    """Return the speed of a run started with `timed_keys`, without the first fifth of its steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    after_warm_up = [line for line in lines if "train/images_per_second" in line][1:]
    return Speed(
        statistics.harmonic_mean([line["train/images_per_second"] for line in after_warm_up]),
        statistics.fmean(line["profile/data"] for line in after_warm_up),
    )
