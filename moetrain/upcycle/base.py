"""What every initializer of experts from a dense feed-forward layer shares.

E experts as the user counts them, G granularity (each is cut into G), N = E * G physical experts of which k = K * G are
chosen; F dense hidden width, f an expert's, D model width.

An initializer is a pure function: dense weights, layer number, which experts, seed. Everything random is drawn from a
generator seeded by (seed, layer, expert), so any division of the experts between ranks makes the same model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenseFFN:
    """w_down_DF(silu(w_gate_FD x) * w_up_FD x)."""

    w_gate_FD: Tensor
    w_up_FD: Tensor
    w_down_DF: Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """n of the N experts: w_gate_up [n, 2, f, D], w_down [n, D, f]."""

    w_gate_up_n2fD: Tensor
    w_down_nDf: Tensor


class Upcycle:
    """Derive from this and implement `d_expert` and `expert`.

    normalized: the gates of a token's k experts sum to 1 (softmax after the choice, or normalised after it). Only then
    can a converted layer equal the dense one. Without it gates are plain probabilities, whose sum is k/N while the
    router is uniform; scales assume that, and are exact for no other router.
    router_std: the router's rows are drawn from N(0, router_std^2), one for each of the E; the paper's is 0.02.
    """

    def __init__(
        self, experts: int, top_k: int, granularity: int = 1, normalized: bool = True, router_std: float = 0.02
    ) -> None:
        if experts < 1:
            raise ValueError(f"experts={experts}; nearest legal value: 1")
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k={top_k} of experts={experts}; nearest legal value: {min(max(top_k, 1), experts)}")
        if granularity < 1:
            raise ValueError(f"granularity={granularity}; nearest legal value: 1")
        if router_std < 0:
            raise ValueError(f"upcycle.router_std={router_std}; nearest legal value: 0")
        self.groups, self.granularity, self.normalized, self.router_std = experts, granularity, normalized, router_std
        self.n_experts, self.top_k = experts * granularity, top_k * granularity

    def d_expert(self, d_ff: int) -> int:
        """An expert's hidden width f. Raises ValueError when d_ff cannot be cut that way."""
        raise NotImplementedError

    def expert(self, ffn: DenseFFN, layer: int, expert: int, seed: int) -> DenseFFN:
        """One of the N experts, with its down projection scaled."""
        raise NotImplementedError

    def experts(self, ffn: DenseFFN, layer: int, which: range, seed: int) -> ExpertWeights:
        """The experts `which` of a layer, in the dtype of the dense weights."""
        return stack([self.expert(ffn, layer, expert, seed) for expert in which])

    def router(self, d_model: int, layer: int, seed: int, dtype: torch.dtype) -> Tensor:
        """Router weights [N, D]. The G parts of one expert share a row, so they are chosen together."""
        rows = [
            torch.empty(d_model).normal_(0.0, self.router_std, generator=generator(seed, layer, group, "router"))
            for group in range(self.groups)
        ]
        return torch.stack(rows).to(dtype).repeat_interleave(self.granularity, dim=0)

    def gate(self) -> float:
        """What one chosen expert's gate is when the router is uniform."""
        return 1.0 / (self.top_k if self.normalized else self.n_experts)

    def refuse_granularity(self, name: str) -> None:
        """For initializers whose experts are as wide as the dense layer."""
        if self.granularity != 1:
            raise ValueError(
                f"granularity={self.granularity}: upcycle={name} makes whole experts; nearest legal value: 1 "
                "(upcycle=virtual_group cuts them)"
            )


def stack(experts: list[DenseFFN]) -> ExpertWeights:
    """Experts as the MoE layer holds them."""
    return ExpertWeights(
        torch.stack([torch.stack([e.w_gate_FD, e.w_up_FD]) for e in experts]),
        torch.stack([e.w_down_DF for e in experts]),
    )


def generator(seed: int, layer: int, expert: int, purpose: str) -> torch.Generator:
    """A generator of its own for each (seed, layer, expert) and purpose, the same on every rank."""
    digest = hashlib.sha256(f"{seed}/{layer}/{expert}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
