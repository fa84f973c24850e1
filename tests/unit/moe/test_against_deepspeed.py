"""Who stays under a capacity, the gates of what is left, and the balance loss: what DeepSpeed says of them."""

from dataclasses import replace

import pytest
import torch

from moetrain.moe.balance.switch import SwitchLoss
from moetrain.moe.capacity import Capacity, without_dropped
from moetrain.moe.router.softmax import SoftmaxTopK
from moetrain.testing.fake import fake_context

sharded_moe = pytest.importorskip("deepspeed.moe.sharded_moe")
pytestmark = pytest.mark.unit
T, D, E = 96, 12, 8


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("factor", [0.4, 0.9, 1.3])
@pytest.mark.parametrize(("drop", "theirs"), [("position", "position"), ("probability", "probs")])
def test_top_k_with_a_capacity(drop, theirs, factor, k):
    torch.manual_seed(k)
    router = SoftmaxTopK(D, E, k, renormalize=False)
    torch.nn.init.normal_(router.weight, std=0.3)
    x_TD = torch.randn(T, D) + 0.5  # some experts are wanted by many, some by few
    routing = router(x_TD, replace(fake_context(1, T), index_BS=torch.arange(T)[None]))
    loss, gate_TEC, sent_TEC, _ = sharded_moe.topkgating(x_TD @ router.weight.T, k, factor, 1, drop_policy=theirs)

    rule = Capacity(factor, drop, n_experts=E)
    keep_TK = rule.keep(routing)
    assert 0 < int((~keep_TK).sum()) < keep_TK.numel()
    kept_TE = torch.zeros(T, E, dtype=torch.bool).scatter_(1, routing.expert_TK, keep_TK)
    assert torch.equal(kept_TE, sent_TEC.any(-1))

    gate_TK = without_dropped(routing, keep_TK, rule).gate_TK
    gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)  # they always do
    gate_TE = torch.zeros(T, E).scatter_(1, routing.expert_TK, gate_TK)
    torch.testing.assert_close(gate_TE, gate_TEC.sum(-1), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(SwitchLoss(E, 1.0).on_routing(routing), loss, rtol=1e-5, atol=0.0)
