"""One dense layer's hidden neurons divided between the experts ("LLaMA-MoE: Building Mixture-of-Experts from LLaMA with
Continual Pre-training")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.upcycle.base import DenseFFN, ExpertWeights, Upcycle, generator, stack

ROUNDS = 10


class Split(Upcycle):
    """N experts of F/N neurons each. by: random | clustering (balanced k-means over the directions of gate rows).

    The experts' outputs sum to the dense layer's. A token adds up only k of them, so they are scaled by N/k over the
    gate of a uniform router: with all N chosen at equal gates the layer is the dense one exactly, with fewer it is not.
    """

    def __init__(
        self,
        experts: int,
        top_k: int,
        granularity: int = 1,
        normalized: bool = True,
        router_std: float = 0.02,
        by: str = "random",
    ) -> None:
        super().__init__(experts, top_k, granularity, normalized, router_std)
        if by not in ("random", "clustering"):
            raise ValueError(f"upcycle.by={by!r}; nearest legal value: random (or clustering)")
        self.by = by
        self.scale = self.n_experts / self.top_k / self.gate()

    def d_expert(self, d_ff: int) -> int:
        if d_ff % self.n_experts:
            legal = [n for n in range(1, d_ff + 1) if d_ff % n == 0]
            nearest = min(legal, key=lambda n: abs(n - self.n_experts))
            raise ValueError(
                f"experts={self.groups} of granularity={self.granularity} do not divide the dense width {d_ff}; "
                f"nearest legal value of their product: {nearest}"
            )
        return d_ff // self.n_experts

    def partition(self, ffn: DenseFFN, layer: int, seed: int) -> Tensor:
        """int64 [N, f]: the neurons of each expert, ascending."""
        width = self.d_expert(ffn.w_gate_FD.shape[0])
        random = generator(seed, layer, 0, "split")
        if self.by == "random":
            order = torch.randperm(self.n_experts * width, generator=random)
            return order.view(self.n_experts, width).sort(dim=1).values
        return balanced_clusters(ffn.w_gate_FD, self.n_experts, random)

    def expert(self, ffn: DenseFFN, layer: int, expert: int, seed: int) -> DenseFFN:
        return self._cut(ffn, self.partition(ffn, layer, seed)[expert])

    def experts(self, ffn: DenseFFN, layer: int, which: range, seed: int) -> ExpertWeights:
        parts_Nf = self.partition(ffn, layer, seed)  # once, however many experts are asked for
        return stack([self._cut(ffn, parts_Nf[expert]) for expert in which])

    def _cut(self, ffn: DenseFFN, which_f: Tensor) -> DenseFFN:
        return DenseFFN(ffn.w_gate_FD[which_f], ffn.w_up_FD[which_f], ffn.w_down_DF[:, which_f] * self.scale)


def balanced_clusters(rows_FD: Tensor, n: int, random: torch.Generator) -> Tensor:
    """int64 [n, F/n]: spherical k-means with equal clusters; each one's rows ascending. F is a multiple of n."""
    unit_FD = F.normalize(rows_FD.double(), dim=-1)
    centre_nD = unit_FD[torch.randperm(len(unit_FD), generator=random)[:n]]
    owner_F = torch.full((len(unit_FD),), -1)
    for _ in range(ROUNDS):
        now_F = _assign(unit_FD @ centre_nD.T, len(unit_FD) // n)
        if torch.equal(now_F, owner_F):
            break
        owner_F = now_F
        sums_nD = torch.zeros_like(centre_nD).index_add(0, owner_F, unit_FD)
        centre_nD = F.normalize(sums_nD, dim=-1)
    return owner_F.sort(stable=True).indices.view(n, -1)


def _assign(similarity_Fn: Tensor, capacity: int) -> Tensor:
    """Each row asks for the most similar cluster with room; a cluster takes the most similar of those who ask."""
    owner_F = torch.full((len(similarity_Fn),), -1)
    room = [capacity] * similarity_Fn.shape[1]
    left_Fn = similarity_Fn.clone()
    while (owner_F < 0).any():
        asked_F = left_Fn.argmax(dim=1)
        for cluster, free in enumerate(list(room)):
            asking = torch.where((owner_F < 0) & (asked_F == cluster))[0]
            if not len(asking):
                continue
            best = left_Fn[asking, cluster].sort(descending=True, stable=True).indices[:free]
            owner_F[asking[best]] = cluster
            room[cluster] -= len(best)
            if room[cluster] == 0:
                left_Fn[:, cluster] = float("-inf")
    return owner_F
