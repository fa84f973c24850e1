"""Tokens travel by DeepEP's high-throughput kernels (github.com/deepseek-ai/DeepEP), where that package is installed.

Written from its documented interface, `deep_ep.Buffer` of version 1: `dispatch` brings one row to each rank that holds
an expert of a token, `combine` returns and adds up one row from each. Nobody has run this beside the library, only
beside a stand-in (tests/distributed/moe/test_deepep.py). So `build` first compares both passes with dispatch=collective
on a few tokens, and refuses to go on if they differ.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.dispatch import collective
from moetrain.moe.dispatch.base import Arrived, Dispatcher, ExchangeShape, Slots, Weights
from moetrain.moe.dispatch.exchange import exchange
from moetrain.moe.experts.base import ExpertBackend
from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.moe.types import Routing, TokenContext, Totals

BAR = 2.0**-6  # bf16 rounds to 2^-9; a result is a sum of rounded parts


class DeepEPDispatch:
    """buffer: a `deep_ep.Buffer` of the group's ranks. One call of the experts a layer; the host waits once, in it."""

    def __init__(self, n_experts: int, group: dist.ProcessGroup, buffer: Any) -> None:
        self.n_experts, self.buffer = n_experts, buffer
        self.first_expert = group.rank() * (n_experts // group.size())

    def __call__(self, x_TD: Tensor, routing: Routing, experts: ExpertBackend, weights: Weights) -> Tensor:
        return exchange(x_TD, routing, _Trip(self), experts, weights, self.first_expert)


class _Trip:
    pieces, first_stays, ahead = 1, False, False

    def __init__(self, dispatch: DeepEPDispatch) -> None:
        self.dispatch, self.handle = dispatch, None  # DeepEP's own, from the first leg on

    def start(self, row_TD: Tensor, slots: Slots | None = None) -> _Leg:
        return _Leg(self, row_TD.contiguous(), slots)


class _Leg:
    def __init__(self, trip: _Trip, row_TD: Tensor, slots: Slots | None) -> None:
        self.trip, buffer = trip, trip.dispatch.buffer
        self.slots: Slots | None = None
        if slots is None:
            self.row_MD = buffer.dispatch(row_TD, handle=trip.handle)[0]
            return
        expert_TK, gate_TK = slots[0].long().contiguous(), slots[1].float().contiguous()
        layout = buffer.get_dispatch_layout(expert_TK, trip.dispatch.n_experts)
        to_rank_R, to_node, to_expert_E, wanted_TR, _ = layout
        counts = {"num_tokens_per_rank": to_rank_R, "num_tokens_per_rdma_rank": to_node}
        counts |= {"num_tokens_per_expert": to_expert_E, "is_token_in_rank": wanted_TR}
        came = buffer.dispatch(row_TD, topk_idx=expert_TK, topk_weights=gate_TK, **counts)
        self.row_MD, slot_MK, gate_MK, _, trip.handle, _ = came
        expert_MK = torch.where(slot_MK >= 0, slot_MK + trip.dispatch.first_expert, -1)  # it numbers a rank's from 0
        self.slots = expert_MK, gate_MK

    def arrive(self, piece: int) -> Arrived:
        return self.row_MD, self.slots, None

    def room(self, piece: int) -> None:
        return None

    def rest(self) -> None:
        return None

    def give(self, piece: int, row_MD: Tensor, gate_MK: Tensor | None = None) -> None:
        gates = None if gate_MK is None else gate_MK.float().contiguous()
        combined = self.trip.dispatch.buffer.combine(row_MD.contiguous(), self.trip.handle, topk_weights=gates)
        self.home: tuple[Tensor, Tensor | None] = combined[0], combined[1]

    def collect(self) -> tuple[Tensor, Tensor | None]:
        return self.home


def build(n_experts: int, group: dist.ProcessGroup | None, shape: ExchangeShape) -> DeepEPDispatch:
    """Raises ValueError where the package is missing, for what it cannot move, and when its sums are wrong."""
    if group is None or group.size() == 1:
        raise ValueError("dispatch=deepep with parallel.ep=1 has no peers; nearest legal value: dispatch=local")
    reason = None
    if find_spec("deep_ep") is None:
        reason = "needs the package deep_ep, built from DeepEP's source"
    elif shape.device_type != "cuda" or shape.dtype != torch.bfloat16:
        reason = f"moves bf16 rows between GPUs, not {str(shape.dtype).removeprefix('torch.')} on {shape.device_type}"
    elif not shape.fixed_slots:
        reason = "with router.rounding, whose slots vary"
    if reason is not None:
        raise ValueError(f"dispatch=deepep {reason}; nearest legal value: dispatch=collective")
    dispatcher = DeepEPDispatch(n_experts, group, make_buffer(import_module("deep_ep").Buffer, group, shape))
    error = distance(dispatcher, n_experts, group, shape)
    if not error <= BAR:
        reason = f"is {error:.1e} off dispatch=collective: this version of deep_ep is not the one it was written for"
        raise ValueError(f"dispatch=deepep {reason}; nearest legal value: dispatch=collective")
    return dispatcher


def make_buffer(library: Any, group: dist.ProcessGroup, shape: ExchangeShape) -> Any:
    """A `library` (deep_ep.Buffer) as large as its own configurations want it."""
    row_bytes, ranks = shape.d_model * shape.dtype.itemsize, group.size()
    configs = [library.get_dispatch_config(ranks), library.get_combine_config(ranks)]
    nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs)
    return library(group, nvlink, max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs))


def distance(dispatcher: Dispatcher, n_experts: int, group: dist.ProcessGroup, shape: ExchangeShape) -> float:
    """Largest relative L2 distance of y and of any gradient from dispatch=collective, on a few tokens. Collective."""
    g, device, here = torch.Generator().manual_seed(group.rank()), shape.device_type, n_experts // group.size()
    normal = lambda *size: torch.randn(size, generator=g).to(device, shape.dtype)  # noqa: E731
    expert_TK = torch.rand(64, n_experts, generator=g).argsort(-1)[:, : shape.top_k]
    expert_TK[torch.rand(expert_TK.shape, generator=g) < 0.3] = -1
    gate_TK, x_TD, dy_TD = torch.rand(expert_TK.shape, generator=g), *(normal(64, shape.d_model) for _ in range(2))
    weights, none = (normal(here, 2, 16, shape.d_model), normal(here, shape.d_model, 16)), torch.empty(0)
    context = TokenContext(none, none, none, Totals(none, none, 1, 1))
    found = []
    for one in (dispatcher, collective.build(n_experts, group, shape, 1)):
        x, gate, *w = (t.clone().requires_grad_() for t in (x_TD, gate_TK.to(device), *weights))
        routing = Routing(expert_TK.to(device), gate, none, none, none, none, context)
        y = one(x, routing, ReferenceExperts(), (w[0], w[1]))
        found.append([y.detach(), *torch.autograd.grad(y, (x, gate, *w), dy_TD)])
    far = [(a - b).float().norm() / b.float().norm().clamp(min=1e-30) for a, b in zip(*found)]
    worst = torch.stack(far).max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group)
    return float(worst)
