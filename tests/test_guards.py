"""The table of faults and guards fits the code: each guard is marked there, and can be removed."""

from __future__ import annotations

import ast
import builtins

import guards
import markers
import pytest

REPO = guards.REPO


@pytest.fixture(scope="module")
def marked() -> dict[str, markers.Marked]:
    return markers.find(REPO)  # fails for a marker that stands twice, or at no statement


def test_every_marker_guards_against_a_fault(marked: dict[str, markers.Marked]) -> None:
    assert set(marked) == {fault.marker for fault in guards.FAULTS}


@pytest.mark.parametrize("fault", guards.FAULTS, ids=lambda fault: fault.name)
def test_a_guard_can_be_removed(fault: guards.Fault, marked: dict[str, markers.Marked]) -> None:
    guard = marked[fault.marker]
    before, after = ast.parse(guard.text), ast.parse(fault.removal.apply(guard))
    compile(after, guard.file, "exec")
    assert ast.dump(before) != ast.dump(after)
    # A name that was changed in the code alone would let the test fail for another reason.
    known = identifiers(before) | set(dir(builtins))
    assert identifiers(ast.parse(fault.removal.text)) <= known


def identifiers(tree: ast.AST) -> set[str]:
    """Names, parameters, and attributes of `self`."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return names | {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "self"}


@pytest.mark.parametrize("fault", guards.FAULTS, ids=lambda fault: fault.name)
def test_the_test_of_a_fault_exists(fault: guards.Fault, marked: dict[str, markers.Marked]) -> None:
    assert guards.digest(fault, marked[fault.marker])


def test_the_innermost_statement_is_marked(tmp_path) -> None:
    package = tmp_path / "distrain"
    package.mkdir()
    (package / "module.py").write_text(
        "def f(x):\n    if x == '×':  # guard: outer\n        y = max(\n            x,\n        )  # guard: inner\n"
    )
    marked = markers.find(tmp_path)
    assert marked["inner"].source.startswith("y = max(")
    assert markers.NEVER.apply(marked["outer"]).splitlines()[1] == "    if False:  # guard: outer"
    replaced = markers.replace("y = 1\nz = 2").apply(marked["inner"])
    assert replaced.splitlines()[2:] == ["        y = 1", "        z = 2  # guard: inner"]


def test_a_marker_stands_once(tmp_path) -> None:
    package = tmp_path / "distrain"
    package.mkdir()
    (package / "module.py").write_text("x = 1  # guard: same\ny = 2  # guard: same\n")
    with pytest.raises(AssertionError, match="the marker same is in"):
        markers.find(tmp_path)
