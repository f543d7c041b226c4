"""Restarts in place: `distrain launch --restarts`, and `torchrun --max-restarts`, whose store is kept."""

from __future__ import annotations

import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import make
from harness import (
    Job,
    TrainedRun,
    arguments,
    clean_environ,
    exit_file,
    ip,
    newest_step,
    small_run,
    trained,
    until,
)
from runs import metrics_but_times
from safetensors.torch import load_file

pytestmark = pytest.mark.faults
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


def torchrun(tree: dict[str, Any], fault: str, attempts: int, *nodes: Sequence[str]) -> list[tuple[int, str]]:
    """Run a job under an agent on each node, with two restarts; return their exit codes and outputs."""
    tree["model"]["name"] = "models_for_ends:Ending"
    environ = {**clean_environ(), "FAULT": fault, "FAULTY_ATTEMPTS": str(attempts)}
    with ExitStack() as stack:
        agents = []
        for options in nodes:
            command = [TORCHRUN, *options, "--max-restarts", "2", "-m", "distrain", "train", *arguments(tree)]
            agent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
            stack.callback(agent.wait, 30)
            stack.callback(agent.terminate)  # ends its workers too
            agents.append(agent)
        outputs = [agent.communicate(timeout=120)[0] for agent in agents]
        return [(agent.returncode, output) for agent, output in zip(agents, outputs, strict=True)]


