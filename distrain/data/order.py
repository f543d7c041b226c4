"""The order of training: which rank trains which sample in which step. Arithmetic only: no files, tensors or processes.

1. An epoch visits the S shards in a permutation drawn from (seed, epoch). It is cut into ROUNDS of C shards;
   the l-th shard of a round belongs to LANE l. S is a multiple of C.
2. A round takes the same number of samples, m, from each of its shards: m is the size of the smallest shard.
   Shard sizes differ by at most one, so an epoch drops at most one sample of each shard, a different one each time.
3. Inside a shard the samples are permuted by (seed, epoch, shard).
4. Row t of the epoch holds the t-th sample of every lane; position p = t·C + l.
5. Step s of the epoch trains positions [s·G, (s+1)·G), where G is the global batch size.
6. Rank r of W owns the lanes l with l mod W = r.

The samples of a step do not depend on W, and any step of any epoch can be computed without those before it.
Draws are raw outputs of the counter-based generator Philox-4x64-10 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011): numpy keeps that stream the same in all its versions, unlike `Generator.permutation`. Random bits
of augmentation are outputs of SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014): each
sample's are computed alone, so a rank draws only those of its own samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distrain.environment import World

Ints = NDArray[np.int64]
RandomBits = NDArray[np.uint64]

# The purposes of draws. The generator's key is (seed, purpose), so no two purposes share a stream.
_SHARDS, _SAMPLES, _AUGMENT, _SPLIT, _SYNTHETIC, _MIXUP, _FLIP, _CUTMIX, _MIXUP_OR_CUTMIX = range(1, 10)

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""Distance of the states of SplitMix64."""


