"""The order of training, for any number of shards, lanes, samples, processes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distrain.data.order import (
    Ints,
    Order,
    alternate_flips,
    augmentation_bits,
    evaluation_shards,
    mixup_weight,
    permutation,
)  # fmt: skip
from distrain.environment import World
from distrain.training.augment import mixup_partners


@st.composite
def orders(draw: st.DrawFn) -> Order:
    lanes = draw(st.integers(1, 12))
    order = Order(
        num_shards=lanes * draw(st.integers(1, 4)),
        lanes=lanes,
        samples_per_shard=draw(st.integers(1, 20)),
        global_batch_size=draw(st.integers(1, 70)),
        seed=draw(st.integers(0, 2**63 - 1)),
    )
    assume(order.steps_per_epoch > 0)
    return order


def local_batch(order: Order, step: int, world: World) -> list[int]:
    """Positions in the epoch that a rank owns in a step, from `Order.positions`."""
    of_rounds = [order.positions(number, world) for number in order.rounds(step)]
    steps, positions = (np.concatenate(each) for each in zip(*of_rounds, strict=True))
    return (positions[steps == step] + step * order.global_batch_size).tolist()


def locate(order: Order, positions: Ints) -> tuple[Ints, Ints, Ints]:
    """Round, lane and index within the shard of positions, as the module's docstring defines them."""
    row, lane = np.divmod(positions, order.lanes)
    round_, index = np.divmod(row, order.samples_per_shard)
    return round_, lane, index


def position_of(order: Order, numbers: Ints, world: World) -> Ints:
    """Positions of the samples with these numbers among all samples of a rank."""
    row, lane = np.divmod(numbers, len(order.owned_lanes(world)))
    return row * order.lanes + world.rank + lane * world.size


@given(orders(), st.data())
def test_the_local_batches_of_a_step_have_no_gap_or_overlap(order: Order, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, order.lanes))
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    local_batches = [local_batch(order, step, World(rank, size)) for rank in range(size)]
    start = step * order.global_batch_size
    assert sorted(sum(local_batches, [])) == list(range(start, start + order.global_batch_size))


@given(orders(), st.data())
def test_the_sizes_of_micro_batches_are_those_of_all_steps(order: Order, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, min(order.lanes, 5)))
    number = data.draw(st.integers(1, 4))
    sizes = set()
    for step in range(order.steps_per_epoch):
        for rank in range(size):
            samples = len(local_batch(order, step, World(rank, size)))
            bounds = [samples * index // number for index in range(number + 1)]
            sizes.update(stop - start for start, stop in itertools.pairwise(bounds))
    assert order.micro_batch_sizes(size, number) == tuple(sorted(sizes, reverse=True))


@given(orders(), st.data())
def test_rounds_are_those_of_a_step_s_positions(order: Order, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 3 * order.steps_per_epoch))
    epoch, in_epoch = divmod(step, order.steps_per_epoch)
    start = in_epoch * order.global_batch_size
    rounds = locate(order, np.arange(start, start + order.global_batch_size))[0] + epoch * order.rounds_per_epoch
    assert set(order.rounds(step)) == set(rounds.tolist())
    assert order.rounds(step).stop <= (epoch + 1) * order.rounds_per_epoch
    before = order.rounds(step - 1) if step else range(0)
    new = set(order.rounds(step)) - set(before)
    assert order.begins_round(step) == bool(new)
    assert len(new) <= order.rounds_per_step + (step % order.steps_per_epoch == 0)


@given(orders(), st.data())
def test_local_batches_are_consecutive_in_the_sequence_of_a_rank(order: Order, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, order.lanes))
    world = World(data.draw(st.integers(0, size - 1)), size)
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    every = np.arange(order.num_shards * order.samples_per_shard)
    owned = every[every % order.lanes % size == world.rank].tolist()
    start = order.owned_before(step * order.global_batch_size, world)
    stop = order.owned_before((step + 1) * order.global_batch_size, world)
    assert owned[start:stop] == local_batch(order, step, world)


