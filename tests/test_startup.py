"""A start that takes long says what it waits for."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch import nn

from distrain import cli, startup
from distrain.data.manifest import Dataset

SAID = threading.Event()


class Slow(nn.Sequential):
    """A model that is built only after the start has said what it waits for, or after 30 seconds."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        SAID.wait(30)
        channels, height, width = image_shape
        super().__init__(nn.Flatten(), nn.Linear(channels * height * width, num_classes))


class Listener(logging.Handler):
    """Keeps the lines of a start."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("still starting: "):
            self.lines.append(record.getMessage())
        if "building model" in record.getMessage():
            SAID.set()


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Listener:
    monkeypatch.setattr(startup, "SILENCE_SECONDS", 1.0)
    new = Listener()
    logger = logging.getLogger("distrain")
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, new])
    monkeypatch.setattr(logger, "level", logging.INFO)
    SAID.clear()
    return new


def test_a_silent_start_says_once_what_it_waits_for(small: Dataset, tmp_path: Path, listener: Listener) -> None:
    keys = [f"data.dir={small.root}", f"run.dir={tmp_path / 'run'}", "train.max_steps=2", "train.global_batch_size=16"]
    assert cli.main(["train", *keys, "model.name=test_startup:Slow", "log.report=false"]) == 0
    assert SAID.is_set()
    assert [line for line in listener.lines if "model" in line] == [
        "still starting: building model test_startup:Slow, and trying it"
    ]


def test_a_start_that_shows_messages_adds_none(listener: Listener) -> None:
    with startup.explained("importing torch"):
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            logging.getLogger("distrain").info("a message")
            time.sleep(0.01)
    assert listener.lines == []


def test_nothing_is_said_after_the_start(listener: Listener) -> None:
    with startup.explained("importing torch"):
        startup.waits_for(None)
        time.sleep(1.2)
    assert listener.lines == []
    assert "distrain-startup" not in {thread.name for thread in threading.enumerate()}
    assert logging.getLogger("distrain").filters == []


COMMANDS = [
    "train", "doctor", "predict run image.png", "export run --out model.pt2", "prepare synthetic --out data",
    "prepare webdataset train.tar --out data",
]  # fmt: skip
UNTIL_TORCH = f"""
import gc, importlib.abc, sys
from distrain import cli

class Recorder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "torch":
            print(gc.isenabled())
            raise ImportError("recorded")

sys.meta_path.insert(0, Recorder())
for command in {COMMANDS}:
    assert cli.main(command.split()) == 1
    assert gc.isenabled()
"""


def test_no_garbage_is_collected_while_torch_is_imported(tmp_path: Path) -> None:
    code = [sys.executable, "-c", UNTIL_TORCH]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"] * len(COMMANDS)
