"""A run being set up, saved and left: data set → order → process group → model and optimizer → lease and checkpoint.

What is trained depends on data, configuration and seed alone: see docs/design.md.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distrain import cache, checkpoint, files, lives, manifest, models, optim, runtime, signals, tracking
from distrain.augment import Normalizer
from distrain.cache import Cache
from distrain.checkpoint import Saved
from distrain.config import Config, identity, public
from distrain.errors import EXIT_AGAIN, BusyError, ConfigError, DataError
from distrain.fetch import Settings
from distrain.lives import Lease
from distrain.manifest import Dataset
from distrain.order import Order
from distrain.profiling import Profile
from distrain.report import fail, failure_of
from distrain.runtime import Runtime
from distrain.stream import memory
from distrain.tracking import Logs
from distrain.watch import Watch

CONFIG, RESULT, STACKS = "config.yaml", "result.json", "stacks"

_FOLLOWED = "weights."
"""Of the model that is trained, in optimizer.safetensors, where model.safetensors holds their average."""


@dataclass
class State:
    """What changes as the run goes on, beside weights and optimizer; all of it is in a checkpoint's state.json."""

    step: int = 0
    """Steps done."""
    logged: int = 0
    """Step of the newest line about training."""
    evaluated: int = 0
    """Step of the newest evaluation; an older one than is due was stopped, and is made up for."""
    lines: int = 0
    """Lines of metrics.jsonl that belong to the steps done."""
    loss_sum: float = 0.0
    """Of the steps since `logged`, so that a line's mean is the same whether the run was interrupted or not."""
    loss_steps: int = 0
    loss_seconds: float = 0.0
    train_seconds: float = 0.0
    seconds: float = 0.0
    best: dict[str, Any] | None = None


