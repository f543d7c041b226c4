"""The image, built once; skipped, saying so, where it cannot be."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import Engine

NEEDED = ("buildah", "podman", "mmdebstrap", "runc")
GIB = 25
"""Free disk that building takes: torch with CUDA, unpacked, in layers."""


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """Builds and runs containers."""
    if os.geteuid():
        pytest.skip("building an image here needs root")
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if lacking:
        pytest.skip(f"no {', '.join(lacking)} (Debian: buildah podman mmdebstrap runc)")
    free = shutil.disk_usage("/var/lib").free / 2**30
    if free < GIB:
        pytest.skip(f"{free:.0f} GiB of free disk, {GIB} are needed to build the image")
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
