"""Types of the public functions, as mypy infers them for a user: `make lint` checks this file, and nothing runs it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import assert_type

import distrain


def functions() -> None:
    """None of these types is Any."""
    assert_type(distrain.prepare(distrain.Folder("photos", image_size=64), "data", val_fraction=0.1), Path)
    config = distrain.Config.load("recipe.yaml", {"train": {"lr": 0.1}})
    assert_type(config, distrain.Config)
    assert_type(config.train.lr, float)
    assert_type(distrain.train(config), distrain.TrainingResult)
    assert_type(distrain.train({"run": {"dir": Path("run")}}), distrain.TrainingResult)
    assert_type(distrain.evaluate("run", "val", overrides=["eval.batch_size=1"]), distrain.Result)
    assert_type(distrain.open_run(Path("run")), distrain.Run)
    assert_type(distrain.load_model("run", device="cuda"), distrain.LoadedModel)
    error: type[ValueError] = distrain.errors.UserError
    assert error is distrain.UserError
    assert_type(distrain.PeerFailedError, type[distrain.PeerFailedError])


def values(run: distrain.Run, result: distrain.TrainingResult, model: distrain.LoadedModel, images: Tensor) -> None:
    """None of these types is Any."""
    assert_type(result.accuracy, float)
    assert_type(result.accuracy_by_class, Mapping[str, float | None])
    assert_type(result.confusion_matrix(), NDArray[np.int64])
    assert_type(result.report, Path | None)
    assert_type(run.metrics, dict[str, NDArray[np.float64]])
    assert_type(run.series("train/loss"), tuple[NDArray[np.int64], NDArray[np.float64]])
    assert_type(run.result, distrain.TrainingResult | None)
    assert_type(run.checkpoints[-1], distrain.SavedCheckpoint)
    assert_type(run.config, distrain.Config)
    assert_type(model(images), Tensor)
    assert_type(model.classes, list[str])
    assert_type(model.preprocess(b""), Tensor)
    assert_type(model.predict("photo.jpg"), dict[str, float])
