"""Balanced k-means over the directions of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDS = 10


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
