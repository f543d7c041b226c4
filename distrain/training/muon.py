"""Muon: steps along orthogonal matrices, for the weights of hidden layers.

After Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024),
https://kellerjordan.github.io/posts/muon/. `torch.optim.Muon` takes matrices only, not the kernels of convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton–Schulz iteration, from Jordan: singular values become 0.7 to 1.2 in a few iterations."""
_EPSILON = 1e-7


def hidden_weights(module: nn.Module, head: str) -> set[nn.Parameter]:
    """Return the weights that Muon is for: those of two or more dimensions, without embeddings and the last layer.

    Args:
        module: the model.
        head: name of the layer that computes the logits.
    """
    return {
        parameter
        for name, layer in module.named_modules()
        if name != head and not isinstance(layer, nn.Embedding | nn.EmbeddingBag)
        for key, parameter in layer.named_parameters(recurse=False)
        if key.endswith("weight") and parameter.dim() > 1
    }


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `orthogonal=True`, SGD for the others; both with momentum.

    A weight of two or more dimensions is used as a matrix [first dimension, all others]. In the groups with
    `orthogonal`, the step is the nearest orthogonal matrix to the momentum, roughly, times max(1, rows / columns)^½,
    and weight decay is decoupled; in the others it is an L2 penalty, as with SGD.

    Args:
        groups: of parameters, each with `orthogonal`.
        lr: learning rate.
        momentum: in 0 … 1.
        nesterov: whether to use Nesterov momentum.
        weight_decay: at least 0.
        iterations: of Newton and Schulz.
        normalize: scale each matrix of m rows to a norm of m^½ before each step, which keeps the angle of a step; for
            layers that are followed by a normalisation, whose outputs do not depend on the scale.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        iterations: int = 5,
        normalize: bool = False,
    ) -> None:
        values = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(groups, {**values, "iterations": iterations, "normalize": normalize, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; `closure` is not supported."""
        for group in self.param_groups:
            parameters = [each for each in group["params"] if each.grad is not None]
            if parameters:
                update = _orthogonal_step if group["orthogonal"] else _sgd_step
                update(parameters, [self._momentum(each) for each in parameters], group)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum"]
        return buffer


def _sgd_step(parameters: list[Tensor], momenta: list[Tensor], group: dict[str, Any]) -> None:
    gradients = _gradients(parameters)
    if group["weight_decay"]:
        gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
    torch._foreach_add_(parameters, _directions(gradients, momenta, group), alpha=-group["lr"])


def _orthogonal_step(parameters: list[Tensor], momenta: list[Tensor], group: dict[str, Any]) -> None:
    directions = _directions(_gradients(parameters), momenta, group)
    if group["normalize"]:
        norms = torch._foreach_norm(parameters)
        torch._foreach_div_(norms, [len(each) ** 0.5 for each in parameters])
        torch._foreach_clamp_min_(norms, _EPSILON)  # a matrix may begin as zeros
        torch._foreach_div_(parameters, norms)
    elif group["weight_decay"]:
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
    by_shape: dict[torch.Size, list[int]] = {}
    for index, each in enumerate(parameters):
        by_shape.setdefault(each.shape, []).append(index)
    for indices in by_shape.values():  # matrices of one shape at once: fewer operations
        matrices = torch.stack([directions[index].flatten(1) for index in indices])
        scale = max(1.0, matrices.shape[1] / matrices.shape[2]) ** 0.5
        for index, matrix in zip(indices, orthogonalize(matrices, group["iterations"]), strict=True):
            parameter = parameters[index]
            parameter.add_(matrix.view(parameter.shape), alpha=-group["lr"] * scale)


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """Return the nearest orthogonal matrices, roughly, by the iteration of Newton and Schulz in bfloat16.

    Args:
        matrices: [n, rows, columns].
        iterations: their number; after 5, most singular values are between 0.7 and 1.2.

    Returns:
        [n, rows, columns], of the type of `matrices`.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + _EPSILON)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [each.grad for each in parameters if each.grad is not None]


def _directions(gradients: list[Tensor], momenta: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Update the momenta in place; return the directions of the steps."""
    torch._foreach_mul_(momenta, group["momentum"])
    torch._foreach_add_(momenta, gradients)
    if not group["nesterov"]:
        return momenta
    return list(torch._foreach_add(gradients, momenta, alpha=group["momentum"]))
