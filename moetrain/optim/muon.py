"""Muon for matrices, AdamW for the rest, the same update under every layout.

Muon (https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum by the nearest semi-orthogonal matrix.
That needs all of it: shards of a matrix are gathered, and each rank keeps its part of the result. An expert's gate,
up, and down projections are three matrices of their own. `torch.optim.Muon` takes whole two-dimensional parameters
only, and rounds to bfloat16 even what is fp64, so that another order of a sum becomes a difference of a thousandth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import Parameter
from torch.optim import Optimizer

from moetrain.config.values import require_range
from moetrain.optim import adamw
from moetrain.parallel.initialize import local_part

# Of the quintic whose iterates approach 1 fastest from small singular values (the post above).
_A, _B, _C = 3.4445, -4.7750, 2.0315


def build(
    named_parameters: adamw.NamedParameters,
    *,
    lr: float,
    momentum: float = 0.95,
    iterations: int = 5,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    decay_embeddings: bool = True,
) -> Muon:
    """Muon for weights of two or more dimensions, except embedding and head; `adamw.build` for the others.

    One rate serves both: Muon's update is scaled to the size of AdamW's (arXiv:2502.16982). momentum: Nesterov's.
    iterations: of Newton-Schulz. State exists from the start. Raises ValueError for hyper-parameters out of range.
    """
    require_range("momentum", momentum, 0, 1 - 1e-6)
    require_range("iterations", iterations, 1, 20)
    require_range("lr", lr, 0, float("inf"))
    require_range("weight_decay", weight_decay, 0, float("inf"))
    named = list(named_parameters)
    chosen = {name for name, parameter in named if parameter.requires_grad and _is_matrix(name, parameter)}
    rest = [(name, parameter) for name, parameter in named if name not in chosen and parameter.requires_grad]
    options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    others = adamw.build(rest, **options, decay_embeddings=decay_embeddings) if rest else None
    matrices = [parameter for name, parameter in named if name in chosen]
    if not matrices and others is None:
        raise ValueError("the model has no parameter that needs a gradient")
    return Muon(matrices, others, lr=lr, momentum=momentum, iterations=iterations, weight_decay=weight_decay)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    path = name.split(".")
    return parameter.ndim >= 2 and not any("embed" in part or "norm" in part for part in path) and path[0] != "head"


class Muon(Optimizer):
    """Use `build`. others: the optimizer of the other parameters; its groups and its state are shown as this one's."""

    def __init__(self, matrices: list[Parameter], others: Optimizer | None, **options: Any) -> None:
        groups = [{"params": matrices, "initial_lr": options["lr"]}] if matrices else []
        super().__init__(groups or others.param_groups, options)  # type: ignore[union-attr]
        self.others, self.matrices = others, groups and self.param_groups[:1]
        for matrix in matrices:
            self.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix, memory_format=torch.preserve_format)}
        if others is not None:
            self.param_groups = [*self.matrices, *others.param_groups]
            self.state.update(others.state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of everything that has a gradient. closure: not supported."""
        assert closure is None, "Muon takes no closure"
        for group in self.matrices:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    _update(matrix, self.state[matrix]["momentum_buffer"], group)
        if self.others is not None:
            self.others.step()


def _update(matrix: Tensor, buffer: Tensor, group: dict[str, Any]) -> None:
    assert matrix.grad is not None
    grad, held, momentum = local_part(matrix.grad)[0], local_part(buffer)[0], group["momentum"]
    held.lerp_(grad, 1 - momentum)
    update = orthogonalise(_whole_matrices(grad.lerp(held, momentum), matrix), group["iterations"])
    local, offset = local_part(matrix)
    # Leading dims number matrices: of those, `update` has this rank's only.
    start = (*[0] * (matrix.ndim - 2), *offset[-2:])
    mine = update[tuple(slice(at, at + size) for at, size in zip(start, local.shape))]
    local.mul_(1 - group["lr"] * group["weight_decay"])
    local.add_(mine.to(local.dtype), alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape[-2:])))


def _whole_matrices(update: Tensor, matrix: Tensor) -> Tensor:
    """This rank's part of an update of `matrix`, but with all rows and columns: the last two dims are gathered."""
    if not isinstance(matrix, DTensor):
        return update
    mesh, first = matrix.device_mesh, matrix.ndim - 2
    kept = [p if p.is_shard() and p.dim < first else Replicate() for p in matrix.placements]  # type: ignore[attr-defined]
    shape, stride = matrix.shape, matrix.stride()
    divided = DTensor.from_local(update, mesh, matrix.placements, run_check=False, shape=shape, stride=stride)
    return divided.redistribute(mesh, kept).to_local()


def orthogonalise(x: Tensor, iterations: int) -> Tensor:
    """[..., R, C] -> the same shape with singular values of about 1, by Newton-Schulz iterations.

    fp64 stays fp64; everything else is rounded to bfloat16 as in the published method, which is enough for a direction.
    """
    y = x if x.dtype == torch.float64 else x.bfloat16()
    wide = y.shape[-2] <= y.shape[-1]
    y = y if wide else y.mT
    y = y / y.flatten(-2).norm(dim=-1).clamp(min=1e-7)[..., None, None]
    for _ in range(iterations):
        gram = y @ y.mT
        y = _A * y + (_B * gram + _C * gram @ gram) @ y
    return y if wide else y.mT
