"""The variables that launchers set, read into a value."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import distrain
from distrain import cli, signals
from distrain.environment import Environment, World, hide_group, host_port
from distrain.errors import ConfigError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "6",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "2",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29400",
}


def test_what_torchrun_sets() -> None:
    environment = Environment.read(TORCHRUN)
    assert environment == Environment(World(5, 6), 1, 2, 2, "node-0", 29400)
    assert environment.several_nodes
    assert not environment.is_main


def test_ranks_of_a_node_that_are_not_set() -> None:
    given = {name: value for name, value in TORCHRUN.items() if name not in ("LOCAL_RANK", "GROUP_RANK")}
    assert Environment.read(given) == Environment.read(TORCHRUN)


@pytest.mark.parametrize("size", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}])
def test_a_single_process_ignores_the_variables_of_a_kubernetes_service(size: dict[str, str]) -> None:
    environment = Environment.read({"MASTER_PORT": "tcp://10.0.0.7:80", "MASTER_SERVICE_HOST": "10.0.0.7", **size})
    assert environment == Environment()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["two", "-1", "1.0"])
def test_a_value_that_is_no_number(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='{value}' is not a whole number"):
        Environment.read({**TORCHRUN, name: value})


WRONG = {
    "rank beyond the size": ({"RANK": "6"}, "RANK='6' should be 0 to 5, because WORLD_SIZE=6"),
    "no process": ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' should be 1 or more"),
    "far too many": ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='9999999999.*…' should be 1 to"),
    "local rank": ({"LOCAL_RANK": "2"}, "LOCAL_RANK='2' should be 0 to 1, because LOCAL_WORLD_SIZE=2"),
    "local size": ({"LOCAL_WORLD_SIZE": "7"}, "LOCAL_WORLD_SIZE='7' should be 1 to 6, because WORLD_SIZE=6"),
    "no multiple": ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4: WORLD_SIZE=6 is not a multiple of it"),
    "node": ({"GROUP_RANK": "6"}, "GROUP_RANK='6' should be 0 to 5"),
    "grace": ({"DISTRAIN_GRACE_SECONDS": "-1"}, "DISTRAIN_GRACE_SECONDS='-1' is not a number of seconds"),
    "no grace": ({"DISTRAIN_GRACE_SECONDS": "nan"}, "DISTRAIN_GRACE_SECONDS='nan' is not a number of seconds"),
    "no port": ({"MASTER_PORT": "0"}, "MASTER_PORT='0' should be 1 to 65535"),
    "port": ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999' should be 1 to 65535"),
    "service": ({"MASTER_PORT": "tcp://10.0.0.7:80"}, "MASTER_PORT='tcp://10.0.0.7:80' is not a whole number"),
    "address and port": ({"MASTER_ADDR": "node-0:29400"}, "MASTER_ADDR='node-0:29400' is no name or address of a host"),
    "label": ({"MASTER_ADDR": "a" * 64}, "is no name or address"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_values_that_contradict_each_other_are_refused_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong, message = WRONG[name]
    for variable, value in {**TORCHRUN, **wrong}.items():
        monkeypatch.setenv(variable, value)
    assert cli.main(["train"]) == 78
    error = capfd.readouterr().err
    assert error.startswith(("distrain: error: the environment variable", "distrain: error: LOCAL_WORLD_SIZE=4"))
    assert re.search(message, error)
    assert len(error.splitlines()) == 1


def test_nodes_of_torchrun_may_have_different_numbers_of_processes() -> None:
    environment = Environment.read({**TORCHRUN, "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"})
    assert environment.local_world_size == 4
    assert environment.torchrun


ALONE = {
    "rank alone": ({"RANK": "1"}, "RANK=1 is set, but not WORLD_SIZE"),
    "local rank alone": ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 is set, but not WORLD_SIZE"),
    "Open MPI": ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=4: mpirun"),
    "MPICH": ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "PMI_SIZE=2: mpirun"),
    "MVAPICH": ({"MV2_COMM_WORLD_SIZE": "2"}, "MV2_COMM_WORLD_SIZE=2: mpirun"),
    "PMIx": ({"PMIX_RANK": "3"}, "PMIX_RANK=3: mpirun"),
    "srun": ({"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS=4: mpirun or srun"),
    "task of srun": ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, "SLURM_PROCID=2: mpirun or srun"),
    "step of srun": ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, "SLURM_NTASKS=4: mpirun or srun"),
    "TrainJob": ({"PET_NNODES": "2", "PET_NODE_RANK": "1"}, "PET_NNODES='2': this is one of several nodes"),
    "elastic PyTorchJob": ({"PET_NNODES": "1:4"}, "PET_NNODES='1:4': this is one of several nodes"),
    "nonsense": ({"PMI_SIZE": "two"}, "PMI_SIZE='two' is not a whole number"),
}


@pytest.mark.parametrize("name", ALONE)
def test_one_of_several_processes_that_would_train_alone_is_refused(name: str) -> None:
    given, message = ALONE[name]
    with pytest.raises(ConfigError, match=message) as caught:
        Environment.read(given)
    assert "\n" not in str(caught.value)
    assert Environment.read({**given, "DISTRAIN_LAUNCHER": "7"} if "RANK" not in message[:11] else {}) is not None


@pytest.mark.parametrize(
    "given",
    [
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_NNODES": "1"},  # the script of an sbatch job
        {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "4"},
        {"PET_NNODES": "1:1"},
        {"JOB_COMPLETION_INDEX": "3"},
    ],
)
def test_a_single_process_of_a_scheduler_trains_alone(given: dict[str, str]) -> None:
    assert Environment.read(given) == Environment()


def test_a_pod_of_a_pytorchjob_is_one_process_of_the_group_unless_it_is_to_have_more() -> None:
    pod = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "PET_NNODES": "2",
           "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "auto"}  # fmt: skip
    assert Environment.read(pod).world == World(1, 2)
    with pytest.raises(ConfigError, match="PET_NPROC_PER_NODE=4: nothing starts the other processes of this pod"):
        Environment.read({**pod, "WORLD_SIZE": "8", "PET_NPROC_PER_NODE": "4"})


def test_a_process_that_is_alone_shows_accelerate_no_group() -> None:
    variables = {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "PMI_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "4", "HOME": "/root"}
    hide_group(variables)
    assert variables == {"WORLD_SIZE": "1", "HOME": "/root"}


def test_ipv6_addresses_are_shown_in_brackets() -> None:
    assert Environment.read({**TORCHRUN, "MASTER_ADDR": "fd00::1"}).rendezvous == "[fd00::1]:29400"
    assert host_port("node-0", 1) == "node-0:1"


NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "PET_NNODES",
    "PET_NODE_RANK", "PET_NPROC_PER_NODE", "PET_MASTER_ADDR", "PET_MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_PROCID",
    "SLURM_NTASKS", "SLURM_NNODES", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS", "JOB_COMPLETION_INDEX", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE",
    "PMI_RANK", "PMIX_RANK", "DISTRAIN_NODES", "DISTRAIN_NODE", "DISTRAIN_HOST", "DISTRAIN_PORT", "DISTRAIN_LAUNCHER",
    "DISTRAIN_STORE_SOCKET", "DISTRAIN_STATUS_FOLDER", "DISTRAIN_JOB",
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(["", "0", "1", "2", "3", "4", "-1", "1:4", "2:2", "auto", "n[1-4]", "[", "::1", "a..b", "٣", "²"]),
    st.integers(-10, 10**30).map(str),
    st.text(max_size=300),
)
VARIABLES = st.dictionaries(st.sampled_from(NAMES), VALUES)


@settings(max_examples=150, deadline=None)
@given(VARIABLES)
def test_any_values_are_a_rank_of_a_group_or_a_message_in_one_line(variables: dict[str, str]) -> None:
    try:
        environment = Environment.read(variables)
    except ConfigError as error:
        message = str(error)
    else:
        assert 0 <= environment.world.rank < environment.world.size
        assert 0 <= environment.local_rank < environment.world.size
        assert environment.local_world_size <= environment.world.size
        return
    assert len(message.splitlines()) == 1
    assert len(message) < 400


@pytest.mark.parametrize("given", [{}, {"RANK": "1"}, {"RANK": "1", "MASTER_ADDR": "127.0.0.1"}])
def test_a_group_without_an_address_is_refused_at_once(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **given}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 is set, but not .*MASTER_PORT: start with distrain launch"):
        distrain.train({"run": {"dir": str(tmp_path / "run")}})
    assert signals.requested() is None
