"""Shapes that cannot be built are refused with the key and the nearest legal value, before a tensor is made."""

from __future__ import annotations

import pytest

from moetrain.config.model import AttentionConfig, ModelConfig, MoEConfig, RopeConfig, check_model

pytestmark = pytest.mark.unit

MLA = {"kind": "mla", "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ModelConfig(attention=AttentionConfig(kind="mha")), ["model.attention.kind=mha", "gqa, mla"]),
        (ModelConfig(attention=AttentionConfig(n_heads=8, n_kv_heads=3)), ["n_kv_heads=3", "nearest that does is 2"]),
        (ModelConfig(attention=AttentionConfig(head_dim=15)), ["head_dim=15", "nearest legal value is 16"]),
        (ModelConfig(attention=AttentionConfig(qk_norm="heads")), ["qk_norm=heads", "nearest is head"]),
        (ModelConfig(attention=AttentionConfig(rope=RopeConfig(scaling="yarm"))), ["scaling=yarm", "nearest is yarn"]),
        (
            ModelConfig(attention=AttentionConfig(rope=RopeConfig(scaling="linear", factor=0.5))),
            ["model.attention.rope.factor=0.5", "1.0"],
        ),
        (ModelConfig(attention=AttentionConfig(**{**MLA, "v_head_dim": 0})), ["model.attention.v_head_dim=0", "1"]),
        (ModelConfig(attention=AttentionConfig(**MLA, qkv_bias=True)), ["model.attention.qkv_bias=True", "False"]),
        (ModelConfig(moe=MoEConfig(n_experts=4, top_k=5)), ["model.moe.top_k=5", "nearest legal value is 4"]),
        (ModelConfig(moe=MoEConfig(top_k=0)), ["model.moe.top_k=0", "nearest legal value is 1"]),
        (ModelConfig(moe=MoEConfig(first_k_dense=4)), ["model.moe.first_k_dense=4", "model.moe.n_experts=0"]),
        (ModelConfig(moe=MoEConfig(shared_gate=True)), ["model.moe.shared_gate", "model.moe.d_shared"]),
        (ModelConfig(moe=MoEConfig(first_k_dense=1), d_ff=0), ["model.d_ff=0"]),
        (ModelConfig(n_layers=0), ["model.n_layers=0"]),
        (ModelConfig(attention=AttentionConfig(rope=RopeConfig(factor=8.0))), ["rope.factor=8.0", "nothing", "1.0"]),
        (ModelConfig(attention=AttentionConfig(rope=RopeConfig(theta=0.0))), ["model.attention.rope.theta=0.0", "1"]),
        (ModelConfig(norm_eps=-1.0), ["model.norm_eps=-1.0", "0"]),
        (ModelConfig(init_std=0.0), ["model.init_std=0.0", "0.02"]),
        (ModelConfig(moe=MoEConfig(first_k_dense=-1, every=2)), ["model.moe.first_k_dense=-1", "0"]),
        (ModelConfig(moe=MoEConfig(d_shared=-1)), ["model.moe.d_shared=-1", "0"]),
    ],
)
def test_refused_by_name(config, words):
    with pytest.raises(ValueError) as error:
        check_model(config)
    for word in words:
        assert word in str(error.value)


def test_legal_shapes_pass():
    check_model(ModelConfig())
    check_model(ModelConfig(d_ff=0))  # every layer has experts
    check_model(ModelConfig(attention=AttentionConfig(**MLA)))
    check_model(ModelConfig(moe=MoEConfig(n_experts=0)))
