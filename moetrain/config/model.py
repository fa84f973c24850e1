"""Shapes of a decoder. No torch here: `params`, `plan`, and validation read these without it."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field


@dataclass
class RopeConfig:
    """Rotary positions. scaling: none | linear | llama3 | yarn; a field below it matters only to those that name it."""

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

    def temperature(self, weight: float) -> float:
        """YaRN's correction of the attention temperature, 0.1 * weight * ln(factor) + 1 (arXiv:2309.00071, eq. 22)."""
        return 1.0 if self.factor <= 1.0 else 0.1 * weight * math.log(self.factor) + 1.0


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

    @property
    def rope_dim(self) -> int:
        """Width of a head's rotated part."""
        return self.qk_rope_head_dim if self.kind == "mla" else self.head_dim

    @property
    def qk_dim(self) -> int:
        """Width of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.kind == "mla" else self.head_dim

    @property
    def v_dim(self) -> int:
        """Width of one head's value."""
        return self.v_head_dim if self.kind == "mla" else self.head_dim


@dataclass
class MoEConfig:
    """Which layers are MoE and their shapes. n_experts=0 makes a dense model.

    first_k_dense: the first layers keep a dense FFN. every: of the others each `every`-th is MoE (the last of a group).
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


def check_model(config: ModelConfig) -> None:
    """Refuse shapes that cannot be built: ValueError with the key and, where there is one, the nearest legal value."""
    attention, moe = config.attention, config.moe
    _one_of("model.attention.kind", attention.kind, ("gqa", "mla"))
    _one_of("model.attention.qk_norm", attention.qk_norm, ("none", "head", "full"))
    _one_of("model.attention.rope.scaling", attention.rope.scaling, ("none", "linear", "llama3", "yarn"))
    _at_least("model.vocab_size", config.vocab_size, 1)
    _at_least("model.d_model", config.d_model, 1)
    _at_least("model.n_layers", config.n_layers, 1)
    _at_least("model.norm_eps", config.norm_eps, 0)
    if not config.init_std > 0:
        raise ValueError(f"model.init_std={config.init_std} must be above 0, such as 0.02: weights of 0 learn nothing")
    _at_least("model.attention.n_heads", attention.n_heads, 1)
    if attention.kind == "mla":
        _check_mla(attention)
    else:
        _at_least("model.attention.head_dim", attention.head_dim, 1)
        _at_least("model.attention.n_kv_heads", attention.n_kv_heads, 1)
        if attention.n_heads % attention.n_kv_heads:
            divisors = [d for d in range(1, attention.n_heads + 1) if attention.n_heads % d == 0]
            nearest = min(divisors, key=lambda d: abs(d - attention.n_kv_heads))
            raise ValueError(
                f"model.attention.n_kv_heads={attention.n_kv_heads} does not divide "
                f"model.attention.n_heads={attention.n_heads}; the nearest that does is {nearest}"
            )
    if attention.rope_dim % 2:
        key = "qk_rope_head_dim" if attention.kind == "mla" else "head_dim"
        raise ValueError(
            f"model.attention.{key}={attention.rope_dim} is odd, but rotary positions turn pairs; "
            f"the nearest legal value is {attention.rope_dim + 1}"
        )
    _check_rope(attention.rope)
    if moe.n_experts > 0:
        _check_moe(config)
    if not all(config.is_moe(layer) for layer in range(config.n_layers)):
        _at_least("model.d_ff", config.d_ff, 1)


def _check_rope(rope: RopeConfig) -> None:
    if rope.scaling == "none" and rope.factor != 1.0:
        raise ValueError(
            f"model.attention.rope.factor={rope.factor} changes nothing with rope.scaling=none; the nearest legal "
            "value is 1.0, or set rope.scaling to linear, llama3, or yarn"
        )
    if not rope.factor >= 1.0:
        raise ValueError(f"model.attention.rope.factor={rope.factor} must be at least 1.0")
    _at_least("model.attention.rope.theta", rope.theta, 1)
    _at_least("model.attention.rope.original_max_position", rope.original_max_position, 1)
    bounds = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}
    if rope.scaling in bounds:
        least, most = bounds[rope.scaling]
        low, high = getattr(rope, least), getattr(rope, most)
        if not 0 < low < high:  # divided by their difference, and their logarithms
            raise ValueError(
                f"model.attention.rope.{least}={low} is not above 0 and below model.attention.rope.{most}={high}; "
                f"the nearest legal values are {getattr(RopeConfig, least)} and {getattr(RopeConfig, most)}"
            )


def _check_mla(attention: AttentionConfig) -> None:
    for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        _at_least(f"model.attention.{key}", getattr(attention, key), 1)
    for key, off in (("qkv_bias", False), ("out_bias", False), ("qk_norm", "none")):
        if getattr(attention, key) != off:
            raise ValueError(
                f"model.attention.{key}={getattr(attention, key)} is for kind=gqa; with kind=mla use {off}"
            )


def _check_moe(config: ModelConfig) -> None:
    moe = config.moe
    _at_least("model.moe.d_expert", moe.d_expert, 1)
    _at_least("model.moe.every", moe.every, 1)
    _at_least("model.moe.first_k_dense", moe.first_k_dense, 0)
    _at_least("model.moe.d_shared", moe.d_shared, 0)
    if not 1 <= moe.top_k <= moe.n_experts:
        nearest = min(max(moe.top_k, 1), moe.n_experts)
        raise ValueError(
            f"model.moe.top_k={moe.top_k} is not within 1 and model.moe.n_experts={moe.n_experts}; "
            f"the nearest legal value is {nearest}"
        )
    if not any(config.is_moe(layer) for layer in range(config.n_layers)):
        raise ValueError(
            f"model.moe.first_k_dense={moe.first_k_dense} and model.moe.every={moe.every} leave none of "
            f"model.n_layers={config.n_layers} layers to the experts; for a dense model set model.moe.n_experts=0"
        )
    if moe.shared_gate and not moe.d_shared:
        raise ValueError("model.moe.shared_gate=true needs shared experts: set model.moe.d_shared above 0")


def _at_least(key: str, value: float, low: int) -> None:
    if not value >= low:  # NaN is not
        raise ValueError(f"{key}={value} must be at least {low}")


def _one_of(key: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        nearest = difflib.get_close_matches(value, legal, n=1, cutoff=0.0)[0]
        raise ValueError(f"{key}={value} is none of {', '.join(legal)}; the nearest is {nearest}")
