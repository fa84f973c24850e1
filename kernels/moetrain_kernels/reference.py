"""Plain-torch meaning of every kernel in this package, under the same names.

Shape legend: T tokens, K slots per token, S = T*K slots, R rows (active slots sorted by expert), D model, F expert
hidden, E experts. Every function runs on any device and in any floating dtype; tests compare with fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Rows:
    """Active slots in expert order: `slot_R` (row -> slot), `row_TK` (slot -> row or -1), `offsets_E1` (first row)."""

    slot_R: torch.Tensor
    row_TK: torch.Tensor
    offsets_E1: torch.Tensor

    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first row, end row) of every expert, empty ones included."""
        offsets = self.offsets_E1.tolist()
        return [(e, offsets[e], offsets[e + 1]) for e in range(len(offsets) - 1)]


def sort_rows(expert_TK: torch.Tensor, num_experts: int) -> Rows:
    """Order the slots by expert, by slot within an expert; slots outside [0, E) have no row."""
    expert_S = expert_TK.reshape(-1).long()
    used_S = (expert_S >= 0) & (expert_S < num_experts)
    key_S = torch.where(used_S, expert_S, num_experts)
    slot_R = torch.argsort(key_S, stable=True)[: int(used_S.sum())]
    row_S = torch.full_like(expert_S, -1)
    row_S[slot_R] = torch.arange(slot_R.numel(), device=slot_R.device)
    counts_E = torch.bincount(key_S, minlength=num_experts + 1)[:num_experts]
    offsets_E1 = functional.pad(counts_E.cumsum(0), (1, 0))
    return Rows(slot_R, row_S.reshape(expert_TK.shape), offsets_E1)


