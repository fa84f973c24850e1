"""Dense checkpoint in, MoE checkpoint out, one layer's experts in memory at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from moetrain.checkpoint.hf.load import expected, open_hf, prepare_run
from moetrain.checkpoint.hf.save import beside, stored_config
from moetrain.checkpoint.lazy import LazyTensor, stored
from moetrain.checkpoint.store import CheckpointStore
from moetrain.checkpoint.use import resolve
from moetrain.config.compose import config_dir, load_config
from moetrain.config.model import MoEConfig
from moetrain.config.plugins import build_plugin, nearest
from moetrain.config.schema import Config
from moetrain.upcycle.base import DenseFFN, ExpertWeights, Upcycle

Weights = dict[str, LazyTensor]


def open_source(source: Path) -> tuple[Config, Weights, Path | None]:
    """Configuration, weights, and the folder of config.json and tokenizer, of a Hugging Face directory or a checkpoint.

    Raises ValueError for what is neither.
    """
    if (source / "config.json").is_file():
        config, tensors = open_hf(source)
        return config, tensors, source
    path = resolve(source)
    config = stored_config(path)
    return config, stored(path / "model"), beside(config, path)


def build_initializer(name: str, options: Mapping[str, str], experts: int, top_k: int, granularity: int) -> Upcycle:
    """`configs/upcycle/<name>.yaml` with `options` over it. Raises ValueError for an unknown name or option."""
    folder = config_dir() / "upcycle"
    choices = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in choices:
        raise ValueError(f"upcycle={name}: no such choice{nearest(name, choices)}; choices: {', '.join(choices)}")
    given = OmegaConf.from_dotlist([f"{key}={value}" for key, value in options.items()])
    node: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(folder / f"{name}.yaml"), given))
    return build_plugin("upcycle", node, experts=experts, top_k=top_k, granularity=granularity)


def upcycled_config(dense: Config, initializer: Upcycle) -> Config:
    """The same model with every feed-forward layer turned into experts, and a router that fits the initializer.

    Raises ValueError when the model has experts already or its width cannot be cut.
    """
    if dense.model.moe.n_experts:
        raise ValueError(f"source is a MoE model already (model.moe.n_experts={dense.model.moe.n_experts})")
    default = load_config(["router=softmax", f"router.renormalize={str(initializer.normalized).lower()}"])
    config = deepcopy(dense)
    d_expert = initializer.d_expert(dense.model.d_ff)
    moe = MoEConfig(n_experts=initializer.n_experts, top_k=initializer.top_k, d_expert=d_expert)
    config.model = replace(config.model, moe=moe, name=f"{dense.model.name}_moe")
    config.router = {**default.router, "top_k": initializer.top_k}
    config.balance = default.balance
    expected(config)  # the router may refuse the choice of top_k: before anything is written
    return config


def upcycled_tensors(dense: Config, tensors: Weights, initializer: Upcycle, seed: int) -> Weights:
    """The MoE model's weights by name: experts and routers are made when asked for, everything else is the source's."""
    moe = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}

    @functools.lru_cache(maxsize=1)  # a layer's two tensors are written one after the other, and made together
    def experts(layer: int) -> ExpertWeights:
        ffn = DenseFFN(*(tensors[name].make() for name in _dense_names(layer)))
        return initializer.experts(ffn, layer, range(initializer.n_experts), seed)

    for layer in range(dense.model.n_layers):
        moe |= _layer(dense, tensors, initializer, layer, seed, experts)
    return moe


def convert(source: str | Path, out: str | Path, initializer: Upcycle, seed: int = 0) -> tuple[Path, Config, Config]:
    """Write the run directory `out`; return its step directory, the dense and the MoE configuration. All ranks call it.

    The ranks share the tensors out. Raises ValueError for an unusable source and when `out` already holds checkpoints.
    """
    source, out = Path(source), Path(out)
    dense, tensors, folder = open_source(source)
    config = upcycled_config(dense, initializer)
    weights = upcycled_tensors(dense, tensors, initializer, seed)
    prepare_run(out, config, folder)
    return CheckpointStore(out).save_weights(0, weights, asdict(config)), dense, config


def _layer(
    dense: Config,
    tensors: Weights,
    initializer: Upcycle,
    layer: int,
    seed: int,
    experts: Callable[[int], ExpertWeights],
) -> Weights:
    here, n = f"layers.{layer}.moe", initializer.n_experts
    d_model, width = dense.model.d_model, initializer.d_expert(dense.model.d_ff)
    dtype = tensors[_dense_names(layer)[0]].dtype
    router = partial(initializer.router, d_model, layer, seed, dtype)
    return {
        f"{here}.router.weight": LazyTensor(torch.Size([n, d_model]), dtype, router),
        f"{here}.experts.w_gate_up": LazyTensor(
            torch.Size([n, 2, width, d_model]), dtype, lambda: experts(layer).w_gate_up_n2fD
        ),
        f"{here}.experts.w_down": LazyTensor(torch.Size([n, d_model, width]), dtype, lambda: experts(layer).w_down_nDf),
    }


def _dense_names(layer: int) -> list[str]:
    return [f"layers.{layer}.mlp.{part}.weight" for part in ("w_gate", "w_up", "w_down")]
