"""dispatch=deepep beside a stand-in that does what deep_ep.Buffer documents, over gloo: the library is nowhere here."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from moetrain.comm.collectives import start_all_to_all
from moetrain.moe.dispatch import deepep
from moetrain.moe.dispatch.base import ExchangeShape
from moetrain.moe.dispatch.deepep import DeepEPDispatch, distance, make_buffer
from moetrain.testing import run_ranks

pytestmark = pytest.mark.distributed
D, E, K, WORLD = 16, 8, 3, 4
SHAPE = ExchangeShape(tokens=64, d_model=D, top_k=K, dtype=torch.float32, device_type="cpu")


class Buffer:
    """One row to each rank that holds an expert of a token, in rank order; received experts number the rank's own."""

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0):
        assert num_nvl_bytes == 32 + D * 4
        assert num_rdma_bytes == 16
        self.group, self.ranks = group, group.size()

    @staticmethod
    def get_dispatch_config(num_ranks):
        hints = {"get_nvl_buffer_size_hint": lambda row, ranks: 32 + row, "get_rdma_buffer_size_hint": lambda *_: 16}
        return SimpleNamespace(**hints)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx, num_experts):
        assert topk_idx.dtype == torch.int64
        self.experts = num_experts // self.ranks
        owner = torch.where(topk_idx >= 0, topk_idx // self.experts, -1)
        wanted = torch.stack([(owner == rank).any(1) for rank in range(self.ranks)], dim=1)
        per_expert = torch.stack([(topk_idx == e).any(1).sum() for e in range(num_experts)]).int()
        return wanted.sum(0).int(), None, per_expert, wanted, None

    def dispatch(self, x, handle=None, topk_idx=None, topk_weights=None, num_tokens_per_rank=None, **layout):
        assert x.is_contiguous()
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            token, send, receive, _ = handle
            return self._move(x[token], send, receive), None, None, None, None, None
        assert topk_weights.dtype == torch.float32
        assert set(layout) == {"num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank"}
        came = torch.empty_like(num_tokens_per_rank)
        dist.all_to_all_single(came, num_tokens_per_rank, group=self.group)
        send, receive = num_tokens_per_rank.tolist(), came.tolist()
        token = layout["is_token_in_rank"].T.nonzero()[:, 1]
        handle = (token, send, receive, len(x))
        first = self.group.rank() * self.experts
        slot, weight = (
            self._move(topk_idx[token], send, receive) - first,
            self._move(topk_weights[token], send, receive),
        )
        other = (slot < 0) | (slot >= self.experts)
        slot, weight = slot.masked_fill(other, -1), weight.masked_fill(other, 0)
        return self._move(x[token], send, receive), slot, weight, [], handle, None

    def combine(self, x, handle, topk_weights=None):
        token, send, receive, tokens = handle
        sums = [x.new_zeros(tokens, x.shape[1]).index_add_(0, token, self._move(x, receive, send))]
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            home = self._move(topk_weights, receive, send)
            sums.append(home.new_zeros(tokens, home.shape[1]).index_add_(0, token, home))
        return sums[0], sums[1] if len(sums) > 1 else None, None

    def _move(self, x, send, receive):
        return start_all_to_all(x, send, receive, self.group).wait()


class Wrong(Buffer):
    """Adds nothing up."""

    def combine(self, x, handle, topk_weights=None):
        y, gates, event = super().combine(x, handle, topk_weights)
        return y * 0.9, gates, event


@pytest.mark.parametrize(("library", "least", "most"), [(Buffer, 0.0, 1e-6), (Wrong, 0.05, 1.0)])
def test_equals_collective(library, least, most):
    """fp32, a sum of at most 8 products' sums of 16 each: a few roundings of 6e-8."""

    def one():
        dispatcher = DeepEPDispatch(E, dist.group.WORLD, make_buffer(library, dist.group.WORLD, SHAPE))
        return distance(dispatcher, E, dist.group.WORLD, SHAPE)

    for found in run_ranks(one, WORLD):
        assert least <= found <= most


def test_refused_by_name(monkeypatch):
    def refused(message, library, **changes):
        if library is not None:
            module = ModuleType("deep_ep")
            module.Buffer, module.__spec__ = library, SimpleNamespace(name="deep_ep")
            monkeypatch.setitem(sys.modules, "deep_ep", module)
        shape = ExchangeShape(**{**vars(SHAPE), **changes})
        with pytest.raises(ValueError, match=message):
            deepep.build(E, dist.group.WORLD, shape)

    def one():
        refused(r"dispatch=deepep needs the package deep_ep.*: dispatch=collective", None)
        refused("moves bf16 rows between GPUs, not float32 on cpu", Buffer)
        monkeypatch.setattr(deepep, "distance", lambda *_: float("nan"))
        monkeypatch.setattr(deepep, "make_buffer", lambda *_: None)
        refused("is nan off dispatch=collective", Buffer, dtype=torch.bfloat16, device_type="cuda")
        refused(r"router\.rounding", Buffer, dtype=torch.bfloat16, device_type="cuda", fixed_slots=False)

    run_ranks(one, 2)
