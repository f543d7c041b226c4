"""The verdict on how processes ended, and which rank is named as behind: pure functions."""

from __future__ import annotations

import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distrain import cli, config
from distrain.distributed.watchdog import straggler
from distrain.failure_report import Failure
from distrain.launcher import launch
from distrain.launcher.attempt import AttemptRecord, NodeRecord
from distrain.launcher.cluster import LOCAL, Topology
from distrain.launcher.verdict import Verdict, WorkerExit, decide, format_verdict
from distrain.worker_status import WorkerStatus


def end(
    rank: int,
    code: int,
    kind: str | None = None,
    time: float = 0.0,
    by_launcher: bool = False,
    unfinished: bool = False,
) -> WorkerExit:
    failure = Failure(kind, code, rank, "host", "train", 7, f"{kind} of {rank}", "", time) if kind else None  # type: ignore[arg-type]
    return WorkerExit(rank, code, failure, WorkerStatus("train", 7), time, by_launcher, unfinished)


KILL = -signal.SIGKILL
CASES = {
    "done": ([end(0, 0), end(1, 0)], None, True, 0, "done"),
    "stopped": ([end(0, 75, "again"), end(1, 75, "again")], None, True, 75, "again of 0"),
    "stopped by the launcher": ([end(0, 75, "again"), end(1, 0)], "SIGTERM", True, 75, "again of 0"),
    "stopped while it starts": ([end(0, -signal.SIGTERM), end(1, -signal.SIGTERM)], "SIGTERM", True, 75, "stopped by"),
    "configuration": ([end(0, 78, "user"), end(1, KILL, by_launcher=True)], None, True, 78, "user of 0"),
    "configuration beats a lost peer": ([end(0, 75, "peer", 1), end(1, 78, "user", 2)], None, True, 78, "user of 1"),
    "fault": ([end(0, 75, "peer", 1), end(1, 1, "fault", 2)], None, True, 1, "fault of 1"),
    "fault after a stop": ([end(0, 1, "fault", 2), end(1, 75, "again", 1)], "SIGTERM", True, 1, "fault of 0"),
    "save": ([end(0, 1, "save"), end(1, 1, "save", 1)], "SIGTERM", True, 1, "save of 0"),
    "GPU": ([end(0, 75, "peer"), end(1, 75, "gpu", 1)], None, True, 75, "gpu of 1"),
    "GPU after a stop of another": ([end(0, 75, "again"), end(1, 75, "gpu", 1)], None, True, 75, "gpu of 1"),
    "crash": ([end(0, 75, "peer"), end(1, -signal.SIGSEGV, time=1)], None, True, 1, "rank 1 was ended by SIGSEGV"),
    "killed": ([end(0, 75, "peer"), end(1, KILL, time=1)], None, True, 75, "rank 1 was ended by SIGKILL"),
    "killed, the other hung": ([end(0, KILL, by_launcher=True), end(1, KILL)], None, True, 75, "rank 1 was ended"),
    "killed, nothing to resume from": ([end(0, 75, "peer"), end(1, KILL)], None, False, 1, "no checkpoint"),
    "peer": ([end(0, 75, "peer"), end(1, KILL, by_launcher=True)], None, True, 75, "peer of 0"),
    "left": (
        [end(0, 75, "peer", 1), end(1, 0, time=2, unfinished=True)], None, True,
        1, "rank 1 ended with 0 in phase train, step 7, before its command was done",
    ),
    "all left": ([end(0, 0, unfinished=True), end(1, 0, unfinished=True)], None, True, 1, "rank 0 ended with 0"),
    "left after a stop": ([end(0, 75, "again"), end(1, 0, unfinished=True)], "SIGTERM", True, 1, "rank 1 ended with 0"),
    "busy": ([end(0, 75, "busy"), end(1, 75, "busy")], None, True, 75, "busy of 0"),
    "grace": ([end(0, KILL, by_launcher=True)] * 2, "SIGUSR1", True, 75, "stopped by SIGUSR1"),
    "grace, nothing to resume from": ([end(0, KILL, by_launcher=True)] * 2, "SIGUSR1", False, 1, "no checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_verdict(name: str) -> None:
    exits, stop_signal, can_resume, code, reason = CASES[name]
    verdict = decide(exits, stop_signal, can_resume)
    assert verdict.code == code
    assert reason in verdict.reason
    assert decide(exits[::-1], stop_signal, can_resume).code == code


def test_the_verdict_names_host_phase_step_and_message() -> None:
    failure = Failure("fault", 1, 3, "node7", "evaluate", 12, "ValueError: no", "Traceback …\nValueError: no", 0.0)
    text = format_verdict(decide([WorkerExit(3, 1, failure, WorkerStatus("end", 20), 0.0, False)], None, True))
    for part in ("rank 3 failed first", "node7", "evaluate, step 12", "Traceback", "exit 1"):
        assert part in text


def test_a_user_error_is_printed_without_rank_and_phase() -> None:
    failure = Failure("user", 78, 1, socket.gethostname(), "start", 0, "train.lr: no", "", 0.0)
    verdict = decide([WorkerExit(1, 78, failure, WorkerStatus("start", 0), 0.0, False)], None, True)
    assert format_verdict(verdict) == "distrain: error: train.lr: no\ndistrain: exit 78: not again unchanged"
    elsewhere = decide(
        [WorkerExit(1, 78, replace(failure, host="node7"), WorkerStatus("start", 0), 0.0, False)], None, True
    )
    assert format_verdict(elsewhere).startswith("distrain: on node7:\ndistrain: error: train.lr: no\n")


def test_a_process_that_lost_a_peer_is_not_named_as_the_first_to_fail() -> None:
    assert "rank 0 ended\n" in format_verdict(decide([end(0, 75, "peer")], None, True))
    killed = format_verdict(decide([end(0, 75, "peer", 1), end(1, KILL, time=2)], None, True))
    assert "rank 1 failed first\n" in killed
    assert "rank 0" not in killed


@pytest.mark.parametrize(
    ("code", "first", "reason"),
    [
        (75, end(2, KILL), "rank 2 was ended by SIGKILL"),
        (1, end(2, 1, "fault"), "fault of 2"),
        (1, end(2, 0, unfinished=True), "rank 2 ended with 0"),
    ],
)
def test_what_happened_to_a_process_is_taken_from_its_own_node(
    code: int, first: WorkerExit, reason: str, tmp_path: Path
) -> None:
    resolved = config.load(None, [f"run.dir={tmp_path}", "data.dir=d"])
    record = AttemptRecord(resolved)
    for node, ends in ((1, [end(1, 75, "peer")]), (2, [first])):
        NodeRecord(resolved, node).close(decide(ends, None, True))
    verdict = record.crash_elsewhere(3, decide([end(0, 75, "peer")], None, True))
    assert verdict.code == code
    assert verdict.reason.startswith(f"{socket.gethostname()}: {reason}")
    assert "rank 0" not in format_verdict(verdict)


def test_without_a_cause_on_another_node_the_verdict_stays(tmp_path: Path) -> None:
    resolved = config.load(None, [f"run.dir={tmp_path}", "data.dir=d"])
    record = AttemptRecord(resolved)
    NodeRecord(resolved, 1).close(decide([end(1, 75, "peer")], None, True))
    for here in (end(0, 75, "peer"), end(0, KILL)):
        assert record.crash_elsewhere(2, decide([here], None, True)).first == here


AGAIN = Verdict(75, "waited 900 s")


def attempt(run: Path, node: int, job: str | None, verdict: Verdict = AGAIN) -> Verdict:
    """Return the verdict of a node's launcher whose processes end like this, if it starts them."""
    resolved = config.load(None, [f"run.dir={run}", "data.dir=d"])
    record = NodeRecord(resolved, node, job) if node else AttemptRecord(resolved, job)
    return record.close(record.exhausted or verdict)


@pytest.mark.parametrize("node", [0, 1])
def test_a_job_that_gave_up_ends_at_once_when_it_is_started_again(node: int, tmp_path: Path) -> None:
    """Kubernetes replaces the pods of a job that ended with 1: pods that never meet must not wait for hours."""
    run = tmp_path / "run"
    codes = [attempt(run, node, "job-1").code for _ in range(8)]
    assert codes.index(1) == (3 if node else 2)
    assert set(codes[codes.index(1) :]) == {1}
    last = attempt(run, node, "job-1", Verdict(0, "not started"))
    assert last.code == 1
    assert last.reason == "3 attempts in a row without progress (launch.max_attempts_without_progress); waited 900 s"


@pytest.mark.parametrize("node", [0, 1])
def test_another_job_is_not_bound_by_the_attempts_of_the_first(node: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for job in ("job-1", "job-2"):
        assert [attempt(run, node, job).code for _ in range(2)] == [75, 75]
    while attempt(run, node, "job-2").code == 75:
        pass
    assert attempt(run, node, "job-3").code == 75
    assert attempt(run, node, "job-3", Verdict(0, "done")) == Verdict(0, "done")


def test_without_an_identity_of_the_job_attempts_are_counted_from_0_after_a_fault(tmp_path: Path) -> None:
    assert [attempt(tmp_path / "run", 0, None).code for _ in range(6)] == [75, 75, 1, 75, 75, 1]
    assert [attempt(tmp_path / "run", 1, None).code for _ in range(6)] == [75] * 6


@pytest.mark.parametrize("node", [0, 1])
def test_a_fault_of_the_program_is_not_an_attempt_without_progress(node: int, tmp_path: Path) -> None:
    ends = [AGAIN, AGAIN, Verdict(1, "a crash"), AGAIN, AGAIN]
    assert [attempt(tmp_path / "run", node, "job", end).code for end in ends] == [75, 75, 1, 75, 75]


@pytest.mark.parametrize(
    ("has_checkpoint", "number", "reason"),
    [(False, 3, "3 attempts in a row without progress"), (True, 1, "no checkpoint can be read")],
)
def test_restarts_end_without_progress_or_a_readable_checkpoint(
    has_checkpoint: bool, number: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, started, run = (tmp_path / name for name in ("program.py", "started", "run"))
    program.write_text(f"import os\nopen({str(started)!r}, 'a').write('.')\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setattr(launch, "PROGRAM", program)
    if has_checkpoint:
        (run / "checkpoints/step-00000001").mkdir(parents=True)  # damaged: it has no files
    job = launch.Job(["train"], config.load(None, [f"run.dir={run}", "data.dir=d"]), 1, 1.0, None)
    verdict = launch.launch(job, Topology(1, 0, LOCAL, 0, "test"), launch.Restarts(5, standby=False))
    assert (verdict.code, started.read_text()) == (1, "." * number)
    assert reason in verdict.reason


def test_a_folder_that_was_removed_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, started, run = (tmp_path / name for name in ("program.py", "started", "run"))
    program.write_text(
        f"import os\nfrom pathlib import Path\nfrom distrain.worker_status import StatusWriter, WorkerStatus\n"
        f"open({str(started)!r}, 'a').write('.')\n"
        "StatusWriter(Path(os.environ['DISTRAIN_STATUS_FOLDER']), 0).write(WorkerStatus('train', 5))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setattr(launch, "PROGRAM", program)
    job = launch.Job(["train"], config.load(None, [f"run.dir={run}", "data.dir=d"]), 1, 1.0, None)
    verdict = launch.launch(job, Topology(1, 0, LOCAL, 0, "test"), launch.Restarts(5, standby=False))
    assert (verdict.code, started.read_text()) == (78, ".")
    assert f"{run}: was removed while the run trained" in verdict.reason
    assert not run.exists()


def test_a_new_checkpoint_is_progress_for_all_nodes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in range(1, 7):
        assert attempt(run, 1, "job").code == 75
        (run / f"checkpoints/step-{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("sys.exit(0)", "distrain: error: sys.exit(0) was called before the command was done"),
        ("sys.exit(200)", "distrain: error: sys.exit(200) was called before the command was done"),
        ("sys.exit('not now')", "distrain: error: sys.exit('not now') was called before the command was done"),
        ("sys.exit()", "distrain: error: sys.exit(None) was called before the command was done"),
        ("raise click.exceptions.Exit(0)", "click.exceptions.Exit: 0"),
        ("raise click.UsageError('mine')", "click.exceptions.UsageError: mine"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_a_model_that_leaves_fails_the_command(
    how: str,
    message: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "leaving.py").write_text(
        "import click, sys\nfrom models_for_tests import Faulty\nclass Leaving(Faulty):\n"
        "    def forward(self, images):\n"
        f"        if self.pass_count == 4:\n            {how}\n        return super().forward(images)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "leaving", raising=False)
    keys = [f"data.dir={data}", f"run.dir={tmp_path / 'run'}", "model.name=leaving:Leaving", "train.max_steps=9"]
    assert cli.main(["train", *keys, "train.global_batch_size=16", "log.report=false"]) == 1
    shown = capfd.readouterr().err
    assert shown.count("Traceback") == 1
    assert shown.endswith(f"{message}\n")


def entry(collectives: int, waits_for: str | None = None) -> dict[str, object]:
    return {"collectives": collectives, "host": "h", "pid": 5, "waiting_for": waits_for}


def test_the_rank_that_is_behind_is_named() -> None:
    assert straggler({0: entry(7), 1: entry(7), 2: entry(6)}, 3).startswith("rank 2 (host h, process 5) is behind")
    assert straggler({0: entry(7), 2: entry(7)}, 3).startswith("rank 1 is behind: it does not answer")
    assert straggler({0: entry(7), 1: entry(7, "its data")}, 2) == "rank 1 waits for its data"
    assert "all ranks wait for each other" in straggler({0: entry(7), 1: entry(7)}, 2)
    assert straggler({}, 2).startswith("rank 0, which serves the store")
