"""Shapes of a decoder. No torch here: `params`, `plan`, and validation read these without it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RopeConfig:
    """Rotary positions. scaling: none | linear | llama3 | yarn; the other fields matter only to those that name them."""

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_max_position: int = 4096
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float = 1.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    interleaved: bool = False  # pairs (2i, 2i+1) instead of (i, i+d/2): DeepSeek's checkpoints


@dataclass
class AttentionConfig:
    """kind: gqa | mla. qk_norm: none | head (one RMSNorm per head, Qwen3) | full (over all heads at once, OLMoE)."""

    kind: str = "gqa"
    n_heads: int = 8
    n_kv_heads: int = 4
    head_dim: int = 16
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str = "none"
    q_lora_rank: int = 0  # mla; 0 projects queries directly
    kv_lora_rank: int = 0  # mla
    qk_nope_head_dim: int = 0  # mla
    qk_rope_head_dim: int = 0  # mla
    v_head_dim: int = 0  # mla
    rope: RopeConfig = field(default_factory=RopeConfig)


@dataclass
class MoEConfig:
    """Which layers are MoE and their shapes. n_experts=0 makes a dense model.

    first_k_dense: the first layers keep a dense FFN. every: of the others each `every`-th is MoE (the last of its group).
    d_shared: hidden width of all shared experts together (they are one wide FFN); 0 is none.
    shared_gate: scale the shared output by sigmoid(linear(x)), as Qwen2-MoE does.
    """

    n_experts: int = 8
    top_k: int = 2
    d_expert: int = 256
    first_k_dense: int = 0
    every: int = 1
    d_shared: int = 0
    shared_gate: bool = False


@dataclass
class ModelConfig:
    """A decoder-only transformer. vocab_size is the embedding's row count, padding included."""

    name: str = "custom"
    vocab_size: int = 264
    d_model: int = 128
    n_layers: int = 4
    d_ff: int = 512  # dense FFN layers
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) holds experts."""
        moe = self.moe
        return moe.n_experts > 0 and layer >= moe.first_k_dense and (layer - moe.first_k_dense + 1) % moe.every == 0
