"""MLA against transformers' DeepSeek-V3 and V2, and the tiles of the block mask against the mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config, OlmoeConfig
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.olmoe import modeling_olmoe as olmoe

from moetrain.config.model import AttentionConfig, ModelConfig, RopeConfig
from moetrain.model.attention import GQA, MLA
from moetrain.model.core import BLOCK, block_mask, document_mask, share
from moetrain.model.generate import one_document

pytestmark = pytest.mark.unit

YARN = {"factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.8, "mscale_all_dim": 0.6}
RENAME = {
    "q_a_proj": "w_q_down",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "w_q",
    "q_proj": "w_q",
    "kv_a_proj_with_mqa": "w_kv_down",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "w_kv",
    "o_proj": "w_o",
}


def their_attention(version, q_lora, yarn, interleaved):
    rope = {"rope_type": "default", "rope_theta": 100.0}
    if yarn:
        rope = {"rope_type": "yarn", "rope_theta": 100.0, "original_max_position_embeddings": 16, **YARN}
    config = (DeepseekV3Config if version is v3 else DeepseekV2Config)(
        hidden_size=24,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=q_lora or None,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=8,
        v_head_dim=5,
        max_position_embeddings=128,
        rope_parameters=rope,
        attn_implementation="sdpa",  # their eager path computes its softmax in fp32
        **({"rope_interleave": interleaved} if version is v3 else {}),
    )
    prefix = "DeepseekV3" if version is v3 else "DeepseekV2"
    return getattr(version, prefix + "Attention")(config, 0), getattr(version, prefix + "RotaryEmbedding")(config)


@pytest.mark.parametrize(
    ("version", "q_lora", "yarn", "interleaved"),
    [(v3, 7, True, True), (v3, 7, False, False), (v3, 0, True, True), (v2, 0, True, True)],
    ids=["v3", "v3_halves", "v3_no_q_lora", "v2_lite"],
)
def test_mla_equals_transformers(version, q_lora, yarn, interleaved):
    torch.manual_seed(4)
    theirs, rotary = their_attention(version, q_lora, yarn, interleaved)
    for name, module in theirs.named_children():
        if "layernorm" in name:  # theirs round fp64 to fp32 on the way
            setattr(theirs, name, nn.RMSNorm(module.weight.shape[0], eps=1e-6))
    theirs = theirs.double()
    for p in theirs.parameters():
        nn.init.normal_(p, mean=float(p.dim() == 1), std=0.4)

    scaling = dict(scaling="yarn", original_max_position=16, **YARN) if yarn else {}
    attention = AttentionConfig(
        kind="mla",
        n_heads=3,
        n_kv_heads=3,
        q_lora_rank=q_lora,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=8,
        v_head_dim=5,
        rope=RopeConfig(theta=100.0, interleaved=interleaved, **scaling),
    )
    ours = MLA(ModelConfig(d_model=24, attention=attention, norm_eps=1e-6)).double()
    state = {}
    for name, value in theirs.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        state[f"{RENAME[stem]}.{kind}"] = value
    ours.load_state_dict(state)

    x_BSD = torch.randn(2, 20, 24, dtype=torch.float64)
    context = one_document(torch.zeros(2, 20, dtype=torch.int64))
    expected, _ = theirs(x_BSD, position_embeddings=their_tables(rotary, context, version), attention_mask=None)
    actual = ours(x_BSD, share(context, attention, torch.float64, documents=False))
    tolerance = 1e-9 if version is v3 else 1e-5  # V2's rotation runs in fp32
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def their_tables(rotary, context, version):
    dtype = torch.float64 if version is v3 else torch.float32
    return rotary(torch.empty(0, dtype=dtype), context.position_BS)


def test_norm_over_all_heads_equals_olmoe():
    torch.manual_seed(6)
    rope = {"rope_type": "default", "rope_theta": 100.0}
    theirs_config = OlmoeConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters=rope,
        attn_implementation="sdpa",
    )
    theirs, rotary = olmoe.OlmoeAttention(theirs_config, 0), olmoe.OlmoeRotaryEmbedding(theirs_config)
    theirs.q_norm, theirs.k_norm = nn.RMSNorm(24, eps=1e-5), nn.RMSNorm(12, eps=1e-5)
    theirs = theirs.double()
    for p in theirs.parameters():
        nn.init.normal_(p, mean=float(p.dim() == 1), std=0.4)
    attention = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=6, qk_norm="full", rope=RopeConfig(theta=100.0))
    ours = GQA(ModelConfig(d_model=24, attention=attention)).double()
    pairs = {"q_proj": "w_q", "k_proj": "w_k", "v_proj": "w_v", "o_proj": "w_o", "q_norm": "q_norm", "k_norm": "k_norm"}
    ours.load_state_dict({f"{pairs[k.split('.')[0]]}.weight": v for k, v in theirs.state_dict().items()})

    x_BSD = torch.randn(2, 9, 24, dtype=torch.float64)
    context = one_document(torch.zeros(2, 9, dtype=torch.int64))
    expected, _ = theirs(x_BSD, position_embeddings=rotary(x_BSD, context.position_BS), attention_mask=None)
    actual = ours(x_BSD, share(context, attention, torch.float64, documents=True))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_block_mask_tiles_hold_the_document_mask():
    """Each pair the mask allows is in a listed tile; a tile listed as full allows all its pairs."""
    length = 5 * BLOCK
    document_BS = torch.zeros(3, length, dtype=torch.int32)
    document_BS[0, 100:] = 1
    document_BS[0, 130:] = 2
    document_BS[1, 4 * BLOCK :] = 1
    document_BS[2, 300:] = -1
    mask_BSS = document_mask(document_BS)[:, 0]
    blocks = block_mask(document_BS)
    tiles = mask_BSS.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3)
    some, every = tiles.any(-1).any(-1), tiles.all(-1).all(-1)
    partial = as_dense(blocks.kv_num_blocks, blocks.kv_indices)
    full = as_dense(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not (partial & full).any()
    assert torch.equal(full, every)
    assert not (some & ~full & ~partial).any()
    assert torch.equal(partial, some & ~every)  # ids ascend within rows here, so no tile is listed in vain
    q, k = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
    for row in range(3):
        assert torch.equal(blocks.mask_mod(torch.tensor(row), torch.tensor(0), q, k), mask_BSS[row])


def as_dense(number_B1N, index_B1NN):
    n = index_B1NN.shape[-1]
    listed = torch.arange(n) < number_B1N[..., None]
    return torch.zeros_like(index_B1NN, dtype=torch.bool).scatter(-1, index_B1NN.long(), listed)[:, 0]
