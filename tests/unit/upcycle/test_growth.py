"""Growth in width and depth, against the model that was grown."""

from __future__ import annotations

import pytest
import torch

from moetrain.checkpoint.tensors import model_tensors
from moetrain.model.build import build_model
from moetrain.testing.dense import random_dense
from moetrain.upcycle.base import Model
from moetrain.upcycle.convert import upcycled_config, upcycled_tensors
from moetrain.upcycle.efficient_scale import EfficientScale
from moetrain.upcycle.growth import deepen, widen
from moetrain.upcycle.report import logits

pytestmark = pytest.mark.unit
TOKENS_BS = torch.randint(0, 264, (2, 16), generator=torch.Generator().manual_seed(1))
EXACT = 1e-12  # fp64: sums of up to 192 products over a few layers, in another order


def deviation(model, reference):
    want, got = logits(reference, TOKENS_BS, torch.float64), logits(model, TOKENS_BS, torch.float64)
    assert want.abs().max() > 0.5
    return float((got - want).abs().max() / want.abs().max())


def fits(model):
    """Every tensor is there with the shape that the configuration gives it."""
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in model_tensors(build_model(model.config, "cpu")).items()}
    assert {name: tensor.shape for name, tensor in model.weights.items()} == wanted
    assert all(tensor.make().shape == tensor.shape for tensor in model.weights.values())


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"tie_embeddings": True},
        {"attention__qkv_bias": True, "attention__out_bias": True},
        {"attention__qk_norm": "head"},
        {"attention__qk_norm": "full"},
        {"attention__n_kv_heads": 4},
    ],
)
@pytest.mark.parametrize("factor", [2, 3])
def test_width_keeps_the_function(features, factor):
    dense = random_dense(**features)
    grown = widen(dense, factor)
    fits(grown)
    model = grown.config.model
    assert (model.d_model, model.d_ff, model.attention.n_heads) == (32 * factor, 48 * factor, 4 * factor)
    assert model.attention.n_kv_heads == dense.config.model.attention.n_kv_heads
    assert deviation(grown, dense) < EXACT


def test_query_heads_grow_inside_their_group():
    """Heads 0, 1 look at key/value head 0 and heads 2, 3 at 1: tiled over all heads, copies would change groups."""
    w_q = widen(random_dense(), 2).weights["layers.0.attention.w_q.weight"].make().view(8, 8, 64)
    assert torch.equal(w_q[0], w_q[2])
    assert torch.equal(w_q[1], w_q[3])
    assert torch.equal(w_q[4], w_q[6])
    assert not torch.equal(w_q[0], w_q[4])


def test_advanced_initialisation_takes_new_neurons_from_the_next_layer():
    dense = random_dense()
    grown = widen(dense, 2, advanced=True)
    fits(grown)
    made = grown.weights["layers.0.mlp.w_gate.weight"].make()
    own, following = (dense.weights[f"layers.{layer}.mlp.w_gate.weight"].make() for layer in (0, 1))
    assert torch.equal(made[:48], torch.cat([own, own], dim=1) / 2)
    assert torch.equal(made[48:], torch.cat([following, following], dim=1) / 2)
    last, plain = (g.weights["layers.2.mlp.w_down.weight"].make() for g in (grown, widen(dense, 2)))
    assert torch.equal(last, plain)
    q = grown.weights["layers.0.attention.w_q.weight"].make().view(8, 8, 64)[..., :32]
    old, new = (dense.weights[f"layers.{i}.attention.w_q.weight"].make().view(4, 8, 32) / 2 for i in (0, 1))
    assert torch.equal(q, torch.cat([old[:2], new[:2], old[2:], new[2:]]))
    assert deviation(grown, dense) > 1e-2


@pytest.mark.parametrize("n_layers", [4, 6, 7])
def test_identity_depth_keeps_the_function(n_layers):
    dense = random_dense()
    grown = deepen(dense, n_layers, "identity")
    fits(grown)
    assert deviation(grown, dense) < EXACT


@pytest.mark.parametrize(("by", "order"), [("interpolate", [0, 0, 1, 1, 2, 2]), ("stack", [0, 1, 2, 0, 1, 2])])
def test_depth_orders(by, order):
    dense = random_dense()
    grown = deepen(dense, 6, by)
    fits(grown)
    for layer, origin in enumerate(order):
        for rest in ("attention.w_o.weight", "mlp.w_down.weight", "ffn_norm.weight"):
            name = f"layers.{origin}.{rest}"
            assert torch.equal(grown.weights[f"layers.{layer}.{rest}"].make(), dense.weights[name].make())
    assert deviation(grown, dense) > 1e-2


@pytest.mark.parametrize(
    "initializer",
    [EfficientScale(4, 2, 2, width=2, layers=5), EfficientScale(3, 2, width=3), EfficientScale(2, 2, 4, width=1)],
)
def test_scale_up_then_out_keeps_the_function(initializer):
    dense = random_dense()
    grown = initializer.prepare([dense])
    config = upcycled_config(grown.config, initializer)
    moe = Model(config, upcycled_tensors(grown, config, initializer, 0))
    fits(moe)
    assert deviation(moe, dense) < EXACT


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EfficientScale(4, 2, width=0), "width=0; nearest legal value: 1"),
        (lambda: EfficientScale(4, 2, depth_by="repeat"), "depth_by='repeat'; nearest legal value: identity"),
        (lambda: EfficientScale(4, 2, layers=2).prepare([random_dense()]), "layers=2 .* nearest legal value: 3"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
