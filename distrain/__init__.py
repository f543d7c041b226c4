"""Train on WebDataset shards: the same samples in every step, on any number of processes.

    import distrain

    data = distrain.prepare(distrain.Folder("photos", image_size=64), "data/mine")
    result = distrain.train({"data": {"dir": data}, "run": {"dir": "runs/first"}})
    print(result.accuracy)

prepare(source, out)      write a data set from a `Folder`, `WebDataset`, `Cifar10`, `Synthetic` or `SourceClass`
Config.load(file, …)      the configuration of a run, from a YAML file, nested mappings or both
train(config)             train, evaluate and save a run; a `TrainingResult`
evaluate(run, split)      evaluate a checkpoint again; a `Result`
open_run(run)             what a run's folder holds: metrics, checkpoints, how it ended; a `Run`
load_model(run)           the model, for predictions; a `LoadedModel`, which is a `torch.nn.Module`

For a training loop of your own (docs/own-loop.md):

open_data(data_dir)       classes, mean, std, steps of an epoch; a `DatasetInfo`
batches(data_dir, …)      this process's samples of each step, from any step on, on any number of processes
evaluation_batches(…)     this process's samples of a split: each sample once over all processes
augment, normalize        from the samples of a batch to the input of a model
loss_scale, VirtualRanks  gradients that do not depend on the number of processes: up to rounding, to the last bit

errors                    the exceptions: `UserError` (correct something first), `AgainError` (call it again)

docs/api.md has examples that run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrain import errors as errors
    from distrain.api.datasets import DatasetInfo as DatasetInfo
    from distrain.api.datasets import open_data as open_data
    from distrain.api.evaluation import evaluate as evaluate
    from distrain.api.evaluation_batches import EvaluationBatch as EvaluationBatch
    from distrain.api.evaluation_batches import evaluation_batches as evaluation_batches
    from distrain.api.inference import load_model as load_model
    from distrain.api.loader import Batches as Batches
    from distrain.api.loader import EncodedBatch as EncodedBatch
    from distrain.api.loader import batches as batches
    from distrain.api.pixels import augment as augment
    from distrain.api.pixels import normalize as normalize
    from distrain.api.preparation import Cifar10 as Cifar10
    from distrain.api.preparation import Folder as Folder
    from distrain.api.preparation import SourceClass as SourceClass
    from distrain.api.preparation import Synthetic as Synthetic
    from distrain.api.preparation import WebDataset as WebDataset
    from distrain.api.preparation import prepare as prepare
    from distrain.api.result import Result as Result
    from distrain.api.result import TrainingResult as TrainingResult
    from distrain.api.run import Run as Run
    from distrain.api.run import SavedCheckpoint as SavedCheckpoint
    from distrain.api.run import open_run as open_run
    from distrain.api.training import train as train
    from distrain.api.virtual_ranks import VirtualRanks as VirtualRanks
    from distrain.config import Config as Config
    from distrain.data.rounds import Batch as Batch
    from distrain.distributed.gradients import loss_scale as loss_scale
    from distrain.errors import AgainError as AgainError
    from distrain.errors import BusyError as BusyError
    from distrain.errors import ConfigError as ConfigError
    from distrain.errors import DataError as DataError
    from distrain.errors import DivergedError as DivergedError
    from distrain.errors import GpuError as GpuError
    from distrain.errors import PeerLostError as PeerLostError
    from distrain.errors import SaveError as SaveError
    from distrain.errors import Stopped as Stopped
    from distrain.errors import UnreachableError as UnreachableError
    from distrain.errors import UserError as UserError
    from distrain.failure_report import PeerFailedError as PeerFailedError
    from distrain.machine import keep_freed_memory as keep_freed_memory
    from distrain.models.batch_norm import sync_batch_norm as sync_batch_norm
    from distrain.tools.loaded_model import LoadedModel as LoadedModel

__version__ = "0.1.0"

_MODULES = {
    "AgainError": "distrain.errors",
    "Batch": "distrain.data.rounds",
    "Batches": "distrain.api.loader",
    "BusyError": "distrain.errors",
    "Cifar10": "distrain.api.preparation",
    "Config": "distrain.config",
    "ConfigError": "distrain.errors",
    "DataError": "distrain.errors",
    "DatasetInfo": "distrain.api.datasets",
    "DivergedError": "distrain.errors",
    "EncodedBatch": "distrain.api.loader",
    "EvaluationBatch": "distrain.api.evaluation_batches",
    "Folder": "distrain.api.preparation",
    "GpuError": "distrain.errors",
    "LoadedModel": "distrain.tools.loaded_model",
    "PeerFailedError": "distrain.failure_report",
    "PeerLostError": "distrain.errors",
    "Result": "distrain.api.result",
    "Run": "distrain.api.run",
    "SaveError": "distrain.errors",
    "SavedCheckpoint": "distrain.api.run",
    "SourceClass": "distrain.api.preparation",
    "Stopped": "distrain.errors",
    "Synthetic": "distrain.api.preparation",
    "TrainingResult": "distrain.api.result",
    "UnreachableError": "distrain.errors",
    "UserError": "distrain.errors",
    "VirtualRanks": "distrain.api.virtual_ranks",
    "WebDataset": "distrain.api.preparation",
    "augment": "distrain.api.pixels",
    "batches": "distrain.api.loader",
    "errors": "distrain",
    "evaluate": "distrain.api.evaluation",
    "evaluation_batches": "distrain.api.evaluation_batches",
    "keep_freed_memory": "distrain.machine",
    "load_model": "distrain.api.inference",
    "loss_scale": "distrain.distributed.gradients",
    "normalize": "distrain.api.pixels",
    "open_data": "distrain.api.datasets",
    "open_run": "distrain.api.run",
    "prepare": "distrain.api.preparation",
    "sync_batch_norm": "distrain.models.batch_norm",
    "train": "distrain.api.training",
}
"""Module of each public name. It is imported when the name is first used, because torch takes seconds."""

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "errors":
        return importlib.import_module("distrain.errors")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
