"""What every initializer of experts from a dense feed-forward layer shares.

E experts as the user counts them, G granularity (each is cut into G), N = E * G physical experts of which k = K * G are
chosen; F dense hidden width, f an expert's, D model width.

An initializer is a pure function: dense weights, layer number, which experts, seed. Everything random is drawn from a
generator seeded by (seed, layer, expert), so any division of the experts between ranks makes the same model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.checkpoint.lazy import LazyTensor
from moetrain.config.schema import Config

Weights = dict[str, LazyTensor]


@dataclass(frozen=True)
class Model:
    """A model: its configuration, and its weights by our names, each read when asked for."""

    config: Config
    weights: Weights


@dataclass(frozen=True)
class DenseFFN:
    """w_down_DF(silu(w_gate_FD x) * w_up_FD x).

    importance_F: how much the loss depends on each hidden neuron, where the initializer has measured it.
    """

    w_gate_FD: Tensor
    w_up_FD: Tensor
    w_down_DF: Tensor
    importance_F: Tensor | None = None


@dataclass(frozen=True)
class ExpertWeights:
    """n of the N experts: w_gate_up [n, 2, f, D], w_down [n, D, f]."""

    w_gate_up_n2fD: Tensor
    w_down_nDf: Tensor


@dataclass(frozen=True)
class Upcycle:
    """Derive from this, as a frozen dataclass whose fields are the options, and implement `expert`.

    experts, top_k: E and K. granularity: G; initializers whose experts stay whole refuse any but 1.
    normalized: the gates of a token's k experts sum to 1 (softmax after the choice, or normalised after it). Only then
    can a converted layer equal the dense one. Without it gates are plain probabilities, whose sum is k/N while the
    router is uniform; scales assume that, and are exact for no other router.
    router_std: the router's rows have this root mean square; 0 starts from a uniform router. The paper's is 0.02.
    router_rows: normal (drawn) | gate_mean (an expert's mean gate row: it gets tokens that excite it).
    tied: the G parts of one expert share a router row, so they are chosen together.
    """

    experts: int
    top_k: int
    granularity: int = 1
    normalized: bool = True
    router_std: float = 0.02
    router_rows: str = "normal"
    tied: bool = True

    cuts: ClassVar[bool] = False  # whether a granularity above 1 means something
    shared_gate: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ValueError(f"experts={self.experts}; nearest legal value: 1")
        if not 1 <= self.top_k <= self.experts:
            nearest = min(max(self.top_k, 1), self.experts)
            raise ValueError(f"top_k={self.top_k} of experts={self.experts}; nearest legal value: {nearest}")
        if self.granularity < 1:
            raise ValueError(f"granularity={self.granularity}; nearest legal value: 1")
        if self.granularity > 1 and not self.cuts:
            raise ValueError(
                f"granularity={self.granularity}, but this initializer makes whole experts; nearest legal value: 1 "
                "(upcycle=virtual_group cuts them)"
            )
        if self.router_std < 0:
            raise ValueError(f"upcycle.router_std={self.router_std}; nearest legal value: 0")
        if self.router_rows not in ("normal", "gate_mean"):
            raise ValueError(f"upcycle.router_rows={self.router_rows!r}; nearest legal value: normal (or gate_mean)")

    @property
    def n_experts(self) -> int:
        """N, physical experts."""
        return self.experts * self.granularity

    @property
    def n_chosen(self) -> int:
        """k, physical experts a token visits."""
        return self.top_k * self.granularity

    @property
    def gate(self) -> float:
        """What one chosen expert's gate is when the router is uniform."""
        return 1.0 / (self.n_chosen if self.normalized else self.n_experts)

    @property
    def scale(self) -> float:
        """Of the down projections: K experts, each the sum of its G parts, at these gates add up to one of them.

        All of it is on the down projection: SiLU is not homogeneous, so any part on the gate projection would change
        the function.
        """
        return self.granularity / (self.n_chosen * self.gate)

    def prepare(self, sources: list[Model]) -> Model:
        """The model whose feed-forward layers become experts. All ranks call it. ValueError for sources of no use."""
        if len(sources) > 1:
            raise ValueError(
                f"source= names {len(sources)} models, but this initializer takes one; nearest legal value: 1 "
                "(upcycle=merge takes several)"
            )
        return sources[0]

    def d_expert(self, d_ff: int) -> int:
        """An expert's hidden width f. Raises ValueError when d_ff cannot be cut that way."""
        return d_ff

    def expert(self, ffn: DenseFFN, layer: int, expert: int, seed: int) -> DenseFFN:
        """One of the N experts, not yet scaled."""
        raise NotImplementedError

    def make(self, ffn: DenseFFN, layer: int, which: range, seed: int) -> ExpertWeights:
        """The experts `which` of a layer, scaled, in the dtype of the dense weights."""
        return self.fill(lambda expert: self.expert(ffn, layer, expert, seed), which)

    def d_shared(self, d_ff: int) -> int:
        """Hidden width of the experts that every token visits; 0 is none."""
        return 0

    def shared(self, ffn: DenseFFN, layer: int, seed: int) -> DenseFFN:
        """The experts that every token visits, as one feed-forward layer; only asked for where d_shared is above 0."""
        raise NotImplementedError

    def router(self, ffn: DenseFFN, layer: int, seed: int) -> Tensor:
        """Router weights [N, D]."""
        if self.router_rows == "gate_mean":
            return self.mean_rows(
                torch.stack(
                    [self.expert(ffn, layer, e, seed).w_gate_FD.float().mean(0) for e in range(self.n_experts)]
                ),
                ffn,
            )
        d_model, drawn = ffn.w_gate_FD.shape[-1], self.experts if self.tied else self.n_experts
        rows = [
            torch.empty(d_model).normal_(0.0, self.router_std, generator=generator(seed, layer, row, "router"))
            for row in range(drawn)
        ]
        return torch.stack(rows).to(ffn.w_gate_FD.dtype).repeat_interleave(self.n_experts // drawn, dim=0)

    def mean_rows(self, mean_ND: Tensor, ffn: DenseFFN) -> Tensor:
        """Router rows in these directions, of the right size, and equal within a group if tied."""
        if self.tied and self.granularity > 1:
            groups_EGD = mean_ND.unflatten(0, (self.experts, -1))
            mean_ND = groups_EGD.mean(1).repeat_interleave(self.granularity, dim=0)
        size = self.router_std * mean_ND.shape[-1] ** 0.5
        return (F.normalize(mean_ND, dim=-1) * size).to(ffn.w_gate_FD.dtype)

    def fill(self, expert: Callable[[int], DenseFFN], which: range) -> ExpertWeights:
        """`expert(e)` for each e of `which`, as the MoE layer holds them; one is held besides what is returned."""
        made: ExpertWeights | None = None
        for place, number in enumerate(which):
            one = expert(number)
            if made is None:
                width, d_model = one.w_gate_FD.shape
                made = ExpertWeights(
                    one.w_gate_FD.new_empty(len(which), 2, width, d_model),
                    one.w_gate_FD.new_empty(len(which), d_model, width),
                )
            made.w_gate_up_n2fD[place, 0] = one.w_gate_FD
            made.w_gate_up_n2fD[place, 1] = one.w_up_FD
            made.w_down_nDf[place] = one.w_down_DF if self.scale == 1.0 else one.w_down_DF * self.scale
        assert made is not None, "no experts asked for"
        return made


def generator(seed: int, layer: int, expert: int, purpose: str) -> torch.Generator:
    """A generator of its own for each (seed, layer, expert) and purpose, the same on every rank."""
    digest = hashlib.sha256(f"{seed}/{layer}/{expert}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
