"""Routing by the kernels of moetrain_kernels: scores, choice, gates, and counts in one launch each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetrain.moe.types import Routing, TokenContext


def usable(kernels: str, logit_TE: Tensor) -> bool:
    """Whether a router with option `kernels` computes these logits here: auto does where the kernels can run."""
    if kernels != "auto" or not logit_TE.is_cuda or logit_TE.dtype != torch.float32:
        return kernels == "triton"
    import moetrain_kernels  # here: not every machine has Triton, and none without a GPU needs it

    return moetrain_kernels.available()[0]


def fused_routing(logit_TE: Tensor, k: int, context: TokenContext, bias_E: Tensor | None, **rule: Any) -> Routing:
    """What `make_routing` builds from a plain top-k; rule: score, by_logit, renormalize, scale of route_topk."""
    import moetrain_kernels

    expert_TK, gate_TK, balance_TE, count_E = moetrain_kernels.route_topk(
        logit_TE, k, context.valid_T, bias_E=bias_E, given_TK=context.chosen_TK, **rule
    )
    selection_TE = (logit_TE if rule.get("by_logit") else balance_TE).detach()
    if rule["score"] == "sigmoid":
        selection_TE = logit_TE.detach().sigmoid()
    return Routing(
        expert_TK=expert_TK,
        gate_TK=gate_TK,
        selection_TE=selection_TE if bias_E is None else selection_TE + bias_E,
        balance_TE=balance_TE,
        logit_TE=logit_TE,
        count_E=count_E,
        context=context,
        top_k=k,
    )
