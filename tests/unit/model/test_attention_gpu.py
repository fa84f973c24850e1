"""Packed attention on CUDA in bf16 (FlexAttention) against the masked fp64 path on the same inputs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from moetrain.config.model import AttentionConfig
from moetrain.model.core import attend, share
from moetrain.moe.types import TokenContext, Totals

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def packed(rows: int, length: int, seed: int) -> TokenContext:
    """Documents of random lengths, those of the last row followed by padding."""
    random = torch.Generator().manual_seed(seed)
    starts = torch.rand(rows, length, generator=random) < 4 / length
    document_BS = starts.cumsum(1).int()
    document_BS[-1, length // 3 :] = -1
    position_BS = torch.arange(length).expand(rows, length)
    n = torch.tensor(1.0)
    return TokenContext(position_BS.cuda(), position_BS.cuda(), document_BS.cuda(), Totals(n, n, rows, 1))


def run(dtype, context, config, inputs, grad_BHSe, documents=True):
    q, k, v = (t.to(dtype, copy=True).requires_grad_() for t in inputs)
    shared = share(context, config, dtype, documents=documents)
    y = attend(q, k, v, shared, config.qk_dim**-0.5)
    y.backward(grad_BHSe.to(dtype))
    return shared.mask, (y.detach(), q.grad, k.grad, v.grad)


@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig(n_heads=8, n_kv_heads=4, head_dim=16),
        AttentionConfig(n_heads=16, n_kv_heads=4, head_dim=64),
        AttentionConfig(n_heads=8, n_kv_heads=8, head_dim=128),
        AttentionConfig(kind="mla", n_heads=4, n_kv_heads=4, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
    ],
    ids=["tiny", "gqa64", "mha128", "mla"],
)
@pytest.mark.parametrize("length", [256, 1024])
def test_packed_bf16_equals_masked_fp64(config, length):
    for seed in (0, 1):  # twice: other documents take the same compiled kernel
        context = packed(3, length, seed)
        torch.manual_seed(seed)
        n_kv = config.n_kv_heads if config.kind == "gqa" else config.n_heads
        sizes = ((config.n_heads, config.qk_dim), (n_kv, config.qk_dim), (n_kv, config.v_dim))
        inputs = [torch.randn(3, heads, length, width, device="cuda").bfloat16() for heads, width in sizes]
        grad_BHSe = torch.randn(3, config.n_heads, length, config.v_dim, device="cuda").bfloat16()
        mask, actual = run(torch.bfloat16, context, config, inputs, grad_BHSe)
        assert isinstance(mask, BlockMask)
        _, expected = run(torch.float64, context, config, inputs, grad_BHSe)
        for ours, exact in zip(actual, expected):
            # Probabilities, outputs and gradients are each rounded to 2^-9: together below 1% of the whole.
            assert (ours.double() - exact).norm() / exact.norm() < 1e-2


def test_whole_causal_rows_share_keys_between_heads_without_holding_all_scores():
    config, length = AttentionConfig(n_heads=16, n_kv_heads=4, head_dim=64), 2048
    context = packed(2, length, 0)
    torch.manual_seed(0)
    heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
    inputs = [torch.randn(2, n, length, 64, device="cuda").bfloat16() for n in heads]
    grad_BHSe = torch.randn(2, config.n_heads, length, 64, device="cuda").bfloat16()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mask, actual = run(torch.bfloat16, context, config, inputs, grad_BHSe, documents=False)
    scores = 2 * config.n_heads * length * length * 2  # bytes of one matrix of scores in bf16
    assert mask is None
    assert torch.cuda.max_memory_allocated() - before < scores
    _, expected = run(torch.float64, context, config, inputs, grad_BHSe, documents=False)
    for ours, exact in zip(actual, expected):
        assert (ours.double() - exact).norm() / exact.norm() < 1e-2  # roundings as above
