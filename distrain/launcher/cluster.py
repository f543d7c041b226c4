"""The topology of a job: its nodes, which one this is, and the address of the store.

It comes from SLURM's variables, those of a Kubernetes Indexed Job, or options.

Pure functions of the environment variables; to support another scheduler, add a function beside `_slurm`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from distrain.errors import ConfigError

LOCAL = "127.0.0.1"
_KUBERNETES_PORT = 29400


@dataclass(frozen=True)
class Topology:
    """This node among the nodes of the job.

    Attributes:
        nodes: number of nodes.
        node: index of this node, from 0.
        host: name or address of the first node, where rank 0 serves the store.
        port: port of the store; 0: any free one.
        source: what the topology was detected from, for messages.
    """

    nodes: int
    node: int
    host: str
    port: int
    source: str


@dataclass(frozen=True)
class Options:
    """The topology as given on the command line; None: to be detected."""

    nodes: int | None = None
    node: int | None = None
    host: str | None = None
    port: int | None = None


def detect(variables: Mapping[str, str], options: Options, full_name: Callable[[], str]) -> Topology:
    """Detect the topology from environment variables; options take precedence.

    Args:
        variables: environment variables.
        options: given on the command line.
        full_name: returns the name of this host with its domain.

    Raises:
        ConfigError: the variables contradict each other, or an option is missing.
    """
    if "SLURM_STEP_NODELIST" in variables and "SLURM_PROCID" in variables:
        detected = _slurm(variables)
    elif "JOB_COMPLETION_INDEX" in variables:
        detected = _kubernetes(variables, options, full_name)
    else:
        allocated = int(variables.get("SLURM_NNODES", 1))
        if allocated > 1 and options.nodes is None:
            raise ConfigError(
                f"the SLURM job has {allocated} nodes, and this is one of them: start distrain launch with srun"
            )
        detected = Topology(1, 0, LOCAL, 0, "this machine")
    nodes = options.nodes if options.nodes is not None else detected.nodes
    node = options.node if options.node is not None else detected.node
    host = options.host or detected.host
    port = options.port if options.port is not None else detected.port
    if not 0 <= node < nodes:
        raise ConfigError(f"node {node} of {nodes} (from {detected.source}): nodes are counted from 0")
    if nodes > 1 and (host == LOCAL or not port):
        raise ConfigError(
            f"{nodes} nodes: give --host (the first node's name), --port (the same on all) and --node, or start under"
            " srun or as a Kubernetes Indexed Job"
        )
    return Topology(nodes, node, host if nodes > 1 else LOCAL, port, detected.source)


def _slurm(variables: Mapping[str, str]) -> Topology:
    nodes = int(variables.get("SLURM_STEP_NUM_NODES") or variables.get("SLURM_NNODES") or 1)
    tasks = int(variables.get("SLURM_STEP_NUM_TASKS") or variables.get("SLURM_NTASKS") or nodes)
    if tasks != nodes:
        raise ConfigError(
            f"srun started {tasks} tasks on {nodes} nodes: start one task a node (--ntasks-per-node=1), and let"
            " --nproc start the processes"
        )
    job = variables.get("SLURM_JOB_ID", "0")
    port = 20000 + int(job) % 20000  # jobs that share a node get different ports
    host = LOCAL if nodes == 1 else first_host(variables["SLURM_STEP_NODELIST"])
    return Topology(nodes, int(variables.get("SLURM_NODEID", 0)), host, port if nodes > 1 else 0, f"SLURM job {job}")


def first_host(nodes: str) -> str:
    """Return the first name of a SLURM node list: `r[3-4,7]n[01-16],s1` → r3n01. Containers have no `scontrol`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else nodes


def _kubernetes(variables: Mapping[str, str], options: Options, full_name: Callable[[], str]) -> Topology:
    index = int(variables["JOB_COMPLETION_INDEX"])
    if options.nodes is None:
        raise ConfigError(
            "a Kubernetes Indexed Job does not tell its pods how many they are: give --nodes, the Job's completions"
            " (or set DISTRAIN_NODES)"
        )
    if options.nodes == 1:
        return Topology(1, index, LOCAL, 0, "a Kubernetes Indexed Job")
    # Pods of an Indexed Job are called JOB-INDEX.SERVICE…; the service is the headless one that `subdomain` names.
    name, _, domain = full_name().partition(".")
    match = re.fullmatch(rf"(.+)-{index}", name)
    if options.host is None and (match is None or not domain):
        raise ConfigError(
            f"the pod's name is {full_name()!r}, not JOB-{index}.SERVICE…: give the pod template a subdomain and a"
            " headless Service of that name, or --host (or DISTRAIN_HOST)"
        )
    host = f"{match[1]}-0.{domain}" if match else LOCAL
    return Topology(options.nodes, index, host, _KUBERNETES_PORT, "a Kubernetes Indexed Job")
