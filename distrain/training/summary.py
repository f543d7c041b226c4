"""What a run says about itself: before it starts (on a screen, and in RUN/setup.json), and when it is done."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from distrain import machine
from distrain.data.stream import memory
from distrain.runs.logs import clock
from distrain.text import printable
from distrain.training import profiling
from distrain.training.evaluation import Scores
from distrain.training.job import Job

_WORST = 3
"""Classes that a run's last lines name."""


def facts(job: Job) -> dict[str, Any]:
    """What the run works with, for JSON: RUN/setup.json."""
    rt, order, found = job.runtime, job.order, job.dataset.manifest
    fewest, most = order.local_batch_sizes(rt.world.size)
    train = job.dataset.split("train")
    cuda = rt.device.type == "cuda"
    return {
        "data": {
            "dir": str(job.dataset.root),
            "source": found.source,
            "manifest": job.dataset.digest,
            "classes": found.classes,
            "image_shape": found.image_shape,
            "splits": {str(name): split.samples for name, split in found.splits.items()},
            "shards": len(train.shards),
            "lanes": train.lanes,
        },
        "model": {
            "name": job.config.model.name,
            "parameters": sum(parameter.numel() for parameter in job.module.parameters()),
            "dependent": job.dependent,
        },
        "processes": {
            "number": rt.world.size,
            "nodes": -(-rt.world.size // machine.processes_here()),
            "asked": f"{os.environ.get('WORLD_SIZE', '1')} × {job.config.run.device}",
            "device": rt.device.type,
            "device_name": torch.cuda.get_device_name(rt.device) if cuda else None,
        },
        "batch": {
            "global": order.global_batch_size,
            "fewest": fewest,
            "most": most,
            "ideal": order.global_batch_size / rt.world.size,
            "grad_accum": job.passes,
        },
        "memory": {
            "bytes": memory(job.dataset, order, rt.world, job.config.data.read_ahead, job.cache is not None),
            "cache": None if job.cache is None else "device" if job.cache.device.type == "cuda" else "ram",
        },
        "steps": job.total_steps,
        "steps_per_epoch": order.steps_per_epoch,
        "from_step": job.state.step,
        "machine": machine.describe(),
        "versions": machine.versions(),
    }


def tell_start(job: Job, found: dict[str, Any]) -> None:
    """What is about to run, before it does: a screen at most."""
    config, data, model, processes, batch = (
        job.config,
        *(found[name] for name in ("data", "model", "processes", "batch")),
    )
    if "dir" not in config.data.model_fields_set:
        print(f"warning: data.dir was not set: this trains on the default, {data['dir']}", file=sys.stderr)
    if model["dependent"]:
        print(
            f"warning: model {model['name']} has {', '.join(model['dependent'])}: what it learns depends on the"
            " number of processes",
            file=sys.stderr,
        )
    splits = ", ".join(f"{name} {samples:,}" for name, samples in data["splits"].items())
    shape = "×".join(map(str, data["image_shape"]))
    kept = {None: "", "ram": "; train stays in RAM", "device": "; train stays in GPU memory"}[found["memory"]["cache"]]
    shares = f"{batch['most']}" if batch["fewest"] == batch["most"] else f"{batch['fewest']} to {batch['most']}"
    accum = f" in {batch['grad_accum']} micro-batches" if batch["grad_accum"] > 1 else ""
    named = f" ({processes['device_name']})" if processes["device_name"] else ""
    on_nodes = f" on {processes['nodes']} nodes" if processes["nodes"] > 1 else ""
    from_here = f", going on after step {found['from_step']:,}" if found["from_step"] else ""
    if found["from_step"] == found["steps"]:
        from_here = ": all done already"
    unused = data["splits"]["train"] - found["steps_per_epoch"] * batch["global"]
    left_out = f" ({unused:,} images left out of each, others in turn)" if unused else ""
    checkpoint = config.checkpoint
    saves = [f"every {checkpoint.every_steps:,} steps"] if checkpoint.every_steps else []
    saves += [f"every {checkpoint.every_minutes:g} minutes"] if checkpoint.every_minutes else []
    for name, line in (
        ("data", f"{data['dir']}: {splits}; {len(data['classes'])} classes, {shape}"),
        ("model", f"{model['name']}, {model['parameters']:,} parameters; {config.train.optimizer},"
                  f" {config.train.precision}"),
        ("devices", f"{processes['number']} × {processes['device']}{named}{on_nodes} (asked for {processes['asked']})"),
        ("batch", f"{batch['global']:,} images a step = {processes['number']} × {shares}{accum}; the largest share is"
                  f" {batch['most'] / batch['ideal']:.2f} × the ideal of {batch['ideal']:.4g}"),
        ("memory", f"{found['memory']['bytes'] / 2**20:,.0f} MiB of each process for reading{kept}"),
        ("steps", f"{found['steps']:,}, {found['steps_per_epoch']:,} an epoch{left_out}{from_here}"),
        ("saves", f"{', '.join(saves) or 'none'}, and at the end or when stopped"),
        ("run", str(job.run)),
    ):  # fmt: skip
        print(f"{name:<9}{line}")
    sys.stdout.flush()


def tell_end(job: Job, scores: Scores, result: dict[str, Any]) -> None:
    """What came of it."""
    parts = result["profile"]
    rate, seconds = result["images_per_second"], round(result["seconds"])
    print(f"trained  {result['steps']:,} steps in {clock(seconds)}, {rate:,.0f} images/s while training")
    if parts:
        print("time     " + profiling.told(parts))
    for line in profiling.advice(parts, cached=job.cache is not None):
        print(f"         {line}")
    by_class = {name: value for name, value in result["accuracy_by_class"].items() if value is not None}
    worst = sorted(by_class.items(), key=lambda item: item[1])[:_WORST]
    print("lowest   " + ", ".join(f"{printable(name)} {value:.1%}" for name, value in worst))
    print("Finished Training")
    print(scores.line("test"))
    print(f"Run: {job.run}", flush=True)
