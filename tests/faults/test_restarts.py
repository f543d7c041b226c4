"""`torchrun --max-restarts`: its store is kept, and the processes that it starts again find each other all the same."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from harness import arguments, clean_environ, small_run, trained

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
