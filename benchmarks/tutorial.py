"""The PyTorch tutorial's recipe: images/s of one process, start-up and evaluation not included.

`python -m benchmarks.plain_script` (ImageFolder, PIL, a DataLoader with two workers, batch 4, torch's default number of
threads), and `distrain train` with the settings of configs/tutorial.yaml and one thread.
"""

from __future__ import annotations

import json

from benchmarks.commands import call_program, train
from benchmarks.context import Context, take_turns
from benchmarks.image_files import write_folders
from benchmarks.table import Table, ratio

_TUTORIAL_KEYS = {
    "data.mean": "[0.5,0.5,0.5]",
    "data.std": "[0.5,0.5,0.5]",
    "train.epochs": "null",
    "train.global_batch_size": 4,
    "train.lr": 0.001,
    "train.schedule": "constant",
    "log.every_steps": 2000,
}
"""configs/tutorial.yaml, but for the length of the run."""


def measure(context: Context) -> Table:
    """Measure images/s."""
    steps = 200 if context.quick else 5000
    images = context.images or write_folders(
        context.dataset, context.work / "files", limit=2_000 if context.quick else 20_000
    )
    run = context.work / "tutorial"

    def plain() -> float:
        arguments = (images, "--steps", steps, "--device", context.device)
        return float(call_program("plain_script", *arguments, threads=None)["images_per_second"])

    def distrain() -> float:
        train(context, run, {**_TUTORIAL_KEYS, "train.max_steps": steps})
        return float(json.loads((run / "result.json").read_text())["images_per_second"])

    rows = take_turns("tutorial", "images/s", {"plain PyTorch script": plain, "distrain": distrain}, context.repeats)
    plain_row, distrain_row = rows.values()
    title = f"The tutorial's recipe on {context.device}, one process"
    return Table(title, list(rows.values()), [ratio(distrain_row, plain_row)])
