"""What `accelerate launch` and its configuration ask for, against what a run does: no wish is passed over silently."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from distrain.errors import ConfigError

MIXED = {"fp32": "no", "tf32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}
"""What accelerate calls our precisions."""


def check(environ: Mapping[str, str], precision: str, on_cpu: bool) -> None:
    """Refuse to start where accelerate was asked for something else than what will run.

    Raises:
        ConfigError: naming each contradiction.
    """
    found = conflicts(environ, precision, on_cpu)
    if found:
        raise ConfigError("accelerate's configuration contradicts distrain's:\n" + "\n".join(found))
    # `accelerate launch` starts one process on CPUs, whatever number it is given, and tells that one nothing of it.
    if "WORLD_SIZE" not in environ:
        asked = processes_asked_for(_parent_command())
        if asked is not None and asked > 1:
            raise ConfigError(
                f"accelerate launch was asked for {asked} processes and started one, as it does on CPUs;"
                " use --multi_gpu (with run.device=cpu; see launch/accelerate-2cpu.yaml), or distrain launch --nproc"
                f" {asked}"
            )


def conflicts(environ: Mapping[str, str], precision: str, on_cpu: bool) -> list[str]:
    """One line for each thing that `accelerate launch` or its configuration file asks for and a run does not do."""
    found = []

    def asks(name: str, harmless: set[str], ours: str) -> None:
        value = environ.get(name, "").lower()
        if value not in harmless | {""}:
            found.append(f"  {name}={environ[name]}, but {ours}")

    asks("ACCELERATE_MIXED_PRECISION", {"no", MIXED[precision]}, f"train.precision={precision}")
    asks("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", {"1"}, "accumulation follows from train.micro_batch_size")
    asks("ACCELERATE_DYNAMO_BACKEND", {"no"}, "train.compile decides whether the model is compiled")
    for feature in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG", "TP", "SAGEMAKER"):
        asks(f"ACCELERATE_USE_{feature}", {"false", "0", "no"}, "distrain trains with DDP alone")
    if not on_cpu:
        asks("ACCELERATE_USE_CPU", {"false", "0", "no"}, "run.device means a GPU; give run.device=cpu")
    return found


def processes_asked_for(command: Sequence[str]) -> int | None:
    """The number that an `accelerate launch` command line, or the configuration file that it takes, asks for; None
    where it is another command.
    """
    words = list(command[1:])  # without the interpreter
    if words[:1] == ["-m"]:
        del words[0]
    name = Path(words[0]).name if words else ""
    if name in ("accelerate", "accelerate.commands.accelerate_cli") and words[1:2] == ["launch"]:
        arguments = words[2:]
    elif name in ("accelerate-launch", "accelerate.commands.launch"):
        arguments = words[1:]
    else:
        return None
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    given, _ = launch_command_parser().parse_known_args(arguments)
    if given.num_processes is not None:
        return int(given.num_processes)
    if given.config_file is None and (given.cpu or not os.path.isfile(default_config_file)):
        return None
    asked = load_config_from_file(given.config_file).num_processes
    return int(asked) if asked is not None else None


def _parent_command() -> list[str]:
    try:
        parent = psutil.Process().parent()
        return parent.cmdline() if parent is not None else []
    except psutil.Error:
        return []
