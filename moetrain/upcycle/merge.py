"""Several dense models become one, each giving experts ("Branch-Train-MiX: Mixing Expert LLMs into a
Mixture-of-Experts LLM")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from moetrain.checkpoint.lazy import LazyTensor
from moetrain.config.inherit import flat
from moetrain.upcycle.base import DenseFFN, Model, Upcycle

_NOT_FUNCTION = ("name", "init_std")


@dataclass(frozen=True)
class Merge(Upcycle):
    """Expert e is the feed-forward layer of source e mod S; every other weight is the mean over the S sources.

    Equal sources give `copy`, which is exact; different ones have no common output that it could be equal to.
    """

    def prepare(self, sources: list[Model]) -> Model:
        """One model whose feed-forward weights are the sources' stacked [S, ...]. ValueError when models differ."""
        if self.experts % len(sources):
            nearest = max(1, round(self.experts / len(sources))) * len(sources)
            raise ValueError(
                f"experts={self.experts} cannot be shared by {len(sources)} sources; nearest legal value: {nearest}"
            )
        first = sources[0]
        for number, other in enumerate(sources[1:], start=2):
            _refuse_difference(first, other, number)
        weights = {}
        for name, tensor in first.weights.items():
            parts = [source.weights[name] for source in sources]
            if ".mlp." in name:
                shape = torch.Size([len(parts), *tensor.shape])
                weights[name] = LazyTensor(shape, tensor.dtype, _stack(parts, tensor.dtype))
            else:
                weights[name] = LazyTensor(tensor.shape, tensor.dtype, _mean(parts, tensor.dtype))
        return Model(first.config, weights)

    def expert(self, ffn: DenseFFN, layer: int, expert: int, seed: int) -> DenseFFN:
        source = expert % len(ffn.w_gate_FD)
        return DenseFFN(ffn.w_gate_FD[source], ffn.w_up_FD[source], ffn.w_down_DF[source])


def _refuse_difference(first: Model, other: Model, number: int) -> None:
    here, there = flat(asdict(first.config.model)), flat(asdict(other.config.model))
    for key, value in here.items():
        if key not in _NOT_FUNCTION and there[key] != value:
            raise ValueError(
                f"source= number {number} has model.{key}={there[key]}, but the first has {value}; merge needs models "
                "that differ in their weights only"
            )


def _stack(parts: list[LazyTensor], dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: torch.stack([part.make().to(dtype) for part in parts])


def _mean(parts: list[LazyTensor], dtype: torch.dtype) -> Callable[[], Tensor]:
    """In fp64: the mean of equal tensors is the tensor itself, bit for bit."""

    def make() -> Tensor:
        total = parts[0].make().double()
        for part in parts[1:]:
            total = total + part.make()
        return (total / len(parts)).to(dtype)

    return make
