"""Attention layers: projections, norms, and rotation around `core.attend`.

Shapes: B rows, S positions, D model width, H query heads, G key/value heads, d head width, e value width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.config.model import ModelConfig
from moetrain.model.core import ForwardContext, Gather, attend, whole
from moetrain.model.norm import RMSNorm
from moetrain.model.rope import rotate


class GQA(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) with optional biases and normalised queries and keys.

    gather: makes whole rows of what may be a stretch of them; parallel/tp.py sets it, and w_o then cuts them again.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = a = config.attention
        self.gather: Gather = whole
        q_dim, kv_dim = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
        self.w_q = nn.Linear(config.d_model, q_dim, bias=a.qkv_bias)
        self.w_k = nn.Linear(config.d_model, kv_dim, bias=a.qkv_bias)
        self.w_v = nn.Linear(config.d_model, kv_dim, bias=a.qkv_bias)
        self.w_o = nn.Linear(q_dim, config.d_model, bias=a.out_bias)
        if a.qk_norm != "none":
            per_head = a.qk_norm == "head"
            self.q_norm = RMSNorm(a.head_dim if per_head else q_dim, config.norm_eps)
            self.k_norm = RMSNorm(a.head_dim if per_head else kv_dim, config.norm_eps)

    def forward(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        a = self.config
        x_BSD = self.gather(x_BSD)
        q, k, v = self.w_q(x_BSD), self.w_k(x_BSD), self.w_v(x_BSD)
        if a.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for t in (q, k, v))
        norms = (self.q_norm, self.k_norm) if a.qk_norm == "head" else (None, None)
        q, k = (rotate(t, context.cos_sin, a.rope.interleaved, norm) for t, norm in zip((q, k), norms))
        y_BHSd = attend(q, k, v, context, a.head_dim**-0.5)
        return self.w_o(y_BHSd.transpose(1, 2).flatten(2))


class MLA(nn.Module):
    """Multi-head latent attention (arXiv:2405.04434 §2.1).

    Keys and values come from one narrow latent; a rotated key, shared by all heads, carries the position. Queries may
    be compressed too. gather: as in GQA, but of the narrow latents.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = a = config.attention
        self.gather: Gather = whole
        if a.q_lora_rank:
            self.w_q_down = nn.Linear(config.d_model, a.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(a.q_lora_rank, config.norm_eps)
        self.w_q = nn.Linear(a.q_lora_rank or config.d_model, a.n_heads * a.qk_dim, bias=False)
        self.w_kv_down = nn.Linear(config.d_model, a.kv_lora_rank + a.qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(a.kv_lora_rank, config.norm_eps)
        self.w_kv = nn.Linear(a.kv_lora_rank, a.n_heads * (a.qk_nope_head_dim + a.v_head_dim), bias=False)
        self.w_o = nn.Linear(a.n_heads * a.v_head_dim, config.d_model, bias=False)
        # A stretched context sharpens the softmax on both sides of the product, hence the square.
        stretch = a.rope.temperature(a.rope.mscale_all_dim) if a.rope.scaling == "yarn" else 1.0
        self.scale = a.qk_dim**-0.5 * stretch**2

    def forward(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        a = self.config
        latent_q = self.q_norm(self.w_q_down(x_BSD)) if a.q_lora_rank else x_BSD
        q = self.w_q(self.gather(latent_q)).unflatten(-1, (-1, a.qk_dim)).transpose(1, 2)
        q_nope, q_rope = q.split([a.qk_nope_head_dim, a.qk_rope_head_dim], dim=-1)

        latent_kv, k_rope = self.gather(self.w_kv_down(x_BSD)).split([a.kv_lora_rank, a.qk_rope_head_dim], dim=-1)
        kv = self.w_kv(self.kv_norm(latent_kv)).unflatten(-1, (-1, a.qk_nope_head_dim + a.v_head_dim)).transpose(1, 2)
        k_nope, v = kv.split([a.qk_nope_head_dim, a.v_head_dim], dim=-1)

        q_rope = rotate(q_rope, context.cos_sin, a.rope.interleaved)
        k_rope = rotate(k_rope[:, None], context.cos_sin, a.rope.interleaved).expand(-1, k_nope.shape[1], -1, -1)
        q, k = torch.cat([q_nope, q_rope], dim=-1), torch.cat([k_nope, k_rope], dim=-1)
        y_BHSe = attend(q, k, v, context, self.scale)
        return self.w_o(y_BHSe.transpose(1, 2).flatten(2))


def build_attention(config: ModelConfig) -> GQA | MLA:
    """The module that `model.attention.kind` names."""
    return MLA(config) if config.attention.kind == "mla" else GQA(config)
