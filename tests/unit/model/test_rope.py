"""Rotary frequencies and tables against transformers' rope utilities."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moetrain.config.model import RopeConfig
from moetrain.model.rope import frequencies, rotate, tables

pytestmark = pytest.mark.unit

CASES = {
    "linear": (RopeConfig(theta=1e4, scaling="linear", factor=4.0), {"factor": 4.0}),
    "llama3": (
        RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_position=8192),
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        RopeConfig(theta=1e4, scaling="yarn", factor=16.0, original_max_position=2048),
        {"factor": 16.0, "original_max_position_embeddings": 2048},
    ),
    "yarn_deepseek_v3": (
        RopeConfig(theta=1e4, scaling="yarn", factor=40.0, mscale=1.0, mscale_all_dim=1.0),
        {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "yarn_two_mscales": (
        RopeConfig(theta=1e6, scaling="yarn", factor=4.0, mscale=1.3, mscale_all_dim=0.4, beta_fast=16, beta_slow=2),
        {
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.3,
            "mscale_all_dim": 0.4,
            "beta_fast": 16,
            "beta_slow": 2,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dim", [32, 128])
def test_scaled_frequencies_equal_transformers(case, dim):
    config, options = CASES[case]
    theirs = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        head_dim=dim,
        max_position_embeddings=65536,
        rope_parameters={"rope_type": config.scaling, "rope_theta": config.theta, **options},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[config.scaling](theirs)
    # fp32, computed in another order: a few units in the last place.
    torch.testing.assert_close(frequencies(config, dim), expected, rtol=2e-6, atol=0)
    position_BS = torch.tensor([[0, 1, 7], [3, 100, 2]])
    cos, sin = tables(config, dim, position_BS)
    angle = position_BS[:, None, :, None] * expected
    torch.testing.assert_close(cos, angle.cos() * factor, rtol=0, atol=2e-4)  # 100 turns * 2e-6
    torch.testing.assert_close(sin, angle.sin() * factor, rtol=0, atol=2e-4)


def test_every_scaling_changes_some_frequency():
    plain = frequencies(RopeConfig(theta=1e4), 64)
    for config, _ in CASES.values():
        unscaled = frequencies(RopeConfig(theta=config.theta), 64)
        assert (frequencies(config, 64) / unscaled - 1).abs().max() > 0.5
    torch.testing.assert_close(plain, 1e4 ** (-torch.arange(0, 64, 2) / 64), rtol=2e-6, atol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_distance_alone(interleaved):
    config = RopeConfig(theta=100.0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    products = []
    for start in (0, 5, 900):
        at = [tables(config, 16, torch.tensor([[p]])) for p in (start + 3, start)]
        products.append((rotate(q, at[0], interleaved) * rotate(k, at[1], interleaved)).sum())
    torch.testing.assert_close(products[1], products[0], rtol=0, atol=1e-5)  # fp32 angles
    torch.testing.assert_close(products[2], products[0], rtol=0, atol=2e-3)  # 900 radians * 2^-24, some 16 terms
    plain = (q * k).sum()
    assert (products[0] - plain).abs() > 1e-3


def test_layouts_are_permutations_of_each_other():
    config = RopeConfig(theta=100.0)
    x = torch.randn(2, 3, 5, 8)
    at = tables(config, 8, torch.arange(5).expand(2, 5))
    halves = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
    torch.testing.assert_close(rotate(x, at, interleaved=True), rotate(halves, at, interleaved=False), rtol=0, atol=0)


def test_half_precision_rotates_in_single():
    x = torch.randn(1, 1, 64, 32).bfloat16()
    at = tables(RopeConfig(), 32, torch.arange(1000, 1064)[None])
    single = rotate(x.float(), at, False)
    assert torch.equal(rotate(x, at, False), single.bfloat16())
    # Two products and a sum in fp32. Rounded to bf16, one in 2^16 would lie on the other side of a tie than exactly.
    exact = rotate(x.double(), tuple(t.double() for t in at), False)
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=3 * 2**-24 * float(x.abs().max()))