@dataclass
class Job:
    """Everything that a run works with."""

    config: Config
    run: Path
    dataset: Dataset
    order: Order
    total_steps: int
    runtime: Runtime
    module: nn.Module
    """The model itself."""
    ddp: nn.Module
    """The model as accelerate prepared it; trained."""
    optimizer: Any
    mean: Tensor
    std: Tensor
    identity: dict[str, Any]
    started: float
    cache: Cache | None = None
    """The train split in memory, where it fits and is wanted."""
    average: AveragedModel | None = None
    """Of the weights, where there is `train.ema_decay`."""
    dependent: list[str] = field(default_factory=list)
    """Layers by which what is trained depends on the number of processes."""
    passes: int = 1
    """Micro-batches of every rank in a step."""
    profile: Profile = field(default_factory=Profile)
    state: State = field(default_factory=State)
    lease: Lease | None = None
    """The main process's right to write in the run's folder."""
    saved_step: int | None = None
    """Step of the newest checkpoint that is known to be whole."""
    save_problem: str | None = None
    """Why the newest save failed."""
    holds_best: bool = False
    """The run is over, and the model holds the best checkpoint's weights: nothing is saved any more."""
    losses: list[Tensor] = field(default_factory=list)
    """This rank's, of the steps that are not in `State.loss_sum` yet; on the device."""
    clock: float = 0.0
    """When the steps of `losses` began."""
    next_poll: int = 0
    """Step after which the processes meet next, to ask who wants to stop."""
    polled_step: int = 0
    polled: float = 0.0
    """When they met last, in steps and by the clock."""
    saved_at: float = 0.0

    @property
    def checkpoints(self) -> Path:
        """RUN/checkpoints."""
        return self.run / checkpoint.FOLDER

    @property
    def scored(self) -> nn.Module:
        """What is evaluated, and saved as the model: the average of its weights, where there is one."""
        return self.module if self.average is None else self.average.module

    @functools.cached_property
    def normalize(self) -> Normalizer:
        """From uint8 to the model's input."""
        return Normalizer(self.mean, self.std, self.dataset.manifest.image_shape[1])

    @functools.cached_property
    def blank(self) -> Tensor:
        """Colour of cutout's squares: uint8 [C], the mean."""
        return (self.mean * 255).round().to(torch.uint8)

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step of the run."""
        train = self.config.train
        return optim.learning_rate(step, self.total_steps, train.schedule, train.lr, train.warmup_fraction)

    def layer_seed(self) -> int:
        """Seed for layers that draw random numbers, of this step and rank: they draw the same after a resume."""
        # Odd factors: no two steps or ranks of a run share a seed. torch's CPU generator takes the low 32 bits.
        return (self.config.run.seed + self.state.step * 2654435761 + self.runtime.world.rank * 40503) % 2**63

    def check_lease(self) -> None:
        """Before anything is written in the run's folder.

        Raises:
            BusyError: another job has taken it over.
        """
        if self.lease is not None:
            self.lease.check()

    def close(self) -> None:
        """Let the next job in."""
        if self.lease is not None:
            self.lease.release()

    @property
    def elapsed(self) -> float:
        """Wall seconds of all lives that led here."""
        return self.state.seconds + time.monotonic() - self.started


def watch(config: Config) -> Watch:
    """The time-outs of a run."""
    limits = config.timeouts
    return Watch(
        {
            "start": limits.start_seconds + config.run.wait_seconds,  # all wait while the main process waits
            "first step": limits.start_seconds,
            "train": limits.step_seconds,
            "evaluate": limits.eval_seconds,
            "save": limits.save_seconds,
        },
        Path(config.run.dir, STACKS),
    )


def start_runtime(config: Config, watching: Watch) -> Runtime:
    """Join the other processes of the run."""
    run, train = config.run, config.train
    settings = runtime.Settings(run.device, train.precision, run.cpu_threads, train.deterministic)
    return runtime.start(settings, config.timeouts.start_seconds, watching)


def set_up(config: Config, started: float, rt: Runtime) -> Job:
    """Everything that a run needs, at the step it goes on from."""
    rt.leave_if_asked()
    dataset = rt.all_or_none(lambda: _read_data(config))
    agree_on_data(rt, dataset, [split for split in ("train", "val", "test") if split in dataset.manifest.splits])
    job = _build(config, dataset, rt, started)
    _settle(job)
    rt.leave_if_asked()
    try:
        _resume(job)
        if rt.is_main:
            _summary(job)
    except BaseException:
        job.close()
        raise
    return job


def _read_data(config: Config) -> Dataset:
    dataset = manifest.read(config.data.dir, Settings.of(config.data))
    for needed in ("train", "test"):
        dataset.split(needed)
    return dataset


def _build(config: Config, dataset: Dataset, rt: Runtime, started: float) -> Job:
    """The job at step 0."""
    order = make_order(config, dataset, rt.world.size)
    mean, std = _normalization(config, dataset)
    _check_augmentation(config, dataset)
    fewest, most = order.shares(rt.world.size)
    passes = -(-most // (config.train.micro_batch_size or most))
    module = build_model(config, dataset, rt, empty=fewest < passes)
    dependent = models.world_size_dependent(module, in_parts=config.train.micro_batch_size is not None)
    start = _initialise(config, module, rt)
    module = rt.couple(module)
    average = _average(config, module, rt)
    return Job(
        config,
        Path(config.run.dir),
        dataset,
        order,
        config.train.max_steps or (config.train.epochs or 0) * order.steps_per_epoch,
        rt,
        module,
        *_prepare(config, module, rt),
        torch.tensor(mean, dtype=rt.dtype, device=rt.device),
        torch.tensor(std, dtype=rt.dtype, device=rt.device),
        {**identity(config), **start, "data.mean": mean, "data.std": std, "data.manifest": dataset.digest},
        started,
        _cache(config, dataset, rt),
        average,
        dependent,
        passes,
    )


def _initialise(config: Config, module: nn.Module, rt: Runtime) -> dict[str, str]:
    """Weights from `model.init`; what identifies them, whatever the file is called."""
    if config.model.init is None:
        return {}
    path = Path(config.model.init)
    anew = rt.all_or_none(lambda: models.initialise(module, path))
    if anew and rt.is_main:
        print(f"model.init: {anew}", flush=True)
    return {"model.init": models.digest(module)}


def _average(config: Config, module: nn.Module, rt: Runtime) -> AveragedModel | None:
    """A second model that follows the weights: decay · average + (1 - decay) · weights after every step."""
    if config.train.ema_decay is None:
        return None
    follow = get_ema_multi_avg_fn(config.train.ema_decay)
    average = AveragedModel(module, multi_avg_fn=follow, use_buffers=True).to(rt.device)
    average.module = rt.prepare_scoring(average.module)
    return average


def _cache(config: Config, dataset: Dataset, rt: Runtime) -> Cache | None:
    place = rt.all_or_none(lambda: cache.choose(config.data.cache, dataset, rt.device))
    return Cache(dataset, place, pin=place.type != rt.device.type) if place is not None else None


def agree_on_data(rt: Runtime, dataset: Dataset, splits: Sequence[str]) -> None:
    """All processes see the same data set, and the main one sees every shard of it."""
    digests = rt.from_all(dataset.digest)
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise DataError(f"{dataset.root}: rank {', '.join(others)} sees another data set than rank 0; share one folder")
    missing = rt.from_main(list(dataset.missing(splits)) if rt.is_main else None)
    if missing:
        more = [f"and {len(missing) - 5} more"] if len(missing) > 5 else []
        raise DataError(
            "\n  ".join([f"{dataset.root}: shards are missing or damaged:", *missing[:5], *more])
            + "\nrestore them or prepare the data set again; `distrain verify` checks all shards"
        )


def make_order(config: Config, dataset: Dataset, world_size: int) -> Order:
    """The order of the run.

    Raises:
        ConfigError: it cannot be had with this batch, or on so many processes.
    """
    split = dataset.split("train")
    batch = config.train.global_batch_size
    order = Order(len(split.shards), split.lanes, min(shard.samples for shard in split.shards), batch, config.run.seed)
    if world_size > split.lanes:
        raise ConfigError(
            f"{world_size} processes for {split.lanes} lanes of {dataset.root}: start at most {split.lanes},"
            f" or prepare the data set with --lanes {world_size} or more"
        )
    if world_size > batch:
        raise ConfigError(
            f"train.global_batch_size={batch} is smaller than the number of processes, {world_size}: "
            f"raise it, or start at most {batch}"
        )
    if order.steps_per_epoch == 0:
        raise ConfigError(
            f"train.global_batch_size={batch} is larger than the {order.num_shards * order.samples_per_shard} samples"
            f" that an epoch of {dataset.root} can use; lower it"
        )
    return order


def _normalization(config: Config, dataset: Dataset) -> tuple[list[float], list[float]]:
    channels = dataset.manifest.image_shape[2]
    values = []
    for key, asked, found in (
        ("mean", config.data.mean, dataset.manifest.mean),
        ("std", config.data.std, dataset.manifest.std),
    ):
        value = asked if asked is not None else found
        if len(value) != channels:
            raise ConfigError(f"data.{key}: {len(value)} values for images of {channels} channels")
        values.append(value)
    return values[0], values[1]


def _check_augmentation(config: Config, dataset: Dataset) -> None:
    settings, smallest = config.augment, min(dataset.manifest.image_shape[:2])
    if settings.crop_padding >= smallest:
        raise ConfigError(f"augment.crop_padding={settings.crop_padding}: at most {smallest - 1} for these images")
    if settings.cutout > smallest:
        raise ConfigError(f"augment.cutout={settings.cutout}: at most {smallest} for these images")
    lanes, batch = dataset.split("train").lanes, config.train.global_batch_size
    if settings.mixup and batch < 2 * lanes:
        raise ConfigError(
            f"augment.mixup mixes samples of the same lane: of {lanes} lanes, a train.global_batch_size of {batch} has"
            f" fewer than two of each; raise it to {2 * lanes}, or prepare the data set with fewer --lanes"
        )


def build_model(config: Config, dataset: Dataset, rt: Runtime, empty: bool = False) -> nn.Module:
    """The model that the configuration names, with its first weights; tried on two black pictures, and on none if
    shares may be `empty`.

    Raises:
        ConfigError: it cannot be built, or does not give one logit for each class.
    """
    torch.manual_seed(config.run.seed)  # weights are drawn on the CPU, so every device starts from the same
    height, width, channels = dataset.manifest.image_shape
    classes, name = len(dataset.manifest.classes), config.model.name
    module = models.build(name, config.model.activation, classes, (channels, height, width)).to(rt.dtype)
    for samples in (2, 0) if empty else (2,):
        images = torch.zeros(samples, channels, height, width, dtype=rt.dtype)
        models.check_output(name, module, images, classes)
    return module


def _prepare(config: Config, module: nn.Module, rt: Runtime) -> tuple[nn.Module, Any]:
    """The model and its optimizer, as accelerate prepares them."""
    settings = config.train
    optimizer = optim.build(
        settings.optimizer,
        module.parameters(),
        settings.lr,
        settings.momentum,
        settings.nesterov,
        settings.betas,
        settings.weight_decay,
    )
    if settings.compile != "off":
        module.compile(mode=settings.compile)
    return rt.prepare(module, optimizer)


def _settle(job: Job) -> None:
    """Two backward passes whose gradients are thrown away, before anything is loaded.

    DDP rebuilds its buckets after the first backward pass of a life, and sums in another order from then on: without
    this, a resumed run differs in the last bits from one that was not interrupted, on three processes or more.
    """
    buffers = {name: buffer.clone() for name, buffer in job.module.named_buffers()}
    images = torch.zeros(2, *job.dataset.manifest.image_shape, dtype=torch.uint8, device=job.runtime.device)
    for _ in range(2):
        with job.runtime.peers(), _what_cannot_be_had():
            logits = job.ddp(job.normalize(images))
        with _what_cannot_be_had():
            job.runtime.backward(logits.sum() * 0)
    job.optimizer.zero_grad()
    for name, buffer in job.module.named_buffers():
        buffer.copy_(buffers[name])


@contextlib.contextmanager
def _what_cannot_be_had() -> Iterator[None]:
    """Around the first passes: a compiler that is missing, or an operation that has no deterministic form."""
    try:
        yield
    except Exception as error:
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise ConfigError(f"train.compile: the model cannot be compiled: {told}; set train.compile=off") from error
        if "deterministic" in str(error):
            raise ConfigError(f"train.deterministic: {told}; set it to false, or change the model") from error
        raise


def _resume(job: Job) -> None:
    """Go on from the newest readable checkpoint, or start fresh: the main process decides for all."""
    rt = job.runtime
    path = rt.from_main(rt.all_or_none(lambda: _take_folder(job) if rt.is_main else None))
    if path is not None:
        _restore(job, path)
    if job.lease is not None:
        job.lease.note(from_step=job.state.step, world_size=rt.world.size)


def _take_folder(job: Job) -> Path | None:
    """The checkpoint to go on from; the folder is this job's alone, and cut back to that checkpoint."""
    saved = _choose(job)
    try:
        job.run.mkdir(parents=True, exist_ok=True)
        seen = checkpoint.steps(job.checkpoints)
        wait, say = job.config.run.wait_seconds, lambda line: print(line, flush=True)
        job.lease = lives.acquire(job.run, wait, say, signals.requested)
        job.lease.keep(_leave_to_another)
        if checkpoint.steps(job.checkpoints) != seen:
            saved = _choose(job)  # another job was still at work here
        _say_and_clear(job, saved)
        done, lines = (saved.step, saved.state["lines"]) if saved is not None else (0, 0)
        checkpoint.sweep(job.checkpoints)
        tracking.cut_back(job.run, done, lines)
        files.replace(job.run / CONFIG, yaml.safe_dump(public(job.config), sort_keys=False))
    except OSError as error:
        raise ConfigError(f"run.dir={job.run}: cannot be written: {error.strerror}; choose another folder") from error
    return saved.path if saved is not None else None