@given(orders(), st.integers(0, 1000), st.data())
def test_an_epoch_uses_each_sample_at_most_once_and_all_shards_alike(
    order: Order, epoch: int, data: st.DataObject
) -> None:
    sizes = [order.samples_per_shard + data.draw(st.integers(0, 1)) for _ in range(order.num_shards)]
    shards = order.epoch_shards(epoch)
    assert sorted(shards.ravel().tolist()) == list(range(order.num_shards))
    round_, lane, index = locate(order, np.arange(order.steps_per_epoch * order.global_batch_size))
    trained = {
        (shard := int(shards[r, column]), int(order.shard_samples(epoch, shard, sizes[shard])[i]))
        for r, column, i in zip(round_, lane, index, strict=True)
    }
    assert len(trained) == order.steps_per_epoch * order.global_batch_size
    assert all(sample < sizes[shard] for shard, sample in trained)
    unused = order.num_shards * order.samples_per_shard - len(trained)
    assert unused < order.global_batch_size


@given(orders(), st.integers(0, 1000))
def test_rounds_per_epoch_reach_the_last_step_and_no_further(order: Order, epoch: int) -> None:
    last = np.array([order.steps_per_epoch * order.global_batch_size - 1])
    assert locate(order, last)[0].tolist() == [order.rounds_per_epoch - 1]


@given(orders(), st.data())
def test_local_batch_sizes_are_the_smallest_and_largest_of_all_steps(order: Order, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, order.lanes))
    every = [
        len(local_batch(order, step, World(rank, size)))
        for step in range(order.steps_per_epoch)
        for rank in range(size)
    ]
    assert order.local_batch_sizes(size) == (min(every), max(every))
    if order.lanes % size == 0 and order.global_batch_size % size == 0:
        assert set(every) == {order.global_batch_size // size}


@given(orders(), st.data())
def test_partners_are_the_same_on_any_number_of_ranks(order: Order, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, order.lanes))
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    start = step * order.global_batch_size
    positions = range(start, start + order.global_batch_size)
    lanes = [[each for each in positions if each % order.lanes == lane] for lane in range(order.lanes)]
    following = {each: lane[(index + 1) % len(lane)] for lane in lanes for index, each in enumerate(lane)}
    for rank in range(size):
        world = World(rank, size)
        local = local_batch(order, step, world)
        partners = mixup_partners(len(local), len(order.owned_lanes(world)), torch.device("cpu"))
        assert [local[index] for index in partners] == [following[each] for each in local]


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0])
def test_mixup_weights_are_drawn_from_a_beta_distribution(alpha: float) -> None:
    drawn = np.array([mixup_weight(5, step, alpha) for step in range(4000)])
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert abs(drawn.mean() - 0.5) < 0.03
    assert abs(drawn.var() - 1 / (4 * (2 * alpha + 1))) < 0.01
    assert mixup_weight(5, 3, alpha) == drawn[3]


@given(st.integers(0, 300), st.integers(0, 2**63 - 1), st.integers(0, 9), st.integers(0, 2**40))
def test_permutations_are_permutations_and_repeat(n: int, seed: int, purpose: int, a: int) -> None:
    drawn = permutation(n, seed, purpose, a)
    assert sorted(drawn.tolist()) == list(range(n))
    assert (permutation(n, seed, purpose, a) == drawn).all()


def test_epochs_shards_and_seeds_draw_differently() -> None:
    order = Order(64, 64, 100, 128, 3)
    other = Order(64, 64, 100, 128, 4)
    assert (order.epoch_shards(0) != order.epoch_shards(1)).any()
    assert (order.epoch_shards(0) != other.epoch_shards(0)).any()
    assert (order.shard_samples(0, 1, 101) != order.shard_samples(0, 2, 101)).any()
    assert (order.shard_samples(0, 1, 101) != order.shard_samples(1, 1, 101)).any()