@dataclass(frozen=True)
class Order:
    """The order of training: S shards in C lanes, m samples used of each shard, global batch size G, and a seed.

    With `alternating_flip`, each sample is mirrored in every second epoch (see `alternate_flips`).
    """

    num_shards: int
    lanes: int
    samples_per_shard: int
    global_batch_size: int
    seed: int
    alternating_flip: bool = False

    def __post_init__(self) -> None:
        if self.num_shards % self.lanes:
            raise ValueError(f"{self.lanes} lanes do not divide {self.num_shards} shards")

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole global batches in an epoch."""
        return self.num_shards * self.samples_per_shard // self.global_batch_size

    def epoch_shards(self, epoch: int) -> Ints:
        """The shard that each lane reads in each round of an epoch: int64 [rounds, lanes]."""
        return _shards_of_epoch(self.num_shards, self.seed, epoch).reshape(-1, self.lanes)

    def shard_samples(self, epoch: int, shard: int, size: int) -> Ints:
        """Indices of the samples that an epoch uses of a shard with `size` samples, in training order: int64 [m]."""
        return permutation(size, self.seed, _SAMPLES, epoch, shard)[: self.samples_per_shard]

    def owned_before(self, position: int, world: World) -> int:
        """The number of positions of an epoch, before `position`, that a rank owns.

        If a rank numbers its samples of an epoch from 0, those of step s are
        owned_before(s·G) … owned_before((s+1)·G) - 1.
        """
        row, lane = divmod(position, self.lanes)
        return row * len(self.owned_lanes(world)) + max(0, -(-(lane - world.rank) // world.size))

    def positions(self, number: int, world: World) -> tuple[Ints, Ints]:
        """Return the steps and positions in which the samples of a rank in a round are trained: int64 [n] each.

        Args:
            number: of the round, over all epochs (`rounds_per_epoch` each).
            world: the rank.

        Returns:
            The steps of the run, and the positions in their global batches, row by row and lane by lane. Samples that
            an epoch drops have steps of the next epoch; these steps do not use the round.
        """
        epoch, round_ = divmod(number, self.rounds_per_epoch)
        rows = np.arange(self.samples_per_shard) + round_ * self.samples_per_shard
        in_epoch = rows[:, None] * self.lanes + np.asarray(self.owned_lanes(world))
        steps, positions = np.divmod(in_epoch.reshape(-1), self.global_batch_size)
        return steps + epoch * self.steps_per_epoch, positions

    def random_bits(self, steps: Ints, positions: Ints, ids: Ints) -> RandomBits:
        """Random bits for the augmentation of samples, by their steps, positions and ids: uint64 [n, 2]."""
        random_bits = augmentation_bits(self.seed, steps, positions)
        if self.alternating_flip:
            alternate_flips(random_bits, self.seed, ids, steps // self.steps_per_epoch)
        return random_bits

    def owned_lanes(self, world: World) -> range:
        """The lanes that a rank owns, ascending."""
        return range(world.rank, self.lanes, world.size)

    @property
    def rounds_per_epoch(self) -> int:
        """Number of rounds that the steps of an epoch use."""
        return -(-self.steps_per_epoch * self.global_batch_size // (self.lanes * self.samples_per_shard))

    def rounds(self, step: int) -> range:
        """The rounds that a step of the run uses, numbered over all epochs (`rounds_per_epoch` each)."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        size, start = self.lanes * self.samples_per_shard, in_epoch * self.global_batch_size
        first = epoch * self.rounds_per_epoch
        return range(first + start // size, first + (start + self.global_batch_size - 1) // size + 1)

    @property
    def rounds_per_step(self) -> int:
        """Maximum number of new rounds that one step can need."""
        return -(-self.global_batch_size // (self.lanes * self.samples_per_shard))

    def begins_round(self, step: int) -> bool:
        """Whether a step of the run uses a round that no earlier step used. The answer is the same on all ranks."""
        return step == 0 or self.rounds(step).stop > self.rounds(step - 1).stop

    def local_batch_sizes(self, world_size: int) -> tuple[int, int]:
        """The smallest and largest local batch of any rank in any step. Ideal are G / W; the largest sets the speed."""
        sizes = list(self._local_batches(world_size))
        return min(int(each.min()) for each in sizes), max(int(each.max()) for each in sizes)

    def largest_local_batch(self, world: World) -> int:
        """The largest local batch of a rank in any step."""
        return max(int(sizes[world.rank]) for sizes in self._local_batches(world.size))

    def smallest_micro_batches(self, world_size: int, accumulation_steps: int) -> tuple[int, int]:
        """The smallest micro-batch of one rank, and of all ranks together, in any step; empty ones do not count."""
        one, together = self.global_batch_size, self.global_batch_size
        for parts in self._micro_batches(world_size, accumulation_steps):
            sums = parts.sum(0)
            one, together = min(one, int(parts[parts > 0].min())), min(together, int(sums[sums > 0].min()))
        return one, together

    def micro_batch_sizes(self, world_size: int, accumulation_steps: int) -> tuple[int, ...]:
        """All sizes of the micro-batches of any rank in any step, from the largest on; 0 if one can be empty."""
        sizes: set[int] = set()
        for parts in self._micro_batches(world_size, accumulation_steps):
            sizes.update(np.unique(parts).tolist())
        return tuple(sorted(sizes, reverse=True))

    def _micro_batches(self, world_size: int, accumulation_steps: int) -> Iterator[Ints]:
        """Yield the sizes of all micro-batches, int64 [W, number], of each step that differs from those before."""
        for sizes in self._local_batches(world_size):
            bounds = sizes[:, None] * np.arange(accumulation_steps + 1) // accumulation_steps
            yield np.diff(bounds, axis=1)

    def _local_batches(self, world_size: int) -> Iterator[Ints]:
        """Yield the sizes of all local batches, int64 [W], of each step that differs from those before."""
        lanes = np.arange(self.lanes)
        whole_rows, rest = divmod(self.global_batch_size, self.lanes)
        for step in range(min(self.steps_per_epoch, self.lanes)):  # sizes repeat after at most C steps
            has_one_more = (lanes - step * self.global_batch_size) % self.lanes < rest
            counts = np.bincount(lanes % world_size, whole_rows + has_one_more, minlength=world_size)
            yield counts.astype(np.int64)


def evaluation_shards(num_shards: int, lanes: int, world: World) -> list[int]:
    """The shards of a split that a rank evaluates, ascending: those of its lanes. Shard k is in lane k mod C."""
    return [shard for shard in range(num_shards) if shard % lanes % world.size == world.rank]


def augmentation_bits(seed: int, steps: Ints, positions: Ints) -> RandomBits:
    """Random bits for samples, by their steps of the run and positions in the global batch: uint64 [n, 2].

    Every step has its own SplitMix64, whose first state is a hash of the step and of a key from Philox. The bits of a
    position p are its outputs 2p and 2p + 1.
    """
    seeds = steps.astype(np.uint64)
    seeds += _philox(seed, _AUGMENT).random_raw(1)
    states = (2 * positions[:, None] + np.arange(2)).astype(np.uint64)
    states *= _GAMMA
    states += mix_bits(seeds)[:, None]
    return mix_bits(states)


def alternate_flips(random_bits: RandomBits, seed: int, ids: Ints, epochs: Ints) -> None:
    """Replace the bits that mirror samples: those mirrored in an epoch are not in the next one, and the reverse.

    A coin for each sample, from the seed and its id alone, decides whether it is mirrored in even or in odd epochs:
    "alternating flip" of Jordan, "94% on CIFAR-10 in 3.29 seconds" (arXiv 2404.00498, 2024).

    Args:
        random_bits: uint64 [n, 2]; bit 0 of the first integer mirrors (`distrain.training.augment`).
        seed: of the run.
        ids: of the samples: int64 [n].
        epochs: of the samples: int64 [n] or [1].
    """
    coins = mix_bits(ids.astype(np.uint64) + _philox(seed, _FLIP).random_raw(1)) ^ epochs.astype(np.uint64)
    random_bits[:, 0] ^= (random_bits[:, 0] ^ coins) & np.uint64(1)


def mix_bits(values: RandomBits) -> RandomBits:
    """Return the output of SplitMix64 in each state: a permutation of the 64-bit integers that mixes their bits."""
    values = values + _GAMMA
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def mixup_weight(seed: int, step: int, alpha: float) -> float:
    """The weight of each sample in a step with mixup (its partner has the rest), from Beta(alpha, alpha), alpha ≤ 1."""
    return _beta(_philox(seed, _MIXUP, step), alpha)


def cutmix_box(seed: int, step: int, alpha: float, height: int, width: int) -> tuple[int, int, int, int]:
    """The box of a step with CutMix, which each sample gets from its partner: top, left, bottom and right.

    As in Yun et al., "CutMix" (2019): its area is 1 - weight of the image's, with the weight from Beta(alpha, alpha),
    alpha ≤ 1. Its centre is anywhere in the image, so that it may be cut off at the edges.
    """
    source = _philox(seed, _CUTMIX, step)
    row, column = (int(bits) * size >> 64 for bits, size in zip(source.random_raw(2), (height, width), strict=True))
    half_side = 0.5 * math.sqrt(1 - _beta(source, alpha))
    down, right = int(half_side * height), int(half_side * width)
    return max(row - down, 0), max(column - right, 0), min(row + down, height), min(column + right, width)


def draws_cutmix(seed: int, step: int) -> bool:
    """Whether CutMix is drawn in a step, of mixup and CutMix: each with the same probability."""
    return int(_philox(seed, _MIXUP_OR_CUTMIX, step).random_raw()) >> 63 == 1


def _beta(source: np.random.Philox, alpha: float) -> float:
    """Draw from Beta(alpha, alpha), alpha ≤ 1.

    By Jöhnk's rejection method (1964) from raw bits: the result of numpy's `beta` may change with its version.
    """
    while True:  # each attempt succeeds with a probability of at least one half
        u, v = (math.log((int(bits) >> 11) + 0.5) - 53 * math.log(2) for bits in source.random_raw(2))
        x, y = u / alpha, v / alpha  # logarithms: powers of small alphas would underflow
        larger, smaller = max(x, y), min(x, y)
        if larger + math.log1p(math.exp(smaller - larger)) <= 0:
            return 1 / (1 + math.exp(min(y - x, 700.0)))


def permutation(n: int, seed: int, purpose: int, a: int = 0, b: int = 0) -> Ints:
    """A random permutation of 0 … n-1 that depends only on the arguments: int64 [n]."""
    return np.argsort(_philox(seed, purpose, a, b).random_raw(n), kind="stable")


@functools.lru_cache(maxsize=2)  # it is asked for in each round: a tenth of a second for a million shards
def _shards_of_epoch(num_shards: int, seed: int, epoch: int) -> Ints:
    shards = permutation(num_shards, seed, _SHARDS, epoch)
    shards.flags.writeable = False
    return shards


def split_permutation(n: int, seed: int, draw: int = 0) -> Ints:
    """A permutation for `prepare`, which shuffles and splits with it: int64 [n]."""
    return permutation(n, seed, _SPLIT, draw)


def generator(seed: int, a: int, b: int) -> np.random.Generator:
    """A random number generator for `prepare synthetic`."""
    return np.random.Generator(_philox(seed, _SYNTHETIC, a, b))


def _philox(seed: int, purpose: int, a: int = 0, b: int = 0) -> np.random.Philox:
    # Outputs are counted in counter[0], below a and b: no two streams of up to 2**64 outputs overlap.
    return np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=np.array([0, 0, a, b], np.uint64))
