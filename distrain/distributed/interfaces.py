"""Network interfaces: the one for gloo, and whether those that variables name exist."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Mapping, Sequence

import psutil

from distrain.errors import ConfigError

GLOO = "GLOO_SOCKET_IFNAME"
"""Environment variable: the interfaces that gloo uses, by their exact names, with commas."""
NCCL = "NCCL_SOCKET_IFNAME"
"""Environment variable: prefixes of the interfaces that NCCL may use; `=` before the list: exact names; `^`: others."""


def addresses() -> dict[str, list[str]]:
    """Return the IP addresses of this host by interface; only of interfaces that have one."""
    families = (socket.AF_INET, socket.AF_INET6)
    by_interface = {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }
    return {name: each for name, each in by_interface.items() if each}


def check(variables: Mapping[str, str], backend: str, remote: str | None, here: Mapping[str, Sequence[str]]) -> None:
    """Check the interfaces that GLOO_SOCKET_IFNAME and, with NCCL, NCCL_SOCKET_IFNAME name.

    Args:
        variables: environment variables.
        backend: `gloo` or `nccl`; beside NCCL, gloo carries the control messages.
        remote: address of the first node, if there are several nodes.
        here: addresses of this host, by interface.

    Raises:
        ConfigError: there is no such interface, or it leads to this host only.
    """
    gloo, nccl = variables.get(GLOO, ""), variables.get(NCCL, "")
    names = gloo.split(",") if gloo else []
    for name in names:
        if name not in here:
            raise ConfigError(f"{GLOO}={gloo}: this host has no interface {name!r} with an address; {_cure(here)}")
    if remote is not None and not _is_loopback(remote):
        for name in names:
            if all(_is_loopback(address) for address in here[name]):
                raise ConfigError(f"{GLOO}={gloo}: {name} does not lead to the other nodes; {_cure(here)}")
    if backend == "nccl" and nccl and not matching(nccl, list(here)):
        raise ConfigError(f"{NCCL}={nccl}: no interface of this host matches; {_cure(here)}")


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the interfaces that a value of NCCL_SOCKET_IFNAME allows."""
    excludes, exact = pattern.startswith("^"), pattern.lstrip("^").startswith("=")
    parts = [part for part in pattern.lstrip("^=").split(",") if part]

    def named(name: str) -> bool:
        return any(name == part if exact else name.startswith(part) for part in parts)

    return [name for name in names if named(name) != excludes]


def towards(host: str, port: int) -> str | None:
    """Return the network interface towards the first node, for gloo.

    Gloo would use the address of this host's name, which is a loopback address where /etc/hosts says so.
    """
    interfaces = {
        entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries if name != "lo"
    }
    with contextlib.suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # sends nothing
                # On the first node itself this is the loopback, but the address is one of its interfaces'.
                for local in (str(address[0]), probe.getsockname()[0]):
                    if local in interfaces:
                        return interfaces[local]
    # /etc/hosts may map the first node's name to a loopback address, which no other node can reach.
    candidates = {name for address, name in interfaces.items() if address.count(".") == 3}
    return candidates.pop() if len(candidates) == 1 else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(host) if ":" not in host else host).is_loopback
    except (OSError, ValueError):
        return False


def _cure(here: Mapping[str, Sequence[str]]) -> str:
    listed = ", ".join(f"{name} ({each[0]})" for name, each in sorted(here.items()))
    return f"there are {listed}; correct the variable, or unset it"
