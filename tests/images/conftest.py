"""The image, built once; skipped, saying so, where it cannot be."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import Engine, missing


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """Builds and runs containers."""
    lacking = missing()
    if lacking:
        pytest.skip(lacking)
    with tempfile.TemporaryDirectory(prefix="distrain-image-") as folder:
        found = Engine(Path(folder))
        yield found
        found.close()


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """The name of the image."""
    return engine.build()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where containers of any user may write."""
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    return tmp_path
