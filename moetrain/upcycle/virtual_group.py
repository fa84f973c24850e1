"""Fine-grained upcycling by virtual groups ("Upcycling Large Language Models into Mixture of Experts").

Each of E groups holds the dense layer cut along its hidden width into G experts. A group's experts share a router row,
so a token chooses whole groups, at equal gates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moetrain.upcycle.base import DenseFFN, Upcycle


@dataclass(frozen=True)
class VirtualGroup(Upcycle):
    """Exact with normalized gates: K whole groups at gates 1/(K G) add up to 1/G of the dense output, so scale is G.

    Without normalized gates scale is E G / K, exact for a uniform router only; with tied=false parts are chosen one by
    one, which is never exact.
    """

    cuts: ClassVar[bool] = True

    def d_expert(self, d_ff: int) -> int:
        if d_ff % self.granularity:
            legal = [g for g in range(1, d_ff + 1) if d_ff % g == 0]
            nearest = min(legal, key=lambda g: abs(g - self.granularity))
            raise ValueError(
                f"granularity={self.granularity} does not divide the dense width {d_ff}; nearest legal value: {nearest}"
            )
        return d_ff // self.granularity

    def expert(self, ffn: DenseFFN, layer: int, expert: int, seed: int) -> DenseFFN:
        width = self.d_expert(ffn.w_gate_FD.shape[0])
        start = expert % self.granularity * width
        part = slice(start, start + width)
        return DenseFFN(ffn.w_gate_FD[part], ffn.w_up_FD[part], ffn.w_down_DF[:, part])
