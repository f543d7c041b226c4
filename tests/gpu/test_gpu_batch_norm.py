"""BatchNorm over all ranks on a GPU: what a CPU computes, without waiting for the GPU."""

from __future__ import annotations

import pytest
import torch
from test_batch_norm import CASES, STEPS, a_group, difference, expected, steps_of_rank

from distrain.models.batch_norm import sync_batch_norm

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_a_cpu_computes(name: str, device: str) -> None:
    case = CASES[name]
    with a_group("nccl" if device == "cuda" else "gloo"):
        results = steps_of_rank(case, 0, STEPS[1], device)
    for result, right in zip(results, expected(case, STEPS[1]), strict=True):
        for key, value in right.items():
            assert difference(result[key].double().cpu(), value.double()) <= case.tolerance, key


@pytest.mark.parametrize("name", CASES)
def test_no_pass_waits_for_the_gpu(name: str, device: str) -> None:
    if device == "cpu":
        pytest.skip("needs a GPU")
    case = CASES[name]
    with a_group("nccl"):
        steps_of_rank(case, 0, STEPS[1], device)  # starts the communicator
        layer = sync_batch_norm(case.layer(case.layer_dtype).to(device))
        x, gradient = (each.to(device) for each in case.batch(0, (5,)))
        x.requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x).backward(gradient)
        finally:
            torch.cuda.set_sync_debug_mode("default")
