"""The topology of a job: its nodes, which one this is, and the address of the store.

It comes from options, or from the variables of SLURM, a Kubeflow job, a Kubernetes Indexed Job, or other launchers.

Pure functions of the environment variables; to support another scheduler, add a function beside `_slurm`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from distrain.environment import TORCHRUN, check_rank, host, integer, is_host, several_processes
from distrain.errors import ConfigError
from distrain.text import printable

LOCAL = "127.0.0.1"
_KUBERNETES_PORT = 29400
_ALONE = "or give --nodes 1 for a run on this node alone"


@dataclass(frozen=True)
class Topology:
    """This node among the nodes of the job.

    Attributes:
        nodes: number of nodes.
        node: index of this node, from 0.
        host: name or address of the first node, where rank 0 serves the store.
        port: port of the store; 0: any free one.
        source: what the topology was detected from, for messages.
        processes: number of processes of each node, if the scheduler says it; else None.
        job: identity of a job that a scheduler starts again by itself (DISTRAIN_JOB); None: a person does.
    """

    nodes: int
    node: int
    host: str
    port: int
    source: str
    processes: int | None = None
    job: str | None = None


@dataclass(frozen=True)
class Options:
    """The topology as given on the command line or by DISTRAIN_NODES …; None: to be detected."""

    nodes: int | None = None
    node: int | None = None
    host: str | None = None
    port: int | None = None

    def or_from(self, variables: Mapping[str, str]) -> Options:
        """Return these options; those that are not given are taken from the environment variables DISTRAIN_NODES …

        Raises:
            ConfigError: a variable, or the option --host, has no such value.
        """
        if self.host is not None and not is_host(self.host):
            raise ConfigError(f"--host {self.host[:80]!r} is no name or address of a host (give --port separately)")
        if self.nodes == 1 and self.node is None:
            return Options(nodes=1, node=0)
        return Options(
            nodes=self.nodes if self.nodes is not None else integer(variables, "DISTRAIN_NODES", 1),
            node=self.node if self.node is not None else integer(variables, "DISTRAIN_NODE", 0),
            host=self.host if self.host is not None else host(variables, "DISTRAIN_HOST"),
            port=self.port if self.port is not None else integer(variables, "DISTRAIN_PORT", 1, 65535),
        )


def detect(variables: Mapping[str, str], options: Options, full_name: Callable[[], str]) -> Topology:
    """Return the topology: what is given by hand goes before what the environment variables say.

    Args:
        variables: environment variables.
        options: given on the command line.
        full_name: returns the name of this host with its domain.

    Raises:
        ConfigError: the variables contradict each other, or an option is missing.
    """
    given = options.or_from(variables)
    if given.nodes == 1 or None not in (given.nodes, given.node, given.host, given.port):
        detected = Topology(1, 0, LOCAL, 0, "as given")
    else:
        detected = _detect(variables, given, full_name)
    nodes = detected.nodes if given.nodes is None else given.nodes
    node = detected.node if given.node is None else given.node
    port = detected.port if given.port is None else given.port
    address = given.host or detected.host
    if node >= nodes:
        raise ConfigError(f"node {node} of {nodes} ({detected.source}): nodes are counted from 0")
    if nodes > 1 and not (port and (given.host or detected.nodes > 1)):
        raise ConfigError(
            f"{nodes} nodes: give --host (the first node's name), --port (the same on all) and --node, or start under"
            " srun, as a Kubernetes Indexed Job or as a Kubeflow job"
        )
    job = printable(variables.get("DISTRAIN_JOB", "")) or None
    return replace(detected, nodes=nodes, node=node, host=address if nodes > 1 else LOCAL, port=port, job=job)


def _detect(variables: Mapping[str, str], given: Options, full_name: Callable[[], str]) -> Topology:
    size = integer(variables, "WORLD_SIZE", 1) or 1
    if variables.get(TORCHRUN) or (size > 1 and variables.get("LOCAL_RANK")):
        raise ConfigError(
            "launch: torchrun or accelerate launch started this process already (LOCAL_RANK and WORLD_SIZE are set):"
            f" start `distrain train` there, {_ALONE}"
        )
    if variables.get("SLURM_STEP_NODELIST") and variables.get("SLURM_PROCID"):
        return _slurm(variables)
    if variables.get("PET_NNODES"):
        return _kubeflow(variables)
    if size > 1:
        return _one_of(size, variables, ("RANK",), ("MASTER_ADDR",), ("MASTER_PORT",), f"WORLD_SIZE={size}")
    check_rank(variables)
    integer(variables, "RANK", 0, size - 1, f"WORLD_SIZE={size}")
    if variables.get("JOB_COMPLETION_INDEX"):
        return _kubernetes(variables, given, full_name)
    allocated = integer(variables, "SLURM_NNODES", 0) or 1
    if allocated > 1 and given.nodes is None:
        raise ConfigError(
            f"the SLURM job has {allocated} nodes, and this is one of them: start distrain launch with srun, {_ALONE}"
        )
    started = several_processes(variables)
    if started and given.nodes is None:
        raise ConfigError(
            f"{started}: mpirun or srun started several processes, and each would launch a run: start one process on"
            f" each node, with --nodes, --node, --host and --port, {_ALONE}"
        )
    return Topology(1, 0, LOCAL, 0, "this machine")


def _slurm(variables: Mapping[str, str]) -> Topology:
    nodes = integer(variables, "SLURM_STEP_NUM_NODES", 1) or integer(variables, "SLURM_NNODES", 1) or 1
    tasks = integer(variables, "SLURM_STEP_NUM_TASKS", 1) or integer(variables, "SLURM_NTASKS", 1) or nodes
    if tasks != nodes:
        raise ConfigError(
            f"srun started {tasks} tasks on {nodes} nodes: start one task a node (--ntasks-per-node=1), and let"
            f" --nproc start the processes, {_ALONE}"
        )
    job = integer(variables, "SLURM_JOB_ID", 0) or 0
    if nodes == 1:
        return Topology(1, 0, LOCAL, 0, f"SLURM job {job}")
    node = integer(variables, "SLURM_NODEID", 0, nodes - 1, f"the step has {nodes} nodes")
    if node is None:
        raise ConfigError(f"SLURM job {job}: the step has {nodes} nodes, but SLURM_NODEID is not set: start with srun")
    port = 20000 + job % 20000  # jobs that share a node get different ports
    first = host({"SLURM_STEP_NODELIST": first_host(variables["SLURM_STEP_NODELIST"])}, "SLURM_STEP_NODELIST")
    return Topology(nodes, node, first or LOCAL, port, f"SLURM job {job}")


def first_host(nodes: str) -> str:
    """Return the first name of a SLURM node list: `r[3-4,7]n[01-16],s1` → r3n01. Containers have no `scontrol`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else nodes


