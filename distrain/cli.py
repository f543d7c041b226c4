"""The command line. It is thin, and answers quickly: only the commands that need torch import it."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distrain import __version__, config, console, failure_report, machine, signals, startup
from distrain.environment import IN_A_GROUP, Environment, integer
from distrain.errors import EXIT_AGAIN, EXIT_INTERRUPTED, EXIT_NEVER_AGAIN, EXIT_OK, ConfigError, ShardError
from distrain.text import percent, plural, printable

if TYPE_CHECKING:
    from distrain.api.preparation import AnySource
    from distrain.launcher.cluster import Topology
    from distrain.launcher.launch import Job, Restarts

log = logging.getLogger("distrain")

_AFTER_FIRST_SECONDS = 5
"""Delay of an error in a node's other processes, as its first process probably shows it as well."""

_CHECKPOINT = click.option(
    "--checkpoint", "which", help="best, last, or a folder's name.  [default: best if there is a val split, else last]"
)
"""The option of the commands that work on one checkpoint of a run."""

_TRIAL = click.option(
    "--trial",
    metavar="FILE:NUMBER",
    help="Add the keys in a line of FILE, which has those of one run in each line; the first one has number 0.",
)
"""The option of the commands that may train a run of a sweep."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 75 run it again, 78 never again unchanged, 1 a fault.

    Log messages are shown on stderr while it runs.
    """
    command = (sys.argv[1:] if arguments is None else arguments)[:1]
    try:
        environment = Environment.read(os.environ if command and command[0] in IN_A_GROUP else {})
    except ConfigError as error:
        return _end(error, Environment())
    with console.logging_to_stderr(environment.world.rank if environment.world.size > 1 else None):
        code = _run(arguments, environment)
    if code == EXIT_OK:
        failure_report.report_done(environment)
    return code


def _run(arguments: list[str] | None, environment: Environment) -> int:
    try:
        return cli.main(arguments, prog_name="distrain", standalone_mode=False, obj=environment) or EXIT_OK
    except click.exceptions.NoArgsIsHelpError as error:
        error.show(sys.stderr)
        return EXIT_OK
    except click.ClickException as error:
        error.message = printable(error.message)  # type: ignore[misc] # it may quote an argument; show() has no other way
        failure = failure_report.failure_here(environment, "user", EXIT_NEVER_AGAIN, error.format_message())
        if not failure_report.report_failure(failure, environment):
            console.show_error(_shown_by_click(error))
        return EXIT_NEVER_AGAIN
    except click.Abort:
        console.show_error("stopped")
        return EXIT_INTERRUPTED
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:  # by a signal
            raise
        return _end(error.cause if isinstance(error, _CommandError) else error, environment)


def _shown_by_click(error: click.ClickException) -> str:
    lines = io.StringIO()
    error.show(lines)
    return lines.getvalue().removesuffix("\n")


class _CommandError(Exception):
    """An error that click would handle itself: EOFError as Ctrl-C, and EPIPE, of any socket, as a quiet exit.

    Code that a run calls, such as a model, may even raise click's own exceptions; its `Exit` would end the run with 0.
    """

    def __init__(self, cause: BaseException) -> None:
        super().__init__(cause)
        self.cause = cause


def _end(error: BaseException, environment: Environment) -> int:
    """Report why this process ends, to the launcher or else to the user; return the exit code."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        # Only a name that was given can be too long; any command may be the first to use it.
        error = ConfigError(f"{printable(error.filename)}: {error.strerror}; give a shorter one")
    failure = failure_report.failure_of(error, environment)
    if failure_report.report_failure(failure, environment):
        return failure.code
    if environment.local_rank > 0 and failure.kind != "fault" and not isinstance(error, ShardError):
        # torchrun ends the others when one process ends: so the message of the first one appears once, and whole.
        until = time.monotonic() + _AFTER_FIRST_SECONDS
        while time.monotonic() < until:
            if signals.requested():
                return failure.code
            time.sleep(0.05)
    prefix = "" if failure.code == EXIT_AGAIN else "error: "
    trace = None if isinstance(error, failure_report.PeerFailedError) else failure.traceback
    if isinstance(error, SystemExit):
        trace = f"{trace}distrain: error: {failure.message}"
    console.show_error((trace or f"distrain: {prefix}{error}").rstrip("\n"))
    return failure.code


class _Command(click.Command):
    """A command whose help can be shown in any encoding."""

    def get_help(self, ctx: click.Context) -> str:
        return console.encodable(super().get_help(ctx))


class _Group(click.Group):
    """A group of commands whose help can be shown in any encoding."""

    command_class = _Command

    def get_help(self, ctx: click.Context) -> str:
        return console.encodable(super().get_help(ctx))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (OSError, EOFError) as error:
            raise _CommandError(error) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Train a CNN on WebDataset shards: the same samples in every step, on any number of processes.

    \b
    distrain prepare synthetic --out data/synthetic
    distrain train data.dir=data/synthetic run.dir=runs/first
    distrain launch --nproc 4 -- train --config configs/cifar10.yaml

    Exit codes: 0 done; 75 stopped on request or a peer was lost: run it again; 78 wrong configuration or data, never
    again unchanged; 1 a fault of the program.
    """


