"""The function `train`: a run from its configuration to its result."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

from distrain import signals, startup
from distrain.config import Config
from distrain.distributed import compilation
from distrain.distributed.numerics import torch_defaults
from distrain.environment import Environment
from distrain.training import setup
from distrain.training.checkpointing import Checkpointer
from distrain.training.summary import announce
from distrain.training.trainer import Trainer


def train(config: Config, environment: Environment) -> dict[str, Any]:
    """Train, evaluate and save a run, as `distrain train` does.

    SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU are stop requests while it runs.

    Args:
        config: the configuration.
        environment: this process among its peers.

    Returns:
        The content of RUN/result.json, without its version.

    Raises:
        UserError: the configuration, data or sources cannot be used, or the loss diverged.
        AgainError: stopped on request, or a peer was lost; called again, it resumes.
        PeerFailedError: another process failed, and recorded why.
        SaveError: the run's last checkpoint could not be saved.

    Where another process has failed and this one does not detect it within seconds, because it waits for a GPU or for
    code of the user, the process is ended with the exit code of the other one: no `except` or `finally` runs.
    """
    started = time.monotonic()
    with (
        torch_defaults(),
        compilation.settings_restored(config.train.compile),
        signals.recorded(),
        closing(setup.start_watchdog(config, environment)) as watchdog,
        setup.start_runtime(config, environment, watchdog) as runtime,
    ):
        job = setup.set_up(config, started, runtime)
        with Checkpointer(job) as checkpointer:
            startup.waits_for(f"opening {job.folder}")
            state = checkpointer.resume()
            announce(job, state.get("step", 0))
            return Trainer(job, checkpointer, state).run()
