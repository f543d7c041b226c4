"""launch/: what can be known of the files without running them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    assert "set -euo pipefail" in script.read_text()
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sbatch")), ids=lambda path: path.name)
def test_directives_stand_before_the_first_command(script: Path) -> None:
    # SLURM stops reading at the first command; what stands behind it is ignored without a word.
    lines = script.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith(("#SBATCH", "##SBATCH")) for line in lines[first:])
