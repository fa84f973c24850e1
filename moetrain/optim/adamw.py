"""AdamW over parameters of two meshes.

Dense parameters are DTensors on the attention mesh, experts on the expert mesh, and in one process all are plain
tensors. A fused or foreach update takes lists of tensors and refuses a list that mixes meshes, so each mesh gets its
own parameter groups. Groups depend on the layout, then, and checkpoints store state by parameter name, not by group.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from moetrain.comm.shards import local
from moetrain.config.values import require_above_0, require_range
from moetrain.fused import fused

NamedParameters = Iterable[tuple[str, Parameter]]


class FusedAdamW(torch.optim.AdamW):
    """AdamW over each rank's own part of every parameter, in one pass over memory. torch's dispatch of lists of
    DTensors costs the host milliseconds in which the device has nothing to do.

    grad_divisor: what the next step divides gradients by, in the pass over them that it makes anyway; None is 1.
    """

    grad_divisor: Tensor | None = None

    @property
    def divides(self) -> bool:
        """Whether `grad_divisor` is heeded. It is fp32, which gradients in fp64 must not be rounded to."""
        return all(p.dtype == torch.float32 for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """As torch's, without closures, `amsgrad`, and `maximize`."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in parameters]
            steps = [local(state["step"]) for state in states]
            torch._foreach_add_(steps, 1)
            here, grads = [local(p) for p in parameters], [local(p.grad).contiguous() for p in parameters]
            first, second = ([local(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq"))
            (beta1, beta2), lr, eps, decay = group["betas"], group["lr"], group["eps"], group["weight_decay"]
            if parameters and fused(here[0]) and self.divides and all(p.is_contiguous() for p in here):
                import moetrain_kernels

                rates = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay}
                moetrain_kernels.adamw(here, grads, (first, second), steps, divisor=self.grad_divisor, **rates)
                continue
            torch._fused_adamw_(
                here,
                grads,
                first,
                second,
                [],
                steps,
                amsgrad=False,
                maximize=False,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=decay,
                eps=eps,
                grad_scale=self.grad_divisor,
            )
        self.grad_divisor = None


def build(
    named_parameters: NamedParameters,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    decay_embeddings: bool = True,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with zeroed state for every parameter that needs a gradient.

    Norm weights, biases, and every other parameter of less than two dimensions do not decay; embeddings (names with
    `embed`) only if decay_embeddings. Stacked expert weights are matrices and decay. Fused on CUDA, foreach elsewhere.
    State exists from the start, so a parameter that got no gradient yet (an idle expert) is saved and restored like
    any other. Each group keeps its peak rate in `initial_lr`. Raises ValueError for hyper-parameters out of range.
    """
    require_range("lr", lr, 0, float("inf"))
    require_above_0("eps", eps, 1e-8)  # a row that never had a gradient would become 0 / 0
    require_range("weight_decay", weight_decay, 0, float("inf"))
    if len(betas) != 2:
        raise ValueError(f"betas has {len(betas)} values, {list(betas)}; the nearest legal value is [0.9, 0.95]")
    for beta in betas:
        require_range("betas", beta, 0, 1 - 1e-6)
    groups: dict[tuple[bool, Any], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        decays = _decays(name, parameter, decay_embeddings)
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        new = {"params": [], "lr": lr, "initial_lr": lr, "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((decays, mesh), new)["params"].append(parameter)
    if not groups:
        raise ValueError("the model has no parameter that needs a gradient")
    on_cuda = all(p.device.type == "cuda" for group in groups.values() for p in group["params"])
    optimizer = (FusedAdamW if on_cuda else torch.optim.AdamW)(
        list(groups.values()),
        lr=lr,
        betas=(float(betas[0]), float(betas[1])),
        eps=eps,
        fused=on_cuda or None,
        foreach=None if on_cuda else True,
    )
    _create_state(optimizer, on_cuda)
    return optimizer


def fill_missing_gradients(parameters: Iterable[Tensor]) -> None:
    """Give parameters without a gradient a zero one.

    An optimizer skips parameters whose gradient is None: no decay, no step count. Whether an idle expert has None or
    zeros depends on which rank it lives on, so without this the update would depend on the layout.
    """
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _decays(name: str, parameter: Tensor, decay_embeddings: bool) -> bool:
    path = name.lower().split(".")
    if parameter.ndim < 2 or path[-1].endswith("bias") or any("norm" in part for part in path):
        return False
    return decay_embeddings or not any("embed" in part for part in path)


def _create_state(optimizer: torch.optim.AdamW, on_cuda: bool) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # The fused kernel reads the step on the device; elsewhere a host scalar avoids synchronising on it.
            device = parameter.device if on_cuda else torch.device("cpu")
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
