"""The summary of a run: before it starts (also in RUN/setup.json), and when it is done."""

from __future__ import annotations

import logging
from typing import Any

import torch

from distrain import files, machine
from distrain.runs import records, results
from distrain.runs.folder import SETUP
from distrain.text import clock, percent, plural, printable, shortened
from distrain.training import inputs, optim, profiling
from distrain.training.checkpointing import os_error_of
from distrain.training.job import Job

log = logging.getLogger("distrain")

_FEW_SAMPLES = 8
"""Samples of a virtual rank below which the statistics of BatchNorm are noisy."""
_WORST_CLASSES = 3
"""Number of classes named at the end of a run."""


def announce(job: Job, from_step: int) -> None:
    """Write RUN/setup.json, and log what is about to run; on rank 0."""
    if not job.runtime.is_main:
        return
    setup = describe(job, from_step)
    text = records.to_json(setup)
    error = os_error_of(lambda: files.replace(job.folder / SETUP, text))
    if error is not None:  # a full disk: training does not depend on this file
        log.warning("%s could not be written: %s", SETUP, error)
    _log_warnings(job, setup)
    for line in _format_setup(job, setup):
        log.info("%s", line)


def describe(job: Job, from_step: int) -> dict[str, Any]:
    """Return a description of the data set, model, processes and machine, to be saved in RUN/setup.json.

    Args:
        job: the run.
        from_step: step from which this attempt trains.
    """
    runtime, order, manifest = job.runtime, job.order, job.dataset.manifest
    world, environment = runtime.world, runtime.environment
    number = job.virtual_ranks[0].size
    fewest, most = order.local_batch_sizes(number)
    train = job.dataset.split("train")
    cuda = runtime.device.type == "cuda"
    return {
        "data": {
            "dir": str(job.dataset.root),
            "tars": str(job.dataset.tars),
            "source": manifest.source,
            "manifest": job.dataset.digest,
            "classes": manifest.classes,
            "image_shape": job.dataset.image_shape,
            "evaluation": _evaluation(job),
            "splits": {str(name): split.samples for name, split in manifest.splits.items()},
            "shards": len(train.sizes),
            "lanes": train.lanes,
        },
        "model": {
            "name": job.config.model.name,
            "parameters": sum(parameter.numel() for parameter in job.model.module.parameters()),
            "flops_per_image": job.flops.per_image,
            "dependent": job.dependent_layers,
        },
        "processes": {
            "number": world.size,
            "nodes": -(-world.size // environment.local_world_size),
            "requested_device": job.config.run.device,
            "device": runtime.device.type,
            "device_name": torch.cuda.get_device_name(runtime.device) if cuda else None,
            "peak_flops": job.flops.peak,
        },
        "batch": {
            "global": order.global_batch_size,
            "fewest": fewest,
            "most": most,
            "number": number,
            "ideal": order.global_batch_size / number,
            "grad_accum": job.accumulation_steps,
        },
        "memory": {
            "bytes": inputs.memory(
                job.config, job.dataset, order, job.virtual_ranks, cached=job.cache is not None, pinned=cuda
            ),
            "cache": None if job.cache is None else "device" if job.cache.device.type == "cuda" else "ram",
        },
        "compile": {
            "mode": job.compilation.mode,
            "sizes": list(job.compilation.sizes),
            "seconds": job.compile_seconds,
        },
        "steps": job.total_steps,
        "steps_per_epoch": order.steps_per_epoch,
        "from_step": from_step,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "bits": job.what_decides_bits,
    }


def _evaluation(job: Job) -> dict[str, Any] | None:
    """Return how the images of an index are evaluated, for `predict` and `export`; None for blocks."""
    if job.preprocessing is None:
        return None
    transform = job.preprocessing.evaluation
    return {"crop": [transform.height, transform.width], "resize": transform.resize}


def _log_warnings(job: Job, setup: dict[str, Any]) -> None:
    if "dir" not in job.config.data.model_fields_set:
        log.warning("data.dir was not set: this trains on the default, %s", setup["data"]["dir"])
    order, pretrained = job.order, job.config.model.init is not None
    images = order.num_shards * order.samples_per_shard
    better = optim.advice(job.config.train, images, _smallest_batch(job), pretrained)
    if better is not None:
        steps = f"{plural(order.steps_per_epoch, 'step')} an epoch, {job.total_steps:,} in all"
        log.warning("%s: a model learns little in so few; try %s", steps, better)
    fewest = setup["batch"]["fewest"]
    if job.config.train.virtual_ranks is not None and job.has_batch_norm and fewest < _FEW_SAMPLES:
        log.warning(
            "BatchNorm takes the statistics of a virtual rank's %s, which are noisy with fewer than %s; lower"
            " train.virtual_ranks, or raise train.global_batch_size",
            plural(fewest, "image"),
            _FEW_SAMPLES,
        )
    if job.dependent_layers:
        log.warning(
            "model %s has %s: what it learns depends on the number of processes",
            job.config.model.name,
            ", ".join(job.dependent_layers),
        )


def _smallest_batch(job: Job) -> int:
    """Return the smallest global batch that the processes, mixup and CutMix allow."""
    return max(job.runtime.world.size, 2 * job.order.lanes if job.config.augment.mixes_labels else 1)


def _format_setup(job: Job, setup: dict[str, Any]) -> list[str]:
    """Return the lines that describe what is about to run: a screen at most."""
    config, virtual = job.config, job.config.train.virtual_ranks is not None
    data, model, processes, memory_use = (setup[name] for name in ("data", "model", "processes", "memory"))
    splits = ", ".join(f"{name} {samples:,}" for name, samples in data["splits"].items())
    start, shape = config.data.start_size, "×".join(map(str, data["image_shape"]))
    shape = shape if start is None else f"from {start}×{start} pixels to {shape}"
    cached = {None: "", "ram": "; train stays in RAM", "device": "; train stays in GPU memory"}[memory_use["cache"]]
    named = f" ({processes['device_name']})" if processes["device_name"] else ""
    on_nodes = f" on {processes['nodes']} nodes" if processes["nodes"] > 1 else ""
    lines = (
        ("data", f"{data['dir']}: {splits}; {plural(len(data['classes']), 'class')}, {shape}"),
        ("model", f"{model['name']}, {model['parameters']:,} parameters, {_format_flops(model['flops_per_image'])};"
                  f" {config.train.optimizer}, {config.train.precision}"),
        ("devices", f"{processes['number']} × {processes['device']}{named}{on_nodes}"
                    f" (run.device={processes['requested_device']})"),
        ("batch", _format_batch(setup["batch"])),
        *([("virtual", _format_virtual_ranks(processes["number"], setup["batch"]["number"]))] if virtual else []),
        *([("compiled", _format_compilation(setup["compile"]))] if job.compilation.is_on else []),
        ("memory", f"{memory_use['bytes'] / 2**20:,.0f} MiB of each process for reading{cached}"),
        ("steps", _format_steps(setup)),
        ("saves", _format_saves(job)),
        ("scores", _format_scores(job)),
        ("run", str(job.folder)),
    )  # fmt: skip
    return [f"{name:<9}{line}" for name, line in lines]


def _format_flops(per_image: int | None) -> str:
    return "FLOPs not counted" if per_image is None else f"{per_image / 1e9:.3g} GFLOPs an image"


def _format_batch(batch: dict[str, Any]) -> str:
    sizes = f"{batch['most']}" if batch["fewest"] == batch["most"] else f"{batch['fewest']} to {batch['most']}"
    accumulation = f" in {batch['grad_accum']} micro-batches" if batch["grad_accum"] > 1 else ""
    ratio = batch["most"] / batch["ideal"]
    uneven = f"; the largest local batch is {ratio:.2f} × the ideal of {batch['ideal']:.4g}" if ratio > 1 else ""
    return f"{plural(batch['global'], 'image')} a step = {batch['number']} × {sizes}{accumulation}{uneven}"


def _format_virtual_ranks(processes: int, number: int) -> str:
    """Say what virtual ranks guarantee, and how many passes they cost each process."""
    per_process = -(-number // processes)
    fewest = -(-number // per_process)
    as_fast = f", as on {plural(fewest, 'process')}" if fewest < processes else ""
    return (
        f"{plural(number, 'rank')}: the same bits on 1 to {plural(number, 'process')};"
        f" {plural(per_process, 'pass')} a step of each process{as_fast}"
    )


def _format_compilation(compiled: dict[str, Any]) -> str:
    sizes = ", ".join(shortened([str(size) for size in compiled["sizes"]], 5))
    slower = ", and so for any size, which is slower" if len(compiled["sizes"]) > 1 else ""
    return f"{compiled['mode']}, in {clock(compiled['seconds'])}, for batches of {sizes} images{slower}"


def _format_steps(setup: dict[str, Any]) -> str:
    unused = setup["data"]["splits"]["train"] - setup["steps_per_epoch"] * setup["batch"]["global"]
    dropped = f" ({plural(unused, 'image')} dropped from each, others in turn)" if unused else ""
    resumed = f", resuming after step {setup['from_step']:,}" if setup["from_step"] else ""
    if setup["from_step"] == setup["steps"]:
        resumed = ": all done already"
    return f"{setup['steps']:,}, {setup['steps_per_epoch']:,} an epoch{dropped}{resumed}"


def _format_saves(job: Job) -> str:
    settings = job.config.checkpoint
    saves = [f"every {plural(settings.every_steps, 'step')}"] if settings.every_steps else []
    saves += [f"every {settings.every_minutes:g} min"] if settings.every_minutes else []
    return f"{', '.join(saves) or 'none'}, and at the end or when stopped"


def _format_scores(job: Job) -> str:
    every = job.config.eval.every_steps
    during = "once an epoch" if every is None else f"every {every:,} steps" if every else "only at the end"
    if "val" in job.dataset.manifest.splits:
        number = job.config.train.stop_after
        stops = "" if number is None else f"; stops after {plural(number, 'evaluation')} without a better one"
        return f"val {during}; the result is that of the best checkpoint on val{stops}"
    curves = f"; test is scored {during}, for the curves" if every != 0 else ""
    return f"there is no val split: the result is that of the last weights{curves}"


def log_result(job: Job, result: dict[str, Any]) -> None:
    """Log what a run did: steps, speed, time by phase with advice, scores, lowest accuracies, checkpoint, warnings."""
    fractions, seconds = result["profile"], result["compile_seconds"]
    rate = results.format_rate(result["images_per_second"], result["tflops_per_second"], result["mfu"])
    compiled = f"; {clock(seconds)} to compile" if seconds else ""
    steps, time_used = plural(result["steps"], "step"), clock(result["seconds"])
    log.info("trained  %s in %s, %s while training%s", steps, time_used, rate, compiled)
    if result["stopped_early"] is not None:
        log.info("         stopped %s", result["stopped_early"])
    if fractions:
        log.info("time     %s", profiling.format_fractions(fractions))
    for line in profiling.advice(fractions, job.cache is not None, job.preprocessing is not None):
        log.info("         %s", line)
    log.info("scores   accuracy %s, %s", percent(result["accuracy"]), results.scores_line(result))
    if result["train_accuracy"] is not None:
        log.info("         accuracy in training %s, on the images as trained", percent(result["train_accuracy"]))
    by_class = results.lowest_first(results.classes_of(result))
    lowest = [(row.name, row.accuracy) for row in by_class if row.accuracy is not None][:_WORST_CLASSES]
    log.info("lowest   %s", ", ".join(f"{printable(name)} {percent(accuracy)}" for name, accuracy in lowest))
    log.info("result   of the checkpoint of %s", results.describe_checkpoint(result))
    for warning in result["warnings"]:
        log.warning("%s", warning)
