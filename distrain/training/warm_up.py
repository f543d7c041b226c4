"""The first passes of an attempt, whose gradients are discarded."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distrain import models, startup
from distrain.distributed.virtual_ranks import VirtualRanks
from distrain.errors import ConfigError
from distrain.failure_report import PeerFailedError
from distrain.text import plural, shortened
from distrain.training.inputs import training_shapes
from distrain.training.job import Job


def warm_up(job: Job) -> float:
    """Run passes of training and drop their gradients, before a checkpoint is loaded; return the seconds they took.

    - The model is compiled for all sizes of micro-batches and images of the run, in an order that does not depend on
      the step that an attempt begins with: no step compiles anything. Without compilation, only the largest ones are
      run.
    - DDP rebuilds its buckets after the first backward pass of a process, and then sums gradients in another order.
      Without a second one, a run resumed on three or more processes would have other last bits than one that was not
      interrupted.
    - What a step needs is known to fit into memory.

    Weights, buffers and the state of torch's generators stay as they were.
    """
    started, model, compilation = time.monotonic(), job.model, job.compilation
    buffers = dict(model.module.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    shapes = training_shapes(job.config, job.dataset)
    sizes = [(size, shape) for shape in shapes for size in compilation.sizes]
    with torch.random.fork_rng([job.runtime.device] if job.runtime.device.type == "cuda" else []):
        if isinstance(model.distributed, VirtualRanks):
            with compilation.suspended():  # what is observed changes the model, and so what is compiled
                _run_micro_batches(job, _inputs(job, *sizes[0]), buffers)
            model.distributed.observe()
        if compilation.is_on:
            _augment_each_size(job, shapes)
        for number, (size, shape) in enumerate(sizes if compilation.is_on else sizes[:1], 1):
            if compilation.is_on:
                which = f", {number} of {len(sizes)} sizes" if len(sizes) > 1 else ""
                startup.waits_for(f"compiling the model for batches of {plural(size, 'image')}{which}")
            for _ in range(3 if compilation.has_cuda_graphs else 2):  # they are recorded in the second pass
                _run_micro_batches(job, _inputs(job, size, shape), buffers)
        if isinstance(model.distributed, VirtualRanks):
            _check_repeatable(job, model.distributed, _inputs(job, *sizes[0]))
    for name, buffer in model.module.named_buffers():
        buffer.copy_(before[name])
    return time.monotonic() - started


def _augment_each_size(job: Job, shapes: Sequence[Sequence[int]]) -> None:
    """Augment black local batches of all sizes of the run: no step compiles anything."""
    device, settings = job.runtime.device, job.config.augment
    if not settings.crop_padding and not settings.cutout:
        return
    startup.waits_for("compiling the augmentation")
    for shape in shapes:
        for size in job.order.micro_batch_sizes(job.virtual_ranks[0].size, 1):
            images = torch.zeros(size, *shape, dtype=torch.uint8, device=device)
            with job.runtime.collectives.fail_alone(), _explain_impossible():
                job.augment(images, torch.zeros(size, 2, dtype=torch.int64, device=device))
            job.runtime.watchdog.heartbeat()


def _inputs(job: Job, size: int, shape: Sequence[int]) -> Tensor:
    """Return a normalised black micro-batch, in the memory layout of a training step: [size, C, H, W]."""
    images = torch.zeros(size, *shape, dtype=torch.uint8, device=job.runtime.device)
    with job.runtime.collectives.fail_alone(), _explain_impossible():  # it may be compiled
        return job.normalize(images)


def _run_micro_batches(job: Job, inputs: Tensor, buffers: dict[str, Tensor]) -> None:
    """Run one pass of each kind that a step has: of a first micro-batch, of a further one and of the last."""
    name, module, distributed = job.config.model.name, job.model.module, job.model.distributed
    for last in [False] * min(2, job.accumulation_steps - 1) + [True]:
        with job.runtime.collectives.fail_alone(), _explain_impossible(), distributed.micro_batch(last):
            logits = distributed.forward(inputs)
            distributed.backward(logits.sum() * 0)
        _check_not_replaced(job, buffers)
        job.runtime.watchdog.heartbeat()
    models.check_gradients(name, module)  # DDP's next pass would fail without a cure
    models.check_buffers(name, module, buffers)
    job.model.optimizer.zero_grad()  # with CUDA graphs, the next pass overwrites gradients


def _check_not_replaced(job: Job, buffers: dict[str, Tensor]) -> None:
    """Check that a pass updates buffers in place: CUDA graphs overwrite what they return.

    Raises:
        ConfigError: the model replaces a buffer.
    """
    if not job.compilation.has_cuda_graphs:
        return
    replaced = [name for name, buffer in job.model.module.named_buffers() if buffer is not buffers.get(name, buffer)]
    if replaced:
        raise ConfigError(
            f"train.compile=reduce-overhead: a training pass replaces the buffers {', '.join(shortened(replaced, 5))}"
            " of the model by new tensors, which the CUDA graph of the next pass overwrites; change them in place, or"
            " set train.compile=default"
        )


def _check_repeatable(job: Job, distributed: VirtualRanks, inputs: Tensor) -> None:
    runtime, seed = job.runtime, job.config.run.seed
    runtime.collectives.all_or_none(lambda: distributed.check_repeatable(inputs, lambda: runtime.seed_all(seed)))


@contextlib.contextmanager
def _explain_impossible() -> Iterator[None]:
    """Raise ConfigError in the first passes for a missing compiler, or an operation without a deterministic form."""
    try:
        yield
    except PeerFailedError:
        raise  # its message is complete
    except Exception as error:
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise ConfigError(
                f"train.compile: the model cannot be compiled: {message}; set train.compile=off"
            ) from error
        if "output of CUDAGraphs that has been overwritten" in message:
            raise ConfigError(
                f"train.compile=reduce-overhead: the model uses a tensor of an earlier pass, which CUDA graphs have"
                f" overwritten: {message}; set train.compile=default"
            ) from error
        if message.startswith("Expected more than 1 "):
            raise ConfigError(
                f"model.name: it normalises single values in training ({message}); prepare larger images, or change it"
            ) from error
        if "deterministic" in str(error):
            raise ConfigError(f"train.deterministic: {message}; set it to false, or change the model") from error
        raise