def _leave_to_another(error: BusyError) -> None:
    """Another job has taken the folder over: this one must not write another byte."""
    if not fail(failure_of(error)):
        print(f"distrain: {error}", file=sys.stderr, flush=True)
    os._exit(EXIT_AGAIN)


def _choose(job: Job) -> Saved | None:
    mode = job.config.run.resume
    if job.run.exists() and not job.run.is_dir():
        raise ConfigError(f"run.dir={job.run}: is a file; choose another folder")
    if not holds_run(job.run):
        if mode == "must":
            raise DataError(f"run.resume=must: {job.run} holds no run to go on from")
        return None
    if mode == "never":
        raise ConfigError(
            f"{job.run}: already holds a run; go on with it by run.resume=auto, or choose another run.dir"
        )
    saved, skipped = checkpoint.newest(job.checkpoints)
    for line in skipped:
        print(f"warning: skipped {line}", file=sys.stderr)
    if saved is None:
        if skipped or mode == "must":
            raise DataError(f"{job.run}: has no readable checkpoint to go on from; choose another run.dir")
        if (job.run / RESULT).exists() or any(entry.get("from_step") for entry in lives.history(job.run)):
            raise DataError(f"{job.run}: its checkpoints are gone; bring them back, or choose another run.dir")
        return None
    differ = checkpoint.differences(saved.state["identity"], job.identity)
    if differ:
        raise ConfigError(
            f"{saved.path}: belongs to another run; choose another run.dir, or set these back:\n"
            + "\n".join(f"  {line}" for line in differ)
        )
    return saved


