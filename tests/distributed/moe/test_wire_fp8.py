"""8-bit rows on the way: experts get exactly the rounded hidden states of others, and nothing else changes.

In fp64, which dispatch.wire=fp8 refuses as a configuration, so that only the wire rounds.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moetrain.moe.dispatch import collective, two_level
from moetrain.moe.dispatch.base import ExchangeShape
from moetrain.moe.dispatch.local import LocalDispatch
from moetrain.moe.dispatch.wire import decode, encode
from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.testing import run_ranks
from moetrain.testing.fake import fake_experts, fake_routing, fake_tokens, own_experts

pytestmark = pytest.mark.distributed
D, H, E, K, WORLD, T = 16, 6, 300, 3, 4, 9  # more experts than any 8-bit label could count
SHAPE = ExchangeShape(tokens=T, d_model=D, top_k=K, dtype=torch.float64, device_type="cpu")
BUILDS = {
    "collective 1": (1, lambda: collective.build(E, dist.group.WORLD, SHAPE, 1)),
    "collective 4": (1, lambda: collective.build(E, dist.group.WORLD, SHAPE, 4)),
    "collective 3 padded": (1, lambda: collective.build(E, dist.group.WORLD, replace(SHAPE, rows=T), 3)),
    "two_level 1": (2, lambda: two_level.build(E, dist.group.WORLD, SHAPE, 1, 2)),
    "two_level 3": (2, lambda: two_level.build(E, dist.group.WORLD, SHAPE, 3, 2)),
}


def data(rank):
    """Rows of very different sizes, one of zeros; a rank with fewer tokens."""
    tokens = T - 4 * (rank == 1)
    x, expert, gate, upstream = fake_tokens(tokens, D, E, K, seed=rank, unused=0.2)
    with torch.no_grad():
        x *= torch.logspace(-3, 3, tokens)[:, None]
        x[2] = 0
    return x, expert, gate, upstream


def routing(expert, gate):
    return fake_routing(expert, gate, bounded=True)


def one_rank(name):
    dispatcher = BUILDS[name][1]()
    dispatcher.fp8 = True
    x, expert, gate, upstream = data(dist.get_rank())
    w = own_experts(fake_experts(E, D, H))
    y = dispatcher(x, routing(expert, gate), ReferenceExperts(), w)
    y.backward(upstream)
    after = torch.ones(3)
    dist.all_reduce(after)  # which 8-bit floats on gloo would have spoilt
    return y.detach(), x.grad, gate.grad, *(t.grad for t in w), after


@pytest.mark.parametrize("name", BUILDS)
def test_only_hidden_states_of_others_are_rounded(name):
    """The reference rounds a token for experts of other nodes, and takes its gradient as if it had not."""
    node_size = BUILDS[name][0]
    ranks, w = run_ranks(one_rank, WORLD, name), tuple(t.requires_grad_() for t in fake_experts(E, D, H))
    for rank in range(WORLD):
        x, expert, gate, upstream = data(rank)
        rounded = x + (decode(*encode(x.detach()), torch.float64) - x).detach()
        here = expert // (E // WORLD * node_size) == rank // node_size
        y = LocalDispatch()(x, routing(expert.where(here, -1), gate), ReferenceExperts(), w)
        y = y + LocalDispatch()(rounded, routing(expert.where(~here, -1), gate), ReferenceExperts(), w)
        y.backward(upstream)
        for got, expected in zip(ranks[rank][:3], (y.detach(), x.grad, gate.grad), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
        assert torch.equal(ranks[rank][-1], torch.full((3,), float(WORLD)))
    for index, expected in enumerate(w, start=3):
        torch.testing.assert_close(torch.cat([r[index] for r in ranks]), expected.grad, rtol=1e-11, atol=1e-11)


def sent(name):
    """(dtype, columns) of what travels by all-to-all, forward and backward."""
    dispatcher, moved, plain = BUILDS[name][1](), [], collective.start_all_to_all
    dispatcher.fp8 = True
    collective.start_all_to_all = lambda x, *counts: moved.append((x.dtype, x.shape[1])) or plain(x, *counts)
    x, expert, gate, upstream = data(dist.get_rank())
    w = own_experts(fake_experts(E, D, H))
    dispatcher(x, routing(expert, gate), ReferenceExperts(), w).backward(upstream)
    return moved


@pytest.mark.parametrize("name", ["collective 1", "two_level 1"])
def test_bytes_out_then_full_rows(name):
    full = torch.float64
    out, home, back = [(full, 2 * K + 1), (torch.uint8, D)], [(full, D)], [(full, D), (full, D), (full, K)]
    for moved in run_ranks(sent, WORLD, name):
        assert moved == [*out, *home, *back]
