"""The dense feed-forward layer."""

from __future__ import annotations

from torch import Tensor, nn

from moetrain.fused import silu_times
from moetrain.model.core import Gather, whole


class SwiGLU(nn.Module):
    """w_down(silu(w_gate x) * w_up x), arXiv:2002.05202. Gate and up are apart, so that each splits by rows.

    gather: as in attention.GQA.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gather: Gather = whole
        self.w_gate = nn.Linear(d_model, d_ff, bias=False)
        self.w_up = nn.Linear(d_model, d_ff, bias=False)
        self.w_down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.gather(x_BSD)
        return self.w_down(silu_times(self.w_gate(x_BSD), self.w_up(x_BSD)))
