"""The settings of `accelerate launch`, compared with those of the run: none is ignored silently."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from distrain.errors import ConfigError

MIXED = {"fp32": "no", "tf32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}
"""accelerate's names of our precisions."""


def check(environ: Mapping[str, str], precision: str, on_cpu: bool) -> None:
    """Refuse to start if accelerate was configured for something else than the run does.

    Raises:
        ConfigError: naming each contradiction.
    """
    contradictions = conflicts(environ, precision, on_cpu)
    if contradictions:
        raise ConfigError("accelerate's configuration contradicts distrain's:\n" + "\n".join(contradictions))
    # On CPUs `accelerate launch` starts one process, whatever number it is given, and does not tell that process.
    if "WORLD_SIZE" not in environ:
        requested = requested_processes(_parent_command())
        if requested is not None and requested > 1:
            raise ConfigError(
                f"accelerate launch was asked for {requested} processes and started one, as it does on CPUs;"
                " use --multi_gpu (with run.device=cpu; see launch/accelerate-2cpu.yaml), or distrain launch --nproc"
                f" {requested}"
            )


def conflicts(environ: Mapping[str, str], precision: str, on_cpu: bool) -> list[str]:
    """Return a line for each setting of `accelerate launch` or its configuration file that the run does not follow."""
    lines = []

    def compare(name: str, harmless: set[str], ours: str) -> None:
        value = environ.get(name, "").lower()
        if value not in harmless | {""}:
            lines.append(f"  {name}={environ[name]}, but {ours}")

    compare("ACCELERATE_MIXED_PRECISION", {"no", MIXED[precision]}, f"train.precision={precision}")
    compare("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", {"1"}, "accumulation follows from train.micro_batch_size")
    compare("ACCELERATE_DYNAMO_BACKEND", {"no"}, "train.compile decides whether the model is compiled")
    for feature in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG", "TP", "SAGEMAKER"):
        compare(f"ACCELERATE_USE_{feature}", {"false", "0", "no"}, "distrain trains with DDP alone")
    if not on_cpu:
        compare("ACCELERATE_USE_CPU", {"false", "0", "no"}, "run.device means a GPU; give run.device=cpu")
    return lines


def requested_processes(command: Sequence[str]) -> int | None:
    """Return the number of processes that an `accelerate launch` command asks for; None for any other command.

    The number comes from the command line, or from the configuration file that it uses.
    """
    rest = list(command[1:])  # without the interpreter
    if rest[:1] == ["-m"]:
        del rest[0]
    name = Path(rest[0]).name if rest else ""
    if name in ("accelerate", "accelerate.commands.accelerate_cli") and rest[1:2] == ["launch"]:
        arguments = rest[2:]
    elif name in ("accelerate-launch", "accelerate.commands.launch"):
        arguments = rest[1:]
    else:
        return None
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    given, _ = launch_command_parser().parse_known_args(arguments)
    if given.num_processes is not None:
        return int(given.num_processes)
    if given.config_file is None and (given.cpu or not os.path.isfile(default_config_file)):
        return None
    configured = load_config_from_file(given.config_file).num_processes
    return int(configured) if configured is not None else None


def _parent_command() -> list[str]:
    try:
        parent = psutil.Process().parent()
        return parent.cmdline() if parent is not None else []
    except psutil.Error:
        return []
