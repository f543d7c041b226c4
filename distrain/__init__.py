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
errors                    the exceptions: `UserError` (correct something first), `AgainError` (call it again)

docs/api.md has examples that run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrain import errors as errors
    from distrain.api.evaluation import evaluate as evaluate
    from distrain.api.inference import load_model as load_model
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
    from distrain.config import Config as Config
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
    from distrain.tools.loaded_model import LoadedModel as LoadedModel

__version__ = "0.1.0"

_MODULES = {
    "AgainError": "distrain.errors",
    "BusyError": "distrain.errors",
    "Cifar10": "distrain.api.preparation",
    "Config": "distrain.config",
    "ConfigError": "distrain.errors",
    "DataError": "distrain.errors",
    "DivergedError": "distrain.errors",
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
    "WebDataset": "distrain.api.preparation",
    "errors": "distrain",
    "evaluate": "distrain.api.evaluation",
    "load_model": "distrain.api.inference",
    "open_run": "distrain.api.run",
    "prepare": "distrain.api.preparation",
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
