"""Options of `accelerate launch`: none is ignored without an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrain.distributed.accelerate_check import conflicts, requested_processes

LAUNCH = Path(__file__).parent.parent / "launch"


@pytest.mark.parametrize(
    "variable",
    [
        "ACCELERATE_MIXED_PRECISION=bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4",
        "ACCELERATE_USE_FSDP=true",
        "ACCELERATE_USE_DEEPSPEED=true",
        "ACCELERATE_DYNAMO_BACKEND=INDUCTOR",
    ],
)
def test_an_option_that_contradicts_the_configuration_is_an_error(variable: str) -> None:
    name, _, value = variable.partition("=")
    (line,) = conflicts({name: value}, "fp32", True)
    assert variable in line
    assert ("train.precision=fp32" in line) == (name == "ACCELERATE_MIXED_PRECISION")
    harmless = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_FSDP": "false"}
    assert conflicts(harmless, "bf16", True) == []


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        ("python /bin/accelerate launch --cpu --num_processes 2 -m distrain train", 2),
        ("python /bin/accelerate-launch --num_processes=4 -m distrain train", 4),
        ("python -m accelerate.commands.launch --cpu --num_processes 3 -m distrain train run.dir=x", 3),
        (f"python /bin/accelerate launch --config_file {LAUNCH}/accelerate-2cpu.yaml -m distrain train", 2),
        (f"python /bin/accelerate launch --config_file {LAUNCH}/accelerate-2cpu.yaml --num_processes 5 x.py", 5),
        ("python /bin/accelerate launch --cpu -m distrain train", None),
        ("python /bin/accelerate config", None),
        ("python train.py --num_processes 2", None),
        ("bash", None),
        ("", None),
    ],
)
def test_the_number_of_requested_processes(command: str, processes: int | None) -> None:
    assert requested_processes(command.split()) == processes
