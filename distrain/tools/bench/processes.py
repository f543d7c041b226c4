"""Commands in processes of their own: with an end, and with their words where they fail."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.tools.bench.context import Context

SECONDS = 3600
"""Longest time for one command."""


class CommandError(RuntimeError):
    """A command failed, or did not end."""

    def __init__(self, command: Sequence[str], how: str, words: str) -> None:
        super().__init__(f"{' '.join(command)}\n{how}:\n{words[-4000:]}")


def environment(threads: int | None, **more: str) -> dict[str, str]:
    """This process's, with so many threads to compute; None: torch's own number."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**inherited, **({"OMP_NUM_THREADS": str(threads)} if threads else {}), **more}


def call(command: Sequence[str], threads: int | None = 1) -> str:
    """Standard output of a command that must succeed.

    Raises:
        CommandError: it did not.
    """
    try:
        done = subprocess.run(
            command, env=environment(threads), capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise CommandError(command, f"did not end within {SECONDS} s", str(error.stderr or "")) from None
    if done.returncode:
        raise CommandError(command, f"ended with {done.returncode}", done.stderr)
    return done.stdout


def call_all(commands: Sequence[Sequence[str]], gpus: bool) -> None:
    """Run commands at the same time, each with one thread; with `gpus` each has one of its own.

    Raises:
        CommandError: of the first that failed.
    """
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as words:
        try:
            for number, command in enumerate(commands):
                own = environment(1, **({"CUDA_VISIBLE_DEVICES": str(number)} if gpus else {}))
                started.append(subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL, stderr=words))
            for process, command in zip(started, commands, strict=True):
                try:
                    code = process.wait(SECONDS)
                except subprocess.TimeoutExpired:
                    raise CommandError(command, f"did not end within {SECONDS} s", _said(words)) from None
                if code:
                    raise CommandError(command, f"ended with {code}", _said(words))
        finally:
            for process in started:
                process.kill()
                process.wait()


def _said(words: Any) -> str:
    words.seek(0)
    return str(words.read().decode(errors="replace"))


@dataclass(frozen=True)
class Steady:
    """A run after its first fifth: images/s, and the share of the time that waits for data."""

    rate: float
    waits: float


def train_command(context: Context, run: Path, keys: Mapping[str, object], processes: int = 1) -> list[str]:
    """`distrain train` with neither checkpoints nor evaluations on the way; of several processes, `distrain launch`."""
    quiet = {
        "data.dir": context.data,
        "run.dir": run,
        "run.device": context.device,
        "checkpoint.every_steps": 0,
        "checkpoint.every_minutes": 0,
        "eval.every_steps": 0,
    }
    start = ["launch", "--nproc", str(processes), "--"] if processes > 1 else []
    asked = [f"{key}={value}" for key, value in {**quiet, **keys}.items()]
    return [sys.executable, "-m", "distrain", *start, "train", *asked]


def steps_of(context: Context, batch: int) -> int:
    """Steps of a timed run, in fifths."""
    return 5 * max(2, context.size // batch // 5)


def step_keys(context: Context, model: str, batch: int, processes: int = 1) -> dict[str, object]:
    """A run of `batch` samples a process and step, as configs/cifar10.yaml trains, every epoch from the shards."""
    steps = steps_of(context, batch)
    return {
        "model.name": model,
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


def steady(run: Path) -> Steady:
    """Of a run's lines but the first, which are of as many steps each."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    later = [line for line in lines if "train/images_per_second" in line][1:]
    return Steady(
        statistics.harmonic_mean([line["train/images_per_second"] for line in later]),
        statistics.fmean(line["profile/data"] for line in later),
    )
