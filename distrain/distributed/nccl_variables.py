"""Environment variables of torch's NCCL backend: those that would end a process without a message of ours."""

from __future__ import annotations

from collections.abc import Mapping

_OFF = {"", "0", "n", "no", "f", "false"}
"""Values that torch reads as off."""

_MUST_BE_OFF = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "NCCL's watchdog would abort the process after an error of a collective",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "NCCL's watchdog would abort the process after an error of CUDA",
    "TORCH_NCCL_TEARDOWN_ON_TIMEOUT": "NCCL's watchdog would abort the process after a time-out",
    "TORCH_NCCL_ENABLE_MONITORING": "NCCL's monitor would abort the process when its watchdog has ended or is stuck",
    "TORCH_NCCL_DESYNC_DEBUG": "it turns TORCH_NCCL_ASYNC_ERROR_HANDLING on again",
    "TORCH_NCCL_BLOCKING_WAIT": "the host would wait in every collective, and errors would not be noticed elsewhere",
}
"""Each variable, with its effect if it were on. Off, the error reaches the main thread, which reports it.

Not here: the flight recorder (TORCH_NCCL_TRACE_BUFFER_SIZE, TORCH_NCCL_DUMP_ON_TIMEOUT and others), which ends nothing,
and TORCH_NCCL_PROPAGATE_ERROR, which only marks the group of the other processes. They stay as the user has set them.
"""


_OF_TORCHRUN = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
"""A variable that torchrun sets for its processes; no user has chosen it."""


def choose(variables: Mapping[str, str], torchrun: bool) -> tuple[dict[str, str], list[str]]:
    """Return the variables to set before a NCCL group is created, and why some replace values of the user.

    Args:
        variables: the environment.
        torchrun: whether torchrun started this process.

    Returns:
        Names with their values; `NAME=VALUE (reason)` for each one that was on.
    """
    overridden = [
        f"{name}={variables[name]} ({reason})"
        for name, reason in _MUST_BE_OFF.items()
        if variables.get(name, "").lower() not in _OFF and not (torchrun and (name, variables[name]) == _OF_TORCHRUN)
    ]
    return dict.fromkeys(_MUST_BE_OFF, "0"), overridden
