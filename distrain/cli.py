"""The command line: thin, and quick to answer; torch is imported by the commands that need it."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from distrain import __version__, address, config, failures, signals
from distrain.environment import Environment
from distrain.errors import EXIT_AGAIN, EXIT_NEVER_AGAIN, EXIT_OK, ConfigError, ShardError

_AFTER_FIRST_SECONDS = 5
"""How long a node's other processes hold back an error that its first one will probably tell."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 75 run it again, 78 never again unchanged, 1 a fault."""
    environment = Environment()
    try:
        environment = Environment.read(os.environ)
        return cli.main(arguments, prog_name="distrain", standalone_mode=False, obj=environment) or EXIT_OK
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_OK
    except click.ClickException as error:
        failure = failures.failure_here(environment, "user", EXIT_NEVER_AGAIN, error.format_message())
        if not failures.report_failure(failure, environment):
            error.show()
        return EXIT_NEVER_AGAIN
    except click.Abort:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        return _end(error, environment)


def _end(error: Exception, environment: Environment) -> int:
    """Tell the launcher, or else the user, why this process ends; return the exit code."""
    why = failures.failure_of(error, environment)
    if failures.report_failure(why, environment):
        return why.code
    if environment.local_rank > 0 and why.kind != "fault" and not isinstance(error, ShardError):
        # torchrun ends the others when one process ends: the first one's message comes out once, whole.
        until = time.monotonic() + _AFTER_FIRST_SECONDS
        while time.monotonic() < until:
            if signals.requested():
                return why.code
            time.sleep(0.05)
    prefix = "" if why.code == EXIT_AGAIN else "error: "
    shown = None if isinstance(error, failures.PeerFailedError) else why.traceback
    print(shown or f"distrain: {prefix}{error}", file=sys.stderr, flush=True)
    return why.code


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Train a CNN on WebDataset shards with any number of processes, and get the same result.

    \b
    distrain prepare synthetic --out data/synthetic
    distrain train data.dir=data/synthetic run.dir=runs/first
    distrain launch --nproc 4 -- train --config configs/cifar10.yaml

    Exit codes: 0 done; 75 stopped on request or a peer was lost: run it again; 78 wrong configuration or data, never
    again unchanged; 1 a fault of the program.
    """


class _WithKeys(click.Command):
    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"\nKeys, with their defaults:\n\n{config.keys_help()}\n")


@cli.command(cls=_WithKeys)
@click.option("--config", "file", type=click.Path(path_type=Path), help="YAML file; its keys go over the defaults.")
@click.argument("overrides", nargs=-1, metavar="[section.key=value]...")
@click.pass_obj
def train(environment: Environment, file: Path | None, overrides: tuple[str, ...]) -> None:
    """Train, evaluate and save a run.

    Under torchrun, accelerate launch or alone. Values: defaults < --config < section.key=value.
    """
    resolved = config.load(file, overrides)
    from distrain.training import train as training

    training.train(resolved, environment)
    if resolved.log.report and environment.is_main:
        _write_report(Path(resolved.run.dir))


def _write_report(run: Path) -> None:
    """Of a run that is done, and stays so whatever happens here; a stop request ends the drawing alone."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    problem = None
    try:
        with signals.handled_by(interrupt):
            if signals.requested():
                interrupt()
            from distrain.tools import report

            print(f"Report: {report.write([run])}", flush=True)
    except KeyboardInterrupt:
        problem = "stopped"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        again = f"`distrain report {run}` tries again"
        print(f"warning: no report was written: {problem}; {again}", file=sys.stderr, flush=True)


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--nproc", type=click.IntRange(1), help="Processes on this node.  [default: one for each GPU, or 1]")
@click.option("--nodes", type=click.IntRange(1), envvar="DISTRAIN_NODES", help="Nodes of the job.")
@click.option("--node", type=click.IntRange(0), envvar="DISTRAIN_NODE", help="This node, counted from 0.")
@click.option("--host", envvar="DISTRAIN_HOST", help="Name of the first node, where all meet.")
@click.option("--port", type=click.IntRange(1, 65535), envvar="DISTRAIN_PORT", help="Port there, free on it.")
@click.option(
    "--grace",
    type=click.FloatRange(0),
    help="Seconds to save and leave after a signal.  [default: launch.grace_seconds]",
)
@click.option(
    "--log-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for a log of each rank but 0, which writes here.  [default: all write here]",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND [ARGUMENT]...")
def launch(
    nproc: int | None,
    nodes: int | None,
    node: int | None,
    host: str | None,
    port: int | None,
    grace: float | None,
    log_dir: Path | None,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND of distrain (train …, evaluate …, doctor …) in several processes, and tell the scheduler the truth.

    \b
    distrain launch --nproc 4 -- train --config configs/cifar10.yaml

    Nodes are worked out from SLURM's variables under srun (one task a node), from a Kubernetes Indexed Job (with
    --nodes), or are this machine alone. SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 are forwarded: the run saves and
    leaves with 75. The exit code is also in RUN/exit.json, with the reason.
    """
    from distrain.launcher import cluster
    from distrain.launcher import launch as launching
    from distrain.launcher.verdict import format_verdict

    if command[0] not in ("train", "evaluate", "doctor"):
        raise ConfigError(f"launch: {command[0]}: behind -- stands train, evaluate or doctor, with its arguments")
    resolved = config.Config()
    if command[0] in ("train", "doctor"):
        context = {"train": train, "doctor": doctor}[command[0]].make_context(command[0], list(command[1:]))
        before = _DOCTOR if command[0] == "doctor" else ()
        resolved = config.load(context.params["file"], (*before, *context.params["overrides"]))
    elif command[0] == "evaluate":
        from distrain.runs import folder

        context = evaluate.make_context("evaluate", list(command[1:]))
        resolved = folder.configuration(context.params["run"], context.params["overrides"])
    topology = cluster.detect(os.environ, cluster.Options(nodes, node, host, port), socket.getfqdn)
    processes = nproc or launching.default_processes()
    print(launching.describe(topology, processes), flush=True)
    seconds = grace if grace is not None else resolved.launch.grace_seconds
    verdict = launching.launch(command, resolved, topology, processes, seconds, log_dir)
    if verdict.code == EXIT_AGAIN and command[0] == "doctor":
        verdict = replace(verdict, code=EXIT_NEVER_AGAIN)
    if verdict.code:
        print(format_verdict(verdict), file=sys.stderr, flush=True)
    return verdict.code


@cli.command(cls=_WithKeys)
@click.option("--config", "file", type=click.Path(path_type=Path), help="YAML file; its keys go over the defaults.")
@click.argument("overrides", nargs=-1, metavar="[section.key=value]...")
@click.pass_obj
def doctor(environment: Environment, file: Path | None, overrides: tuple[str, ...]) -> None:
    """Look, in seconds, for what would end a job.

    Put it where train stands, under any launcher, with the same configuration:

    \b
    distrain launch --nproc 4 -- doctor --config configs/cifar10.yaml
    srun --ntasks-per-node=1 distrain launch -- doctor --config configs/cifar10.yaml

    Looks at versions, devices, cores, memory, /dev/shm and open files of every node, at the data set, at the run's
    folder and how long a save takes, at the rendezvous, and at what the processes share. Exit code 0, or 78.
    """
    resolved = config.load(file, (*_DOCTOR, *overrides))
    from distrain.tools import doctor as looking

    looking.examine(resolved, environment)


_DOCTOR = ("timeouts.start_seconds=20", "timeouts.step_seconds=15")
"""`distrain doctor` does not wait for as long as a job would, unless it is asked to."""


@cli.command("config")
def show_config() -> None:
    """Print every key with its default and meaning, as YAML."""
    click.echo(config.commented_yaml(), nl=False)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[section.key=value]...")
@click.option("--split", default="test", show_default=True, help="train, val or test.")
@click.option("--checkpoint", "which", help="best, last or a folder's name; default: best, where there is a val split.")
@click.pass_obj
def evaluate(environment: Environment, run: Path, overrides: tuple[str, ...], split: str, which: str | None) -> None:
    """Score a checkpoint of RUN, on any number of processes."""
    from distrain.tools import evaluate as scoring

    scoring.evaluate_run(run, split, overrides, which, environment)


@cli.command("report")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN [RUN]...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write.  [default: RUN/report; of several runs there is none]",
)
def write_report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write a page that shows what a run did, or compares several; it opens from disk, without any network.

    \b
    distrain report runs/first
    distrain report runs/first runs/second --out comparison

    OUT/index.html has curves, confusions, pictures that were got wrong, what augmentation does, configuration, data
    and machine; OUT/*.png are its charts. A run that is not done yet can be looked at as well.
    """
    from distrain.tools import report

    click.echo(report.write(runs, out))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(run: Path, as_json: bool) -> None:
    """Say how far RUN is, wherever it goes on: step, rate, time left, last checkpoint, attempts."""
    from distrain.tools.status import format_status, run_status

    progress = run_status(run)
    click.echo(json.dumps(progress) if as_json else format_status(progress))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@click.option("--checkpoint", "which", help="best, last or a folder's name; default: best, where there is a val split.")
@click.option("--top", default=3, show_default=True, type=click.IntRange(1), help="Most probable classes shown.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
def predict(run: Path, images: tuple[Path, ...], which: str | None, top: int, as_json: bool, device: str) -> None:
    """Say what the model of RUN sees in image files; neither its data set nor other processes are needed."""
    from distrain.tools import predict as predicting

    for prediction in predicting.predict(run, images, which, device):
        click.echo(predicting.format_prediction(prediction, top, as_json))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="File: NAME.pt2 (torch.export) or NAME.onnx."
)
@click.option("--checkpoint", "which", help="best, last or a folder's name; default: best, where there is a val split.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def export(run: Path, out: Path, which: str | None, force: bool) -> None:
    """Write the model of RUN as one file, for use without distrain.

    It takes images as float32 [N, C, H, W] in 0 … 1, of any N, and gives logits [N, K]; the names of the classes are in
    the file. What was written is read back, and its outputs are compared with the model's. ONNX needs an extra: pip
    install 'distrain[onnx]'.
    """
    from distrain.tools import export as exporting

    found = exporting.export(run, out, which, force)
    click.echo(f"{out}: {found['kind']} of {found['checkpoint']}; logits differ by {found['difference']:.2g} at most")


@cli.command("wandb")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--mode", default="online", show_default=True, type=click.Choice(["online", "offline"]))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for the offline run.")
def send_to_wandb(run: Path, mode: str, out: Path | None) -> None:
    """Send RUN to wandb as one run, however often it was interrupted: its metrics, configuration, result and pictures.

    \b
    distrain wandb runs/first                                    # with WANDB_API_KEY, or after `wandb login`
    distrain wandb runs/first --mode offline --out to-wandb      # then `wandb sync` from another machine

    What a server has already is not sent again.
    """
    from distrain.tools import wandb_run

    click.echo(wandb_run.send(run, mode == "online", out))


@cli.command()
@click.argument("folder")
def verify(folder: str) -> None:
    """Check every digest and count of the data set in FOLDER, or at an address."""
    from distrain.data import manifest, prepare
    from distrain.errors import DataError

    dataset = manifest.read(folder)
    wrong = list(prepare.verify(dataset))
    if wrong:
        raise DataError("\n  ".join([f"{dataset.root}: {len(wrong)} found wrong:", *wrong]))
    click.echo(f"{dataset.root}: {_describe(dataset)}: all as written")


class _Sources(click.Group):
    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        found = super().get_command(ctx, name)
        if found is None and ("/" in name or Path(name).exists()):
            raise click.UsageError(f"{name} is a path: distrain prepare folder {name} --out …", ctx)
        return found


@cli.group("prepare", cls=_Sources)
def prepare_group() -> None:
    """Write a data set that training can stream."""


def _folder(_context: click.Context, _option: click.Parameter, text: str) -> Path:
    kind = address.scheme(text)
    if kind is not None:  # a path of that name would be made, silently
        raise ConfigError(f"--out: {kind}:// is an address; write to a folder and upload that")
    return Path(text)


def _prepare_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that all sources share."""
    for option in (
        click.option(
            "--skip-bad",
            default=0,
            show_default=True,
            type=click.IntRange(0),
            help="Unreadable sources that are left out, not an error.",
        ),
        click.option(
            "--test-fraction",
            default=0.1,
            show_default=True,
            type=click.FloatRange(0, 1, max_open=True),
            help="Of train, where the source has no test; stratified.",
        ),
        click.option(
            "--val-fraction",
            default=0.0,
            show_default=True,
            type=click.FloatRange(0, 1, max_open=True),
            help="Of train, to choose the best checkpoint by; stratified.",
        ),
        click.option("--limit", type=click.IntRange(1), help="Most samples of each split; stratified."),
        click.option(
            "--lanes",
            type=click.IntRange(1),
            help="Parallel streams an epoch is dealt from: at most so many processes. [default: 64]",
        ),
        click.option(
            "--shards",
            type=click.IntRange(1),
            help="Tar files of each split, a multiple of the lanes. [default: of at most 32 MiB]",
        ),
        click.option(
            "--seed",
            default=0,
            show_default=True,
            type=click.IntRange(0, 2**63 - 1),
            help="Draws the splits, the shuffle and the generator's pictures.",
        ),
        click.option("--out", required=True, callback=_folder, metavar="PATH", help="Folder to write."),
    ):
        command = option(command)
    return command


@prepare_group.command("cifar10")
@click.option(
    "--root",
    default="data/downloads",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where torchvision keeps, or puts, its files.",
)
@_prepare_options
def prepare_cifar10(root: Path, out: Path, **options: Any) -> None:
    """CIFAR-10 as torchvision downloads and verifies it."""

    def open_source(work: Path) -> Any:
        from distrain.data.sources.cifar10 import Cifar10

        return Cifar10(root, work)

    _prepare(out, "cifar10", {}, open_source, options)


@prepare_group.command("folder")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option(
    "--image-size",
    default=32,
    show_default=True,
    type=click.IntRange(1),
    help="Height and width that images are resized and centre-cropped to.",
)
@_prepare_options
def prepare_folder(paths: tuple[Path, ...], image_size: int, out: Path, **options: Any) -> None:
    """Your own images: a folder per class under train/ and test/, or .tar(.gz) archives of such folders."""

    def open_source(work: Path) -> Any:
        from distrain.data.sources.folder import Folder

        return Folder(paths, image_size, work)

    _prepare(out, "folder", {"image_size": image_size}, open_source, options)


@prepare_group.command("synthetic")
@click.option("--samples", default=20000, show_default=True, type=click.IntRange(1), help="Training pictures.")
@click.option("--test-samples", default=4000, show_default=True, type=click.IntRange(1), help="Test pictures.")
@click.option("--image-size", default=32, show_default=True, type=click.IntRange(8), help="Height and width.")
@click.option("--classes", default=10, show_default=True, type=click.IntRange(2), help="Classes.")
@_prepare_options
def prepare_synthetic(
    samples: int, test_samples: int, image_size: int, classes: int, out: Path, **options: Any
) -> None:
    """The embedded data set: pictures drawn by a generator from a seed. No download."""

    def open_source(work: Path) -> Any:
        from distrain.data.sources.synthetic import Synthetic

        return Synthetic(samples, test_samples, image_size, classes, options["seed"])

    asked = {"samples": samples, "test_samples": test_samples, "image_size": image_size, "classes": classes}
    _prepare(out, "synthetic", asked, open_source, options)


def _pairs(_context: click.Context, _argument: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"{text}: should be key=value, the name and value of an argument of the class")
        if key in pairs:
            raise ConfigError(f"{text}: {key} is given twice")
        pairs[key] = value
    return pairs


@prepare_group.command("source")
@click.argument("name", metavar="package.module:Class")
@click.argument("arguments", nargs=-1, callback=_pairs, metavar="[key=value]...")
@_prepare_options
def prepare_source(name: str, arguments: dict[str, str], out: Path, **options: Any) -> None:
    """A class of your own that gives images and labels: docs/extending.md has an example.

    It is looked up in the current folder, then where Python looks, and called with the pairs as keyword arguments, all
    of them text. The manifest records its name and the pairs, but no secrets: addresses without theirs, and nothing of
    a pair whose key says token, secret, password or credential, or ends in key.
    """

    def open_source(_work: Path) -> Any:
        from distrain.data.sources.user_class import UserSource

        return UserSource(name, arguments)

    recorded = {key: "hidden" if address.is_secret(key) else address.scrub(value) for key, value in arguments.items()}
    _prepare(out, "source", {"class": name, "arguments": recorded}, open_source, options)


def _prepare(out: Path, kind: str, asked: dict[str, Any], open_source: Callable[[Path], Any], options: Any) -> None:
    from distrain.data import prepare

    dataset, made = prepare.prepare(out, kind, asked, open_source, prepare.Options(**options))
    skipped = dataset.manifest.source.get("skipped")
    note = f"; {skipped} unreadable left out" if skipped else ""
    click.echo(
        f"{out}: {_describe(dataset)}{note}" + ("" if made else ": already prepared, left alone; sources not compared")
    )


def _describe(dataset: Any) -> str:
    found = dataset.manifest
    splits = ", ".join(
        f"{name} {split.samples:,} in {len(split.shards)} shards of {split.lanes} lanes"
        for name, split in found.splits.items()
    )
    return f"{splits}; {len(found.classes)} classes, {'×'.join(map(str, found.image_shape))}"
