"""Copies over memory whose lanes run beside the host as a GPU's streams do: what is not waited for is not there."""

import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moetrain.moe.dispatch.base import ExchangeShape
from moetrain.moe.dispatch.chunks import Chunks
from moetrain.moe.dispatch.copy_engine import CopyEngineDispatch, regions
from moetrain.moe.dispatch.local import LocalDispatch
from moetrain.moe.experts.pieces import CallPieces
from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.testing import run_ranks
from moetrain.testing.fake import fake_experts, fake_routing, fake_tokens, own_experts
from moetrain.testing.peer import ThreadedMemory

pytestmark = pytest.mark.distributed
D, H, E, K, WORLD, MOST, LAYERS = 8, 6, 8, 3, 4, 14, 3
SHAPE = ExchangeShape(tokens=MOST, d_model=D, top_k=K, dtype=torch.float64, device_type="cpu")


def data(rank, layer):
    """Uneven tokens, none at all, unused slots; the last rank's want experts of rank 0 only."""
    tokens = [9 + layer, 0 if layer else 5, 8, 7][rank]
    x, expert, gate, upstream = fake_tokens(tokens, D, E, K, seed=100 * layer + rank, unused=0.2)
    if rank == WORLD - 1:
        expert = torch.cat([expert[:, :1].clamp(min=0) % (E // WORLD), torch.full_like(expert[:, 1:], -1)], dim=1)
    return x, expert, gate, upstream


class SlowWrites(ThreadedMemory):
    """Kernels that put out slots are slower than copies."""

    def write(self, to, source, lane):
        self._do(lane, time.sleep, 0.02)
        super().write(to, source, lane)


class SortsFirst(CallPieces):
    """Reads slots while rows are still on their way."""

    def start(self, x_MD, expert_MK, gate_MK, base, land=None):
        super().start(x_MD, expert_MK.clone(), gate_MK.clone(), base, land)


class Experts(ReferenceExperts):
    def divide(self, weights, wanted):
        return SortsFirst(self, weights, wanted)


def one_rank(directory, chunks, jitter):
    """Several layers over one memory, each with another bound on its rows: all forward, then all backward."""
    rank = dist.get_rank()
    memory = SlowWrites(dist.group.WORLD, regions(SHAPE, WORLD)[1], directory, jitter[rank])
    dispatcher = CopyEngineDispatch(E, memory, SHAPE, Chunks("copy_engine", chunks, (), dist.group.WORLD))
    w, done = own_experts(fake_experts(E, D, H)), []
    for layer in range(LAYERS):
        x, expert, gate, upstream = data(rank, layer)
        routing = replace(fake_routing(expert, gate), most=9 + layer)
        done.append((dispatcher(x, routing, Experts(), w), x, gate, upstream))
    for y, _, _, upstream in reversed(done):
        y.backward(upstream)
    dist.barrier()
    return [(y.detach(), x.grad, gate.grad) for y, x, gate, _ in done], [t.grad for t in w]


@pytest.mark.parametrize(
    ("chunks", "jitter"),
    [  # 5: a part ends amid a source's rows, which then come home by two flags
        (2, (0.004,) * WORLD),
        (3, (0.0, 0.03, 0.0, 0.0)),
        (4, (0.002, 0.0, 0.002, 0.02)),
        (5, (0.0, 0.02, 0.0, 0.0)),
    ],
)
def test_equals_one_process_whatever_is_late(chunks, jitter, tmp_path):
    ranks = run_ranks(one_rank, WORLD, tmp_path, chunks, jitter)
    w = tuple(t.requires_grad_() for t in fake_experts(E, D, H))
    for layer in range(LAYERS):
        for rank in range(WORLD):
            x, expert, gate, upstream = data(rank, layer)
            y = LocalDispatch()(x, fake_routing(expert, gate), ReferenceExperts(), w)
            y.backward(upstream)
            for got, want in zip(ranks[rank][0][layer], (y.detach(), x.grad, gate.grad), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for index, want in enumerate(w):
        torch.testing.assert_close(torch.cat([r[1][index] for r in ranks]), want.grad, rtol=1e-12, atol=1e-12)
