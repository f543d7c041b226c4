"""What a run writes down, and how it is cut back to a checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from distrain.runs.tracking import JsonLines, Progress, WandbMirror, audit_path, cut_back


def lines(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_cut_back_drops_what_came_after_for_every_rank_that_ever_wrote(tmp_path: Path) -> None:
    metrics = JsonLines(tmp_path / "metrics.jsonl")
    audits = [JsonLines(audit_path(tmp_path, rank)) for rank in (0, 1, 7)]
    for step in range(10):
        metrics.write({"step": step + 1, "train/loss": 1.0})
        for audit in audits:
            audit.write({"step": step, "epoch": 0, "ids": [step]})
    for file in (metrics, *audits):
        file.sync()
        file.close()
    with audit_path(tmp_path, 7).open("a") as file:
        file.write('{"step": 10, "ids": [1,')  # the process was killed while it wrote
    cut_back(tmp_path, 10, 10)
    assert lines(audit_path(tmp_path, 7)) == list(range(10))
    cut_back(tmp_path, 4, 3)
    assert lines(tmp_path / "metrics.jsonl") == [1, 2, 3]
    for rank in (0, 1, 7):
        assert lines(audit_path(tmp_path, rank)) == [0, 1, 2, 3]
    cut_back(tmp_path, 0, 0)
    assert lines(audit_path(tmp_path, 7)) == []


def test_lines_go_on_behind_what_is_there(tmp_path: Path) -> None:
    for step in (1, 2):
        file = JsonLines(tmp_path / "a.jsonl")
        file.write({"step": step})
        file.sync()
        file.close()
    assert lines(tmp_path / "a.jsonl") == [1, 2]


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(True, 100, 0)
    progress.step()
    for step in (50, 60, 70, 100):
        progress.train(step, 0.5, 2.25, 0.01, 12345.6, 3700)
    progress.say("hello")
    progress.close()
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "step 50/100  epoch 0.50  loss 2.2500  lr 0.01  12,346 images/s  1:01:40 left",
        "step 100/100  epoch 0.50  loss 2.2500  lr 0.01  12,346 images/s  1:01:40 left",  # too soon for those between
        "hello",
    ]


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(False, 100, 0)
    progress.train(50, 0.5, 2.25, 0.01, 12345.6, 3700)
    progress.say("hello")
    assert capsys.readouterr().out == ""


def mirror(mode: str, run: Path, warnings: list[str]) -> WandbMirror:
    return WandbMirror(mode, "distrain-test", "name", run, {"train": {"lr": 0.1}}, warnings.append)  # type: ignore[arg-type]


@pytest.fixture
def no_wandb_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.usefixtures("no_wandb_account")
def test_wandb_offline_keeps_its_id_over_restarts(tmp_path: Path) -> None:
    warnings: list[str] = []
    ids = []
    for _ in range(2):
        one = mirror("offline", tmp_path, warnings)
        one.log({"train/loss": 1.0}, 1)
        one.close({"accuracy": 0.5})
        ids.append((tmp_path / "wandb-id").read_text())
    assert warnings == []
    assert ids[0] == ids[1]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))) >= 1


@pytest.mark.usefixtures("no_wandb_account")
def test_wandb_without_a_key_costs_one_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    one = mirror("online", tmp_path, warnings)
    one.log({"train/loss": 1.0}, 1)
    one.close({})
    assert len(warnings) == 1
    assert "no API key" in warnings[0]
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.mark.usefixtures("no_wandb_account")
@pytest.mark.ranks
def test_a_broken_wandb_server_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import http.server
    import threading

    class Broken(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(500)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        warnings: list[str] = []
        one = mirror("online", tmp_path, warnings)
        one.log({"train/loss": 1.0}, 1)
        one.close({})
    finally:
        server.shutdown()
    assert len(warnings) == 1
    assert "wandb cannot be reached" in warnings[0]


def test_wandb_disabled_does_nothing(tmp_path: Path) -> None:
    warnings: list[str] = []
    one = mirror("disabled", tmp_path, warnings)
    one.log({}, 1)
    one.close({})
    assert (warnings, list(tmp_path.iterdir())) == ([], [])
