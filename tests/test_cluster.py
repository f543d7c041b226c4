"""The nodes of a job, from the environment alone."""

from __future__ import annotations

import pytest

from distrain.errors import ConfigError
from distrain.launcher.cluster import Options, Topology, detect, first_host

SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "n[3-4]",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
}  # fmt: skip


def topology(environ: dict[str, str], name: str = "host", **options: object) -> Topology:
    return detect(environ, Options(**options), lambda: name)  # type: ignore[arg-type]


def test_one_machine() -> None:
    assert topology({}) == Topology(1, 0, "127.0.0.1", 0, "this machine")


def test_an_sbatch_script_without_srun_is_one_machine() -> None:
    batch = {key: value for key, value in SLURM.items() if "STEP" not in key}
    assert topology(batch).nodes == 1
    with pytest.raises(ConfigError, match="2 nodes, and this is one of them"):
        topology({**batch, "SLURM_NNODES": "2"})
    assert topology({**batch, "SLURM_NNODES": "2"}, nodes=1).nodes == 1


def test_srun() -> None:
    assert topology(SLURM) == Topology(2, 1, "n3", 24711, "SLURM job 4711")
    alone = {**SLURM, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"}
    assert topology(alone) == Topology(1, 0, "127.0.0.1", 0, "SLURM job 4711")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a1,b2", "a1"), ("n[3-4]", "n3"), ("n[007-012,20],m1", "n007"), ("r[3-4,7]n[01-16],s1", "r3n01"),
     ("a-b.c,d", "a-b.c"), ("n[8,10-12]", "n8")],
)  # fmt: skip
def test_the_first_name_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_jobs_of_one_node_do_not_share_a_port() -> None:
    ports = {topology({**SLURM, "SLURM_JOB_ID": str(job)}).port for job in range(100, 200)}
    assert len(ports) == 100
    assert all(1024 < port < 65536 for port in ports)


def test_srun_with_a_task_for_each_process_is_refused() -> None:
    with pytest.raises(ConfigError, match="one task a node"):
        topology({**SLURM, "SLURM_STEP_NUM_TASKS": "8"})


def test_an_indexed_job() -> None:
    pod = {"JOB_COMPLETION_INDEX": "2"}
    name = "train-2.train.lab.svc.cluster.local"
    assert topology(pod, name, nodes=4) == Topology(
        4, 2, "train-0.train.lab.svc.cluster.local", 29400, "a Kubernetes Indexed Job"
    )
    assert topology(pod, "train-2", nodes=4, host="elsewhere").host == "elsewhere"
    with pytest.raises(ConfigError, match="subdomain"):
        topology(pod, "train-2", nodes=4)
    with pytest.raises(ConfigError, match="--nodes"):
        topology(pod, name)
    with pytest.raises(ConfigError, match="node 2 of 2"):
        topology(pod, name, nodes=2)


def test_by_hand() -> None:
    assert topology({}, nodes=3, node=2, host="a", port=5) == Topology(3, 2, "a", 5, "this machine")
    for options in ({"nodes": 3}, {"nodes": 2, "host": "a"}, {"nodes": 2, "port": 5}):
        with pytest.raises(ConfigError, match="give --host"):
            topology({}, **options)
