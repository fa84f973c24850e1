"""Grow a dense model in width and in depth, tensor by tensor.

m is the factor of width, L the number of layers. Sources: AquilaMoE's EfficientScale ("AquilaMoE: Efficient Training
for MoE Models with Scale-Up and Scale-Out Strategies"), whose width rules are bert2BERT's ("bert2BERT: Towards Reusable
Pretrained Language Models", 2110.07143), and LLaMA Pro's identity blocks (2401.02415).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from moetrain.checkpoint.lazy import LazyTensor
from moetrain.config.model import ModelConfig
from moetrain.upcycle.base import Model, Weights

# Which axis of a tensor is what: (axis that makes values, axis that takes values in). "keep" does not grow.
_AXES = {
    "embed.weight": ("model", 1, None, 0),
    "head.weight": (None, 0, "model", 1),
    "norm.weight": ("model", 0, None, 0),
    "attention_norm.weight": ("model", 0, None, 0),
    "ffn_norm.weight": ("model", 0, None, 0),
    "attention.w_q.weight": ("heads", 0, "model", 1),
    "attention.w_q.bias": ("heads", 0, None, 0),
    "attention.w_k.weight": (None, 0, "model", 1),
    "attention.w_k.bias": (None, 0, None, 0),
    "attention.w_v.weight": (None, 0, "model", 1),
    "attention.w_v.bias": (None, 0, None, 0),
    "attention.w_o.weight": ("model", 0, "heads", 1),
    "attention.w_o.bias": ("model", 0, None, 0),
    "attention.q_norm.weight": (None, 0, None, 0),
    "attention.k_norm.weight": (None, 0, None, 0),
    "mlp.w_gate.weight": ("ff", 0, "model", 1),
    "mlp.w_up.weight": ("ff", 0, "model", 1),
    "mlp.w_down.weight": ("model", 0, "ff", 1),
}
_WRITES = (
    "attention.w_o.weight",
    "attention.w_o.bias",
    "mlp.w_down.weight",
)  # what a layer adds to the residual stream


def widen(dense: Model, factor: int, advanced: bool = False) -> Model:
    """d_model, d_ff, and query heads times `factor`; key and value heads stay, so groups grow.

    A new neuron is a copy of an old one, and what takes in `factor` copies divides its weights by as many: with
    advanced=False the function stays as it is (RMSNorm included: the mean square of repeated values is the same).
    advanced: layers' new neurons are the next layer's instead ("advanced knowledge initialisation"), not exact.
    Raises ValueError for latent attention.
    """
    if factor == 1:
        return dense
    model = dense.config.model
    if model.attention.kind != "gqa":
        raise ValueError(
            f"upcycle.width={factor}: model.attention.kind={model.attention.kind} cannot grow in width; "
            "nearest legal value: 1"
        )
    index = _index(model, factor)
    sources = dict(dense.weights)
    if model.tie_embeddings:  # an embedding is copied, a head is divided: no longer one tensor
        sources["head.weight"] = sources["embed.weight"]
    weights = {name: _widened(sources, name, model, index, factor, advanced) for name in sources}
    attention = replace(model.attention, n_heads=model.attention.n_heads * factor)
    grown = replace(
        model,
        d_model=model.d_model * factor,
        d_ff=model.d_ff * factor,
        attention=attention,
        tie_embeddings=False,
        name=f"{model.name}_w{factor}",
    )
    return _with_model(dense, grown, weights)


def deepen(dense: Model, n_layers: int, by: str) -> Model:
    """The model with n_layers layers, each a copy of an old one.

    by: interpolate (layer l is the old floor(l * L / n_layers)) | stack (the old l mod L) | identity (as interpolate,
    but all copies of a layer after its first add nothing to the residual stream: the function stays as it is).
    """
    old = dense.config.model.n_layers
    source = [layer % old if by == "stack" else layer * old // n_layers for layer in range(n_layers)]
    weights = {name: tensor for name, tensor in dense.weights.items() if not name.startswith("layers.")}
    for layer, origin in enumerate(source):
        silent = by == "identity" and layer > 0 and source[layer - 1] == origin
        prefix = f"layers.{origin}."
        for name, tensor in dense.weights.items():
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                weights[f"layers.{layer}.{rest}"] = _zeros(tensor) if silent and rest in _WRITES else tensor
    model = dense.config.model
    return _with_model(dense, replace(model, n_layers=n_layers, name=f"{model.name}_l{n_layers}"), weights)


def _index(model: ModelConfig, factor: int) -> dict[str, Tensor]:
    """For each kind of axis, which old row each new one is; copies of a row stand `factor` strides apart."""
    attention = model.attention
    head_GH = torch.arange(attention.n_heads).view(attention.n_kv_heads, -1).repeat(1, factor)
    element = torch.arange(attention.head_dim)
    return {
        "model": torch.arange(model.d_model).repeat(factor),
        "ff": torch.arange(model.d_ff).repeat(factor),
        "heads": (head_GH.flatten()[:, None] * attention.head_dim + element).flatten(),
    }


def _widened(
    sources: Weights, name: str, model: ModelConfig, index: dict[str, Tensor], factor: int, advanced: bool
) -> LazyTensor:
    prefix, leaf = _layer_of(name)
    makes, makes_dim, takes, takes_dim = _AXES[leaf]
    if model.attention.qk_norm == "full" and leaf == "attention.q_norm.weight":
        makes = "heads"
    tensor = sources[name]
    shape = list(tensor.shape)
    for kind, dim in ((makes, makes_dim), (takes, takes_dim)):
        if kind is not None:
            shape[dim] *= factor
    following = _following(sources, prefix, leaf, model.n_layers) if advanced and len(shape) == 2 else None

    def make() -> Tensor:
        grown = _taking(tensor.make(), index.get(takes or ""), takes_dim, factor)
        other = grown if following is None else _taking(following.make(), index.get(takes or ""), takes_dim, factor)
        return _making(grown, other, index.get(makes or ""), makes_dim)

    return LazyTensor(torch.Size(shape), tensor.dtype, make)


def _taking(weight: Tensor, index: Tensor | None, dim: int, factor: int) -> Tensor:
    return weight if index is None else weight.index_select(dim, index) / factor


def _making(weight: Tensor, other: Tensor, index: Tensor | None, dim: int) -> Tensor:
    """First copies from `weight`, later ones from `other`."""
    if index is None:
        return weight
    if other is weight:
        return weight.index_select(dim, index)
    order = index.sort(stable=True)
    first = torch.ones(len(index), dtype=torch.bool)
    first[order.indices[1:]] = order.values[1:] != order.values[:-1]
    shape = [-1 if d == dim else 1 for d in range(weight.dim())]
    return torch.where(first.view(shape), weight.index_select(dim, index), other.index_select(dim, index))


def _following(sources: Weights, prefix: str, leaf: str, n_layers: int) -> LazyTensor | None:
    """The same tensor of the next layer; the last layer's own; None outside of layers."""
    if not prefix:
        return None
    layer = int(prefix.split(".")[1])
    return sources[f"layers.{min(layer + 1, n_layers - 1)}.{leaf}"]


def _layer_of(name: str) -> tuple[str, str]:
    """("layers.3.", "mlp.w_up.weight") of "layers.3.mlp.w_up.weight", ("", name) outside of layers."""
    if not name.startswith("layers."):
        return "", name
    _, number, leaf = name.split(".", 2)
    return f"layers.{number}.", leaf


def _zeros(tensor: LazyTensor) -> LazyTensor:
    make: Callable[[], Tensor] = lambda: torch.zeros(tensor.shape, dtype=tensor.dtype)  # noqa: E731
    return LazyTensor(tensor.shape, tensor.dtype, make)


def _with_model(dense: Model, model: ModelConfig, weights: Weights) -> Model:
    config = deepcopy(dense.config)
    config.model = model
    return Model(config, weights)
