"""The measurement of chunk counts, with events that need no GPU."""

from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moetrain.moe.dispatch import chunks
from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.moe.types import Routing
from moetrain.testing.fake import fake_context

pytestmark = pytest.mark.unit


def test_measuring_inside_a_layer_that_is_recomputed_recomputes_nothing():
    g = torch.Generator().manual_seed(0)
    x, gate, *weights = (torch.randn(*s, generator=g) for s in ((8, 4), (8, 2), (3, 2, 6, 4), (3, 4, 6)))
    expert_TK = torch.arange(16).view(8, 2) % 3
    routing = Routing(expert_TK, gate, x, x, x, expert_TK, fake_context(1, 8))
    runs, layers = [], []

    def run(count, x_TD, routing, weights):
        runs.append(count)
        return ReferenceExperts()(x_TD, routing.expert_TK, routing.gate_TK, *weights)

    def layer(x_TD):
        if not layers:  # a run measures once
            layers.append(chunks._measure(run, 2, x_TD, routing, tuple(weights)))
        else:
            layers.append(None)
        return x_TD.square()

    with mock.patch("torch.cuda.Event") as event, mock.patch("torch.cuda.synchronize"):
        event.return_value.elapsed_time.return_value = 1.0
        y = checkpoint(layer, x.requires_grad_(), use_reentrant=False)
    assert len(layers) == 1
    assert runs == [2] * (chunks.WARMUP + chunks.REPEATS)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, 2 * x)