class _WithKeys(_Command):
    """A command whose help lists the keys of the configuration."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"\nKeys, with their defaults:\n\n{config.keys_help()}\n")


@cli.command(cls=_WithKeys)
@click.option("--config", "file", type=click.Path(path_type=Path), help="YAML file; its keys replace the defaults.")
@_TRIAL
@click.argument("overrides", nargs=-1, metavar="[section.key=value]...")
@click.pass_obj
def train(environment: Environment, file: Path | None, trial: str | None, overrides: tuple[str, ...]) -> None:
    """Train a model, evaluate it and save it.

    Works alone, under distrain launch, torchrun or accelerate launch. Later values win: defaults, then --config, then
    --trial, then section.key=value.
    """
    resolved = _load(file, overrides, trial)
    with _running(environment):
        with startup.quick_imports():
            from distrain.api import training

        result = training.train_run(resolved)
    if environment.is_main:
        from distrain.runs import results

        console.show("Finished Training")
        console.show(results.accuracy_line(result.split, result.total, result.accuracy))
        console.show(f"Run: {result.run}")
        report = training.with_report(resolved, result).report
        if report is not None:
            console.show(f"Report: {report}")


@contextlib.contextmanager
def _running(environment: Environment) -> Iterator[None]:
    """Run a model: click does not see what its code raises; the first process of each node explains a long start."""
    try:
        with startup.explained("importing torch") if environment.local_rank == 0 else contextlib.nullcontext():
            yield
    except BaseException as error:
        raise _CommandError(error) from error


def _load(file: Path | None, overrides: Sequence[str], trial: str | None = None) -> config.Config:
    """Return the configuration of a command line; log messages follow its `log.level` from here on."""
    keys = config.trial_keys(trial) if trial is not None else []
    resolved = config.load(file, [*keys, *overrides])
    console.set_level(resolved.log.level)
    return resolved


def _load_run(run: Path, overrides: Sequence[str]) -> config.Config:
    """Return the configuration of a run's folder in the same way."""
    from distrain.runs import folder

    resolved = folder.configuration(run, overrides)
    console.set_level(resolved.log.level)
    return resolved


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--nproc", type=click.IntRange(1), help="Processes on this node.  [default: one for each GPU, or 1]")
@click.option("--nodes", type=click.IntRange(1), help="Nodes of the job; also DISTRAIN_NODES.")
@click.option("--node", type=click.IntRange(0), help="This node, counted from 0; also DISTRAIN_NODE.")
@click.option("--host", help="Name or address of the first node, where the rendezvous is; also DISTRAIN_HOST.")
@click.option("--port", type=click.IntRange(1, 65535), help="A free port of the first node; also DISTRAIN_PORT.")
@click.option(
    "--grace",
    type=click.FloatRange(0),
    help="Seconds to save and exit after a signal.  [default: launch.grace_seconds]",
)
@click.option(
    "--log-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for one log file per rank; rank 0 writes here.  [default: all ranks write here]",
)
@click.option(
    "--restarts",
    type=click.IntRange(0),
    help="Start the processes again, at most so many times, when one was lost; also DISTRAIN_RESTARTS."
    "  [default: launch.restarts]",
)
@click.option(
    "--min-nodes",
    type=click.IntRange(1),
    help="Continue with so many nodes when others are lost; also DISTRAIN_MIN_NODES.  [default: all]",
)
@click.option("--oversubscribe", is_flag=True, help="Allow more than 4 processes for each CPU core.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND [ARGUMENT]...")
def launch(
    nproc: int | None,
    nodes: int | None,
    node: int | None,
    host: str | None,
    port: int | None,
    grace: float | None,
    log_dir: Path | None,
    restarts: int | None,
    min_nodes: int | None,
    oversubscribe: bool,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND of distrain (train …, evaluate …, doctor …) in several processes.

    \b
    distrain launch --nproc 4 -- train --config configs/cifar10.yaml

    Nodes are detected from the variables of SLURM under srun (one task per node), of a Kubeflow job, of WORLD_SIZE and
    RANK, or of a Kubernetes Indexed Job (with --nodes); otherwise the job runs on this machine alone. Options go before
    variables. SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU are forwarded: the run saves a checkpoint and exits
    with 75. RUN/exit.json has the exit code, with the reason.

    With --restarts, a process of train that is killed, crashes by a signal, hangs or loses its link ends this attempt
    only: all processes are started again, and resume from the newest checkpoint. A fault of the program ends the job.
    """
    from distrain.launcher import cluster
    from distrain.launcher import launch as launching
    from distrain.launcher.verdict import format_verdict

    if command[0] not in ("train", "evaluate", "doctor"):
        raise ConfigError(f"launch: {command[0]}: give train, evaluate or doctor after --, with its arguments")
    resolved = _of_launched(command)
    topology = cluster.detect(os.environ, cluster.Options(nodes, node, host, port), socket.getfqdn)
    processes = nproc or topology.processes or launching.default_processes(resolved.run.device)
    gpus, cores = machine.gpus(os.environ), machine.cores()
    launching.check_number(processes, resolved.run.device, gpus, cores, oversubscribe)
    log.info("%s", launching.describe(topology, processes))
    seconds = grace if grace is not None else resolved.launch.grace_seconds
    job = launching.Job(command, resolved, processes, seconds, log_dir)
    verdict = launching.launch(job, topology, _restarts(job, topology, restarts, min_nodes))
    if verdict.code == EXIT_AGAIN and command[0] == "doctor":
        verdict = replace(verdict, code=EXIT_NEVER_AGAIN)
    if verdict.code:
        console.show_error(format_verdict(verdict))
    return verdict.code


def _restarts(job: Job, topology: Topology, number: int | None, least_nodes: int | None) -> Restarts:
    """Return how a job is started again: as given, or by its environment variables, or by its configuration.

    Raises:
        ConfigError: this is not possible.
    """
    from distrain.launcher.launch import Restarts

    settings = job.config.launch
    if number and not job.trains:
        raise ConfigError(f"launch: --restarts is for train; run {job.arguments[0]} again instead")
    number = integer(os.environ, "DISTRAIN_RESTARTS", 0) if number is None else number
    least_nodes = integer(os.environ, "DISTRAIN_MIN_NODES", 1) if least_nodes is None else least_nodes
    number = (settings.restarts if number is None else number) if job.trains else 0
    if least_nodes is not None and least_nodes > topology.nodes:
        raise ConfigError(f"launch: --min-nodes {least_nodes}: the job has {plural(topology.nodes, 'node')}")
    if least_nodes is not None and not number and job.trains:
        raise ConfigError("launch: --min-nodes takes effect at a restart: give --restarts too")
    return Restarts(number, least_nodes, settings.rejoin_seconds, settings.standby)


def _of_launched(command: tuple[str, ...]) -> config.Config:
    """Return the configuration that a command given to `launch` will have."""
    name, arguments = command[0], list(command[1:])
    if name == "evaluate":
        params = evaluate.make_context(name, arguments).params
        return _load_run(params["run"], params["overrides"])
    params = (train if name == "train" else doctor).make_context(name, arguments).params
    defaults = _DOCTOR if name == "doctor" else ()
    return _load(params["file"], (*defaults, *params["overrides"]), params["trial"])


@cli.command(cls=_WithKeys)
@click.option("--config", "file", type=click.Path(path_type=Path), help="YAML file; its keys replace the defaults.")
@_TRIAL
@click.argument("overrides", nargs=-1, metavar="[section.key=value]...")
@click.pass_obj
def doctor(environment: Environment, file: Path | None, trial: str | None, overrides: tuple[str, ...]) -> None:
    """Check, within seconds, whether a job can run.

    Replace `train` by `doctor` in your command, under any launcher, with the same configuration:

    \b
    distrain launch --nproc 4 -- doctor --config configs/cifar10.yaml
    srun --ntasks-per-node=1 distrain launch -- doctor --config configs/cifar10.yaml

    On every node it checks versions, devices, cores, memory, /dev/shm, the limit of open files, and the folders of
    temporary files and of the cache; for the job, the data set, all that a run does in its folder, the free space and
    the time for a checkpoint, the rendezvous, and whether all processes see the same data and folder, and have equal
    GPUs. At last it trains two steps at the real sizes. Exit code: 0 if nothing would end the job, else 78.
    """
    resolved = _load(file, (*_DOCTOR, *overrides), trial)
    with startup.quick_imports():
        from distrain.tools import doctor as examination

    examination.examine(resolved, environment)


_DOCTOR = ("timeouts.start_seconds=20", "timeouts.step_seconds=15")
"""Defaults of `distrain doctor`, which does not wait as long as a job."""


@cli.command("config")
def show_config() -> None:
    """Print every key with its default and meaning, as YAML."""
    print(config.commented_yaml(), end="")
    console.check_answer()


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[section.key=value]...")
@click.option("--split", default="test", show_default=True, help="train, val or test.")
@_CHECKPOINT
@click.pass_obj
def evaluate(environment: Environment, run: Path, overrides: tuple[str, ...], split: str, which: str | None) -> None:
    """Evaluate a checkpoint of RUN, on any number of processes."""
    _load_run(run, overrides)
    with _running(environment):
        with startup.quick_imports():
            from distrain.tools import evaluate as evaluation

        content = evaluation.evaluate_run(run, split, overrides, which, environment)
    if environment.is_main:
        from distrain.runs import results

        console.show(results.accuracy_line(split, content["total"], content["accuracy"]))
        console.show(f"{results.scores_line(content)}, calibration error {percent(content['calibration_error'])}")
        console.show(f"written to {evaluation.file_of(run, content)}")


@cli.command("report")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN [RUN]...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write.  [default: RUN/report; required for several runs]",
)
def write_report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write a page that shows a run or compares several. It opens from disk, without a network.

    \b
    distrain report runs/first
    distrain report runs/first runs/second --out comparison

    OUT/index.html has scores, command and git commit, curves, a table by epoch, confusions, misclassified pictures,
    augmented pictures, configuration, data and machine. A run that is not finished can be shown as well. Several runs
    are sorted by their accuracy on val (on test if there is no val), and shown as text too, with the keys that differ.
    """
    from distrain.tools import report

    path, comparison = report.compare(runs, out)
    if comparison:
        console.show(comparison)
    console.show(path)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(run: Path, as_json: bool) -> None:
    """Show the progress of RUN, on whatever machine it runs: step, rate, time left, last checkpoint, attempts."""
    from distrain.tools.status import format_status, run_status

    progress = run_status(run)
    console.show(json.dumps(progress) if as_json else format_status(progress))
    console.check_answer()


@cli.command("hash")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN [RUN]...")
@click.option("--json", "as_json", is_flag=True, help="One JSON array, with an object for each run.")
def show_hashes(runs: tuple[Path, ...], as_json: bool) -> None:
    """Show the digests of the weights, the optimizer and the trained ids of runs; compare several with the first one.

    \b
    distrain hash runs/first
    distrain hash runs/first runs/second

    They are read from RUN/metrics.jsonl, where a run writes them at each evaluation and save. Where a run parts from
    the first one, the line, what differs there and what may be why are named, and the exit code is 78.
    """
    from distrain.tools.hash_runs import check_equal, format_hashes, hash_runs

    hashes = hash_runs(runs)
    console.show(json.dumps(hashes) if as_json else format_hashes(hashes))
    console.check_answer()
    check_equal(hashes)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@_CHECKPOINT
@click.option(
    "--top", default=3, show_default=True, type=click.IntRange(1), help="Number of the most probable classes shown."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
def predict(run: Path, images: tuple[Path, ...], which: str | None, top: int, as_json: bool, device: str) -> None:
    """Classify image files with the model of RUN, a run or a bundle. Its data set is not needed.

    Images are decoded, resized and cropped as by `prepare`; for an index, as in evaluation. The output has one line per
    file: its name, and the --top most probable classes with their probabilities. With --json: {"file": NAME, "classes":
    {CLASS: PROBABILITY}}, probabilities in 0 … 1.
    """
    with startup.quick_imports():
        from distrain.tools import predict as prediction

    for one in prediction.predict(run, images, which, device):
        console.show(prediction.format_prediction(one, top, as_json))
    console.check_answer()


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="File: NAME.pt2 (torch.export) or NAME.onnx.")
@click.option("--bundle", type=click.Path(path_type=Path), help="New folder, to share the model with others.")
@_CHECKPOINT
@click.option("--force", is_flag=True, help="Replace an existing file.")
def export(run: Path, out: Path | None, bundle: Path | None, which: str | None, force: bool) -> None:
    """Write the model of RUN as one file, for use without distrain, or as a folder to share it (--bundle).

    \b
    input     images       float32 [N, C, H, W], any N: pixels / 255
    output    logits       float32 [N, K]
    metadata  classes      JSON list of the K names
              image_shape  JSON list [C, H, W]
              resize       of an index: length of the shorter side before [H, W] is cropped; else null
              checkpoint   name of the checkpoint

    Images must be resized and cropped as for `predict`, but not normalised: the file does that. docs/extending.md has
    examples that run. The file is read back, and its outputs are compared with the model's. ONNX needs an extra: pip
    install 'distrain[onnx]'.

    A bundle has the layout of the Hugging Face Hub: weights, preprocessing and a model card with the scores. `predict`
    and distrain.load_model read it like a run, and `hf upload USER/NAME FOLDER .` sends it: docs/sharing.md.
    """
    if (out is None) == (bundle is None) or (bundle is not None and force):
        raise click.UsageError("give either --out FILE, with --force if it may be replaced, or --bundle FOLDER")
    with startup.quick_imports():
        from distrain.tools import export as exporter

    if bundle is not None:
        console.show(f"{bundle}: {exporter.export_bundle(run, bundle, which)}")
    elif out is not None:
        facts = exporter.export(run, out, which, force)
        difference = f"logits differ by {facts['difference']:.2g} at most"
        console.show(f"{out}: {facts['kind']} of {facts['checkpoint']}; {difference}")


@cli.command("wandb")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--mode", default="online", show_default=True, type=click.Choice(["online", "offline"]))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for the offline run.")
def send_to_wandb(run: Path, mode: str, out: Path | None) -> None:
    """Send RUN to wandb: its metrics, configuration, result and pictures, as one run however often it was interrupted.

    \b
    distrain wandb runs/first                                    # with WANDB_API_KEY, or after `wandb login`
    distrain wandb runs/first --mode offline --out to-wandb      # then `wandb sync` from another machine

    Anything that the server already has is not sent again.
    """
    from distrain.tools import wandb_run

    console.show(wandb_run.send(run, mode == "online", out))