@pytest.mark.parametrize(
    "fault", ["forward-kill:1:30", "forward-kill:0:30", "backward-skip:0:30", "forward-leave:1:30"]
)
def test_the_third_attempt_after_two_faults_ends_well(fault: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    [(code, output)] = torchrun(small_run(data, run), fault, 2, ["--standalone", "--nproc-per-node", "2"])
    assert code == 0, output
    assert len(list((run / "attempts").glob("*.json"))) == 3
    assert trained(run).metrics
    if fault == "backward-skip:0:30":
        assert output.count("RuntimeError: skip connection mismatch") >= 2
    if fault.endswith("1:30"):
        assert output.count("distrain: another process is gone: rank 1 on") == 2


@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
def test_agents_that_count_their_restarts_separately(rendezvous: str, data: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    options = {
        "c10d": ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "job"],
        "static": ["--master-addr", "localhost", "--master-port", port],
    }[rendezvous]
    nodes = [["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", *options] for node in range(2)]
    ends = torchrun(small_run(data, tmp_path / "run"), "forward-kill:1:30", 1, *nodes)
    assert [code for code, _ in ends] == [0, 0], "\n".join(output for _, output in ends)
    assert trained(tmp_path / "run").metrics


@pytest.mark.short
def test_processes_are_started_again(data: Path, tmp_path: Path, undisturbed: Any) -> None:
    expected: TrainedRun = undisturbed()
    with Job(small_run(data, tmp_path / "run"), tmp_path, 2, ["--restarts", "2"]) as job:
        job.wait_for("train", 23)
        job.signal("rank1", number=signal.SIGSEGV)
        until(lambda: "1 more restart allowed" in job.output, "the second attempt")
        job.wait_for("train", 33)
        job.signal("rank0", number=signal.SIGKILL)
        assert job.wait() == 0, job.output
    assert "rank 1 was ended by SIGSEGV" in job.output
    assert "rank 0 was ended by SIGKILL" in job.output
    assert "starting again from the newest checkpoint (0 more restarts allowed)" in job.output
    assert len(attempts(job)) == 3
    trained(job.run).same_as(expected)


def attempts(job: Job) -> list[Path]:
    return sorted((job.run / "attempts").glob("*.json"))


@pytest.mark.parametrize(
    ("fault", "restarts", "number", "reason"),
    [
        ("raise:1:30", 2, 1, "a fault of the model"),
        ("crash:1:5", 5, 3, "3 attempts in a row without progress"),
        ("crash:1:15", 2, 3, "rank 1 was ended by SIGSEGV"),  # two restarts are used up
    ],
)
def test_a_job_that_ends_all_the_same(
    fault: str, restarts: int, number: int, reason: str, data: Path, tmp_path: Path
) -> None:
    with Job(small_run(data, tmp_path / "run"), tmp_path, 2, ["--restarts", str(restarts)], {"FAULT": fault}) as job:
        assert job.wait() == 1, job.output
    assert len(attempts(job)) == number, job.output
    assert reason in exit_file(job.run)["reason"]


def test_a_stop_ends_the_job(data: Path, tmp_path: Path) -> None:
    with Job(small_run(data, tmp_path / "run"), tmp_path, 2, ["--restarts", "2"], {"FAULT": "slow:1:1"}) as job:
        job.wait_for("train", 13)
        job.signal("launcher", number=signal.SIGTERM)
        assert job.wait() == 75, job.output
    assert len(attempts(job)) == 1


def test_a_process_that_is_stopped_by_a_signal(data: Path, tmp_path: Path, undisturbed: Any) -> None:
    expected: TrainedRun = undisturbed(3)
    tree = small_run(data, tmp_path / "run", timeouts={"step_seconds": 5})
    with Job(tree, tmp_path, 3, ["--restarts", "2"]) as job:
        job.wait_for("train", 23)
        job.signal("rank1", number=signal.SIGSTOP)
        assert job.wait() == 0, job.output
    assert "no progress for 5 s in phase train" in job.output
    trained(job.run).same_as(expected)


Start = Callable[..., list[Job]]


@pytest.fixture
def start(data: Path, tmp_path: Path) -> Iterator[Start]:
    """`start(names, *options, **environ)`: a launcher with two restarts in each network name space."""
    started: list[Job] = []

    def begin(names: list[str], *options: str, virtual_ranks: int | None = None, **environ: str) -> list[Job]:
        seconds, train = {"start_seconds": 60, "step_seconds": 5}, {"virtual_ranks": virtual_ranks}
        tree = small_run(data, tmp_path / "run", timeouts=seconds, launch={"rejoin_seconds": 20}, train=train)
        together = ["--restarts", "2", "--nodes", str(len(names)), "--host", "10.99.7.10", "--port", "29500", *options]
        for number, name in enumerate(names):
            prefix = ["ip", "netns", "exec", name]
            started.append(Job(tree, tmp_path, 1, [*together, "--node", str(number)], environ, prefix))
        return started

    yield begin
    for job in started:
        job.close()


def test_a_process_of_another_node_is_killed(nodes: Any, start: Start, undisturbed: Any) -> None:
    expected = undisturbed(2)
    jobs = start(nodes[0], FAULT="slow:0:20")
    jobs[1].wait_for("train", 33, rank=1)
    jobs[1].signal("rank0", number=signal.SIGKILL)  # the only one there
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output + jobs[1].output
    assert "starting again" in jobs[0].output
    trained(jobs[0].run).same_as(expected)


def test_rank_0_is_killed_at_the_end(nodes: Any, start: Start, undisturbed: Any) -> None:
    expected = undisturbed(2)
    jobs = start(nodes[0])
    until((jobs[0].run / "result.json").exists, "the result")
    jobs[0].signal("rank0", number=signal.SIGKILL)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output + jobs[1].output
    trained(jobs[0].run).same_as(expected)
    assert exit_file(jobs[0].run)["code"] == 0


def test_a_node_that_detects_a_loss_late(nodes: Any, start: Start, undisturbed: Any) -> None:
    """The process of the other node is stopped meanwhile: it cannot see that rank 0 was killed."""
    expected = undisturbed(2)
    jobs = start(nodes[0], FAULT="slow:0:20")
    jobs[0].wait_for("train", 33)
    jobs[1].signal("rank0", number=signal.SIGSTOP)  # the only one there
    jobs[0].signal("rank0", number=signal.SIGKILL)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output + jobs[1].output
    assert "is missing" not in jobs[0].output
    trained(jobs[0].run).same_as(expected)


def test_a_fault_on_another_node_ends_both(nodes: Any, start: Start) -> None:
    jobs = start(nodes[0], FAULT="raise:1:30")
    assert jobs[1].wait() == 1, jobs[1].output
    assert jobs[0].wait() == 1, jobs[0].output
    assert "a fault of the model" in exit_file(jobs[0].run)["reason"]


def test_a_link_that_is_cut_and_healed(nodes: Any, start: Start, undisturbed: Any) -> None:
    names, link = nodes
    expected = undisturbed(2)
    jobs = start(names, FAULT="slow:0:20")
    jobs[0].wait_for("train", 33)
    ip("link", "set", link, "down")
    until(lambda: all("starting again" in job.output for job in jobs), "both attempts end", 60)
    ip("link", "set", link, "up")
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output + jobs[1].output
    trained(jobs[0].run).same_as(expected)


@pytest.mark.parametrize("least", [1, 2])
def test_a_node_that_is_lost(least: int, nodes: Any, start: Start, finish: Any, tmp_path: Path) -> None:
    names, link = nodes
    jobs = start(names, "--min-nodes", str(least), virtual_ranks=2, FAULT="slow:0:20")
    jobs[0].wait_for("train", 33)
    ip("link", "set", link, "down")
    jobs[1].close()
    assert jobs[0].wait() == (0 if least == 1 else 75), jobs[0].output
    if least == 1:
        assert "continuing with 1 node of 2" in jobs[0].output
        trained(jobs[0].run).same_as(finish(tmp_path / "undisturbed", 2, train={"virtual_ranks": 2}))
    else:
        assert "node 1 is missing" in jobs[0].output


KILLS, STOPS = 100, 20
STEPS, SAVED_STEPS, PACE, TIMEOUT = 24_000, 20, 0.04, 5
"""Steps of the job, steps between checkpoints, seconds that FAULT=unhurried adds to a step, timeouts.step_seconds."""


@pytest.mark.timeout(3600)
def test_a_hundred_kills_and_twenty_stops_of_one_job(tmp_path: Path) -> None:
    """One process after another is killed or stopped by a signal, in one job of three processes."""
    make(tmp_path / "data", 403, 100, image_size=8, shards=12, lanes=6)
    changes: dict[str, Any] = {
        "train": {"max_steps": STEPS}, "checkpoint": {"every_steps": SAVED_STEPS, "keep": 2},
        "data": {"audit": "false", "cache": "ram"}, "eval": {"every_steps": STEPS // 4},
        "log": {"every_steps": STEPS // 40}, "timeouts": {"step_seconds": TIMEOUT},
    }  # fmt: skip
    with Job(small_run(tmp_path / "data", tmp_path / "whole", **changes), tmp_path, 3) as job:
        began = time.monotonic()
        assert job.wait(900) == 0, job.output
        undisturbed = time.monotonic() - began + STEPS * PACE
    draw, events = random.Random(0), [signal.SIGKILL] * KILLS + [signal.SIGSTOP] * STOPS
    draw.shuffle(events)
    options, environ = ["--restarts", str(len(events))], {"FAULT": "unhurried:0:1"}
    with Job(small_run(tmp_path / "data", tmp_path / "disturbed", **changes), tmp_path, 3, options, environ) as job:
        began = time.monotonic()
        costs = [_disturb(job, event, draw.randrange(3), undisturbed / STEPS) for event in events]
        assert job.wait(1200) == 0, job.output
        seconds = time.monotonic() - began
    assert len(attempts(job)) == len(events) + 1
    trained_alike(tmp_path / "whole", job.run)
    again, imports = sum(cost.again for cost in costs), sum(cost.imports for cost in costs)
    gaps = {each: [cost.gap for cost in costs if cost.event == each] for each in (signal.SIGKILL, signal.SIGSTOP)}
    lost = sum(map(sum, gaps.values()))
    print(f"\n{KILLS} SIGKILLs, {STOPS} SIGSTOPs: the same bits as undisturbed")
    print(f"{seconds:.0f} s, of which {undisturbed + lost + again + imports:.0f} s are explained: undisturbed")
    print(f"{undisturbed:.0f} s, gaps {lost:.0f} s, steps trained again {again:.0f} s, imports of standby processes,")
    print(f"which slow down steps, {imports:.0f} s")
    for event, each in gaps.items():
        print(f"gap after {event.name}: median {statistics.median(each):.2f} s, longest {max(each):.2f} s")


@dataclass(frozen=True)
class Cost:
    """An event, and the seconds that it costs.

    Attributes:
        event: the signal.
        gap: until the next step.
        again: for steps that are trained again.
        imports: by which steps took longer while standby processes did their imports.
    """

    event: signal.Signals
    gap: float
    again: float
    imports: float


def _disturb(job: Job, event: signal.Signals, rank: int, step_seconds: float) -> Cost:
    """Send a signal to a process of a job that has made progress; wait until it trains again."""
    done, saved = job.output.count("starting again"), newest_step(job.run)
    at, step = time.monotonic(), job.wait_for("train").step
    job.wait_for_standby()
    imports = time.monotonic() - at - (job.status().step - step) * step_seconds
    until(lambda: newest_step(job.run) > saved, "progress", pause=0.02)
    at, step = time.monotonic(), job.wait_for("train").step
    job.signal(f"rank{rank}", number=event)
    until(lambda: job.output.count("starting again") > done, "the end of the attempt", pause=0.02)
    step -= newest_step(job.run)
    job.wait_for("train", pause=0.01)
    return Cost(event, time.monotonic() - at, step * step_seconds, imports)


def trained_alike(one: Path, other: Path) -> None:
    """Check that the last checkpoints and the metrics have the same bits."""
    weights = [load_file(max((run / "checkpoints").glob("step-*")) / "model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert metrics_but_times(one) == metrics_but_times(other)