def _say_and_clear(job: Job, saved: Saved | None) -> None:
    """Say what the run starts from, and clear newer checkpoints, all damaged: they would stand in the way."""
    if saved is None:
        nothing = "has no checkpoint yet; starting from the beginning" if holds_run(job.run) else "a new run"
        print(f"{job.run}: {nothing}", flush=True)
        return
    for step in checkpoint.steps(job.checkpoints):
        if step > saved.step:
            checkpoint.set_aside(checkpoint.path_of(job.checkpoints, step))
    print(f"{job.run}: going on from {saved.path.name}", flush=True)


def holds_run(run: Path) -> bool:
    """Whether a folder has anything of a run in it that would be lost: a step logged, a checkpoint, a result."""
    metrics = run / tracking.METRICS
    logged = metrics.exists() and metrics.stat().st_size > 0
    return logged or (run / RESULT).exists() or bool(checkpoint.steps(run / checkpoint.FOLDER))


def _restore(job: Job, path: Path) -> None:
    """Every process loads the checkpoint; if one cannot, all leave together."""
    saved = job.runtime.all_or_none(lambda: checkpoint.load(path))
    job.scored.load_state_dict(saved.model)
    tensors = saved.optimizer
    if job.average is not None:  # the weights that it follows lie beside the optimizer's memory of them
        following = {name: tensors.pop(_FOLLOWED + name) for name in saved.model}
        job.module.load_state_dict(following)
        job.average.n_averaged.fill_(saved.step)
    optim.load_state_tensors(job.optimizer, tensors)
    job.runtime.load_scaler_state(saved.state["scaler"])
    job.state = State(**{name: saved.state[name] for name in State.__dataclass_fields__})
    job.saved_step = saved.step


