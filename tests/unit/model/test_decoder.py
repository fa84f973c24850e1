"""Logits and gradients against transformers' dense models; packing, padding, and precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moetrain.config.model import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moetrain.model.decoder import Decoder
from moetrain.model.generate import one_document
from moetrain.moe.types import TokenContext, Totals

pytestmark = pytest.mark.unit

SHAPES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "attn_implementation": "sdpa",  # their eager path computes its softmax in fp32, also in an fp64 model
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}, {}),
    "llama_biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True}, {"qkv_bias": True, "out_bias": True}),
    "llama_tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}, {"qkv_bias": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}, {"qk_norm": "head"}),
}
RENAME = {
    "model.embed_tokens.": "embed.",
    "model.norm.": "norm.",
    "lm_head.": "head.",
    "model.layers.": "layers.",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "self_attn.q_proj": "attention.w_q",
    "self_attn.k_proj": "attention.w_k",
    "self_attn.v_proj": "attention.w_v",
    "self_attn.o_proj": "attention.w_o",
    "mlp.gate_proj": "mlp.w_gate",
    "mlp.up_proj": "mlp.w_up",
    "mlp.down_proj": "mlp.w_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attention_norm",
}


def no_moe(layer: int) -> nn.Module:
    raise AssertionError(f"layer {layer} of a dense model asked for experts")


def rename(theirs: str) -> str:
    for old, new in RENAME.items():
        theirs = theirs.replace(old, new)
    return theirs


def keep_fp64(theirs: nn.Module) -> nn.Module:
    """Swap their norms, which round fp64 to fp32, for torch's."""
    for parent in list(theirs.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, nn.RMSNorm(child.weight.shape, eps=1e-5))
    return theirs


def dense(tie: bool = False, **attention: object) -> ModelConfig:
    """SHAPES in this project's words."""
    return ModelConfig(
        vocab_size=48,
        d_model=32,
        n_layers=3,
        d_ff=56,
        tie_embeddings=tie,
        attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, rope=RopeConfig(theta=500.0), **attention),
        moe=MoEConfig(n_experts=0),
    )


def random_decoder(config: ModelConfig, dtype: torch.dtype = torch.float64, documents: bool = True) -> Decoder:
    torch.manual_seed(7)
    model = Decoder(config, no_moe, documents).to(dtype)
    for p in model.parameters():  # away from ones and zeros, which would hide a norm or a bias left out
        nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3)
    return model


def packed(document_BS: Tensor, vocab: int = 48) -> TokenContext:
    """Random tokens; positions restart where the document changes."""
    token_BS = torch.randint(vocab, document_BS.shape, generator=torch.Generator().manual_seed(3))
    start = torch.ones_like(document_BS, dtype=torch.bool)
    start[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    index = torch.arange(document_BS.shape[1]).expand_as(document_BS)
    position_BS = index - torch.where(start, index, 0).cummax(dim=1).values
    n = (document_BS >= 0).sum().double()
    return TokenContext(token_BS, position_BS, document_BS.int(), Totals(n, n, document_BS.shape[0], 1))


@pytest.mark.parametrize("documents", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers(family, dtype, tolerance, documents):
    build, build_config, their_options, our_options = FAMILIES[family]
    torch.manual_seed(1)
    theirs = keep_fp64(build(build_config(**SHAPES, **their_options))).to(dtype)
    for p in theirs.parameters():
        nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    tie = their_options.get("tie_word_embeddings", False)
    ours = Decoder(dense(tie, **our_options), no_moe, documents).to(dtype)
    ours.load_state_dict({rename(k): v for k, v in theirs.state_dict().items() if not (tie and "lm_head" in k)})

    token_BS = torch.randint(48, (3, 11))
    expected = theirs(token_BS).logits
    actual = ours(token_BS, one_document(token_BS))
    scale = expected.abs().max()
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=tolerance)

    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    our_grads = {k: p.grad for k, p in ours.named_parameters()}
    for name, p in theirs.named_parameters():
        expected_grad, actual_grad = p.grad, our_grads.pop(rename(name))
        scale = expected_grad.abs().max()
        torch.testing.assert_close(actual_grad / scale, expected_grad / scale, rtol=0, atol=20 * tolerance, msg=name)
    assert not our_grads, f"not in their model: {list(our_grads)}"


@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
def test_packed_documents_equal_each_alone(qk_norm):
    model = random_decoder(dense(qk_norm=qk_norm))
    document_BS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 6, [0] * 7 + [1] * 5])
    context = packed(document_BS)
    together = model(context.token_BS, context)
    for row, document in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
        chosen = document_BS[row] == document
        alone_BS = context.token_BS[row, chosen][None]
        torch.testing.assert_close(
            together[row, chosen], model(alone_BS, one_document(alone_BS))[0], rtol=0, atol=1e-12
        )


