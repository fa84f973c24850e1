"""Counts by arithmetic against the built model, the published numbers, and flops counted by torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moetrain.config.model import AttentionConfig, ModelConfig, MoEConfig, check_model
from moetrain.model.decoder import Decoder
from moetrain.model.generate import one_document
from moetrain.plan.params import count, flops_per_token, format_table

pytestmark = pytest.mark.unit

PRESETS = Path(__file__).parents[3] / "configs" / "model"
# Parameters of the published checkpoints, without balance biases (state) and multi-token prediction.
PUBLISHED_TOTAL = {
    "olmoe_1b_7b": 6_919_161_856,
    "mixtral_8x7b": 46_702_792_704,
    "mixtral_8x22b": 140_620_634_112,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen2_57b_a14b": 57_408_658_944,
    "deepseek_v2_lite": 15_706_484_224,
    "deepseek_v3": 671_026_404_352,
}
# As their papers and model cards round them, in billions. DeepSeek's leave the embedding look-up out of "activated".
PUBLISHED_ACTIVE = {
    "olmoe_1b_7b": 1.3,
    "mixtral_8x7b": 12.9,
    "mixtral_8x22b": 39,
    "qwen3_30b_a3b": 3.3,
    "qwen2_57b_a14b": 14,
    "deepseek_v2_lite": 2.4,
    "deepseek_v3": 37,
}


def preset(name: str) -> ModelConfig:
    node = OmegaConf.load(PRESETS / f"{name}.yaml").model
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), node))
    assert isinstance(config, ModelConfig)
    return config


class MoEShapes(nn.Module):
    """The tensors of a MoE layer, and what one chosen token does with them: enough to count."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe, d = config.moe, config.d_model
        self.top_k = moe.top_k
        self.router = nn.Parameter(torch.zeros(moe.n_experts, d))
        self.w_gate_up = nn.Parameter(torch.zeros(moe.n_experts, 2, moe.d_expert, d))
        self.w_down = nn.Parameter(torch.zeros(moe.n_experts, d, moe.d_expert))
        if moe.d_shared:
            self.shared_gate_up = nn.Parameter(torch.zeros(2, moe.d_shared, d))
            self.shared_down = nn.Parameter(torch.zeros(d, moe.d_shared))
        if moe.shared_gate:
            self.shared_gate = nn.Parameter(torch.zeros(1, d))

    def forward(self, x_BSD, context, carry):
        x_TD = x_BSD.flatten(0, 1)
        y_TD = (x_TD @ self.router.T).sum(-1, keepdim=True) * x_TD
        experts = [(self.w_gate_up[e], self.w_down[e]) for e in range(self.top_k)]
        if hasattr(self, "shared_down"):
            experts.append((self.shared_gate_up, self.shared_down))
        for (gate, up), down in experts:
            y_TD = y_TD + (F.silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T
        if hasattr(self, "shared_gate"):
            y_TD = y_TD * (x_TD @ self.shared_gate.T)
        return y_TD.view_as(x_BSD), carry


ODD = {
    "mla_with_everything": ModelConfig(
        d_model=24,
        d_ff=40,
        n_layers=5,
        attention=AttentionConfig(
            kind="mla",
            n_heads=3,
            q_lora_rank=7,
            kv_lora_rank=9,
            qk_nope_head_dim=5,
            qk_rope_head_dim=4,
            v_head_dim=6,
        ),
        moe=MoEConfig(n_experts=5, top_k=3, d_expert=11, first_k_dense=1, every=2, d_shared=13, shared_gate=True),
    ),
    "gqa_with_everything": ModelConfig(
        d_model=24,
        tie_embeddings=True,
        attention=AttentionConfig(n_heads=6, n_kv_heads=2, head_dim=10, qkv_bias=True, out_bias=True, qk_norm="full"),
    ),
    "dense": ModelConfig(moe=MoEConfig(n_experts=0), attention=AttentionConfig(qk_norm="head")),
}
NAMES = [*sorted(p.stem for p in PRESETS.glob("*.yaml")), *ODD]


@pytest.mark.parametrize("name", NAMES)
def test_counts_equal_the_built_model(name):
    config = ODD.get(name) or preset(name)
    with torch.device("meta"):
        model = Decoder(config, lambda layer: MoEShapes(config))
    sizes = {key: p.numel() for key, p in model.named_parameters()}
    unused = sum(
        n * (config.moe.n_experts - config.moe.top_k) // config.moe.n_experts
        for key, n in sizes.items()
        if key.endswith(("moe.w_gate_up", "moe.w_down"))
    )
    counted = count(config)
    assert counted.total == sum(sizes.values())
    assert counted.active == counted.total - unused
    assert counted.embedding == sum(n for key, n in sizes.items() if key in ("embed.weight", "head.weight"))


@pytest.mark.parametrize("name", PUBLISHED_TOTAL)
def test_presets_have_the_published_size(name):
    config = preset(name)
    check_model(config)
    assert config.name == name
    counted = count(config)
    assert counted.total == PUBLISHED_TOTAL[name]
    look_up = config.vocab_size * config.d_model if name.startswith("deepseek") else 0
    # Published to two or three digits: a unit of the second digit.
    assert (counted.active - look_up) / 1e9 == pytest.approx(PUBLISHED_ACTIVE[name], rel=0.05)


def test_tiny_splits_along_every_axis():
    tiny, small = preset("tiny"), preset("small_300m_active")
    assert (tiny.n_layers, tiny.d_model, tiny.attention.n_heads, tiny.attention.n_kv_heads) == (4, 128, 8, 4)
    assert (tiny.moe.n_experts, tiny.moe.top_k, tiny.vocab_size, tiny.vocab_size % 8) == (8, 2, 264, 0)
    assert 250e6 < count(small).active < 350e6


@pytest.mark.parametrize("name", ["tiny", *ODD])
def test_flops_equal_what_torch_counts(name):
    """Forward and backward of one unmasked row: torch counts the whole square, so attended is the row's length."""
    config = ODD.get(name) or preset(name)
    length = 32
    model = Decoder(config, lambda layer: MoEShapes(config), documents=False)
    token_BS = torch.zeros(1, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(token_BS, one_document(token_BS)).sum().backward()
    expected = flops_per_token(config, length, attended=length) * length
    assert counter.get_total_flops() == expected


def test_causal_rows_attend_to_half():
    config = preset("tiny")
    whole, causal = flops_per_token(config, 256, attended=256), flops_per_token(config, 256)
    attention = 6 * 4 * 8 * (16 + 16)
    assert whole - causal == attention * (256 - 128.5)


def test_table_shows_exact_numbers():
    table = format_table(preset("mixtral_8x7b"))
    assert "mixtral_8x7b" in table
    assert "46,702,792,704 (46.70B)" in table
    assert "12,879,925,248 (12.88B)" in table
