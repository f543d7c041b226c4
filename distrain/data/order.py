"""Which sample is trained when, and by whom: arithmetic, without files, tensors or processes.

1. An epoch visits the S shards in a permutation drawn from (seed, epoch). It is cut into ROUNDS of C shards;
   the l-th shard of a round belongs to LANE l. S is a multiple of C.
2. A round takes the same number of samples, m, from each of its shards: m is the size of the smallest shard.
   Shard sizes differ by at most one, so an epoch loses at most a sample a shard, another one in each epoch.
3. Inside a shard the samples are permuted by (seed, epoch, shard).
4. Row t of the epoch holds the t-th sample of every lane; position p = t·C + l.
5. Step s of the epoch trains positions [s·G, (s+1)·G), G being the global batch size.
6. Rank r of W owns the lanes l with l mod W = r.

The samples of a step do not depend on W, and any step of any epoch can be computed without those before it.
All draws are raw words of the counter-based generator Philox-4x64-10 (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", SC 2011): numpy promises that stream for all its versions, unlike `Generator.permutation`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distrain.environment import World

Ints = NDArray[np.int64]
RandomBits = NDArray[np.uint64]

# What a draw is for: with the seed it makes the generator's key, so that no two uses share a stream.
_SHARDS, _SAMPLES, _AUGMENT, _SPLIT, _SYNTHETIC, _MIXUP = range(1, 7)


@dataclass(frozen=True)
class Order:
    """The order of training: of S shards in C lanes, m samples used of each, global batch G, under a seed."""

    num_shards: int
    lanes: int
    samples_per_shard: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_shards % self.lanes:
            raise ValueError(f"{self.lanes} lanes do not divide {self.num_shards} shards")

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return self.num_shards * self.samples_per_shard // self.global_batch_size

    def epoch_shards(self, epoch: int) -> Ints:
        """Shard read by each lane in each round: int64 [rounds, lanes]."""
        shards = permutation(self.num_shards, self.seed, _SHARDS, epoch)
        return shards.reshape(-1, self.lanes)

    def shard_samples(self, epoch: int, shard: int, size: int) -> Ints:
        """Indices of the samples used of a shard that holds `size`, in their order: int64 [m]."""
        return permutation(size, self.seed, _SAMPLES, epoch, shard)[: self.samples_per_shard]

    def owned_before(self, position: int, world: World) -> int:
        """How many positions of an epoch below `position` a rank owns: its samples of step s are the
        owned_before(s·G) … owned_before((s+1)·G) - 1 th of its own, in order.
        """
        row, lane = divmod(position, self.lanes)
        return row * len(self.owned_lanes(world)) + max(0, -(-(lane - world.rank) // world.size))

    def places(self, step: int, world: World) -> Ints:
        """Places in the global batch of a step of an epoch that a rank owns, ascending: int64 [n]."""
        lanes = np.arange(world.rank, self.lanes, world.size)
        first = np.sort((lanes - step * self.global_batch_size) % self.lanes)
        rows = np.arange(0, self.global_batch_size, self.lanes)
        places = (rows[:, None] + first).reshape(-1)
        return places[: np.searchsorted(places, self.global_batch_size)]

    def owned_lanes(self, world: World) -> range:
        """Lanes of a rank, ascending."""
        return range(world.rank, self.lanes, world.size)

    @property
    def rounds_per_epoch(self) -> int:
        """Rounds that the steps of an epoch reach into."""
        return -(-self.steps_per_epoch * self.global_batch_size // (self.lanes * self.samples_per_shard))

    def rounds(self, step: int) -> range:
        """Rounds that a step of the run reaches into, counted over all epochs (`rounds_per_epoch` each)."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        size, start = self.lanes * self.samples_per_shard, in_epoch * self.global_batch_size
        first = epoch * self.rounds_per_epoch
        return range(first + start // size, first + (start + self.global_batch_size - 1) // size + 1)

    @property
    def rounds_per_step(self) -> int:
        """Most rounds that a step reaches into, beside the one that the step before it ended in."""
        return -(-self.global_batch_size // (self.lanes * self.samples_per_shard))

    def begins_round(self, step: int) -> bool:
        """Whether a step of the run reaches into a round that no step before it did: all ranks know it alike."""
        return step == 0 or self.rounds(step).stop > self.rounds(step - 1).stop

    def shares(self, world_size: int) -> tuple[int, int]:
        """Fewest and most samples that one rank has in one step; the ideal is G / W. The step waits for the latter."""
        lanes = np.arange(self.lanes)
        fewest, most = self.global_batch_size, 0
        for step in range(min(self.steps_per_epoch, self.lanes)):  # the shares repeat after C steps at the latest
            rounds, rest = divmod(self.global_batch_size, self.lanes)
            once_more = (lanes - step * self.global_batch_size) % self.lanes < rest
            counts = np.bincount(lanes % world_size, rounds + once_more, minlength=world_size)
            fewest, most = min(fewest, int(counts.min())), max(most, int(counts.max()))
        return fewest, most

    def partners(self, step: int, world: World) -> Ints:
        """For each of a rank's samples in a step of an epoch, in order, another one of the same lane and so of the same
        rank: int64 [n], indices among them. The sample itself where its lane has no other.
        """
        places = self.places(step, world)
        following = places + self.lanes
        return np.searchsorted(places, np.where(following < self.global_batch_size, following, places % self.lanes))


def evaluation_shards(num_shards: int, lanes: int, world: World) -> list[int]:
    """Shards of a split that a rank scores, ascending: those of its lanes, the k-th shard being in lane k mod C."""
    return [shard for shard in range(num_shards) if shard % lanes % world.size == world.rank]


def augmentation_bits(seed: int, step: int, global_batch_size: int) -> RandomBits:
    """Two random words for each sample of a global batch, by its place in it: uint64 [G, 2]."""
    return _philox(seed, _AUGMENT, step).random_raw(2 * global_batch_size).reshape(2, -1).T


def mixup_weight(seed: int, step: int, alpha: float) -> float:
    """What a sample keeps of itself in a step under mixup: drawn from Beta(alpha, alpha), 0 < alpha ≤ 1.

    By Jöhnk's rejection (1964), from words: numpy's own `beta` may change with its version.
    """
    words = _philox(seed, _MIXUP, step)
    while True:  # each try succeeds with a probability of a half or more
        u, v = (math.log((int(word) >> 11) + 0.5) - 53 * math.log(2) for word in words.random_raw(2))
        x, y = u / alpha, v / alpha  # logarithms: powers of small alphas would underflow
        larger, smaller = max(x, y), min(x, y)
        if larger + math.log1p(math.exp(smaller - larger)) <= 0:
            return 1 / (1 + math.exp(min(y - x, 700.0)))


def permutation(n: int, seed: int, purpose: int, a: int = 0, b: int = 0) -> Ints:
    """A permutation of 0 … n-1 that depends on nothing but its arguments: int64 [n]."""
    return np.argsort(_philox(seed, purpose, a, b).random_raw(n), kind="stable")


def split_permutation(n: int, seed: int, part: int = 0) -> Ints:
    """The permutation that `prepare` shuffles and splits with."""
    return permutation(n, seed, _SPLIT, part)


def generator(seed: int, a: int, b: int) -> np.random.Generator:
    """Random numbers for what `prepare synthetic` draws."""
    return np.random.Generator(_philox(seed, _SYNTHETIC, a, b))


def _philox(seed: int, purpose: int, a: int = 0, b: int = 0) -> np.random.Philox:
    # RandomBits are counted in counter[0]; a and b lie above it, so streams of 2**64 words never meet.
    return np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=np.array([0, 0, a, b], np.uint64))
