"""Train on WebDataset shards: the same samples in every step, on any number of processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

__version__ = "0.1.0"
__all__ = ["train"]


def train(config: Mapping[str, Any] | str | os.PathLike[str] | Any) -> dict[str, Any]:
    """Train a run: `distrain.train({"data": {"dir": "data/synthetic"}, "run": {"dir": "runs/first"}})`.

    Messages go to `logging.getLogger("distrain")`, which has no handler of its own.

    Args:
        config: nested mappings of the keys that `distrain config` prints, the path of a YAML file, or a
            `distrain.config.Config`.

    Returns:
        The content of RUN/result.json, without its version.

    Raises:
        distrain.errors.UserError: configuration or data cannot be used, or the loss diverged.
    """
    from distrain.environment import Environment
    from distrain.training import train as training  # imports torch: seconds

    return training.train(config, Environment.read(os.environ))
