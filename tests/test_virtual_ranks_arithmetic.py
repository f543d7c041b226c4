"""The tree in which gradients of virtual ranks are added, and their exchange, as pure code: no processes."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distrain.config import from_tree
from distrain.distributed.collectives import Collectives
from distrain.distributed.compilation import Compilation
from distrain.distributed.gradient_tree import Node, TreeSum, subtrees
from distrain.distributed.virtual_ranks import Division, VirtualRanks, complete, outgoing
from distrain.distributed.watchdog import Watchdog
from distrain.environment import Environment, World
from distrain.training import setup


def spans(virtual_ranks: int, size: int) -> list[range]:
    by_process = [World(rank, size).virtual_ranks(virtual_ranks) for rank in range(size)]
    return [range(of_rank[0].rank, of_rank[-1].rank + 1) for of_rank in by_process]


def local(span: range, virtual_ranks: int) -> list[tuple[Node, str]]:
    """The subtotals of one process, as text that shows the order of additions."""
    tree = TreeSum[str](virtual_ranks, "({}+{})".format)
    for leaf in span:
        tree.push(Node(leaf, 1), str(leaf))
    return tree.take()


def total(virtual_ranks: int, size: int) -> str:
    tree = TreeSum[str](virtual_ranks, "({}+{})".format)
    for span in spans(virtual_ranks, size):
        for node, value in local(span, virtual_ranks):
            tree.push(node, value)
    [(root, value)] = tree.take()
    assert root.first == 0
    assert root.width // 2 < virtual_ranks <= root.width
    return value


def reference(first: int, width: int, leaves: int) -> str:
    """The tree as it is defined."""
    if first >= leaves:
        return ""
    if width == 1:
        return str(first)
    left, right = (reference(first + half, width // 2, leaves) for half in (0, width // 2))
    return f"({left}+{right})" if right else left


@pytest.mark.parametrize("virtual_ranks", range(1, 65))
def test_the_order_of_additions_depends_on_the_number_of_virtual_ranks_alone(virtual_ranks: int) -> None:
    expected = reference(0, 1 << (virtual_ranks - 1).bit_length(), virtual_ranks)
    for size in range(1, virtual_ranks + 1):
        assert total(virtual_ranks, size) == expected


@given(st.integers(1, 4096).flatmap(lambda v: st.tuples(st.just(v), st.integers(1, v))))
def test_every_virtual_rank_belongs_to_one_process_and_counts_once(numbers: tuple[int, int]) -> None:
    virtual_ranks, size = numbers
    ranges = spans(virtual_ranks, size)
    assert [leaf for span in ranges for leaf in span] == list(range(virtual_ranks))
    assert {len(span) for span in ranges} <= {virtual_ranks // size, -(-virtual_ranks // size)}
    tree = TreeSum[int](virtual_ranks, int.__add__)
    for span in ranges:
        subtotals = TreeSum[int](virtual_ranks, int.__add__)
        for leaf in span:
            subtotals.push(Node(leaf, 1), 2**leaf)  # the sum tells which leaves are in it, and how often
        nodes = subtotals.take()
        assert [node for node, _ in nodes] == subtrees(span, virtual_ranks)
        assert len(nodes) <= 2 * max(1, len(span).bit_length())
        assert all(one.first + one.width == two.first for (one, _), (two, _) in pairwise(nodes))
        for node, value in nodes:
            tree.push(node, value)
    [(_, value)] = tree.take()
    assert value == 2**virtual_ranks - 1


@given(st.integers(1, 24).flatmap(lambda v: st.tuples(st.just(v), st.integers(1, v))), st.integers(1, 40), st.randoms())
def test_the_exchange_gives_the_same_bits_as_one_process(numbers: tuple[int, int], part: int, random: object) -> None:
    virtual_ranks, size = numbers
    generator = torch.Generator().manual_seed(random.randint(0, 2**31))  # type: ignore[attr-defined]
    leaves = (
        torch.randn(virtual_ranks, size * part, generator=generator) * torch.logspace(-6, 6, virtual_ranks)[:, None]
    )
    leaves[leaves.abs() < 1e-5] = -0.0

    def subtotals(span: range) -> list[torch.Tensor]:
        tree = TreeSum[torch.Tensor](virtual_ranks, torch.add)
        for leaf in span:
            tree.push(Node(leaf, 1), leaves[leaf])
        return [value for _, value in tree.take()]

    ranges = spans(virtual_ranks, size)
    nodes = [subtrees(span, virtual_ranks) for span in ranges]
    sent = [outgoing(subtotals(span), size) for span in ranges]
    roots = []
    for receiver in range(size):  # what all_to_all_single delivers
        parcels = [
            each.view(size, len(of_rank), part)[receiver].flatten() for each, of_rank in zip(sent, nodes, strict=True)
        ]
        roots.append(complete(torch.cat(parcels), nodes, virtual_ranks))
    [expected] = subtotals(range(virtual_ranks))
    assert torch.cat(roots).view(torch.int32).tolist() == expected.view(torch.int32).tolist()


def test_the_scaler_of_fp16_works_on_the_complete_gradient(tmp_path: Path) -> None:
    """An infinite loss of one virtual rank skips the whole step and halves the scale; all others are unscaled once."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    accelerator = SimpleNamespace(scaler=scaler, backward=lambda loss: scaler.scale(loss).backward())
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    alone = copy.deepcopy(model)
    watchdog = Watchdog({}, tmp_path, Environment())
    division = Division(World(), 4, 20)
    distributed = VirtualRanks(
        model, accelerator, Collectives(World(), None, watchdog, None), Compilation("off", (2,)), division
    )
    distributed.forward(torch.ones(5, 3)).sum().backward()
    distributed.observe()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = torch.randn(3, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    for step, batch in enumerate(batches):
        model.zero_grad()
        before = {name: value.clone() for name, value in model.named_parameters()}
        for rank, inputs in zip(World().virtual_ranks(4), batch, strict=True):
            with distributed.virtual_rank(rank):
                loss = distributed.forward(inputs).square().sum()
                overflow = float("inf") if step == 1 and rank.rank == 2 else 1.0
                distributed.backward(loss * distributed.loss_scale * overflow)
        distributed.exchange()
        scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(value, before[name]) for name, value in model.named_parameters())
        assert unchanged == (step == 1)
        if step == 0:
            losses = [alone(inputs).square().sum() / 20 for inputs in batch]  # ghost BatchNorm: each for itself
            torch.stack(losses).sum().backward()
            for trained, reference in zip(model.parameters(), alone.parameters(), strict=True):
                assert torch.allclose(trained, reference - 0.1 * reference.grad, atol=1e-6)
    watchdog.close()
    assert scaler.get_scale() == 2.0**9
    assert int(model[1].num_batches_tracked) == 3


@pytest.mark.parametrize(
    ("train", "warnings"),
    [
        ({}, []),
        ({"optimizer": "muon"}, ["the weights of unlike ones drift apart: rank 1 has GPU B, on rank 0 A"]),
        ({"virtual_ranks": 2}, ["depend on which process computes what: rank 1 has GPU B, on rank 0 A"]),
    ],
)
def test_unlike_processes_are_named_where_they_decide_what_is_trained(
    train: dict[str, Any], warnings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    facts = [{"GPU": "A"}, {"GPU": "B"}]  # two machines, as one process sees them
    collectives = SimpleNamespace(from_all=lambda _: facts)
    runtime: Any = SimpleNamespace(collectives=collectives, what_decides_bits=facts[0], is_main=True)
    setup._compare_numerics(from_tree({"train": train}), runtime)
    assert len(caplog.messages) == len(warnings)
    assert all(text in message for text, message in zip(warnings, caplog.messages, strict=True))