@cli.command()
@click.argument("folder")
@click.option("--tars", help="Folder or address of an index's tar files.  [default: where they were indexed]")
def verify(folder: str, tars: str | None) -> None:
    """Check every digest and count of the data set in FOLDER, or at an address, and of the tar files of an index."""
    from distrain.data import manifest
    from distrain.errors import DataError
    from distrain.preparation import verification

    dataset = manifest.read(folder, tars=tars)
    wrong = list(verification.verify(dataset))
    if wrong:
        raise DataError("\n  ".join([f"{dataset.root}: {len(wrong)} found wrong:", *wrong]))
    console.show(f"{dataset.root}: {_describe(dataset)}: all as written")


class _Sources(_Group):
    """The sources that `prepare` knows."""

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        command = super().get_command(ctx, name)
        if command is None and ("/" in name or Path(name).exists()):
            raise click.UsageError(f"{name} is a path: distrain prepare folder {name} --out …", ctx)
        return command


@cli.group("prepare", cls=_Sources)
def prepare_group() -> None:
    """Write a data set that training can stream."""


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decorator that adds options to a command."""

    def add(command: Any) -> Any:
        for option in options:
            command = option(command)
        return command

    return add


_prepare_options = _options(
    click.option(
        "--skip-bad",
        default=0,
        show_default=True,
        type=click.IntRange(0),
        help="How many unreadable images to drop; more are an error.",
    ),
    click.option(
        "--test-fraction",
        type=click.FloatRange(0, 1, max_open=True),
        help="Part of train that becomes test, if the source has no test split; stratified.  [default: 0.1]",
    ),
    click.option(
        "--val-fraction",
        default=0.0,
        show_default=True,
        type=click.FloatRange(0, 1, max_open=True),
        help="Part of train that becomes val, which the best checkpoint is chosen on; stratified.",
    ),
    click.option("--limit", type=click.IntRange(1), help="Maximum number of samples of each split; stratified."),
    click.option(
        "--lanes",
        type=click.IntRange(1),
        help="Parallel streams of an epoch, and so the maximum number of processes.  [default: 64, or fewer for"
        " some hundreds of images]",
    ),
    click.option(
        "--shards",
        type=click.IntRange(1),
        help="Shards of each split, a multiple of the lanes.  [default: files of at most 32 MiB]",
    ),
    click.option(
        "--seed",
        default=0,
        show_default=True,
        type=click.IntRange(0, 2**63 - 1),
        help="Seed of the splits, the shuffle and the generated pictures.",
    ),
    click.option("--out", required=True, metavar="PATH", help="Folder to write."),
)
"""The options that all sources share."""


@prepare_group.command("cifar10")
@click.option(
    "--root",
    default="data/downloads",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder of torchvision's files; missing ones are downloaded.",
)
@_prepare_options
def prepare_cifar10(root: Path, out: str, **options: Any) -> None:
    """CIFAR-10, downloaded and verified by torchvision."""
    from distrain.api.preparation import Cifar10

    _prepare(Cifar10(root), out, options)


_decoding_options = _options(
    click.option(
        "--max-pixels",
        default=89_478_485,
        show_default=True,
        type=click.IntRange(1),
        help="Images with more pixels are unreadable, as they may be made to exhaust the memory.",
    ),
    click.option(
        "--bit-depth",
        default=16,
        show_default=True,
        type=click.IntRange(1, 16),
        help="Bits of the pixels in grey images of 16 bits that do not state it (12: scientific cameras, DICOM).",
    ),
    click.option(
        "--background",
        default="white",
        show_default=True,
        help="Colour behind transparent pixels: a name, or #rrggbb.",
    ),
)
"""The options that decide how image files become pixels, the fields of `images.Decoding`."""


@prepare_group.command("folder")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option(
    "--image-size",
    default=32,
    show_default=True,
    type=click.IntRange(1),
    help="Height and width: images are resized and centre-cropped.",
)
@_decoding_options
@_prepare_options
def prepare_folder(paths: tuple[Path, ...], out: str, **options: Any) -> None:
    """Your own images: a folder per class under train/ and test/, or tar and zip archives of such folders.

    Splits may also be called training, val, valid, validation, dev, eval and testing, in any case. Without splits, the
    folders are the classes. What was recognised, and what was passed over, is shown.
    """
    from distrain.api.preparation import Folder

    _prepare(Folder(paths, **_fields(Folder, options)), out, options)


@prepare_group.command("webdataset")
@click.argument("train", nargs=-1, required=True, metavar="TRAIN...")
@click.option("--val", multiple=True, metavar="PATTERN", help="Tar files of val; may be repeated.")
@click.option("--test", multiple=True, metavar="PATTERN", help="Tar files of test; may be repeated.")
@click.option(
    "--image", default="jpg;jpeg;png;webp", show_default=True, help="Fields that are images; the first one is used."
)
@click.option("--label", default="cls", show_default=True, help="Field that is the label: cls, txt or json:path.to.it.")
@click.option(
    "--classes",
    type=click.Path(path_type=Path),
    help="Text file with a class name in each line.  [default: the labels of train]",
)
@click.option("--accept-order", is_flag=True, help="Accept samples that are sorted by class in the tar files.")
@click.option(
    "--normalization",
    default="measured",
    show_default=True,
    type=click.Choice(["measured", "imagenet"]),
    help="Mean and std: of 1,000 drawn images of train, or ImageNet's.",
)
@click.option("--convert", is_flag=True, help="Write blocks of images of one size, shuffled, instead of an index.")
@click.option(
    "--image-size",
    type=click.IntRange(1),
    help="With --convert, height and width: images are resized and centre-cropped.  [default: as they are]",
)
@_decoding_options
@_prepare_options
def prepare_webdataset(train: tuple[str, ...], out: str, **options: Any) -> None:
    """Tar files of KEY.jpg and KEY.cls (or .json, .txt), as they are: an index of them is written.

    \b
    distrain prepare webdataset 'train-{0000..1281}.tar' --test 'val-{00..63}.tar' --out data/imagenet

    TRAIN and PATTERN are paths or addresses (http://, https://, s3://) of tar files, with {000..123}, {a,b}, * and ?,
    or @FILE with one of them in each line. Each tar file is read once; if this is interrupted, the same command
    continues. Training reads the images from the tar files, in their order.
    """
    from distrain.api.preparation import WebDataset

    _prepare(WebDataset(train, **_fields(WebDataset, options)), out, options)


@prepare_group.command("synthetic")
@click.option("--samples", default=20000, show_default=True, type=click.IntRange(1), help="Training pictures.")
@click.option("--test-samples", default=4000, show_default=True, type=click.IntRange(1), help="Test pictures.")
@click.option("--image-size", default=32, show_default=True, type=click.IntRange(8), help="Height and width.")
@click.option("--classes", default=10, show_default=True, type=click.IntRange(2), help="Classes.")
@_prepare_options
def prepare_synthetic(out: str, **options: Any) -> None:
    """Generated pictures, drawn from a seed. No download."""
    from distrain.api.preparation import Synthetic

    _prepare(Synthetic(**_fields(Synthetic, options)), out, options)


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
def prepare_source(name: str, arguments: dict[str, str], out: str, **options: Any) -> None:
    """A class of your own that yields images and labels: docs/extending.md has an example.

    It is searched in the current folder, then on Python's path, and called with the pairs as keyword arguments; their
    values are text. The manifest records its name and the pairs, but no secrets: user names, passwords and query
    strings in addresses are removed, and so is the value of a pair whose key contains token, secret, password or
    credential, or ends in key.
    """
    from distrain.api.preparation import SourceClass

    _prepare(SourceClass(name, arguments), out, options)


def _fields(kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Remove the options that are fields of a source from those that all sources share, and return them."""
    return {each.name: options.pop(each.name) for each in fields(kind) if each.name in options}


def _prepare(source: AnySource, out: str, options: dict[str, Any]) -> None:
    """Prepare a data set and describe it on stdout."""
    with startup.quick_imports():
        from distrain.api import preparation
        from distrain.preparation import blocks

    dataset, made = preparation.make(source, out, blocks.Options(**options))
    kind = dataset.manifest.source["kind"]
    if kind == "webdataset":
        compared = "options, names and sizes of tar files"
    else:
        compared = "options" if kind in blocks.FIXED_BY_OPTIONS else "options, classes and numbers of images"
    _show(dataset, made, compared)


def _show(dataset: Any, made: bool, compared: str) -> None:
    """Show a data set on stdout, and if it was there already, what of it was compared."""
    skipped = dataset.manifest.source.get("skipped")
    dropped = f"; {skipped} unreadable dropped" if skipped else ""
    unchanged = (
        "" if made else f": already prepared, not changed; the {compared} are the same, pixels were not compared"
    )
    console.show(f"{dataset.root}: {_describe(dataset)}{dropped}{unchanged}")


def _describe(dataset: Any) -> str:
    manifest = dataset.manifest
    splits = ", ".join(
        f"{name} {split.samples:,} in "
        + (
            f"{plural(len(split.tars), 'tar file')}, {plural(split.shards, 'virtual shard')}"
            if dataset.is_index
            else plural(len(split.shards), "shard")
        )
        + f" of {plural(split.lanes, 'lane')}"
        for name, split in manifest.splits.items()
    )
    if manifest.image_shape is not None:
        size = "×".join(map(str, manifest.image_shape))
    else:
        size = " to ".join("×".join(map(str, each)) for each in (manifest.smallest, manifest.largest))
    return f"{splits}; {plural(len(manifest.classes), 'class')}, {size}"
