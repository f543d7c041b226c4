"""The function `train`: a run from its configuration to its result."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from distrain import signals, startup
from distrain.config import Config, from_tree, load
from distrain.distributed import compilation
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

    Where another process has failed and this one does not detect it within seconds, because it waits for a GPU or for
    code of the user, the process is ended with the exit code of the other one: no `except` or `finally` runs.
    """
    started = time.monotonic()
    if isinstance(config, Mapping):
        config = from_tree(config)
    elif not isinstance(config, Config):
        config = load(Path(config))
    with (
        _torch_defaults(),
        compilation.settings_restored(config.train.compile),
        signals.recorded(),
        closing(setup.start_watchdog(config, environment)) as watchdog,
        setup.start_runtime(config, environment, watchdog) as runtime,
    ):
        job = setup.set_up(config, started, runtime)
        with closing(Checkpointer(job)) as checkpointer:
            startup.waits_for(f"opening {job.folder}")
            state = checkpointer.resume()
            announce(job, state.get("step", 0))
            return Trainer(job, checkpointer, state).run()


@contextmanager
def _torch_defaults() -> Iterator[None]:
    """Run the block with torch's defaults, whatever the caller has set: they would change the result, or prevent it."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield
