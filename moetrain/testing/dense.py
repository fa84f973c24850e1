"""Random dense models in memory, to test an upcycling initializer on."""

from __future__ import annotations

import functools
from copy import deepcopy

import torch

from moetrain.checkpoint.lazy import in_memory
from moetrain.checkpoint.tensors import model_tensors
from moetrain.config.compose import load_config
from moetrain.config.schema import Config
from moetrain.model.build import build_model
from moetrain.upcycle.base import Model

SIZES = {
    "d_model": 32,
    "n_layers": 3,
    "d_ff": 48,
    "vocab_size": 264,
    "attention.n_heads": 4,
    "attention.n_kv_heads": 2,
    "attention.head_dim": 8,
    "moe.n_experts": 0,
}


def random_dense(seed: int = 0, dtype: torch.dtype = torch.float64, std: float = 0.3, **model: object) -> Model:
    """A dense model whose logits are of order one. model: overrides of `model.*`, with `__` for a dot."""
    sizes = SIZES | {key.replace("__", "."): value for key, value in model.items()}
    config = deepcopy(_config(tuple(f"model.{key}={value}" for key, value in sizes.items())))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, empty in model_tensors(build_model(config, "cpu")).items():
        value = std * torch.randn(empty.shape, generator=generator, dtype=torch.float64) + ("norm" in name)
        weights[name] = in_memory(value.to(dtype))
    return Model(config, weights)


@functools.cache
def _config(overrides: tuple[str, ...]) -> Config:
    """Composing takes longer than everything else here."""
    return load_config(list(overrides))
