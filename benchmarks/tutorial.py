"""distrain beside the plain script (plain.py): the same network, settings and images, seed by seed; then the recipe
of configs/cifar10.yaml, and how long it needs for the plain script's mean accuracy.

    python benchmarks/tutorial.py IMAGES --work WORK      # IMAGES has train/CLASS/*.jpg and test/CLASS/*.jpg

"seconds" are of training: reading and decoding included, start and evaluation not. "clock" is the run's own, from the
start of distrain's work in its process: reading the manifest, joining the group and earlier evaluations included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "configs"


class Figures(NamedTuple):
    accuracy: float
    seconds: float
    images_per_second: float


class Launch(NamedTuple):
    """How distrain is started."""

    data: Path
    processes: int
    threads: int


def call(command: Sequence[str], threads: int | None = None) -> str:
    """Standard output of a command that must succeed."""
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else dict(os.environ)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def plain(images: Path, seed: int) -> Figures:
    """One run of plain.py with torch's own number of threads: as the tutorial is run."""
    found = json.loads(
        call([sys.executable, str(HERE / "plain.py"), str(images), "--seed", str(seed)]).splitlines()[-1]
    )
    return Figures(*(found[name] for name in Figures._fields))


def train(config: str, launch: Launch, run: Path, seed: int, *more: str) -> Figures:
    """One run of `distrain train`, in one process or under torchrun."""
    start = [sys.executable]
    if launch.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(launch.processes)]
    keys = [
        f"data.dir={launch.data}",
        f"run.dir={run}",
        f"run.seed={seed}",
        f"run.cpu_threads={launch.threads}",
        "run.device=cpu",
    ]
    call([*start, "-m", "distrain", "train", "--config", str(CONFIGS / config), *keys, *more], launch.threads)
    result = json.loads((run / "result.json").read_text())
    seconds = result["steps"] * batch_size(run / "config.yaml") / result["images_per_second"]
    return Figures(result["accuracy"], seconds, result["images_per_second"])


def batch_size(config: Path) -> int:
    """The global batch size that a configuration file sets."""
    return int(yaml.safe_load(config.read_text())["train"]["global_batch_size"])


def curve(run: Path) -> Iterator[tuple[float, float, float]]:
    """(accuracy, seconds of training, seconds on the run's clock) of each evaluation of a run."""
    batch = batch_size(run / "config.yaml")
    trained, clock, logged = 0.0, 0.0, 0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values: dict[str, Any] = json.loads(line)
        if "train/images_per_second" in values:  # comes before the evaluation of the same step
            trained += (values["step"] - logged) * batch / values["train/images_per_second"]
            clock, logged = values["seconds"], values["step"]
        elif "test/accuracy" in values:
            yield values["test/accuracy"], trained, clock


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{form}} ± {deviation:{form}}"


def row(name: str, runs: Sequence[Figures]) -> str:
    accuracy = spread([100 * run.accuracy for run in runs], ".2f")
    seconds = spread([run.seconds for run in runs], ".1f")
    rate = spread([run.images_per_second for run in runs], ",.0f")
    each = ", ".join(f"{100 * run.accuracy:.2f}" for run in runs)
    return f"{name:<26}{accuracy:>16}{seconds:>18}{rate:>20}   {each}"


def side_by_side(images: Path, launch: Launch, seeds: Sequence[int], runs: Path) -> list[Figures]:
    """The plain script and configs/tutorial.yaml in turn; the plain script's figures."""
    theirs, ours = [], []
    for seed in seeds:
        theirs.append(plain(images, seed))
        print(f"# plain, seed {seed}: {theirs[-1]}", flush=True)
        ours.append(train("tutorial.yaml", launch, runs / f"tutorial-{seed}", seed))
        print(f"# distrain, seed {seed}: {ours[-1]}", flush=True)
    print(f"\nThe tutorial, seeds {', '.join(map(str, seeds))}; distrain in {launch.processes} process(es)\n")
    print(f"{'':<26}{'accuracy %':>16}{'seconds':>18}{'images/s':>20}   each seed's accuracy")
    print(row("plain PyTorch script", theirs))
    print(row("distrain, tutorial.yaml", ours))
    ratio = mean(ours, "images_per_second") / mean(theirs, "images_per_second")
    points = 100 * (mean(ours, "accuracy") - mean(theirs, "accuracy"))
    print(f"\ndistrain / plain: {ratio:.2f} × the images/s; accuracy {points:+.2f} points", flush=True)
    return theirs


def recipe(launch: Launch, seeds: Sequence[int], runs: Path, theirs: Sequence[Figures]) -> None:
    """configs/cifar10.yaml, evaluated four times an epoch, against the plain script's mean accuracy and time."""
    target, allowed = mean(theirs, "accuracy"), mean(theirs, "seconds")
    config = CONFIGS / "cifar10.yaml"
    images = json.loads((launch.data / "manifest.json").read_text())["splits"]["train"]["samples"]
    every = max(1, images // batch_size(config) // 4)
    results, reached = [], []
    for seed in seeds:
        run = runs / f"cifar10-{seed}"
        results.append(train("cifar10.yaml", launch, run, seed, f"eval.every_steps={every}"))
        reached.append(next((point for point in curve(run) if point[0] >= target), (0.0, float("inf"), float("inf"))))
        print(f"# cifar10.yaml, seed {seed}: {results[-1]}", flush=True)
    print(f"\nThe recipe, seeds {', '.join(map(str, seeds))}; distrain in {launch.processes} process(es)\n")
    print(f"{'':<26}{'accuracy %':>16}{'seconds':>18}{'images/s':>20}   each seed's accuracy")
    print(row("distrain, cifar10.yaml", results))
    print(f"\nUntil the plain script's {100 * target:.2f} %, which took it {allowed:.1f} seconds:\n")
    print(f"{'seed':<8}{'accuracy %':>12}{'seconds':>12}{'clock':>12}{'plain / recipe':>18}")
    for seed, (accuracy, seconds, clock) in zip(seeds, reached, strict=True):
        print(f"{seed:<8}{100 * accuracy:>12.2f}{seconds:>12.1f}{clock:>12.1f}{allowed / seconds:>16.1f} ×")


def mean(runs: Sequence[Figures], name: str) -> float:
    return statistics.fmean(getattr(run, name) for run in runs)


def prepared(images: Path, folder: Path) -> Path:
    """The images as a data set of distrain, prepared unless it is there already."""
    if not (folder / "manifest.json").exists():
        call([sys.executable, "-m", "distrain", "prepare", "folder", str(images), "--out", str(folder)], 1)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Time distrain beside the plain script, and its CIFAR-10 recipe.")
    parser.add_argument("images", type=Path, help="folder with train/CLASS/ and test/CLASS/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the prepared data and the runs")
    parser.add_argument("--data", type=Path, help="the same images, already prepared; default: WORK/data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1, help="of distrain, beside the plain script")
    parser.add_argument("--recipe-processes", type=int, default=2, help="of distrain, for configs/cifar10.yaml")
    parser.add_argument("--threads", type=int, default=1, help="threads that compute, in each process of distrain")
    asked = parser.parse_args()

    asked.work.mkdir(parents=True, exist_ok=True)
    data = prepared(asked.images, asked.data or asked.work / "data")
    runs = Path(tempfile.mkdtemp(prefix="runs-", dir=asked.work))
    theirs = side_by_side(asked.images, Launch(data, asked.processes, asked.threads), asked.seeds, runs)
    recipe(Launch(data, asked.recipe_processes, asked.threads), asked.seeds, runs, theirs)


if __name__ == "__main__":
    main()
