"""The nodes of a job, from the environment alone."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_environment import VARIABLES

from distrain import cli
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


@pytest.mark.parametrize(("value", "job"), [("", None), ("3f2a-9", "3f2a-9"), ("a\x1b[2J\udcff", "a\\x1b[2J\\udcff")])
def test_a_job_has_the_identity_that_its_scheduler_gives_it(value: str, job: str | None) -> None:
    assert topology({"DISTRAIN_JOB": value}).job == job
    assert topology({**SLURM, "DISTRAIN_JOB": value}).job == job


def test_an_sbatch_script_without_srun_is_one_machine() -> None:
    batch = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "4"}
    assert topology({**batch, "WORLD_SIZE": "1"}) == Topology(1, 0, "127.0.0.1", 0, "this machine")
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
    assert topology({}, nodes=3, node=2, host="a", port=5) == Topology(3, 2, "a", 5, "as given")
    for options in ({"nodes": 3}, {"nodes": 2, "host": "a"}, {"nodes": 2, "port": 5}):
        with pytest.raises(ConfigError, match="give --host"):
            topology({}, **options)


PYTORCHJOB = {
    "WORLD_SIZE": "8", "RANK": "1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "PET_NNODES": "2",
    "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "4", "PET_MASTER_ADDR": "job-master-0", "PET_MASTER_PORT": "23456",
}  # fmt: skip
TRAINJOB = {
    "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "auto", "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29400", "JOB_COMPLETION_INDEX": "1",
}  # fmt: skip


def test_a_pod_of_a_kubeflow_job_is_one_of_its_nodes() -> None:
    assert topology(PYTORCHJOB) == Topology(2, 1, "job-master-0", 23456, "a Kubeflow job", 4)
    assert topology(TRAINJOB) == Topology(2, 1, "job-node-0-0.job", 29400, "a Kubeflow job")
    older = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    assert topology(older) == Topology(2, 1, "job-master-0", 23456, "WORLD_SIZE=2")
    assert topology({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "4"}).processes == 4
    assert topology({"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "tcp://10.0.0.7:80"}).nodes == 1


def test_what_is_given_by_hand_goes_before_what_is_detected() -> None:
    sweep = {"JOB_COMPLETION_INDEX": "3"}
    for variables in (sweep, SLURM, {**SLURM, "SLURM_STEP_NUM_TASKS": "8"}, PYTORCHJOB, TRAINJOB,
                      {"OMPI_COMM_WORLD_SIZE": "4"}, {"SLURM_NNODES": "abc"}):  # fmt: skip
        assert topology(variables, nodes=1) == Topology(1, 0, "127.0.0.1", 0, "as given")
        assert topology({**variables, "DISTRAIN_NODES": "1"}) == topology(variables, nodes=1)
        assert topology(variables, nodes=2, node=0, host="a", port=5) == Topology(2, 0, "a", 5, "as given")
    assert topology({"DISTRAIN_NODES": "4", **sweep}, nodes=1).nodes == 1
    assert topology({"DISTRAIN_NODES": "4", "DISTRAIN_NODE": "3", "DISTRAIN_HOST": "a"}, nodes=1).nodes == 1
    assert topology(PYTORCHJOB, port=5).port == 5
    assert topology({}, nodes=2, node=0, host="127.0.0.1", port=5).host == "127.0.0.1"


WRONG = {
    "no rank": ({"WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "this is one of 2 nodes, but RANK, MASTER_PORT is not set"),
    "no address": ({"PET_NNODES": "2", "PET_NODE_RANK": "0"}, "but PET_MASTER_ADDR, PET_MASTER_PORT is not set"),
    "elastic": ({"PET_NNODES": "1:4"}, "PET_NNODES='1:4' is a range"),
    "beyond": ({**PYTORCHJOB, "PET_NODE_RANK": "2"}, "PET_NODE_RANK='2' should be 0 to 1"),
    "processes": ({**PYTORCHJOB, "PET_NPROC_PER_NODE": "many"}, "PET_NPROC_PER_NODE='many' is not a whole number"),
    "size": ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a whole number"),
    "torchrun": ({"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"}, "torchrun or accelerate launch started this"),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4: mpirun or srun started several processes"),
    "nodes": ({"SLURM_NNODES": "abc"}, "SLURM_NNODES='abc' is not a whole number"),
    "job": ({**SLURM, "SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x' is not a whole number"),
    "node": ({**SLURM, "SLURM_NODEID": "2"}, "SLURM_NODEID='2' should be 0 to 1"),
    "list": ({**SLURM, "SLURM_STEP_NODELIST": "["}, r"SLURM_STEP_NODELIST='\[' is no name or address of a host"),
    "no node": ({**SLURM, "SLURM_NODEID": ""}, "the step has 2 nodes, but SLURM_NODEID is not set: start with srun"),
    "colon": ({"PET_NNODES": ":"}, "PET_NNODES=':' is not a whole number"),
    "rank alone": ({"RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "5"}, "RANK=1 is set, but not WORLD_SIZE"),
    "local rank alone": ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is set, but not WORLD_SIZE"),
    "rank of one": ({"WORLD_SIZE": "1", "RANK": "3"}, "RANK='3' should be 0 to 0, because WORLD_SIZE=1"),
    "index": ({"JOB_COMPLETION_INDEX": "x"}, "JOB_COMPLETION_INDEX='x' is not a whole number"),
    "given": ({"DISTRAIN_NODES": "x"}, "DISTRAIN_NODES='x' is not a whole number"),
    "none given": ({"DISTRAIN_NODES": "0"}, "DISTRAIN_NODES='0' should be 1 or more"),
    "host": ({"DISTRAIN_HOST": "tcp://a:5"}, "DISTRAIN_HOST='tcp://a:5' is no name or address of a host"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_environment_that_cannot_be_used_is_refused_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    variables, message = WRONG[name]
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert cli.main(["launch", "--", "train"]) == 78
    error = capfd.readouterr().err
    assert re.search(message, error)
    assert error.startswith("distrain: error: ")
    assert len(error.splitlines()) == 1


@settings(max_examples=150, deadline=None)
@given(
    VARIABLES,
    st.builds(
        Options, st.none() | st.integers(1, 5), st.none() | st.integers(0, 5), st.none() | st.text(max_size=80),
        st.none() | st.integers(1, 65535),
    ),
    st.text(max_size=80),
)  # fmt: skip
def test_any_environment_is_a_topology_or_a_message_in_one_line(
    variables: dict[str, str], options: Options, name: str
) -> None:
    try:
        detected = detect(variables, options, lambda: name)
    except ConfigError as error:
        message = str(error)
    else:
        assert 0 <= detected.node < detected.nodes
        assert detected.nodes == 1 or 1 <= detected.port <= 65535
        return
    assert len(message.splitlines()) == 1
