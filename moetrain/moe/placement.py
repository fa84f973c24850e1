"""Which rank of the ep group holds which expert: hot experts change places with cold ones of other ranks.

A step is as slow as its fullest rank. Experts may lie anywhere, as long as every rank has E / ep of them: so where
load stays uneven, experts are moved (EPLB of DeepSeek-V3, arXiv:2412.19437, section 3.4; Hecate, arXiv:2502.02581).
Both also copy hot experts; here they only move, so one that has more than a mean rank's load keeps its rank too full.

Shape suffixes: L MoE layers, E experts, R ranks of the ep group. slot_E: for each expert the place where it is; rank r
has E / R of them, from r * E / R on. In logical order slot_E is 0, 1, 2, ...
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_GAIN = 0.01  # of the mean rank's load: swaps that bring less are not worth their bytes


class Placement:
    """When experts move. every: steps between decisions, 0 for none.

    threshold: the fullest rank's load over the mean's since the last decision above which a layer's experts are moved.
    """

    def __init__(self, every: int = 0, threshold: float = 1.1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise ValueError(f"dispatch.placement.every={every} is no number of steps; nearest legal value: 0")
        if not threshold >= 1 or not math.isfinite(threshold):
            raise ValueError(f"dispatch.placement.threshold={threshold} is not 1 or more; nearest legal value: 1.0")
        self.every, self.threshold = every, threshold

    def plan(self, count_LE: Tensor, slot_LE: Tensor, ranks: int) -> Tensor:
        """The slots to move to. count_LE: int64 choices; on the CPU, as the slots are. A pure function of integers:
        every rank plans the same."""
        return torch.stack([self._layer(count_E, slot_E, ranks) for count_E, slot_E in zip(count_LE, slot_LE)])

    def _layer(self, count_E: Tensor, slot_E: Tensor, ranks: int) -> Tensor:
        load_R = loads(count_E[None], rank_of(slot_E, ranks)[None], ranks)[0]
        if int(load_R.max()) * ranks <= self.threshold * int(load_R.sum()):
            return slot_E
        return swapped(count_E, slot_E, ranks)


def rank_of(slot_E: Tensor, ranks: int) -> Tensor:
    """The rank on which each slot is."""
    return slot_E // (slot_E.shape[-1] // ranks)


def loads(count_LE: Tensor, rank_LE: Tensor, ranks: int) -> Tensor:
    """[L, R]: the choices of each rank's experts."""
    return count_LE.new_zeros(count_LE.shape[0], ranks).scatter_add_(1, rank_LE, count_LE)


def swapped(count_E: Tensor, slot_E: Tensor, ranks: int) -> Tensor:
    """slot_E after swaps between the fullest rank and another, the best first, until none gains enough.

    Each swap lowers the larger load of its two ranks, so it ends. Swaps move few experts; a plan from nothing (longest
    processing time first) would move nearly all for a few per cent more.
    """
    slot_E, rank_E = slot_E.clone(), rank_of(slot_E, ranks)
    load_R = loads(count_E[None], rank_E[None], ranks)[0]
    least = LEAST_GAIN * int(count_E.sum()) / ranks
    while True:
        full = int(load_R.argmax())
        (from_I,), (to_J,) = torch.where(rank_E == full), torch.where(rank_E != full)
        relief_IJ = count_E[from_I, None] - count_E[to_J]
        after_IJ = torch.maximum(load_R[full] - relief_IJ, load_R[rank_E[to_J]] + relief_IJ)
        best = int(after_IJ.argmin())
        if int(load_R[full] - after_IJ.flatten()[best]) <= least:
            return slot_E
        pair, relief = [int(from_I[best // len(to_J)]), int(to_J[best % len(to_J)])], relief_IJ.flatten()[best]
        load_R[full] -= relief
        load_R[rank_E[pair[1]]] += relief
        for place in (slot_E, rank_E):
            place[pair] = place[pair[::-1]]