def up_swiglu(x_TD: torch.Tensor, rows: Rows, w_gate_up_E2FD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-activation `h_R2F` (gate columns first) and activation `a_RF = silu(gate) * up` of every row's token."""
    x_RD = x_TD[rows.slot_R // rows.row_TK.shape[1]]
    h_R2F = torch.cat([x_RD[a:b] @ w_gate_up_E2FD[e].flatten(0, 1).T for e, a, b in rows.spans()])
    gate_RF, up_RF = h_R2F.chunk(2, dim=1)
    return h_R2F, functional.silu(gate_RF) * up_RF


def grouped_gemm(a_RI: torch.Tensor, rows: Rows, w_EOI: torch.Tensor) -> torch.Tensor:
    """`out_RO`: each row times the transpose of its expert's [O, I] matrix."""
    return torch.cat([a_RI[a:b] @ w_EOI[e].T for e, a, b in rows.spans()])


def combine(y_RD: torch.Tensor, row_TK: torch.Tensor, gate_TK: torch.Tensor | None = None) -> torch.Tensor:
    """`out_TD`: the (weighted) sum of each token's rows; slots without a row add nothing."""
    gathered_TKD = y_RD.new_zeros(*row_TK.shape, y_RD.shape[1])
    used_TK = row_TK >= 0
    gathered_TKD[used_TK] = y_RD[row_TK[used_TK]]
    if gate_TK is not None:
        gathered_TKD = gathered_TKD * gate_TK.to(gathered_TKD.dtype)[..., None]
    return gathered_TKD.sum(1)


def swiglu_grad(
    b_RF: torch.Tensor, gate_TK: torch.Tensor, rows: Rows, h_R2F: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward of gate weight and SwiGLU from H alone: `dh_R2F`, `gate * a_RF`, `dgate_R`.

    b = dy @ W_down of the row's token. d(gate) = <b, a>: the expert's output is not needed.
    """
    gate_R = gate_TK.reshape(-1)[rows.slot_R].to(h_R2F.dtype)
    g_RF, u_RF = h_R2F.chunk(2, dim=1)
    s_RF = torch.sigmoid(g_RF)
    a_RF = g_RF * s_RF * u_RF
    da_RF = gate_R[:, None] * b_RF
    dh_R2F = torch.cat([da_RF * u_RF * s_RF * (1 + g_RF * (1 - s_RF)), da_RF * g_RF * s_RF], dim=1)
    return dh_R2F, gate_R[:, None] * a_RF, (b_RF * a_RF).sum(1)


def weight_grad(left_RM: torch.Tensor, right_RN: torch.Tensor, rows: Rows) -> torch.Tensor:
    """`dw_EMN`: per expert, left^T @ right over that expert's rows; zero for an expert without rows."""
    return torch.stack([left_RM[a:b].T @ right_RN[a:b] for _, a, b in rows.spans()])


def moe_experts(
    x_TD: torch.Tensor,
    expert_TK: torch.Tensor,
    gate_TK: torch.Tensor,
    w_gate_up_E2FD: torch.Tensor,
    w_down_EDF: torch.Tensor,
    *,
    max_rows: int | None = None,
) -> torch.Tensor:
    """y_t = sum over slots k of gate[t, k] * down_e(silu(gate_e x_t) * up_e x_t), e = expert[t, k]; differentiable.

    `max_rows` is accepted for the common signature: this version needs no bound.
    """
    rows = sort_rows(expert_TK, w_down_EDF.shape[0])
    _, a_RF = up_swiglu(x_TD, rows, w_gate_up_E2FD)
    return combine(grouped_gemm(a_RF, rows, w_down_EDF), rows.row_TK, gate_TK)


def route_topk(
    logit_TE: torch.Tensor,
    k: int,
    valid_T: torch.Tensor,
    *,
    score: str = "softmax",
    by_logit: bool = False,
    renormalize: bool = True,
    scale: float = 1.0,
    bias_E: torch.Tensor | None = None,
    given_TK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`expert_TK`, `gate_TK`, `balance_TE`, `count_E`, as router.route_topk says, in the logits' dtype."""
    score_TE = logit_TE.softmax(-1) if score == "softmax" else logit_TE.sigmoid()
    rank_by_TE = (logit_TE if by_logit else score_TE).detach()
    if bias_E is not None:
        rank_by_TE = rank_by_TE + bias_E
    expert_TK = rank_by_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    if given_TK is not None:
        expert_TK = torch.where(given_TK >= 0, given_TK, expert_TK)
    gate_TK = score_TE.gather(1, expert_TK)
    if renormalize:
        gate_TK = gate_TK / (gate_TK.sum(1, keepdim=True) + 1e-20)
    gate_TK = torch.where(valid_T[:, None], gate_TK * scale, 0.0)
    expert_TK = torch.where(valid_T[:, None], expert_TK, -1)
    count_E = torch.bincount(expert_TK[valid_T].flatten(), minlength=logit_TE.shape[1])
    return expert_TK, gate_TK, score_TE / score_TE.sum(1, keepdim=True), count_E


def cross_entropy(
    logit_CV: torch.Tensor, target_C: torch.Tensor, mask_C: torch.Tensor, grad_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`loss_C` and `grad_CV`, as softmax_loss.cross_entropy says, the loss in the logits' dtype."""
    logit_CV = torch.where(mask_C[:, None], logit_CV, 0.0)
    target_C = torch.where(mask_C, target_C, 0)
    log_prob_CV = logit_CV.log_softmax(-1)
    loss_C = torch.where(mask_C, -log_prob_CV.gather(1, target_C[:, None])[:, 0], 0.0)
    if grad_dtype is None:
        return loss_C, None
    grad_CV = log_prob_CV.exp() - functional.one_hot(target_C, logit_CV.shape[1])
    return loss_C, torch.where(mask_C[:, None], grad_CV, 0.0).to(grad_dtype)


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; differentiable."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta, and `rms_norm` of it."""
    total = x + delta
    return total, rms_norm(total, weight_D, eps)


def norm_rope(
    x_BHSd: torch.Tensor,
    weight_d: torch.Tensor | None,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    eps: float = 0.0,
    interleaved: bool = False,
) -> torch.Tensor:
    """As rotation.norm_rope says; differentiable."""
    if weight_d is not None:
        x_BHSd = rms_norm(x_BHSd, weight_d, eps)
    a, b = (x_BHSd[..., 0::2], x_BHSd[..., 1::2]) if interleaved else x_BHSd.chunk(2, dim=-1)
    cos, sin = cos_sin
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def convert(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None) -> torch.Tensor:
    """x * scale in `dtype`."""
    return (x if scale is None else x * scale).to(dtype)


def adamw(
    parameters: list[torch.Tensor],
    grads: list[torch.Tensor],
    moments: tuple[list[torch.Tensor], list[torch.Tensor]],
    steps: list[torch.Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    divisor: torch.Tensor | None = None,
) -> None:
    """In place, as update.adamw says."""
    for p, g, m, v, step in zip(parameters, grads, *moments, steps):
        g = g if divisor is None else g / divisor
        m.lerp_(g, 1 - betas[0])
        v.lerp_(g * g, 1 - betas[1])
        denominator = (v / (1 - betas[1] ** step)).sqrt() + eps
        p.mul_(1 - lr * weight_decay).sub_(lr / (1 - betas[0] ** step) * m / denominator)
