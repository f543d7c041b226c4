"""Models whose processes end in the middle of a run; FAULT=KIND:RANK:N in the environment says how, where and when."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist
from models_for_tests import Faulty
from torch import Tensor, nn


def accelerator_error(code: int, text: str) -> torch.AcceleratorError:
    """Build the error that torch raises for an error of CUDA: torch sets its code as an attribute."""
    error = torch.AcceleratorError(
        f"CUDA error: {text}\nCUDA kernel errors might be asynchronously reported at some other API call, so the"
        " stacktrace below might be incorrect."
    )
    error.error_code = code  # type: ignore[attr-defined]
    return error


TEXTS: dict[str, Exception] = {
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has …"),
    "ecc": accelerator_error(214, "uncorrectable ECC error encountered"),
    "text": ValueError("CUDA out of memory"),
    "skip": RuntimeError("skip connection mismatch"),
    "timeout": RuntimeError("the socket timed out: NCCL, gloo, TCPStore"),
    "refused": ConnectionRefusedError(111, "Connection refused"),
    "value": ValueError("broken pipe"),
}


class Ending(Faulty):
    """Ends in the N-th forward pass of a rank, or in its backward pass, with BatchNorm over all ranks."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(num_classes, image_shape)
        self.append(nn.BatchNorm1d(num_classes))
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) >= int(os.environ.get("FAULTY_ATTEMPTS", "1")):
            self.kind = "none"
        elif self.kind == "none" and "-outlive:" in os.environ.get("FAULT", ""):
            self.kind = "forward-leave"

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K]."""
        where, _, kind = self.kind.rpartition("-")
        if self.pass_count + 1 == self.fault_pass:
            if where == "forward":
                _end(kind)
            if where == "backward":
                return _EndBackward.apply(super().forward(images), kind)
            if where == "hook":
                logits = super().forward(images)
                logits.register_hook(lambda _: _end(kind))
                return logits
        return super().forward(images)


class _EndBackward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, logits: Tensor, kind: str) -> Tensor:
        context.kind = kind
        return logits.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        _end(context.kind)
        return gradient[:, :3] if context.kind == "gradient" else gradient, None


def _end(kind: str) -> None:
    if kind in TEXTS:
        raise TEXTS[kind]
    if kind == "outlive":  # the other process leaves; then this one fails by itself
        with contextlib.suppress(RuntimeError):
            dist.barrier()
        raise TEXTS["skip"]
    if kind == "shapes":
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    if kind == "leave":
        os._exit(0)
    if kind == "exit":
        sys.exit(0)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
