"""A run at work: everything that it works with, and what changes as it goes on."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from distrain.config import Config
from distrain.data.cache import Cache
from distrain.data.manifest import Dataset
from distrain.data.order import Order
from distrain.distributed.runtime import Runtime
from distrain.runs import checkpoint
from distrain.runs.attempts import Lease
from distrain.training import optim
from distrain.training.augment import Normalizer
from distrain.training.profiling import Profile


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
        """Wall seconds of all attempts that led here."""
        return self.state.seconds + time.monotonic() - self.started
