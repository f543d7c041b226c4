"""One cluster of two nodes, and the jobs that tests submit to it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, configured with four processors each."""
    if reason := missing():
        pytest.skip(reason)
    if not Path(sys.prefix, "bin/distrain").exists():
        pytest.skip(f"distrain is not installed in {sys.prefix}")
    with tempfile.TemporaryDirectory(prefix="distrain-slurm-") as folder, Cluster(Path(folder)) as cluster:
        yield cluster
