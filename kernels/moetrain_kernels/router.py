"""Top-k routing in one kernel each way: scores, choice, gates, and counts from the router's logits.

One program holds the logits of a few tokens in registers. Only the logits and the chosen ids are kept for the backward
pass. Counts are integer atomics, whose sum does not depend on their order: everything repeats bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, interpreting, power_of_2

BLOCK_ELEMENTS = 4096  # logits of one program
SCORES = ("softmax", "sigmoid")
TINY = tl.constexpr(1e-20)


@triton.jit
def _scores(logit, inside, SIGMOID: tl.constexpr):
    """Scores and their normalised form (what balance losses look at), zero outside the experts."""
    if SIGMOID:
        small = tl.exp(-tl.abs(logit))  # never overflows
        score = tl.where(logit >= 0, 1.0, small) / (1.0 + small)
        score = tl.where(inside, score, 0.0)
        return score, score / tl.sum(score, axis=1)[:, None]
    shifted = tl.exp(logit - tl.max(logit, axis=1)[:, None])
    shifted = tl.where(inside, shifted, 0.0)
    score = shifted / tl.sum(shifted, axis=1)[:, None]
    return score, score


@triton.jit
def route_topk_kernel(
    logit_ptr,
    bias_E,
    valid_T,
    given_TK,
    expert_TK,
    gate_TK,
    balance_TE,
    count_E,
    num_tokens,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    E_POW2: tl.constexpr,
    K_POW2: tl.constexpr,
    TOKENS: tl.constexpr,
    SIGMOID: tl.constexpr,
    BY_LOGIT: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BIASED: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """Each token's K largest scores (+ bias), lowest id first among equals; what `given` names takes a slot's place."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e, slot = tl.arange(0, E_POW2), tl.arange(0, K_POW2)
    live = t < num_tokens
    inside = (e < E)[None, :] & (t >= 0)[:, None]
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    logit = tl.load(logit_ptr + at, mask=live[:, None] & inside, other=0.0)
    logit = tl.where(inside, logit, -float("inf"))
    score, balance = _scores(logit, inside, SIGMOID)
    tl.store(balance_TE + at, balance, mask=live[:, None] & inside)
    rank_by = logit if BY_LOGIT else score
    if BIASED:
        rank_by += tl.load(bias_E + e, mask=e < E, other=0.0)[None, :]
    rank_by = tl.where(inside, rank_by, -float("inf"))
    valid = tl.load(valid_T + t, mask=live, other=0) != 0

    gate = tl.zeros((TOKENS, K_POW2), tl.float32)
    hits = tl.zeros((TOKENS, E_POW2), tl.int32)
    for k in tl.static_range(K):
        best = tl.argmax(rank_by, axis=1, tie_break_left=True)
        rank_by = tl.where(e[None, :] == best[:, None], -float("inf"), rank_by)
        if GIVEN:
            given = tl.load(given_TK + t.to(tl.int64) * K + k, mask=live, other=-1).to(tl.int32)
            best = tl.where(given >= 0, given, best)
        chosen = e[None, :] == best[:, None]
        value = tl.sum(tl.where(chosen, score, 0.0), axis=1)
        gate = tl.where(slot[None, :] == k, value[:, None], gate)
        hits += chosen.to(tl.int32)
        tl.store(expert_TK + t.to(tl.int64) * K + k, tl.where(valid, best, -1).to(tl.int64), mask=live)
    if RENORMALIZE:
        gate = gate / (tl.sum(gate, axis=1)[:, None] + TINY)
    gate = tl.where(valid[:, None], gate * scale, 0.0)
    place = t.to(tl.int64)[:, None] * K + slot[None, :]
    tl.store(gate_TK + place, gate, mask=live[:, None] & (slot < K)[None, :])
    counted = tl.sum(tl.where(valid[:, None], hits, 0), axis=0)
    tl.atomic_add(count_E + e, counted.to(tl.int64), mask=(e < E) & (counted > 0), sem="relaxed")