def test_documents_switch_lets_a_row_be_one_text():
    document_BS = torch.tensor([[0] * 6 + [1] * 6])
    context = packed(document_BS)
    stops, crosses = (random_decoder(dense(), documents=d)(context.token_BS, context) for d in (True, False))
    torch.testing.assert_close(stops[:, :6], crosses[:, :6], rtol=0, atol=1e-12)
    assert (stops[:, 6:] - crosses[:, 6:]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_padding_is_finite_and_changes_nothing(dtype):
    """A row of nothing but padding, and padding behind a document: no NaN, and no share in the other tokens."""
    model = random_decoder(dense(qk_norm="head"), dtype)
    document_BS = torch.tensor([[0] * 5 + [-1] * 3, [-1] * 8, [0] * 3 + [1] * 5])
    context = packed(document_BS)
    logits = model(context.token_BS, context)
    logits[context.document_BS >= 0].float().square().sum().backward()
    assert torch.isfinite(logits).all()
    for name, p in model.named_parameters():
        assert torch.isfinite(p.grad).all(), name
    if dtype == torch.float64:
        alone_BS = context.token_BS[:1, :5]
        torch.testing.assert_close(logits[:1, :5], model(alone_BS, one_document(alone_BS)), rtol=0, atol=1e-12)


def test_rows_do_not_mix():
    model = random_decoder(dense())
    token_BS = torch.randint(48, (4, 9), generator=torch.Generator().manual_seed(2))
    together = model(token_BS, one_document(token_BS))
    for row in range(4):
        alone = model(token_BS[row : row + 1], one_document(token_BS[row : row + 1]))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-12)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_bf16_is_the_fp64_model_rounded():
    """Three layers of ten roundings to 2^-9 add up as noise to sqrt(30) * 2^-9 = 1% of the logits; 4% is allowed."""
    model = random_decoder(dense(qk_norm="full"), torch.bfloat16)
    token_BS = torch.randint(48, (4, 32), generator=torch.Generator().manual_seed(5))
    rough = model(token_BS, one_document(token_BS)).double()
    exact = model.double()(token_BS, one_document(token_BS))
    assert (rough - exact).norm() / exact.norm() < 0.04


@pytest.mark.parametrize("tie", [False, True])
def test_criterion_gets_hidden_states_and_head(tie):
    model = random_decoder(dense(tie))
    token_BS = torch.randint(48, (2, 6))
    context = one_document(token_BS)
    target_T = torch.randint(48, (12,))
    loss = model(token_BS, context, lambda h_TD, w_VD: F.cross_entropy(h_TD @ w_VD.T, target_T))
    expected = F.cross_entropy(model(token_BS, context).flatten(0, 1), target_T)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)


class AddLayerNumber(nn.Module):
    """Stands for a MoE layer: adds its number, and carries how many came before."""

    def __init__(self, layer: int, seen: list) -> None:
        super().__init__()
        self.layer, self.seen = layer, seen

    def forward(self, x_BSD, context, carry):
        self.seen.append((self.layer, None if carry is None else int(carry), isinstance(context, TokenContext)))
        return torch.full_like(x_BSD, self.layer), torch.tensor((0 if carry is None else int(carry)) + 1)


def test_moe_layers_are_where_the_config_says_and_carry_passes_dense_ones():
    config = dense()
    config.n_layers, config.moe = 6, MoEConfig(n_experts=4, top_k=1, first_k_dense=1, every=2)
    seen: list = []
    model = Decoder(config, lambda layer: AddLayerNumber(layer, seen))
    token_BS = torch.randint(48, (2, 4))
    model(token_BS, one_document(token_BS))
    assert seen == [(2, None, True), (4, 1, True)]
    assert [hasattr(b, "mlp") for b in model.layers.values()] == [True, True, False, True, False, True]


def test_meta_model_has_every_tensor_in_its_state():
    """A model materialised from the meta device and loaded equals its source: nothing is computed at build time."""
    for config in (dense(qk_norm="head"), dense(qkv_bias=True)):
        model = random_decoder(config, torch.float32)
        with torch.device("meta"):
            empty = Decoder(config, no_moe)
        empty.to_empty(device="cpu").load_state_dict(model.state_dict())
        token_BS = torch.randint(48, (2, 6))
        torch.testing.assert_close(
            empty(token_BS, one_document(token_BS)), model(token_BS, one_document(token_BS)), rtol=0, atol=0
        )
