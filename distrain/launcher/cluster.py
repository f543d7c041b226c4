"""Which node this is, of how many, and where they meet: from SLURM, a Kubernetes Indexed Job, or this machine alone.

Pure: the host's full name, which is asked of the outside, is passed in.
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
    """`host` and `port`: where rank 0 serves the store; port 0: any free one."""

    nodes: int
    node: int
    host: str
    port: int
    source: str


@dataclass(frozen=True)
class Asked:
    """What the user gave by hand; None where it is to be worked out."""

    nodes: int | None = None
    node: int | None = None
    host: str | None = None
    port: int | None = None


def work_out(environ: Mapping[str, str], asked: Asked, full_name: Callable[[], str]) -> Topology:
    """The topology that an environment describes; what was asked for by hand goes first.

    Args:
        environ: environment variables.
        asked: given by hand.
        full_name: this host's name with its domain.

    Raises:
        ConfigError: it contradicts itself, or something has to be given by hand.
    """
    if "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ:
        found = _slurm(environ)
    elif "JOB_COMPLETION_INDEX" in environ:
        found = _kubernetes(environ, asked, full_name)
    else:
        allocated = int(environ.get("SLURM_NNODES", 1))
        if allocated > 1 and asked.nodes is None:
            raise ConfigError(
                f"the SLURM job has {allocated} nodes, this is one of them: start distrain launch by srun"
            )
        found = Topology(1, 0, LOCAL, 0, "this machine")
    nodes = asked.nodes if asked.nodes is not None else found.nodes
    node = asked.node if asked.node is not None else found.node
    host = asked.host or found.host
    port = asked.port if asked.port is not None else found.port
    if not 0 <= node < nodes:
        raise ConfigError(f"node {node} of {nodes} nodes (from {found.source}): nodes are counted from 0")
    if nodes > 1 and (host == LOCAL or not port):
        raise ConfigError(
            f"{nodes} nodes: give --host (the first node's name), --port (the same on all) and --node, or start under"
            " srun or as a Kubernetes Indexed Job"
        )
    return Topology(nodes, node, host if nodes > 1 else LOCAL, port, found.source)


def _slurm(environ: Mapping[str, str]) -> Topology:
    nodes = int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES") or 1)
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or nodes)
    if tasks != nodes:
        raise ConfigError(
            f"srun started {tasks} tasks on {nodes} nodes: start one task a node (--ntasks-per-node=1), and let"
            " --nproc start the processes"
        )
    job = environ.get("SLURM_JOB_ID", "0")
    port = 20000 + int(job) % 20000  # jobs that share a node do not meet
    host = LOCAL if nodes == 1 else first_host(environ["SLURM_STEP_NODELIST"])
    return Topology(nodes, int(environ.get("SLURM_NODEID", 0)), host, port if nodes > 1 else 0, f"SLURM job {job}")


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: `r[3-4,7]n[01-16],s1` → r3n01. `scontrol` is in no container image."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else nodes


def _kubernetes(environ: Mapping[str, str], asked: Asked, full_name: Callable[[], str]) -> Topology:
    index = int(environ["JOB_COMPLETION_INDEX"])
    if asked.nodes is None:
        raise ConfigError(
            "a Kubernetes Indexed Job does not tell its pods how many they are: give --nodes, the Job's completions"
            " (or set DISTRAIN_NODES)"
        )
    if asked.nodes == 1:
        return Topology(1, index, LOCAL, 0, "a Kubernetes Indexed Job")
    # Pods of an Indexed Job are called JOB-INDEX.SERVICE…; the service is the headless one that `subdomain` names.
    name, _, domain = full_name().partition(".")
    match = re.fullmatch(rf"(.+)-{index}", name)
    if asked.host is None and (match is None or not domain):
        raise ConfigError(
            f"the pod's name is {full_name()!r}, not JOB-{index}.SERVICE…: give the pod template a subdomain and a"
            " headless Service of that name, or --host (or DISTRAIN_HOST)"
        )
    host = f"{match[1]}-0.{domain}" if match else LOCAL
    return Topology(asked.nodes, index, host, _KUBERNETES_PORT, "a Kubernetes Indexed Job")
