"""The variables by which a launcher tells this process its rank, read once into a value.

`distrain launch`, torchrun and `accelerate launch` set the same variables; without them a process is alone. A program
that starts several processes with other variables (mpirun, srun, a Kubeflow job) is detected: each would train alone.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from distrain.errors import ConfigError

STATUS_FOLDER = "DISTRAIN_STATUS_FOLDER"
"""Environment variable: the launcher's folder for the status and the failures of its workers."""
STORE_SOCKET = "DISTRAIN_STORE_SOCKET"
"""Environment variable: descriptor of the socket that the launcher opened, on which rank 0 serves the store."""
LAUNCHERS = "distrain/launchers"
"""Key in the store at which launchers meet; the store of the worker processes has none."""
LAUNCHER = "DISTRAIN_LAUNCHER"
"""Environment variable: process ID of the launcher."""
COMMAND = "DISTRAIN_COMMAND"
"""Environment variable: the launcher's command, without secrets, for the record of the attempt."""
TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Environment variable that torchrun sets in the processes that it starts."""
GRACE = "DISTRAIN_GRACE_SECONDS"
"""Environment variable: seconds after a stop request until the launcher kills its workers (`--grace`)."""
IN_A_GROUP = ("train", "evaluate", "doctor")
"""Commands whose process may be one of a group. The others, `launch` included, ignore the variables of a group."""

_OF_A_GROUP = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "PMIX_RANK")
"""Variables of Open MPI, MPICH, Intel MPI, MVAPICH and PMIx."""
_LARGEST = 10**9


@dataclass(frozen=True)
class World:
    """One process among those that share the work: its rank, and their number."""

    rank: int = 0
    size: int = 1

    def virtual_ranks(self, number: int | None) -> tuple[World, ...]:
        """Return the virtual ranks that this process trains, of a `number` of them; None: one for each process.

        Of V virtual ranks, process r of W has those from r·V/W to (r + 1)·V/W, rounded down: at least one for W ≤ V.
        """
        if number is None:
            return (self,)
        first, stop = (rank * number // self.size for rank in (self.rank, self.rank + 1))
        return tuple(World(rank, number) for rank in range(first, stop))


@dataclass(frozen=True)
class Environment:
    """The rank of this process, its node, its launcher and the address of the store.

    Attributes:
        world: rank and number of the processes that the launcher started (RANK, WORLD_SIZE).
        local_rank: rank among the processes of this node (LOCAL_RANK).
        local_world_size: number of processes on this node (LOCAL_WORLD_SIZE).
        node: index of this node (GROUP_RANK).
        master_address: host on which rank 0 serves the store (MASTER_ADDR); None without a launcher.
        master_port: port of the store there (MASTER_PORT).
        status_folder: where `distrain launch` reads status and failures; None under other launchers.
        store_socket: descriptor of the open socket for the store; None where rank 0 opens one itself.
        launcher: process ID of `distrain launch`; None under other launchers.
        torchrun: whether torchrun's agent is the parent.
        grace_seconds: seconds after a stop request until `distrain launch` kills this process; None: as configured.
        missing: variables that a group of several processes needs, and that are not set.
    """

    world: World = World()
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    master_address: str | None = None
    master_port: int | None = None
    status_folder: Path | None = None
    store_socket: int | None = None
    launcher: int | None = None
    torchrun: bool = False
    grace_seconds: float | None = None
    missing: tuple[str, ...] = ()

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> Environment:
        """Read the variables, `os.environ` in practice.

        Raises:
            ConfigError: a variable is none of the numbers that it can be, or this is one of several processes that were
                not started as a group.
        """
        launcher = integer(variables, LAUNCHER, 1)
        if launcher is None and not variables.get("WORLD_SIZE"):
            _check_alone(variables)
        size = integer(variables, "WORLD_SIZE", 1) or 1
        if launcher is None and size > 1 and not variables.get("LOCAL_RANK"):
            _check_one_per_node(variables)
        rank = integer(variables, "RANK", 0, size - 1, f"WORLD_SIZE={size}") or 0
        local_size = integer(variables, "LOCAL_WORLD_SIZE", 1, size, f"WORLD_SIZE={size}")
        limit = size if local_size is None else local_size
        cause = f"WORLD_SIZE={size}" if local_size is None else f"LOCAL_WORLD_SIZE={local_size}"
        local_rank = integer(variables, "LOCAL_RANK", 0, limit - 1, cause)
        local_size = local_size or 1
        torchrun = TORCHRUN in variables
        if size % local_size and not torchrun:  # torchrun's nodes may have different numbers of processes
            raise ConfigError(
                f"LOCAL_WORLD_SIZE={local_size}: WORLD_SIZE={size} is not a multiple of it; give every node the same"
                " number of processes"
            )
        node = integer(variables, "GROUP_RANK", 0, size - 1, f"WORLD_SIZE={size}")
        # A single process may find something else there: in Kubernetes, a Service `master` sets MASTER_PORT=tcp://…
        group = variables if size > 1 else {}
        folder = variables.get(STATUS_FOLDER)
        return cls(
            world=World(rank, size),
            local_rank=rank % local_size if local_rank is None else local_rank,
            local_world_size=local_size,
            node=rank // local_size if node is None else node,
            master_address=host(group, "MASTER_ADDR"),
            master_port=integer(group, "MASTER_PORT", 1, 65535),
            status_folder=Path(folder) if folder else None,
            store_socket=integer(variables, STORE_SOCKET, 0),
            launcher=launcher,
            torchrun=torchrun,
            grace_seconds=_seconds(variables, GRACE),
            missing=tuple(name for name in _OF_A_GROUP if not group.get(name)) if group else (),
        )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the run's folder and speaks to the user."""
        return self.world.rank == 0

    @property
    def several_nodes(self) -> bool:
        """Whether there are processes on other nodes."""
        return self.world.size != self.local_world_size

    @property
    def rendezvous(self) -> str:
        """Address of the store, for messages."""
        return host_port(str(self.master_address), self.master_port or 0)


