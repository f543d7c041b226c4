"""Virtual ranks for training loops of other programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrain.api.group import in_group, world_of
from distrain.data.rounds import Batch
from distrain.distributed.numerics import layer_seed, seed_all, set_deterministic
from distrain.distributed.virtual_ranks import Division, TreeExchange
from distrain.environment import World
from distrain.errors import ConfigError
from distrain.models.batch_norm import local_batch_norm
from distrain.text import plural


class VirtualRanks:
    """A model whose gradients have the same bits on any number of processes, from 1 to the number of virtual ranks.

    It replaces DDP. A step of your loop:

        for batch in model.in_step(step, batches):
            loss = F.cross_entropy(model(normalize(batch.images)), batch.labels, reduction="sum")
            (loss / global_batch_size).backward()
        optimizer.step()
        optimizer.zero_grad()

    All processes begin with the weights and buffers of rank 0. For this process, it turns deterministic algorithms on
    and sets torch's number of threads. BatchNorm uses the statistics of a virtual rank's samples; its running
    statistics are the mean over all virtual ranks. Gradients must not be accumulated over several steps.

    Args:
        module: the model, on its device and in training mode. It maps [n, …] to one tensor. Its SyncBatchNorm layers
            become local ones.
        number: of virtual ranks, as `distrain.batches` has it.
        global_batch_size: samples of a step, over all virtual ranks.
        example: two or more inputs of the model, on its device; they are used to see which buffers a pass changes.
        seed: of the layers that draw random numbers, such as dropout.
        threads: number of threads of torch on the CPU, which decides the last bits too.

    Raises:
        ConfigError: there are more processes than virtual ranks, the process group is missing, or the model cannot be
            trained so.
    """

    def __init__(
        self,
        module: nn.Module,
        number: int,
        global_batch_size: int,
        example: Tensor,
        *,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        world = _world(number)
        self._module, self._seed, self._device = local_batch_norm(module), seed, example.device
        self._ranks = world.virtual_ranks(number)
        torch.set_num_threads(threads)
        set_deterministic(True)
        if world.size > 1:
            for value in (*module.parameters(), *module.buffers()):
                dist.broadcast(value.detach(), src=0)
        self._tree = TreeExchange(self._module, Division(world, number, global_batch_size))
        self._observe(example)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Run a forward pass, inside the loop over `in_step`."""
        return self._tree.forward(self._module, inputs)

    def in_step(self, step: int, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Yield the batches of this process's virtual ranks; after the last one, exchange the gradients.

        Before each batch all random generators are seeded, by the seed, the step and the virtual rank. A batch without
        samples is not yielded. After the loop, the gradient of each parameter is the sum over all virtual ranks. All
        processes must finish the loop.

        Args:
            step: of the run.
            batches: one for each virtual rank of this process, as `distrain.batches` returns them.

        Raises:
            ConfigError: there are more or fewer of them.
        """
        if isinstance(batches, Batch) or len(batches) != len(self._ranks):
            raise ConfigError(
                f"batches: should be a list of {len(self._ranks)}, one for each virtual rank of this process; "
                "give distrain.batches the virtual_ranks that VirtualRanks has"
            )
        for rank, batch in zip(self._ranks, batches, strict=True):
            seed_all(self._device, layer_seed(self._seed, step, rank.rank))
            self._tree.begin_rank()
            if len(batch.labels):
                yield batch
            self._tree.end_rank(rank.rank)
        self._tree.exchange()

    def _observe(self, example: Tensor) -> None:
        """Run passes whose gradients are dropped; the model and torch's generators stay as they are."""
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            (self(example).sum() * 0).backward()
            self._tree.observe()
            self._tree.check_repeatable(self, example, lambda: seed_all(self._device, self._seed))
        self._module.zero_grad()


def _world(virtual_ranks: int) -> World:
    """Return this process among those of the default process group.

    Raises:
        ConfigError: there is no group, but a launcher started several processes; or there are too many.
    """
    world = world_of(None, None)
    if world.size > 1 and not in_group():
        raise ConfigError(
            f"VirtualRanks: WORLD_SIZE={world.size}, but there is no process group: call"
            " torch.distributed.init_process_group() first"
        )
    if world.size > virtual_ranks:
        raise ConfigError(
            f"VirtualRanks: {plural(world.size, 'process')} for {plural(virtual_ranks, 'virtual rank')}; start at most"
            f" {virtual_ranks}, or begin another run with more virtual ranks"
        )
    return world
