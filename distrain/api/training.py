"""Training from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from distrain.config import Config
from distrain.environment import Environment
from distrain.training import train as training


def train(config: Config | Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """Train a run: `distrain.train({"data": {"dir": "data/synthetic"}, "run": {"dir": "runs/first"}})`.

    Messages go to `logging.getLogger("distrain")`, which has no handler of its own.

    Args:
        config: a `Config`, nested mappings of the keys that `distrain config` prints, or the path of a YAML file.

    Returns:
        The content of RUN/result.json, without its version.

    Raises:
        distrain.errors.UserError: configuration or data cannot be used, or the loss diverged.
    """
    return training.train(config, Environment.read(os.environ))
