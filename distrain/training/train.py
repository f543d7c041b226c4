"""The function `train`: a run from its configuration to its result."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from distrain import signals
from distrain.config import Config, from_tree, load
from distrain.environment import Environment
from distrain.training import setup
from distrain.training.checkpointing import Checkpointer
from distrain.training.summary import announce
from distrain.training.trainer import Trainer


def train(config: Config | Mapping[str, Any] | str | os.PathLike[str], environment: Environment) -> dict[str, Any]:
    """Train, evaluate and save a run, as `distrain train` does.

    SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU are stop requests while it runs.

    Args:
        config: a `Config`, nested mappings of its keys, or the path of a YAML file.
        environment: this process among its peers.

    Returns:
        The content of RUN/result.json, without its version.

    Raises:
        UserError: the configuration, data or sources cannot be used, or the loss diverged.
        AgainError: stopped on request, or a peer was lost; called again, it resumes.
        PeerFailedError: another process failed, and recorded why.
        SaveError: the run's last checkpoint could not be saved.
    """
    started = time.monotonic()
    if isinstance(config, Mapping):
        config = from_tree(config)
    elif not isinstance(config, Config):
        config = load(Path(config))
    with (
        signals.recorded(),
        closing(setup.start_watchdog(config, environment)) as watchdog,
        setup.start_runtime(config, environment, watchdog) as runtime,
    ):
        job = setup.set_up(config, started, runtime)
        with closing(Checkpointer(job)) as checkpointer:
            state = checkpointer.resume()
            announce(job, state.get("step", 0))
            return Trainer(job, checkpointer, state).run()
