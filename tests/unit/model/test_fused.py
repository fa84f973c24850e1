"""That attention and loss hand the fused kernels what they mean: with the references in the kernels' place, in fp64,
nothing may change. What the kernels make of it is tests/unit/kernels/interpreted_model.py's."""

from __future__ import annotations

import moetrain_kernels
import pytest
import torch

from moetrain import fused as choice
from moetrain import loss as losses
from moetrain.config.model import AttentionConfig, ModelConfig, RopeConfig
from moetrain.model import norm, rope
from moetrain.model.attention import GQA, MLA
from moetrain.model.core import share
from moetrain.model.mlp import SwiGLU
from moetrain.moe.shared import SharedExperts
from moetrain.testing.fake import fake_context

pytestmark = pytest.mark.unit
GQA_SHAPE = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
MLA_SHAPE = {"kind": "mla", "n_heads": 4, "n_kv_heads": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 4}


@pytest.fixture
def called(monkeypatch):
    """Names of the kernels that were called, each replaced by its reference."""
    names = []

    def stand_in(name):
        def call(*args, **kwargs):
            names.append(name)
            return getattr(moetrain_kernels.reference, name)(*args, **kwargs)

        monkeypatch.setattr(moetrain_kernels, name, call)

    stand_in("norm_rope")
    stand_in("cross_entropy")
    stand_in("convert")
    stand_in("swiglu")
    stand_in("rms_norm")
    stand_in("add_rms_norm")
    return names


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (GQA, {**GQA_SHAPE, "qk_norm": "head"}),
        (GQA, {**GQA_SHAPE, "qk_norm": "full"}),
        (GQA, {**GQA_SHAPE, "rope": RopeConfig(interleaved=True)}),
        (MLA, {**MLA_SHAPE, "qk_nope_head_dim": 6, "v_head_dim": 6, "rope": RopeConfig(interleaved=True)}),
    ],
)
def test_attention(kind, options, called, monkeypatch):
    torch.manual_seed(0)
    config = ModelConfig(d_model=24, attention=AttentionConfig(**options), norm_eps=0.01)  # an eps that shows
    attention = kind(config).double()
    for name, parameter in attention.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    context = share(fake_context(2, 16), config.attention, torch.float64, documents=False)
    x = torch.randn(2, 16, 24, dtype=torch.float64, requires_grad=True)
    found = []
    for kernels in (False, True):
        monkeypatch.setattr(rope, "fused", lambda _, kernels=kernels: kernels)
        y = attention(x, context)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *attention.parameters()])])
    assert called == ["norm_rope"] * 2
    for plain, fused in zip(*found):
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


def test_norm_and_residual(called, monkeypatch):
    torch.manual_seed(0)
    module = norm.RMSNorm(6, 0.01).double()
    torch.nn.init.normal_(module.weight)
    x, delta = (torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = []
    for kernels in (False, True):
        monkeypatch.setattr(norm, "fused", lambda _, kernels=kernels: kernels)
        total, y = module.add(x, delta)
        loss = total.square().sum() + y.pow(3).sum() + module(x).sin().sum()
        found.append([total.detach(), y.detach(), *torch.autograd.grad(loss, [x, delta, module.weight])])
    assert called == ["add_rms_norm", "rms_norm"]
    for plain, fused in zip(*found):
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


def test_swiglu(called, monkeypatch):
    torch.manual_seed(0)
    layers = [SwiGLU(6, 10).double(), SharedExperts(6, 10, gated=True).double()]
    parameters = [p for layer in layers for p in layer.parameters()]
    for parameter in parameters:
        torch.nn.init.normal_(parameter)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for kernels in (False, True):
        monkeypatch.setattr(choice, "fused", lambda _, kernels=kernels: kernels)
        y = sum(layer(x) for layer in layers)
        found.append(torch.autograd.grad(y.sin().sum(), [x, *parameters]))
    assert called == ["swiglu"] * 2
    for plain, fused in zip(*found):
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


def test_loss(called, monkeypatch):
    torch.manual_seed(0)
    h, weight = torch.randn(20, 6, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64)
    target, mask = torch.randint(30, (20,)), torch.rand(20) < 0.7
    h[~mask] = float("nan")
    found = []
    for kernels in (False, True):
        monkeypatch.setattr(losses, "fused", lambda _, kernels=kernels: kernels)
        leaves = [h.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = losses.chunked_cross_entropy(*leaves, target, mask, 8)
        found.append([value.detach(), *torch.autograd.grad(value / 3, leaves)])
        with torch.no_grad():
            torch.testing.assert_close(losses.chunked_cross_entropy(*leaves, target, mask, 8), found[-1][0])
    assert sorted(called) == ["convert"] * 2 + ["cross_entropy"] * 6
    for plain, fused in zip(*found):
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
