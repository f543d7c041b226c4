"""Train on WebDataset shards: the same samples in every step, on any number of processes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrain.api.datasets import DatasetInfo, open_data
    from distrain.api.evaluation import EvaluationBatch, evaluation_batches
    from distrain.api.loader import Batches, EncodedBatch, batches
    from distrain.api.pixels import augment, normalize
    from distrain.api.training import train
    from distrain.config import Config
    from distrain.data.rounds import Batch
    from distrain.distributed.gradients import loss_scale
    from distrain.machine import keep_freed_memory

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Batches",
    "Config",
    "DatasetInfo",
    "EncodedBatch",
    "EvaluationBatch",
    "augment",
    "batches",
    "evaluation_batches",
    "keep_freed_memory",
    "loss_scale",
    "normalize",
    "open_data",
    "train",
]

_MODULES = {
    "Batch": "distrain.data.rounds",
    "Batches": "distrain.api.loader",
    "Config": "distrain.config",
    "DatasetInfo": "distrain.api.datasets",
    "EncodedBatch": "distrain.api.loader",
    "EvaluationBatch": "distrain.api.evaluation",
    "augment": "distrain.api.pixels",
    "batches": "distrain.api.loader",
    "evaluation_batches": "distrain.api.evaluation",
    "keep_freed_memory": "distrain.machine",
    "loss_scale": "distrain.distributed.gradients",
    "normalize": "distrain.api.pixels",
    "open_data": "distrain.api.datasets",
    "train": "distrain.api.training",
}
"""Module of each public name. It is imported when the name is first used, because torch takes seconds."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
