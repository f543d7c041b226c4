"""The variables that launchers set, read into a value."""

from __future__ import annotations

from pathlib import Path

import pytest

import distrain
from distrain import signals
from distrain.environment import Environment, World
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
