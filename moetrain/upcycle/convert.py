"""Dense checkpoint in, MoE checkpoint out, one layer's experts in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from moetrain.checkpoint.hf.load import expected, open_hf, write_run
from moetrain.checkpoint.hf.save import beside
from moetrain.checkpoint.lazy import LazyTensor, stored
from moetrain.checkpoint.stored import stored_config
from moetrain.checkpoint.use import resolve
from moetrain.config.compose import config_dir, load_config
from moetrain.config.model import MoEConfig
from moetrain.config.plugins import build_plugin, nearest
from moetrain.config.schema import Config
from moetrain.upcycle.base import DenseFFN, ExpertWeights, Model, Upcycle, Weights

Sources = str | Path | list[str] | list[Path]


@dataclass(frozen=True)
class Converted:
    """What a conversion made: the step directory and its configuration; and the dense models it was made from."""

    path: Path
    config: Config
    sources: list[Model]


def open_source(source: Path) -> tuple[Model, Path | None]:
    """A Hugging Face directory's or a checkpoint's model, and the folder of its config.json and tokenizer.

    Raises ValueError for what is neither.
    """
    if (source / "config.json").is_file():
        config, tensors = open_hf(source)
        return Model(config, tensors), source
    path = resolve(source)
    config = stored_config(path)
    return Model(config, stored(path / "model")), beside(config, path)


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

    Raises ValueError when its width cannot be cut or the router cannot choose so many.
    """
    default = load_config(["router=softmax", f"router.renormalize={str(initializer.normalized).lower()}"])
    config = deepcopy(dense)
    moe = MoEConfig(
        n_experts=initializer.n_experts,
        top_k=initializer.n_chosen,
        d_expert=initializer.d_expert(dense.model.d_ff),
        d_shared=initializer.d_shared(dense.model.d_ff),
        shared_gate=initializer.shared_gate,
    )
    config.model = replace(config.model, moe=moe, name=f"{dense.model.name}_moe")
    config.router = {**default.router, "top_k": initializer.n_chosen}
    config.balance = default.balance
    expected(config)  # the router may refuse the choice of top_k: before anything is written
    return config


def upcycled_tensors(dense: Model, moe: Config, initializer: Upcycle, seed: int) -> Weights:
    """The MoE model's weights by name: experts and routers are made when asked for, everything else is the source's."""
    shapes = {name: tensor.shape for name, tensor in expected(moe).items()}
    weights = {name: tensor for name, tensor in dense.weights.items() if ".mlp." not in name}

    held: dict[int, ExpertWeights] = {}

    def experts(layer: int) -> ExpertWeights:
        """Made once for a layer's two tensors, which are written one after the other; let go before the next."""
        if layer not in held:
            held.clear()
            held[layer] = initializer.make(_ffn(dense.weights, layer), layer, range(initializer.n_experts), seed)
        return held[layer]

    for layer in range(dense.config.model.n_layers):
        made = _layer(dense.weights, initializer, layer, seed, experts)
        dtype = dense.weights[f"layers.{layer}.mlp.w_gate.weight"].dtype
        for name, make in made.items():
            full = f"layers.{layer}.moe.{name}"
            if full in shapes:  # not every model has shared experts, or a gate for them
                weights[full] = LazyTensor(shapes[full], dtype, make)
    assert weights.keys() >= shapes.keys() - {name for name in shapes if ".balance." in name}
    return weights


def convert(source: Sources, out: str | Path, initializer: Upcycle, seed: int = 0) -> Converted:
    """Write the run directory `out`. All ranks call it, and share the tensors out.

    source: a model, or several for an initializer that takes several; the first gives tokenizer and config.json.
    Raises ValueError for an unusable source and when `out` already holds checkpoints.
    """
    paths, out = [Path(path) for path in (source if isinstance(source, list) else [source])], Path(out)
    opened = [open_source(path) for path in paths]
    for path, (dense, _) in zip(paths, opened):
        if dense.config.model.moe.n_experts:
            n = dense.config.model.moe.n_experts
            raise ValueError(f"source={path} is a MoE model already (model.moe.n_experts={n})")
    sources = [dense for dense, _ in opened]
    prepared = initializer.prepare(sources)
    config = upcycled_config(prepared.config, initializer)
    weights = upcycled_tensors(prepared, config, initializer, seed)
    path = write_run(out, config, weights, opened[0][1])
    return Converted(path, config, sources)


def _ffn(dense: Weights, layer: int) -> DenseFFN:
    here = f"layers.{layer}.mlp"
    gate, up, down = (dense[f"{here}.{part}.weight"].make() for part in ("w_gate", "w_up", "w_down"))
    measured = dense.get(f"{here}.importance")
    return DenseFFN(gate, up, down, measured.make() if measured else None)


def _layer(
    dense: Weights, initializer: Upcycle, layer: int, seed: int, experts: Callable[[int], ExpertWeights]
) -> dict[str, Callable[[], Tensor]]:
    """How to make each tensor of a layer's experts, by its name below `moe`."""

    def shared() -> DenseFFN:
        return initializer.shared(_ffn(dense, layer), layer, seed)

    def shared_gate_up() -> Tensor:
        made = shared()
        return torch.stack([made.w_gate_FD, made.w_up_FD])

    def shared_gate() -> Tensor:
        weight_FD = _ffn(dense, layer).w_gate_FD
        return weight_FD.new_zeros(1, weight_FD.shape[-1])

    return {
        "router.weight": lambda: initializer.router(_ffn(dense, layer), layer, seed),
        "experts.w_gate_up": lambda: experts(layer).w_gate_up_n2fD,
        "experts.w_down": lambda: experts(layer).w_down_nDf,
        "shared.w_gate_up": shared_gate_up,
        "shared.w_down": lambda: shared().w_down_DF,
        "shared.gate": shared_gate,
    }