def _kubeflow(variables: Mapping[str, str]) -> Topology:
    """Read torchrun's own variables, PET_…, which Kubeflow's PyTorchJob and TrainJob set in the pod of each node."""
    least, colon, most = variables["PET_NNODES"].partition(":")
    if colon and least != most:
        raise ConfigError(
            f"PET_NNODES={variables['PET_NNODES'][:40]!r} is a range, but a run has a fixed number of nodes: remove the"
            " job's elasticPolicy, or give --nodes, --node, --host and --port"
        )
    nodes = integer({"PET_NNODES": least or colon}, "PET_NNODES", 1) or 1
    per_node = variables.get("PET_NPROC_PER_NODE")
    processes = None if per_node in ("auto", "gpu", "cpu") else integer(variables, "PET_NPROC_PER_NODE", 1)
    topology = Topology(1, 0, LOCAL, 0, "a Kubeflow job")
    if nodes > 1:
        ranks, hosts, ports = (("PET_NODE_RANK", "RANK"), ("PET_MASTER_ADDR", "MASTER_ADDR"),
                               ("PET_MASTER_PORT", "MASTER_PORT"))  # fmt: skip
        topology = _one_of(nodes, variables, ranks, hosts, ports, "a Kubeflow job")
    return replace(topology, processes=processes)


def _one_of(
    nodes: int,
    variables: Mapping[str, str],
    ranks: tuple[str, ...],
    hosts: tuple[str, ...],
    ports: tuple[str, ...],
    source: str,
) -> Topology:
    """Return this node among several, from the first variable of each kind that is set.

    Raises:
        ConfigError: none of a kind is set.
    """

    def first(names: tuple[str, ...]) -> str:
        return next((name for name in names if variables.get(name)), names[0])

    rank, address, port = first(ranks), first(hosts), first(ports)
    missing = [name for name in (rank, address, port) if not variables.get(name)]
    if missing:
        raise ConfigError(
            f"{source}: this is one of {nodes} nodes, but {', '.join(missing)} is not set: give --nodes, --node, --host"
            f" and --port, {_ALONE}"
        )
    return Topology(
        nodes,
        integer(variables, rank, 0, nodes - 1, f"the job has {nodes} nodes") or 0,
        host(variables, address) or LOCAL,
        integer(variables, port, 1, 65535) or 0,
        source,
    )


def _kubernetes(variables: Mapping[str, str], given: Options, full_name: Callable[[], str]) -> Topology:
    index = integer(variables, "JOB_COMPLETION_INDEX", 0) or 0
    if given.nodes is None:
        raise ConfigError(
            "a Kubernetes Indexed Job does not tell its pods how many they are: give --nodes, the Job's completions"
            " (or set DISTRAIN_NODES); 1 for a run in each pod"
        )
    # Pods of an Indexed Job are called JOB-INDEX.SERVICE…; the service is the headless one that `subdomain` names.
    name, _, domain = full_name().partition(".")
    match = re.fullmatch(rf"(.+)-{index}", name)
    if given.host is None and (match is None or not domain):
        raise ConfigError(
            f"the pod's name is {full_name()!r}, not JOB-{index}.SERVICE…: give the pod template a subdomain and a"
            " headless Service of that name, or --host (or DISTRAIN_HOST)"
        )
    address = f"{match[1]}-0.{domain}" if match else str(given.host)
    return Topology(given.nodes, index, address, _KUBERNETES_PORT, "a Kubernetes Indexed Job")
