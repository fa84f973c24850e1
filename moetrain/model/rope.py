"""Rotary positions (arXiv:2104.09864) and the ways to stretch them.

Nothing is stored: the tables are made from the config in every forward, once for all layers, so a model built on the
meta device loses no buffer. They are fp32 whatever the model's dtype, and so is the rotation of bf16 queries and keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moetrain.config.model import RopeConfig
from moetrain.fused import fused
from moetrain.model.norm import RMSNorm


def frequencies(config: RopeConfig, dim: int, device: torch.device | None = None) -> Tensor:
    """fp32 [dim/2], radians per position of each rotated pair, after scaling.

    Sources: linear arXiv:2306.15595; yarn arXiv:2309.00071 §3.2; llama3 as in Llama 3.1's published code.
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    base = 1.0 / config.theta**exponent
    if config.scaling == "none":
        return base
    if config.scaling == "linear":
        return base / config.factor
    if config.scaling == "llama3":
        return _llama3(config, base)
    assert config.scaling == "yarn", config.scaling
    return _yarn(config, base, dim)


def _llama3(config: RopeConfig, base: Tensor) -> Tensor:
    """Waves shorter than the high bound stay, longer than the low bound are stretched, between them a linear blend."""
    turns = config.original_max_position * base / (2 * math.pi)  # full turns within the original context
    keep = ((turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)).clamp(0, 1)
    return keep * base + (1 - keep) * base / config.factor


def _yarn(config: RopeConfig, base: Tensor, dim: int) -> Tensor:
    """Pairs that turn beta_fast times within the original context stay, those below beta_slow are stretched."""

    def pair_of(turns: float) -> float:
        return dim * math.log(config.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low = max(math.floor(pair_of(config.beta_fast)), 0)
    high = min(math.ceil(pair_of(config.beta_slow)), dim - 1)
    pair = torch.arange(dim // 2, dtype=torch.float32, device=base.device)
    stretch = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    return stretch * base / config.factor + (1 - stretch) * base


def tables(config: RopeConfig, dim: int, position_BS: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin), fp32 [B, 1, S, dim/2]; both times YaRN's attention factor, of which q and k each take a share."""
    angle_BSr = position_BS[..., None].float() * frequencies(config, dim, position_BS.device)
    factor = 1.0
    if config.scaling == "yarn":
        factor = config.temperature(config.mscale) / config.temperature(config.mscale_all_dim)
    return angle_BSr.cos()[:, None] * factor, angle_BSr.sin()[:, None] * factor


def rotate(x_BHSd: Tensor, cos_sin: tuple[Tensor, Tensor], interleaved: bool, norm: RMSNorm | None = None) -> Tensor:
    """Turn each pair of x by its angle. Pairs are (i, i+d/2), or (2i, 2i+1) when interleaved.

    The result is in halves in both cases: queries and keys are permuted alike, so their products do not change.
    norm: of each head, before it turns.
    """
    if fused(x_BHSd):
        import moetrain_kernels

        weight_d, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return moetrain_kernels.norm_rope(x_BHSd, weight_d, cos_sin, eps, interleaved)
    if norm is not None:
        x_BHSd = norm(x_BHSd)
    cos, sin = cos_sin
    a, b = (x_BHSd[..., 0::2], x_BHSd[..., 1::2]) if interleaved else x_BHSd.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_BHSd.dtype)