def test_random_bits_are_even_and_independent_of_those_of_other_steps_positions_and_seeds() -> None:
    count = 20_000
    positions, zeros = np.arange(count), np.zeros(count, int)
    drawn = {
        "positions": augmentation_bits(3, np.array([5]), positions),
        "steps": augmentation_bits(3, positions, zeros),
        "next step": augmentation_bits(3, np.array([6]), positions),
        "another seed": augmentation_bits(4, np.array([5]), positions),
    }
    bits = {name: np.unpackbits(np.ascontiguousarray(each).view(np.uint8), axis=1) for name, each in drawn.items()}
    error = 5 * 0.5 / count**0.5  # of a mean of fair bits: 5 standard deviations
    for each in bits.values():
        assert (abs(each.mean(0) - 0.5) < error).all()
        assert (abs((each[1:] ^ each[:-1]).mean(0) - 0.5) < 1.01 * error).all()  # neighbours
        assert abs((each[:, :64] ^ each[:, 64:]).mean() - 0.5) < error / 8
    for other in ("next step", "another seed"):
        assert (abs((bits["positions"] ^ bits[other]).mean(0) - 0.5) < error).all()


def test_random_bits_of_a_sample_do_not_depend_on_the_others_that_are_drawn() -> None:
    steps, positions = np.array([3, 3, 2**40]), np.array([7, 70_000, 7])
    together = augmentation_bits(42, steps, positions)
    alone = [augmentation_bits(42, steps[[i]], positions[[i]])[0].tolist() for i in range(3)]
    assert together.tolist() == alone


def test_the_order_never_changes_between_versions() -> None:
    # If these numbers change, runs resume from their checkpoints with another order.
    order = Order(8, 4, 5, 4, 42)
    assert order.epoch_shards(3).tolist() == EPOCH_SHARDS
    assert order.shard_samples(3, 2, 6).tolist() == SHARD_SAMPLES
    assert augmentation_bits(42, np.array([7]), np.arange(2)).tolist() == RANDOM_BITS
    bits = np.zeros((16, 2), np.uint64)
    alternate_flips(bits, 42, np.arange(16), np.array([3]))
    assert bits[:, 0].tolist() == FLIPS
    assert not bits[:, 1].any()


EPOCH_SHARDS = [[5, 1, 2, 0], [6, 3, 4, 7]]
SHARD_SAMPLES = [1, 4, 2, 5, 0]
RANDOM_BITS = [[10026477260115595815, 6391274926087588182], [14455738899868125316, 4150067819376086940]]
FLIPS = [0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1]


@given(st.integers(1, 12), st.integers(1, 5), st.data())
def test_every_shard_is_evaluated_by_one_rank(lanes: int, rounds: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, lanes))
    owners = [evaluation_shards(lanes * rounds, lanes, World(rank, size)) for rank in range(size)]
    assert sorted(shard for owned in owners for shard in owned) == list(range(lanes * rounds))
    assert all(owned == sorted(owned) for owned in owners)


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 10**6))
def test_4096_ranks_and_65536_shards(seed: int, epoch: int) -> None:
    """All ranks together train each position of a step once, with distinct samples; tried in some steps."""
    order = Order(num_shards=65536, lanes=8192, samples_per_shard=1000, global_batch_size=30000, seed=seed)
    shards = order.epoch_shards(epoch)
    assert (np.sort(shards.ravel()) == np.arange(65536)).all()
    worlds = [World(rank, 4096) for rank in range(4096)]
    for step in (0, 1, 777, order.steps_per_epoch - 1):
        start, stop = step * order.global_batch_size, (step + 1) * order.global_batch_size
        positions = [
            position_of(order, np.arange(order.owned_before(start, world), order.owned_before(stop, world)), world)
            for world in worlds
        ]
        everything = np.concatenate(positions)
        assert (np.sort(everything) == np.arange(start, stop)).all()
        for rank in (0, 1, 4095):
            assert positions[rank].tolist() == local_batch(order, step, worlds[rank])
        round_, lane, index = locate(order, everything)
        samples = shards[round_, lane] * order.samples_per_shard + index
        assert len(np.unique(samples)) == order.global_batch_size