def save(job: Job, logs: Logs, why: str) -> None:
    """Commit a checkpoint of this step. What it counts on, on every process, is on disk before.

    A save that fails (no space, no permission) is told and leaves everything as it was: the run goes on, and the next
    one is tried. `Job.save_problem` says so on all processes.
    """
    if job.saved_step == job.state.step:
        return
    rt = job.runtime
    with rt.watch.phase("save"):
        job.check_lease()
        rt.agree()  # not before the main process has seen that the folder is still this job's
        problem = attempt(logs.sync)
        if not any(rt.agree(problem is not None).flags) and rt.is_main:
            problem = attempt(lambda: _write(job, logs, why))
        problems = [line for line in rt.from_all(problem) if line]
    job.save_problem = problems[0] if problems else None
    if not problems:
        job.saved_step = job.state.step
    elif rt.is_main:
        logs.progress.warn(f"step {job.state.step}: no checkpoint could be saved: {problems[0]}; training goes on")
    job.saved_at = time.monotonic()
    job.next_poll = job.state.step


def attempt(action: Callable[[], object]) -> str | None:
    """What an action that writes failed with."""
    try:
        action()
    except OSError as error:
        return f"{error.filename or 'disk'}: {error.strerror}"
    return None


def _write(job: Job, logs: Logs, why: str) -> None:
    job.check_lease()  # once more: syncing may have taken long
    state = {
        **vars(job.state),
        "lines": logs.metrics.lines if logs.metrics is not None else 0,
        "seconds": job.elapsed,
        "why": why,
        "identity": job.identity,
        "scaler": job.runtime.scaler_state,
        "epoch": job.state.step // job.order.steps_per_epoch,
        "world_size": job.runtime.world.size,
        "cpu_threads": job.config.run.cpu_threads,
    }
    tensors = optim.state_tensors(job.optimizer)
    if job.average is not None:
        tensors |= {_FOLLOWED + name: value for name, value in job.module.state_dict().items()}
    checkpoint.save(job.checkpoints, job.state.step, job.scored.state_dict(), tensors, state)
    best = job.state.best["step"] if job.state.best else None
    settings = job.config.checkpoint
    try:
        checkpoint.prune(job.checkpoints, settings.keep, settings.keep_every, best)
    except OSError as error:  # the new one stands: an old one that stays is not worth more than a word
        logs.progress.warn(f"{error.filename}: an old checkpoint cannot be deleted: {error.strerror}")


