"""The image, built once; its tests skip with the reason if it cannot be built here."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import Engine, missing


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """An engine that builds and runs containers."""
    if reason := missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="distrain-image-") as folder:
        engine = Engine(Path(folder))
        yield engine
        engine.close()


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """The name of the image."""
    return engine.build()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder into which containers of any user can write."""
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    return tmp_path
