"""The command line: `python -m benchmarks`. torch is imported only when something is measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from benchmarks import PARTS
from distrain.errors import EXIT_NEVER_AGAIN, EXIT_OK, UserError

_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 78 for a mistake in the command or the data, 130 if interrupted."""
    try:
        bench.main(arguments, prog_name="python -m benchmarks", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return EXIT_NEVER_AGAIN
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_NEVER_AGAIN
    except click.Abort:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    return EXIT_OK


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("parts", nargs=-1, type=click.Choice(PARTS), metavar="[PART]...")
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Image files in train/CLASS/ and test/CLASS/; prepared at 32×32 into OUT/data.",
)
@click.option("--data", type=click.Path(path_type=Path), help="A prepared data set.  [default: synthetic, in OUT/data]")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for bench.json and bench.png.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Samples of each contestant.")
@click.option("--quick", is_flag=True, help="Little data and few steps: shows that it works, not how fast.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Device for training and evaluation.",
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(["fp32", "tf32", "bf16", "fp16"]),
    help="Precision of the parts training, scaling and virtual_ranks.",
)
@click.option("--models", default="", help="Comma-separated names.  [default: net; on GPUs net,resnet9]")
@click.option(
    "--recipe",
    default="configs/cifar10.yaml",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Configuration that the parts accuracy and launches train.",
)
@click.option(
    "--target",
    type=click.FloatRange(0, 100, min_open=True),
    help="Accuracy in percent for the part accuracy.  [default: the plain script's accuracy]",
)
@click.option(
    "--photos",
    default=2_000,
    show_default=True,
    type=click.IntRange(200),
    help="Number of photos that the part decoding generates, in OUT.",
)
def bench(models: str, **options: Any) -> None:
    """Measure distrain on this machine, compared with common alternatives and with the machine's limits.

    \b
    python -m benchmarks --out bench-out               # all parts that are not slow, on synthetic images
    python -m benchmarks reading scaling --data data/cifar10 --out bench-out
    python -m benchmarks accuracy --images photos/ --out bench-out

    \b
    reading      images/s from shards; compared with webdataset's and torchvision's usual pipelines
    decoding     images/s and CPU time from photos in tar files; compared with other loaders and decoding alone
    tutorial     images/s of the PyTorch tutorial's recipe; compared with its plain script
    training     images/s; compared with a bare loop over data in memory
    scaling      images/s of 1, 2, 4 … processes; compared with as many independent runs
    evaluation   images/s; compared with a bare loop over data in memory
    startup      seconds to the first step, of a new run and of a resumed run
    memory       memory for reading, by size of data and shards; time per image; time to plan a step
    launches     operations and host time of a step of --recipe, without a GPU
    saves        slow: steps that a checkpoint of 202 MB stops the training, on this disk and on one of 100 MB/s
    virtual_ranks  slow: milliseconds of a step with virtual ranks; compared with one without
    accuracy     slow: time until --recipe reaches the plain script's accuracy, or --target

    Contestants take turns. Medians and spreads are printed; OUT/bench.json has every sample.
    """
    from benchmarks import run

    names = tuple(name.strip() for name in models.split(",") if name.strip())
    run.run(run.Options(models=names, **options))


if __name__ == "__main__":
    sys.exit(main())