def _summary(job: Job) -> None:
    """What is about to run, before it does."""
    rt, order, train = job.runtime, job.order, job.config.train
    found = job.dataset.manifest
    splits = ", ".join(f"{name} {split.samples:,}" for name, split in found.splits.items())
    parameters = sum(parameter.numel() for parameter in job.module.parameters())
    largest, ideal = order.shares(rt.world.size)[1], order.global_batch_size / rt.world.size
    buffers = memory(job.dataset, order, rt.world, job.config.data.read_ahead, job.cache is not None) / 2**20
    where = f"; train stays in {'GPU memory' if job.cache.device.type == 'cuda' else 'RAM'}" if job.cache else ""
    if job.dependent:
        print(
            f"warning: model {job.config.model.name} has {', '.join(job.dependent)}: what it learns depends on the"
            " number of processes",
            file=sys.stderr,
        )
    print(
        f"data     {job.dataset.root}: {splits}; {len(found.classes)} classes, {'×'.join(map(str, found.image_shape))}"
    )
    print(f"model    {job.config.model.name}, {parameters:,} parameters; {train.optimizer}, {train.precision}")
    asked = f"asked for {os.environ.get('WORLD_SIZE', '1')} × {job.config.run.device}"
    share = f"slowest share {largest / ideal:.2f} × the ideal of {ideal:g}"
    print(f"devices  {rt.world.size} × {rt.device.type} ({asked}); {share}")
    print(f"memory   {buffers:,.0f} MiB per process for reading{where}")
    print(f"steps    {job.total_steps:,} of {order.global_batch_size}, {order.steps_per_epoch:,} an epoch")
    print(f"run      {job.run}", flush=True)