@triton.jit
def route_topk_grad_kernel(
    logit_ptr,
    expert_TK,
    dgate_TK,
    dbalance_TE,
    dlogit_TE,
    num_tokens,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    E_POW2: tl.constexpr,
    TOKENS: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GATED: tl.constexpr,
    BALANCED: tl.constexpr,
):
    """Logit gradient of gates and balance scores; scores are worked out again from the logits."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, E_POW2)
    live = t < num_tokens
    inside = (e < E)[None, :] & (t >= 0)[:, None]
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    logit = tl.load(logit_ptr + at, mask=live[:, None] & inside, other=0.0)
    logit = tl.where(inside, logit, -float("inf"))
    score, balance = _scores(logit, inside, SIGMOID)
    dscore = tl.zeros((TOKENS, E_POW2), tl.float32)
    if BALANCED:
        dscore += tl.load(dbalance_TE + at, mask=live[:, None] & inside, other=0.0)
        if SIGMOID:  # balance = score / sum(score)
            total = tl.sum(score, axis=1)[:, None]
            dscore = (dscore - tl.sum(dscore * balance, axis=1)[:, None]) / total
    if GATED:
        dgate = tl.zeros((TOKENS, E_POW2), tl.float32)
        picked = tl.zeros((TOKENS, E_POW2), tl.float32)
        for k in tl.static_range(K):
            expert = tl.load(expert_TK + t.to(tl.int64) * K + k, mask=live, other=-1).to(tl.int32)
            upstream = tl.load(dgate_TK + t.to(tl.int64) * K + k, mask=live, other=0.0)
            here = e[None, :] == expert[:, None]
            dgate += tl.where(here, upstream[:, None], 0.0)
            picked += here.to(tl.float32)
        dgate *= scale
        if RENORMALIZE:  # gate = score / sum of the picked scores
            total = tl.sum(score * picked, axis=1)[:, None] + TINY
            mean = tl.sum(dgate * score, axis=1)[:, None] / total
            dgate = picked * (dgate - mean) / total
        dscore += dgate
    if SIGMOID:
        dlogit = dscore * score * (1.0 - score)
    else:
        dlogit = score * (dscore - tl.sum(score * dscore, axis=1)[:, None])
    tl.store(dlogit_TE + at, dlogit, mask=live[:, None] & inside)


class RouteTopK(torch.autograd.Function):
    """The launches behind `route_topk`; rule is (sigmoid, by_logit, renormalize, scale)."""

    @staticmethod
    def forward(ctx, logit_TE, valid_T, bias_E, given_TK, k, rule):
        sigmoid, by_logit, renormalize, scale = rule
        tokens, experts = logit_TE.shape
        expert_TK = torch.empty(tokens, k, dtype=torch.int64, device=logit_TE.device)
        gate_TK = torch.empty(tokens, k, dtype=torch.float32, device=logit_TE.device)
        balance_TE = torch.empty_like(logit_TE)
        count_E = torch.zeros(experts, dtype=torch.int64, device=logit_TE.device)
        block = _tokens_of_a_program(experts)
        if tokens:
            route_topk_kernel[(cdiv(tokens, block),)](
                logit_TE,
                bias_E,
                valid_T.to(torch.uint8),
                given_TK,
                expert_TK,
                gate_TK,
                balance_TE,
                count_E,
                tokens,
                scale,
                E=experts,
                K=k,
                E_POW2=power_of_2(experts),
                K_POW2=power_of_2(k),
                TOKENS=block,
                SIGMOID=sigmoid,
                BY_LOGIT=by_logit,
                RENORMALIZE=renormalize,
                BIASED=bias_E is not None,
                GIVEN=given_TK is not None,
                num_warps=4,
            )
        ctx.save_for_backward(logit_TE, expert_TK)
        ctx.rule = rule
        ctx.mark_non_differentiable(expert_TK, count_E)
        ctx.set_materialize_grads(False)
        return expert_TK, gate_TK, balance_TE, count_E

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _expert, dgate_TK, dbalance_TE, _count):
        logit_TE, expert_TK = ctx.saved_tensors
        sigmoid, _, renormalize, scale = ctx.rule
        if dgate_TK is None and dbalance_TE is None:
            return None, None, None, None, None, None
        dlogit_TE = torch.empty_like(logit_TE)
        tokens, experts = logit_TE.shape
        block = _tokens_of_a_program(experts)
        if tokens:
            route_topk_grad_kernel[(cdiv(tokens, block),)](
                logit_TE,
                expert_TK,
                None if dgate_TK is None else dgate_TK.contiguous(),
                None if dbalance_TE is None else dbalance_TE.contiguous(),
                dlogit_TE,
                tokens,
                scale,
                E=experts,
                K=expert_TK.shape[1],
                E_POW2=power_of_2(experts),
                TOKENS=block,
                SIGMOID=sigmoid,
                RENORMALIZE=renormalize,
                GATED=dgate_TK is not None,
                BALANCED=dbalance_TE is not None,
                num_warps=4,
            )
        return dlogit_TE, None, None, None, None, None


def _tokens_of_a_program(experts: int) -> int:
    return max(1, min(64, BLOCK_ELEMENTS // power_of_2(experts)))


@torch.compiler.disable
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
    """`expert_TK` int64, `gate_TK`, `balance_TE`, `count_E` int64: which experts a token goes to and how they weigh.

    logit_TE fp32. s = softmax or sigmoid of the logits, each expert's own; chosen are the k largest of s + bias (of
    logit + bias with by_logit), equal ones by id. gate = scale * s of the chosen, divided by their sum (+ 1e-20)
    with renormalize. balance = s / sum(s). Tokens that are not valid have experts -1 and gates 0 and are not counted.
    given_TK: experts to take instead of the own choice where >= 0. Differentiable once in the logits, through gates and
    balance. Raises ValueError for logits that are not fp32, and for k not in 1..E.
    """
    if logit_TE.dtype != torch.float32 or (logit_TE.device.type != "cuda" and not interpreting()):
        raise ValueError(f"the router kernels need fp32 logits on a GPU; got {logit_TE.dtype} on {logit_TE.device}")
    if not 1 <= k <= logit_TE.shape[1]:
        raise ValueError(f"k={k} of {logit_TE.shape[1]} experts")
    if score not in SCORES:
        raise ValueError(f"score={score!r} is none of {', '.join(SCORES)}")
    bias_E = None if bias_E is None else bias_E.float().contiguous()
    given_TK = None if given_TK is None else given_TK.contiguous()
    rule = (score == "sigmoid", by_logit, renormalize, float(scale))
    return RouteTopK.apply(logit_TE.contiguous(), valid_T.contiguous(), bias_E, given_TK, k, rule)