def host_port(address: str, port: int) -> str:
    """Format a host and a port; an IPv6 address is put in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def integer(
    variables: Mapping[str, str], name: str, low: int, high: int = _LARGEST, because: str | None = None
) -> int | None:
    """Return the value of an environment variable that is a whole number; None if it is not set or empty.

    Args:
        variables: environment variables.
        name: name of the variable.
        low: least number that it may be.
        high: greatest number that it may be.
        because: what sets this limit, for the message.

    Raises:
        ConfigError: it is no such number.
    """
    text = variables.get(name)
    if not text:
        return None
    if not re.fullmatch(r"[0-9]+", text):
        raise ConfigError(_wrong(name, text, "is not a whole number"))
    value = int(text[:20])  # int() refuses thousands of digits
    if not low <= value <= high:
        limits = f"{low} or more" if value < low and high == _LARGEST else f"{low} to {high}"
        raise ConfigError(_wrong(name, text, f"should be {limits}{f', because {because}' if because else ''}"))
    return value


def _seconds(variables: Mapping[str, str], name: str) -> float | None:
    """Return the value of an environment variable that is a time in seconds; None if it is not set or empty.

    Raises:
        ConfigError: it is no such number.
    """
    text = variables.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise ConfigError(_wrong(name, text, "is not a number of seconds"))
    return value


def host(variables: Mapping[str, str], name: str) -> str | None:
    """Return the value of an environment variable that is a host's name or address; None if it is not set or empty.

    Raises:
        ConfigError: it is neither.
    """
    text = variables.get(name)
    if not text:
        return None
    if not is_host(text):
        raise ConfigError(_wrong(name, text, "is no name or address of a host (give the port separately)"))
    return text


def is_host(text: str) -> bool:
    """Return whether a text can be the name or the address of a host."""
    try:
        if ":" in text:
            return ipaddress.ip_address(text).version == 6
        return bool(re.fullmatch(r"[\w.-]+", text) and text.encode("idna"))  # as it is sent to a name server
    except ValueError:
        return False


def several_processes(variables: Mapping[str, str]) -> str | None:
    """Return the variable, as `NAME=VALUE`, by which MPI or srun says that this is one of several processes, or None.

    The script of an sbatch job is a single process, whatever number of tasks the job has.

    Raises:
        ConfigError: a variable is no number.
    """
    in_step = variables.get("SLURM_STEP_ID") or variables.get("SLURM_STEP_NODELIST")
    tasks = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if in_step and variables.get(name)), None)
    for name in (*_SIZES, *filter(None, [tasks])):
        if (integer(variables, name, 0) or 0) > 1:
            return f"{name}={variables[name]}"
    for name in (*_RANKS, "SLURM_PROCID"):
        if (integer(variables, name, 0) or 0) > 0:
            return f"{name}={variables[name]}"
    return None


def check_rank(variables: Mapping[str, str]) -> None:
    """Check that a process has no rank among several, if their number is not known.

    Raises:
        ConfigError: it has one, and would train alone.
    """
    for name in ("RANK", "LOCAL_RANK"):
        if not variables.get("WORLD_SIZE") and integer(variables, name, 0):
            raise ConfigError(
                f"{name}={variables[name]} is set, but not WORLD_SIZE, the number of processes: set it, or unset {name}"
            )


def hide_group(variables: MutableMapping[str, str]) -> None:
    """Remove the variables for which accelerate would start a group, in a process that is alone."""
    for name in ("LOCAL_RANK", *_SIZES):
        variables.pop(name, None)


def _check_alone(variables: Mapping[str, str]) -> None:
    """Check that this process, which no launcher started, is alone.

    Raises:
        ConfigError: several were started, and each would train alone.
    """
    check_rank(variables)
    started = several_processes(variables)
    if started:
        raise ConfigError(
            f"{started}: mpirun or srun started several processes, and each would train alone: start one on each node,"
            " `distrain launch --nproc N -- …`, which starts the others (with --nodes 1 for a run of its own each)"
        )
    nodes = variables.get("PET_NNODES", "")
    if nodes and set(nodes.split(":")) != {"1"}:  # a range has a colon
        raise ConfigError(
            f"PET_NNODES={nodes[:40]!r}: this is one of several nodes, and each would train alone: start with"
            " `distrain launch -- …`, or unset PET_NNODES"
        )


def _check_one_per_node(variables: Mapping[str, str]) -> None:
    """Check that a Kubeflow job, which starts one process in each pod, is not to have more.

    Raises:
        ConfigError: the others would be missing, because nothing starts them.
    """
    per_node = variables.get("PET_NPROC_PER_NODE", "")
    if per_node.isdecimal() and per_node != "1":
        raise ConfigError(
            f"PET_NPROC_PER_NODE={per_node[:40]}: nothing starts the other processes of this pod: start with"
            " `distrain launch -- …`"
        )


def _wrong(name: str, text: str, problem: str) -> str:
    shown = text if len(text) <= 40 else f"{text[:40]}…"
    return f"the environment variable {name}={shown!r} {problem}; unset it, or correct it"
