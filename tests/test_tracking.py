"""The logs of a run, and their copies at wandb and for TensorBoard."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image
from runs import confusion_matrix
from tracked import as_lines, events, history, records, values, wandb_files
from wandb_server import WandbServer, serving

import distrain
from distrain.cli import main
from distrain.config import Config, Log, Wandb, from_tree
from distrain.data.manifest import Dataset
from distrain.environment import Environment
from distrain.errors import ConfigError, Stopped
from distrain.runs import folder, trackers
from distrain.runs.folder import RunRecord
from distrain.runs.logs import JsonLines, Progress, audit_path, cut_back
from distrain.runs.trackers import (
    FinishedRun,
    TensorBoardMirror,
    WandbMirror,
    WandbRun,
    check_installed,
    open_by_name,
    wandb_id,
)
from distrain.tools import doctor


def numbers(run: RunRecord) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their digests, which trackers do not draw."""
    return [{name: value for name, value in line.items() if name != "digests"} for line in run.lines]


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


def test_lines_are_appended(tmp_path: Path) -> None:
    for step in (1, 2):
        file = JsonLines(tmp_path / "a.jsonl")
        file.write({"step": step})
        file.sync()
        file.close()
    assert lines(tmp_path / "a.jsonl") == [1, 2]


def test_lines_of_a_file_that_was_deleted_are_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run/metrics.jsonl"
    metrics = JsonLines(path)
    metrics.write({"step": 1})
    metrics.sync()
    path.unlink()
    metrics.write({"step": 2})
    metrics.sync()
    metrics.write({"step": 3})
    metrics.flush()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert "was deleted while the run writes it" in caplog.text
    shutil.rmtree(path.parent)
    metrics.write({"step": 4})
    with pytest.raises(FileNotFoundError):
        metrics.sync()
    assert not path.parent.exists()
    metrics.close()


def test_progress_is_logged_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distrain")
    progress = Progress(True, 100, 0)
    progress.step()
    for step in (50, 60, 70, 100):
        progress.train(step, 0.5, 2.25, 0.01, 12345.6, 3700)
        progress.scores(step, "val", 0.5, 1.25)
    progress.close()
    assert caplog.messages == [
        "step 50/100  epoch 0.50  loss 2.2500  12,346 images/s  lr 0.01  1:01:40 left",
        "step 50/100  val: accuracy 50.0 %  loss 1.2500",
        "step 100/100  epoch 0.50  loss 2.2500  12,346 images/s  lr 0.01  1:01:40 left",  # too soon for those between
        "step 100/100  val: accuracy 50.0 %  loss 1.2500",
    ]


def test_other_processes_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distrain")
    progress = Progress(False, 100, 0)
    progress.train(50, 0.5, 2.25, 0.01, 12345.6, 3700)
    progress.scores(50, "val", 0.5, 1.25)
    assert caplog.messages == []


def mirror(mode: str, run: Path, warnings: list[str]) -> WandbMirror:
    settings = WandbRun.of(Wandb(mode=mode, project="distrain-test", name="name"), run, wandb_id(run))  # type: ignore[arg-type]
    return WandbMirror(settings, run, {"train": {"lr": 0.1}}, warnings.append)


@pytest.fixture
def no_wandb_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    wandb.teardown()  # it remembers a key


@pytest.mark.usefixtures("no_wandb_account")
def test_wandb_offline_keeps_its_id_over_restarts(tmp_path: Path) -> None:
    warnings: list[str] = []
    ids = []
    for _ in range(2):
        one = mirror("offline", tmp_path, warnings)
        one.log({"train/loss": 1.0}, 1)
        one.close({"accuracy": 0.5})
        ids.append(wandb_id(tmp_path))
    assert warnings == []
    assert ids[0] == ids[1]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))) >= 1


