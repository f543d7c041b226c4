"""What a run says about itself, before it starts."""

from __future__ import annotations

import os
import sys

from distrain.data.stream import memory
from distrain.training.job import Job


def tell_start(job: Job) -> None:
    """What is about to run, before it does."""
    rt, order, train = job.runtime, job.order, job.config.train
    found = job.dataset.manifest
    splits = ", ".join(f"{name} {split.samples:,}" for name, split in found.splits.items())
    parameters = sum(parameter.numel() for parameter in job.module.parameters())
    largest, ideal = order.shares(rt.world.size)[1], order.global_batch_size / rt.world.size
    buffers = memory(job.dataset, order, rt.world, job.config.data.read_ahead, job.cache is not None) / 2**20
    where = f"; train stays in {'GPU memory' if job.cache.device.type == 'cuda' else 'RAM'}" if job.cache else ""
    if job.dependent:
        print(
            f"warning: model {job.config.model.name} has {', '.join(job.dependent)}: what it learns depends on the"
            " number of processes",
            file=sys.stderr,
        )
    print(
        f"data     {job.dataset.root}: {splits}; {len(found.classes)} classes, {'×'.join(map(str, found.image_shape))}"
    )
    print(f"model    {job.config.model.name}, {parameters:,} parameters; {train.optimizer}, {train.precision}")
    asked = f"asked for {os.environ.get('WORLD_SIZE', '1')} × {job.config.run.device}"
    share = f"slowest share {largest / ideal:.2f} × the ideal of {ideal:g}"
    print(f"devices  {rt.world.size} × {rt.device.type} ({asked}); {share}")
    print(f"memory   {buffers:,.0f} MiB per process for reading{where}")
    print(f"steps    {job.total_steps:,} of {order.global_batch_size}, {order.steps_per_epoch:,} an epoch")
    print(f"run      {job.run}", flush=True)
