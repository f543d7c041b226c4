"""The variables by which a launcher tells this process its rank, read once into a value.

`distrain launch`, torchrun and `accelerate launch` set the same variables; without them a process is alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distrain.errors import ConfigError

STATUS_FOLDER = "DISTRAIN_STATUS_FOLDER"
"""Environment variable: the launcher's folder for the status and the failures of its workers."""
STORE_SOCKET = "DISTRAIN_STORE_SOCKET"
"""Environment variable: descriptor of the socket that the launcher opened, on which rank 0 serves the store."""
LAUNCHER = "DISTRAIN_LAUNCHER"
"""Environment variable: process ID of the launcher."""
_OF_A_GROUP = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """One process among those that share the work: its rank, and their number."""

    rank: int = 0
    size: int = 1


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
    missing: tuple[str, ...] = ()

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> Environment:
        """Read the variables, `os.environ` in practice.

        Raises:
            ConfigError: a variable that should be a number is none.
        """
        world = World(_integer(variables, "RANK", 0), _integer(variables, "WORLD_SIZE", 1))
        local_size = max(_integer(variables, "LOCAL_WORLD_SIZE", 1), 1)
        folder = variables.get(STATUS_FOLDER)
        # A single process may find something else there: in Kubernetes, a Service `master` sets MASTER_PORT=tcp://…
        group = variables if world.size > 1 else {}
        return cls(
            world=world,
            local_rank=_integer(variables, "LOCAL_RANK", world.rank % local_size),
            local_world_size=local_size,
            node=_integer(variables, "GROUP_RANK", world.rank // local_size),
            master_address=group.get("MASTER_ADDR"),
            master_port=_optional_integer(group, "MASTER_PORT"),
            status_folder=Path(folder) if folder else None,
            store_socket=_optional_integer(variables, STORE_SOCKET),
            launcher=_optional_integer(variables, LAUNCHER),
            torchrun="TORCHELASTIC_RUN_ID" in variables,
            missing=tuple(name for name in _OF_A_GROUP if world.size > 1 and not variables.get(name)),
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
        return f"{self.master_address}:{self.master_port}"


def _integer(variables: Mapping[str, str], name: str, default: int) -> int:
    value = _optional_integer(variables, name)
    return default if value is None else value


def _optional_integer(variables: Mapping[str, str], name: str) -> int | None:
    text = variables.get(name)
    if not text:
        return None
    if not text.isdecimal():
        raise ConfigError(f"the environment variable {name}={text!r} is not a whole number; unset it, or correct it")
    return int(text)
