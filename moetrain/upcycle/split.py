"""One dense layer's hidden neurons divided between the experts ("LLaMA-MoE: Building Mixture-of-Experts from LLaMA with
Continual Pre-training"; the shared block also "Dense2MoE")."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from moetrain.checkpoint.agree import on_rank0
from moetrain.checkpoint.lazy import in_memory
from moetrain.upcycle.base import DenseFFN, ExpertWeights, Model, Upcycle, generator
from moetrain.upcycle.clusters import balanced_clusters
from moetrain.upcycle.importance import importance
from moetrain.upcycle.text import real_tokens

BY = ("random", "clustering", "importance")


@dataclass(frozen=True)
class Split(Upcycle):
    """N experts of F/(N + shared) neurons each; `shared` further parts are visited by every token.

    by: random | clustering (balanced k-means over the directions of gate rows) | importance (experts get equal shares
    of important neurons). The shared part takes the most important neurons. Importance is the mean over real tokens of
    |h * dL/dh|, h a neuron's activation and L the loss; it is worked out once, layer by layer.
    shared_gate: give the shared part a gate that starts at sigmoid(0), and twice the weight: Qwen2-MoE's form.

    The experts' outputs and the shared part's sum to the dense layer's. A token adds up only k of the N, so those are
    scaled by N/k over the gate of a uniform router: with all N chosen at equal gates the layer is the dense one
    exactly, with fewer it is not.
    """

    by: str = "random"
    shared_experts: int = 0
    shared_gate: bool = False  # type: ignore[misc]  # an option here, constant elsewhere

    cuts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in BY:
            raise ValueError(f"upcycle.by={self.by!r}; nearest legal value: random (or {', '.join(BY[1:])})")
        if self.shared_experts < 0:
            raise ValueError(f"upcycle.shared_experts={self.shared_experts}; nearest legal value: 0")
        if self.shared_gate and not self.shared_experts:
            raise ValueError(
                "upcycle.shared_gate=true needs upcycle.shared_experts above 0; nearest legal value: false"
            )

    @property
    def scale(self) -> float:
        return self.n_experts / self.n_chosen / self.gate

    def prepare(self, sources: list[Model]) -> Model:
        dense = super().prepare(sources)
        self.d_expert(dense.config.model.d_ff)  # refuse before measuring
        if self.by != "importance" and not self.shared_experts:
            return dense
        measured_LF = on_rank0(lambda: importance(dense, real_tokens(dense.config)))
        rows = {f"layers.{layer}.mlp.importance": in_memory(row_F) for layer, row_F in enumerate(measured_LF)}
        return replace(dense, weights=dense.weights | rows)

    def d_expert(self, d_ff: int) -> int:
        parts = self.n_experts + self.shared_experts
        if d_ff % parts:
            legal = [n for n in range(1, d_ff + 1) if d_ff % n == 0]
            nearest = min(legal, key=lambda n: abs(n - parts))
            shared = f" and upcycle.shared_experts={self.shared_experts}" if self.shared_experts else ""
            raise ValueError(
                f"experts={self.experts} of granularity={self.granularity}{shared} do not divide the dense width "
                f"{d_ff}; nearest legal value of their {'sum' if shared else 'product'}: {nearest}"
            )
        return d_ff // parts

    def d_shared(self, d_ff: int) -> int:
        return self.shared_experts * self.d_expert(d_ff)

    def partition(self, ffn: DenseFFN, layer: int, seed: int) -> tuple[Tensor, Tensor]:
        """int64 [N, f], the neurons of each expert, and [shared * f], those of the shared part; each ascending."""
        width, random = ffn.w_gate_FD.shape[0], generator(seed, layer, 0, "split")
        each = self.d_expert(width)
        rest = torch.arange(width)
        shared = rest[:0]
        if self.shared_experts:
            order = _importance(ffn).sort(descending=True, stable=True).indices
            shared, rest = order[: self.d_shared(width)].sort().values, order[self.d_shared(width) :].sort().values
        if self.by == "random":
            parts = torch.randperm(len(rest), generator=random).view(self.n_experts, each)
        elif self.by == "clustering":
            parts = balanced_clusters(ffn.w_gate_FD[rest], self.n_experts, random)
        else:
            parts = _dealt(_importance(ffn)[rest], self.n_experts)
        return rest[parts].sort(dim=1).values, shared

    def expert(self, ffn: DenseFFN, layer: int, expert: int, seed: int) -> DenseFFN:
        return _cut(ffn, self.partition(ffn, layer, seed)[0][expert])

    def make(self, ffn: DenseFFN, layer: int, which: range, seed: int) -> ExpertWeights:
        parts_Nf, _ = self.partition(ffn, layer, seed)  # once, however many experts are asked for
        return self.fill(lambda expert: _cut(ffn, parts_Nf[expert]), which)

    def shared(self, ffn: DenseFFN, layer: int, seed: int) -> DenseFFN:
        made = _cut(ffn, self.partition(ffn, layer, seed)[1])
        return replace(made, w_down_DF=2 * made.w_down_DF) if self.shared_gate else made

    def router(self, ffn: DenseFFN, layer: int, seed: int) -> Tensor:
        if self.router_rows == "normal":
            return super().router(ffn, layer, seed)
        parts_Nf, _ = self.partition(ffn, layer, seed)
        return self.mean_rows(torch.stack([ffn.w_gate_FD[part].float().mean(0) for part in parts_Nf]), ffn)


def _cut(ffn: DenseFFN, which_f: Tensor) -> DenseFFN:
    return DenseFFN(ffn.w_gate_FD[which_f], ffn.w_up_FD[which_f], ffn.w_down_DF[:, which_f])


def _importance(ffn: DenseFFN) -> Tensor:
    assert ffn.importance_F is not None, "`prepare` measures it"
    return ffn.importance_F


def _dealt(importance_F: Tensor, n: int) -> Tensor:
    """int64 [n, F/n]: rows dealt out from the most important down, the order turning after each round."""
    rounds = importance_F.sort(descending=True, stable=True).indices.view(-1, n)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T