@pytest.mark.usefixtures("no_wandb_account")
def test_the_id_that_an_agent_of_a_sweep_gave_is_written_down(
    small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, keys = tmp_path / "run", {"wandb": {"mode": "offline"}, "train": {"max_steps": 2, "epochs": None}}
    for name, value in {"WANDB_SWEEP_ID": "sweep123", "WANDB_RUN_ID": "agent456"}.items():
        monkeypatch.setenv(name, value)  # as `wandb agent` sets them
    distrain.train(tree(small, run, **keys))
    assert wandb_id(run) == "agent456"
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name)
    wandb.teardown()
    distrain.train(tree(small, run, **keys))  # the next attempt without the agent is the same run there
    assert wandb_id(run) == "agent456"
    assert [path.stem for path in wandb_files(run)] == ["run-agent456"] * 2


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

    class Broken(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(500)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(trackers, "_INIT_SECONDS", 3.0)
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


def test_rows_that_a_server_has_are_not_sent_again(tmp_path: Path) -> None:
    class Server:
        starting_step = 4

        def log(self, values: dict[str, Any], step: int, commit: bool) -> None:
            assert commit
            sent.append((step, values["step"]))

    sent: list[tuple[int, int]] = []
    warnings: list[str] = []
    one = WandbMirror(WandbRun("disabled", "", "", ""), tmp_path, {}, warnings.append, lines=2)
    one._backend = Server()
    for step in (20, 30, 30, 40):  # the evaluation after step 30 was stopped, and is made up for
        one.log({}, step)
    assert (sent, warnings) == ([(4, 30), (5, 40)], [])


def test_wandb_disabled_does_nothing(tmp_path: Path) -> None:
    warnings: list[str] = []
    one = WandbMirror(WandbRun("disabled", "", "", ""), tmp_path, {}, warnings.append)
    one.log({}, 1)
    one.close({})
    assert (warnings, list(tmp_path.iterdir())) == ([], [])


def tree(dataset: Dataset, run: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    keys: dict[str, dict[str, Any]] = {
        "data": {"dir": str(dataset.root)},
        "run": {"dir": str(run)},
        "train": {"epochs": 2, "global_batch_size": 64},
        "log": {"every_steps": 4, "report": False},
    }
    for section, changes in sections.items():
        keys.setdefault(section, {}).update(changes)
    return keys


def interrupted(dataset: Dataset, run: Path, monkeypatch: pytest.MonkeyPatch, **sections: dict[str, Any]) -> None:
    """Train in three attempts: one that fails after its checkpoint, one that is stopped, and one that finishes."""
    sections = {"model": {"name": "models_for_tests:Faulty"}, "checkpoint": {"every_steps": 10}, **sections}
    for fault, error in (("raise:0:18", RuntimeError), ("stop:0:13", Stopped)):
        monkeypatch.setenv("FAULT", fault)
        with pytest.raises(error):
            distrain.train(tree(dataset, run, **sections))
    monkeypatch.delenv("FAULT")
    distrain.train(tree(dataset, run, **sections))
    first, second, third = (attempt["from_step"] for attempt in folder.read(run).attempts)
    assert (first, second) == (0, 10)
    assert 10 < third < 30


def mlflow_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", folder.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the tests have no database for it
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def check_mlflow(run: Path, record: RunRecord) -> None:
    """MLflow has one run, with each line of metrics.jsonl once, and the configuration."""
    from mlflow import MlflowClient

    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'distrain'")
    (there,) = client.search_runs([experiment.experiment_id])
    assert (there.info.run_name, there.info.status) == ("run", "FINISHED")
    for name in {name for line in numbers(record) for name in line} - {"step"}:
        expected = [(line["step"], line[name]) for line in record.lines if name in line]
        points = [(point.step, point.value) for point in client.get_metric_history(there.info.run_id, name)]
        assert [step for step, _ in points] == [step for step, _ in expected], name
        if name in ("epoch", "train/loss", "train/lr") or name.startswith("test/"):  # others depend on the time
            assert points == expected
    assert there.data.params["train.global_batch_size"] == "64"
    assert there.data.params["train.betas"] == "[0.9, 0.999]"
    assert there.data.params["data.tars"] == "null"


@pytest.mark.usefixtures("no_wandb_account")
def test_an_interrupted_run_is_one_run_everywhere(
    small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key, password = "0123456789abcdef" * 2 + "01234567", "hunter2hunter2"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr("sys.argv", ["distrain", f"data.dir=https://user:{password}@host/data?token={password}"])
    run, out = tmp_path / "run", tmp_path / "out"
    wandb_keys = {"mode": "offline", "group": "some group", "job_type": "a job"}
    mlflow_in(tmp_path / "mlruns", monkeypatch)
    interrupted(small, run, monkeypatch, wandb=wandb_keys, log={"tensorboard": True, "trackers": ["mlflow"]})
    run_record = folder.read(run)
    assert main(["wandb", str(run), "--mode", "offline", "--out", str(out)]) == 0
    output = capsys.readouterr()
    assert "warning" not in output.err.lower()
    (replayed,) = wandb_files(out)
    assert output.out.splitlines()[-1] == f"to send it: wandb sync {replayed.parent}"

    # Each attempt's files have their own rows, by the numbers of their lines: together they are metrics.jsonl.
    attempts = wandb_files(run)
    assert len(attempts) == 3
    rows = {row["_step"]: row for path in attempts for row in history(path)}
    assert sorted(rows) == list(range(len(run_record.lines) + 1))
    assert as_lines([rows[number] for number in sorted(rows)]) == numbers(run_record)
    assert sum(len(history(path)) for path in attempts) > len(rows)  # some were trained, and logged, twice
    assert as_lines(history(replayed)) == numbers(run_record)

    assert run_record.result is not None
    for path in (attempts[-1], replayed):
        (start,) = [record.run for record in records(path) if record.HasField("run")]
        assert (start.run_id, start.run_group, start.job_type) == (wandb_id(run), "some group", "a job")
        settings: dict[str, Any] = {}
        axes, summary = {}, {}
        for record in records(path):
            settings |= values(record.config.update)
            summary |= values(record.summary.update)
            axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        assert settings["train"]["global_batch_size"] == 64
        assert summary["accuracy"] == run_record.result["accuracy"]
        assert {axes[f"{group}/*"] for group in ("train", "val", "test", "profile")} == {"step"}
        assert (
            settings["_wandb.visualize.result/confusion"]["panel_config"]["panelDefId"] == "wandb/confusion_matrix/v1"
        )
        last = history(path)[-1]
        assert last["step"] == 30
        table = json.loads((path.parent / "files" / last["result/by_class.path"]).read_text())
        assert table["columns"] == ["class", "accuracy", "samples"]
        assert {name: value for name, value, _ in table["data"]} == run_record.result["accuracy_by_class"]
        assert sum(samples for *_, samples in table["data"]) == 203
        cells = json.loads((path.parent / "files" / last["result/confusion_table.path"]).read_text())["data"]
        names = run_record.classes
        matrix = confusion_matrix(run_record.result)
        counts = {(names[i], names[j]): matrix[i][j] for i in range(10) for j in range(10)}
        assert {(actual, predicted): count for actual, predicted, count in cells} == counts
        misclassified = folder.read_pictures(run / folder.MISCLASSIFIED)
        assert len(last["result/misclassified.captions"]) == len(misclassified["images"]) == 24
        for index, image in enumerate(misclassified["images"]):
            with Image.open(path.parent / "files" / last["result/misclassified.filenames"][index]) as shown:
                assert (np.asarray(shown) == image).all()
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert key.encode() not in content, path
        assert password.encode() not in content, path

    shown = events(run / "tensorboard")
    for name in {name for line in numbers(run_record) for name in line} - {"step"}:
        expected = [(line["step"], line[name]) for line in run_record.lines if name in line]
        assert [(event.step, event.value) for event in shown.Scalars(name)] == [
            (step, pytest.approx(value)) for step, value in expected
        ]
    check_mlflow(run, run_record)
    assert [event.step for event in shown.Images("pictures/misclassified")] == [30]
    assert [event.step for event in shown.Images("pictures/augmented")] == [30]
    configuration = shown.Tensors("configuration/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "global_batch_size: 64" in configuration


@pytest.fixture
def server(no_wandb_account: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with serving() as one:
        monkeypatch.setenv("WANDB_BASE_URL", one.address)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield one


def test_a_server_gets_every_line_once(
    small: Dataset, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    interrupted(small, run, monkeypatch, wandb={"mode": "online"})
    for _ in range(2):  # after the attempts, and after the command, which has nothing to add
        (rows,) = server.rows.values()
        assert [row["_step"] for row in rows] == list(range(len(rows)))
        sent, expected = as_lines(rows), numbers(folder.read(run))
        assert [(line["step"], line.get("train/loss"), line.get("test/loss")) for line in sent] == [
            (line["step"], line.get("train/loss"), line.get("test/loss")) for line in expected
        ]
        assert len(rows) == len(expected) + 1
        assert rows[-1]["result/by_class"]["nrows"] == 10
        assert set(rows[-1]["result/misclassified"]["filenames"]) <= set(server.uploaded)
        assert main(["wandb", str(run)]) == 0


def test_a_run_that_was_not_logged_is_sent_afterwards(
    small: Dataset, tmp_path: Path, server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    distrain.train(tree(small, run))
    assert main(["wandb", str(run)]) == 0
    (id_, rows) = next(iter(server.rows.items()))
    assert id_ == wandb_id(run)
    assert as_lines(rows) == numbers(folder.read(run))
    assert capsys.readouterr().out.endswith(f"/runs/{id_}\n")


def test_a_server_that_goes_away_does_not_delay_the_end(tmp_path: Path, server: WandbServer) -> None:
    warnings: list[str] = []
    one = mirror("online", tmp_path, warnings)
    one.log({"train/loss": 1.0}, 1)
    server.down = True
    one.log({"train/loss": 0.5}, 2)
    started = time.monotonic()
    one.close({}, 2)
    assert time.monotonic() - started < 4
    assert warnings == ["wandb did not finish within 2 s; metrics.jsonl has everything"]


def finished(names: list[str], matrix: list[list[int]], pictures: int = 0) -> FinishedRun:
    by_class = {
        name: row[k] / sum(row) if sum(row) else None for k, (name, row) in enumerate(zip(names, matrix, strict=True))
    }
    misclassified = {
        "images": np.ones((pictures, 4, 4, 1), np.uint8),
        "labels": np.zeros(pictures, np.int64),
        "predicted": np.ones(pictures, np.int64),
        "probabilities": np.full(pictures, 0.875),
    }
    confusion = [[i, j, count] for i, row in enumerate(matrix) for j, count in enumerate(row) if count]
    return FinishedRun({"accuracy_by_class": by_class, "confusion": confusion}, misclassified if pictures else {}, {})


@pytest.mark.usefixtures("no_wandb_account")
def test_names_of_classes_are_shown_unchanged(tmp_path: Path) -> None:
    names = ["<script>alert('x')</script>\n\"é\"", "", "none of it"]
    warnings: list[str] = []
    one = mirror("offline", tmp_path, warnings)
    one.result(finished(names, [[1, 3, 0], [0, 2, 0], [0, 0, 0]], pictures=1), 7)
    one.close({})
    assert warnings == []
    (path,) = wandb_files(tmp_path)
    (row,) = history(path)
    files = path.parent / "files"
    table = json.loads((files / row["result/by_class.path"]).read_text())
    assert table["data"] == [[names[0], 0.25, 4], [names[1], 1.0, 2], [names[2], None, 0]]
    assert row["result/misclassified.captions"] == [f"{names[0]} → {names[1]}, 87.5 %"]
    with Image.open(files / row["result/misclassified.filenames"][0]) as shown:
        assert np.asarray(shown).tolist() == [[1] * 4] * 4
    assert not list(tmp_path.rglob("staging/*"))  # `wandb sync` needs nothing from outside the run's folder
    assert not any(record.HasField("artifact") for record in records(path))


def test_a_large_confusion_matrix_keeps_the_classes_with_the_most_mistakes() -> None:
    matrix = (np.eye(500, dtype=int) * 100).tolist()
    for k in range(30):
        matrix[k * 3][490] = 1
    shown = finished([f"class {k}" for k in range(500)], matrix).most_confused()
    assert len(shown) == 40
    assert {*range(0, 90, 3), 490} <= set(shown)


def test_a_missing_tensorboard_is_reported_before_training(
    small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    requested = tree(small, tmp_path / "run", log={"tensorboard": True})
    cure = "pip install 'distrain[tensorboard]'"
    with pytest.raises(ConfigError, match=rf"log.tensorboard=true: .*{re.escape(cure)}"):
        distrain.train(requested)
    findings = doctor.extras(from_tree(requested), Environment())
    assert any(finding.level == "bad" and cure in finding.message for finding in findings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", "has keys of its own; set wandb.mode=online instead"),
        ("tensorboard", "has keys of its own; set log.tensorboard=true instead"),
        ("mlfow", "accelerate has no such tracker; it has aim, clearml, comet_ml, dvclive, mlflow, swanlab, trackio"),
        ("aim", "is not installed; pip install aim, or remove it from the list"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_one_message(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_installed(Log(trackers=["mlflow", name]))
    assert str(caught.value) == f"log.trackers: {name}: {message}"
    findings = doctor.extras(from_tree({"log": {"trackers": [name]}}), Environment())
    assert [(finding.level, finding.message) for finding in findings] == [("bad", str(caught.value))]


def test_a_tracker_gets_every_line_on_one_thread_and_costs_one_warning_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

    calls: list[Any] = []

    class Recorder(GeneralTracker):
        name, requires_logging_directory, tracker = "recorder", True, None
        main_process_only = False

        def __init__(self, *arguments: str) -> None:
            calls.append((*arguments, threading.current_thread().name))

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            calls.append(values)

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            calls.append((step, values["line"], values["train/loss"], threading.current_thread().name))
            if values["train/loss"] < 0:
                raise OSError("the server is gone")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "train/loss": 3.0}\n{"step": 8, "train/loss": 2.0}\n')
    warnings: list[str] = []
    one = open_by_name("recorder", tmp_path, {"train": {"lr": 0.1, "epochs": None}}, warnings.append)
    one.log({"train/loss": 1.0, "digests": {}}, 12)
    one.close({})
    assert calls == [
        ("distrain", str(tmp_path), "recorder"),
        {"train.lr": 0.1, "train.epochs": "null"},
        *((4 * line, line, 4.0 - line, "recorder") for line in (1, 2, 3)),
    ]
    assert warnings == []
    one = open_by_name("recorder", tmp_path, {}, warnings.append)
    one.log({"train/loss": -1.0}, 12)
    one.log({"train/loss": 1.0}, 16)
    one.close({})
    assert warnings == ["recorder is switched off: the server is gone; metrics.jsonl has everything"]
    assert calls[-1][:2] == (12, 3)


def test_an_mlflow_server_that_does_not_answer_delays_the_end_only_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        silent.settimeout(60)
        one = open_by_name("mlflow", tmp_path, {}, warnings.append)
        one.log({"train/loss": 1.0}, 1)
        with silent.accept()[0]:  # it waits for an answer
            started = time.monotonic()
            one.close({}, 0.2)
            assert time.monotonic() - started < 5
    assert warnings == ["mlflow did not finish within 0.2 s; metrics.jsonl has everything"]


def test_tensorboard_that_cannot_write_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    warnings: list[str] = []
    one = TensorBoardMirror(tmp_path, {}, warnings.append)
    one.log({"train/loss": 1.0}, 1)
    one.close({})
    assert len(warnings) == 1
    assert "tensorboard is off" in warnings[0]


def test_tensorboard_turned_on_later_has_earlier_metrics_too(
    small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("FAULT", "stop:0:18")
    with pytest.raises(Stopped):
        distrain.train(tree(small, run, model={"name": "models_for_tests:Faulty"}))
    monkeypatch.delenv("FAULT")
    distrain.train(tree(small, run, model={"name": "models_for_tests:Faulty"}, log={"tensorboard": True}))
    expected = [line["step"] for line in folder.read(run).lines if "train/loss" in line]
    assert [event.step for event in events(run / "tensorboard").Scalars("train/loss")] == expected


@pytest.mark.usefixtures("no_wandb_account")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no API key; set WANDB_API_KEY"),
        (["--mode", "offline"], "needs --out FOLDER"),
        (["--out", "out"], "--out is for --mode offline"),
    ],
)
def test_distrain_wandb_reports_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    folder.write_configuration(tmp_path, Config())
    assert main(["wandb", str(tmp_path), *options]) == 78
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.ranks
@pytest.mark.usefixtures("no_wandb_account")
def test_every_other_node_has_a_run_beside_the_main_one(small: Dataset, tmp_path: Path) -> None:
    run, names = tmp_path / "run", []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    keys = [f"data.dir={small.root}", f"run.dir={run}", "train.max_steps=4", "run.device=cpu"]
    keys += ["wandb.mode=offline", "wandb.nodes=all", "train.global_batch_size=64", "log.report=false"]
    cluster = ["--nproc", "2", "--nodes", "2", "--host", "localhost", "--port", str(port)]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "distrain", "launch", *cluster, "--node", str(node), "--", "train", *keys],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    for node in nodes:
        out, _ = node.communicate(timeout=240)
        assert node.returncode == 0, out
        assert "warning" not in out.replace("warning: the accuracy on test, ", "")  # of four steps: at chance
    main_id = wandb_id(run)
    for path in wandb_files(run):
        (start,) = [record.run for record in records(path) if record.HasField("run")]
        names.append((start.run_id, start.display_name, start.run_group, start.job_type))
        assert bool(as_lines(history(path))) == (start.job_type == "train")
    assert sorted(names) == [
        (main_id, "run", main_id, "train"),
        (f"{main_id}-node-1", "run-node-1", main_id, "node"),
    ]
