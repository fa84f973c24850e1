"""What every top-k router shares: fp32 logits, deterministic selection, and building the `Routing`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.moe.types import Routing, TokenContext


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Logits [T, E] computed in fp32, or in fp64 for fp64 inputs, whatever autocast or the compute dtype says."""
    with torch.autocast(x_TD.device.type, enabled=False):
        if x_TD.is_cuda and x_TD.dtype == weight_ED.dtype == torch.bfloat16:
            return HalfLogits.apply(x_TD, weight_ED)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(dtype), weight_ED.to(dtype))


class HalfLogits(torch.autograd.Function):
    """x @ weight^T in fp32 from bf16 operands, on tensor cores: products of bf16 numbers are exact in fp32, and so are
    their sums. In the backward pass an fp32 gradient is the sum of two bf16 numbers but for 2^-17 of it: the matmuls
    run over both at once."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return wide_matmul(x_TD, weight_ED.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        high_TE = grads[0].to(x_TD.dtype)
        low_TE = (grads[0] - high_TE).to(x_TD.dtype)
        both_TE = torch.cat([high_TE, low_TE], dim=1)
        dx_TD = both_TE @ weight_ED.repeat(2, 1)
        # A sum over all tokens for few outputs: cut into as many as fill the device.
        parts = next(n for n in (8, 4, 2, 1) if len(x_TD) % n == 0)
        cut = [t.view(parts, -1, t.shape[1]) for t in (both_TE, x_TD)]
        dweight_ED = wide_matmul(cut[0].mT, cut[1]).sum(0).unflatten(0, (2, -1)).sum(0)
        return dx_TD, dweight_ED.to(weight_ED.dtype)


def wide_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of two bf16 matrices, or of each of two stacks, in fp32."""
    if not a.is_cuda:
        return a.float() @ b.float()
    return (torch.bmm if a.dim() == 3 else torch.mm)(a, b, out_dtype=torch.float32)


def top_k(score_TE: Tensor, k: int) -> Tensor:
    """Indices [T, k] of the k largest scores per token; equal scores go to the lowest index.

    torch.topk leaves ties to the device, and tied router rows (virtual-group upcycling) need them equal everywhere.
    """
    return score_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]


def choose(selection_TE: Tensor, k: int, context: TokenContext) -> Tensor:
    """The experts of each token [T, k]: the k best, or those that the context prescribes (recomputation, replay).

    Every router chooses through this, then takes gates from its own scores. Padding, -1 in what is prescribed, stays
    free. A router whose k varies reads `context.chosen_TK` itself.
    """
    expert_TK = top_k(selection_TE, k)
    if context.chosen_TK is None:
        return expert_TK
    return torch.where(context.chosen_TK >= 0, context.chosen_TK, expert_TK)


KERNELS = ("torch", "triton", "auto")


def check_kernels(kernels: str) -> str:
    """A router's option `kernels`; ValueError if there is no such choice."""
    if kernels not in KERNELS:
        raise ValueError(f"router.kernels={kernels!r}: nearest legal value: torch (of {', '.join(KERNELS)})")
    return kernels


def make_routing(
    *,
    expert_TK: Tensor,
    gate_TK: Tensor,
    selection_TE: Tensor,
    balance_TE: Tensor,
    logit_TE: Tensor,
    context: TokenContext,
) -> Routing:
    """Blank out padding tokens and count the choices of the others."""
    valid_T1 = context.valid_T[:, None]
    expert_TK = torch.where(valid_T1, expert_TK, -1)
    gate_TK = torch.where(expert_TK >= 0, gate_TK, 0.0)
    n_experts = logit_TE.shape[-1]
    return Routing(
        expert_TK=expert_TK,
        gate_TK=gate_TK,
        selection_TE=selection_TE.detach(),
        balance_TE=balance_TE,
        logit_TE=logit_TE,
        count_E=count_experts(expert_TK, n_experts),
        context=context,
        top_k=expert_TK.shape[1],
    )


def count_experts(expert_TK: Tensor, n_experts: int) -> Tensor:
    """int64 [E]: how often each expert occurs; -1 is not counted. No host synchronisation."""
    flat = torch.where(expert_TK >= 0, expert_TK, n_experts).flatten()
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:n_experts]
