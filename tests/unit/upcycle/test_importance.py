"""Importance of neurons, and the split that goes by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moetrain.checkpoint.tensors import model_tensors
from moetrain.model.build import build_model
from moetrain.model.generate import one_document
from moetrain.testing.dense import random_dense
from moetrain.upcycle.base import DenseFFN, Model
from moetrain.upcycle.convert import upcycled_config, upcycled_tensors
from moetrain.upcycle.importance import importance
from moetrain.upcycle.report import logits
from moetrain.upcycle.split import Split

pytestmark = pytest.mark.unit
TOKENS_BS = torch.randint(0, 264, (2, 16), generator=torch.Generator().manual_seed(1))
WIDTH, D = 48, 12


@pytest.fixture
def ffn():
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(WIDTH, D, generator=generator, dtype=torch.float64) for _ in range(3))
    return DenseFFN(gate, up, down.T.contiguous(), torch.rand(WIDTH, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("tied", [False, True])
def test_importance_is_what_one_backward_pass_of_the_whole_model_gives(tied):
    dense = random_dense(tie_embeddings=tied)
    got_LF = importance(dense, TOKENS_BS, torch.float64)
    model = build_model(dense.config, "cpu").double()
    for name, tensor in model_tensors(model, keep_vars=True).items():
        tensor.data = dense.weights[name].make()
    kept = []

    def keep(_, inputs):
        inputs[0].retain_grad()
        kept.append(inputs[0])

    for block in model.layers.values():
        block.mlp.w_down.register_forward_pre_hook(keep)
    logit_BSV = model(TOKENS_BS, one_document(TOKENS_BS))
    F.cross_entropy(logit_BSV[:, :-1].flatten(0, 1), TOKENS_BS[:, 1:].flatten()).backward()
    want_LF = torch.stack([(h * h.grad).abs().flatten(0, 1).mean(0) for h in kept]).detach()
    assert (got_LF - want_LF).abs().max() < 1e-12 * want_LF.max()


def test_shared_neurons_are_the_most_important(ffn):
    initializer = Split(4, 2, by="random", shared_experts=2)
    parts, shared = initializer.partition(ffn, 0, 0)
    assert (parts.shape, shared.shape) == ((4, 8), (16,))
    assert torch.equal(torch.cat([parts.flatten(), shared]).sort().values, torch.arange(WIDTH))
    assert ffn.importance_F[shared].min() > ffn.importance_F[parts.flatten()].max()


def test_experts_get_equal_shares_of_importance(ffn):
    parts, _ = Split(4, 2, by="importance").partition(ffn, 0, 0)
    assert torch.equal(parts.flatten().sort().values, torch.arange(WIDTH))
    shares = ffn.importance_F[parts].sum(1)
    # Dealt back and forth, two experts differ by at most one step of the sorted list in each pair of rounds.
    drawn = ffn.importance_F[Split(4, 2).partition(ffn, 0, 0)[0]].sum(1)
    assert shares.max() - shares.min() < 0.2 * (drawn.max() - drawn.min())
    hand = replace(ffn, importance_F=torch.arange(WIDTH, 0, -1).double())
    assert Split(4, 2, by="importance").partition(hand, 0, 0)[0][0].tolist() == [
        0,
        7,
        8,
        15,
        16,
        23,
        24,
        31,
        32,
        39,
        40,
        47,
    ]


@pytest.mark.parametrize("by", ["random", "clustering", "importance"])
@pytest.mark.parametrize("gate", [False, True])
def test_all_experts_and_the_shared_part_are_the_dense_model(by, gate):
    dense = random_dense()
    initializer = Split(4, 4, router_std=0.0, by=by, shared_experts=2, shared_gate=gate)
    prepared = initializer.prepare([dense])
    config = upcycled_config(prepared.config, initializer)
    assert (config.model.moe.d_expert, config.model.moe.d_shared, config.model.moe.shared_gate) == (8, 16, gate)
    moe = Model(config, upcycled_tensors(prepared, config, initializer, 0))
    want, got = logits(dense, TOKENS_BS, torch.float64), logits(moe, TOKENS_BS, torch.float64)
    assert (got - want).abs().max() < 1e-12 * want.abs().max()


def test_gate_mean_router_points_where_experts_look(ffn):
    initializer = Split(4, 2, router_rows="gate_mean", router_std=0.5)
    parts, _ = initializer.partition(ffn, 0, 0)
    router_ND = initializer.router(ffn, 0, 0)
    mean_ND = torch.stack([ffn.w_gate_FD[part].mean(0) for part in parts])
    assert F.cosine_similarity(router_ND, mean_ND).min() > 1 - 1e-6
    torch.testing.assert_close(router_ND.square().mean(1).sqrt(), torch.full((4,), 0.5).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Split(4, 2, shared_experts=-1), "shared_experts=-1; nearest legal value: 0"),
        (lambda: Split(4, 2, shared_gate=True), "shared_gate=true needs"),
        (lambda: Split(4, 2, shared_experts=1).d_expert(48), "nearest legal value of their sum: 4"),
        (lambda: Split(4, 2, router_rows="mean"), "router_rows='mean'; nearest legal value: normal"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
