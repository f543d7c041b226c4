"""Sweeps: the file for `wandb agent`, and the trials' folders, which `distrain report` compares."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import make
from wandb_server import serving

from distrain import cli
from distrain.runs.folder import read
from distrain.runs.trackers import wandb_id

REPO = Path(__file__).parent.parent
AGENT = """
from wandb import wandb_agent
from wandb.cli.cli import cli
wandb_agent.Agent.POLL_INTERVAL = 0.2  # seconds between two heartbeats; 5 otherwise
cli(["sweep", "wandb-sweep.yaml"], standalone_mode=False)
cli(["agent", "someone/project/sweep1"], standalone_mode=False)
"""


@pytest.mark.ranks
def test_wandb_agent_trains_each_trial_in_its_own_folder_and_the_report_compares_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "data/cifar10", 400, 60, val_fraction=0.2, lanes=4)
    keys = {"train": {"max_steps": 6, "global_batch_size": 32}, "eval": {"every_steps": 3}, "log": {"report": False}}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/cifar10.yaml").write_text(yaml.safe_dump(keys))
    shutil.copy(REPO / "launch/wandb-sweep.yaml", tmp_path)
    with serving() as server:
        for name, value in {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": "0" * 40}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
        done = subprocess.run(
            [sys.executable, "-c", AGENT], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
        )
    assert done.returncode == 0, done.stderr
    trials = [tmp_path / f"runs/sweep1/trial{number}" for number in range(4)]
    assert sorted((tmp_path / "runs/sweep1").iterdir()) == trials
    values = [(record.config.train.lr, record.config.train.weight_decay) for record in map(read, trials)]
    assert values == [(0.1, 0.0), (0.1, 0.0005), (0.2, 0.0), (0.2, 0.0005)]
    assert [wandb_id(trial) for trial in trials] == list(server.rows) == ["trial0", "trial1", "trial2", "trial3"]
    assert all(any("val/accuracy" in row for row in rows) for rows in server.rows.values())
    assert cli.main(["report", *map(str, trials), "--out", str(tmp_path / "page")]) == 0
    header, *rows = (re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()[-6:-1])
    assert header == ["run", "accuracy on val", "accuracy on test", "of checkpoint", "train.lr", "train.weight_decay"]
    assert sorted(row[-2:] for row in rows) == [["0.1", "0.0"], ["0.1", "0.0005"], ["0.2", "0.0"], ["0.2", "0.0005"]]
    scores = [float(row[1].removesuffix(" %")) for row in rows]
    assert scores == sorted(scores, reverse=True)
