"""The expert layer on rows that come in pieces, each piece's work in two halves between which others may be started.

A caller that exchanges rows with other devices gets to hide both ways of its transfers: a piece whose rows never travel
is started while others' come and finished while their results go home; backward, all weight gradients come last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .combine import combine
from .configs import Config, choose, leaving
from .down_grad import down_grad
from .experts import aligned, beside, check
from .gemm import grouped_gemm
from .plan import RowPlan, sort_rows
from .spans import WeightRows, several_pieces
from .up import up_swiglu
from .weight_grad import weight_grad

More = Callable[[], tuple[torch.Tensor, torch.Tensor | None]]  # [P, at least T, D], [P, as many, K]; contiguous
SORTS = 4  # multiprocessors that sort a piece's slots while the piece before has the others


@dataclass
class _Piece:
    """What a piece's next half needs. No plan: no rows. h: until dh stands; a_RF, part_RP: only between two halves."""

    x_TD: torch.Tensor
    gate_TK: torch.Tensor
    plan: RowPlan | None = None
    config: Config | None = None
    h_R2F: torch.Tensor | None = None
    a_RF: torch.Tensor | None = None
    dy_TD: torch.Tensor | None = None
    dh_R2F: torch.Tensor | None = None
    dx_RD: torch.Tensor | None = None
    part_RP: torch.Tensor | None = None


class ExpertPieces:
    """`moe_experts` of pieces, without autograd: start, finish; start_gradients, finish_gradients; weight_gradients.

    wanted: which of x, gate, w_gate_up, w_down will be asked for a gradient; None if there will be no backward pass.
    Pieces are numbered in the order of `start`. A second half may come at any time after its first; gradients start
    when every forward half is done, those of weights come when all pieces' have started. All once.

    beside: a piece's first half may run on another stream, which waits for all work before the first piece and is
    waited for before the second half. Memory is safe so: what a first half uses was taken on its stream, or earlier on
    one for which its stream has waited; and what it gives back was its stream's.
    """

    beside = True

    def __init__(
        self, w_gate_up_E2FD: torch.Tensor, w_down_EDF: torch.Tensor, wanted: tuple[bool, bool, bool, bool] | None
    ) -> None:
        self.w_gate_up_E2FD, self.w_down_EDF = w_gate_up_E2FD.contiguous(), w_down_EDF.contiguous()
        self.wanted = wanted
        self.pieces: list[_Piece] = []
        self.rows: tuple[torch.Tensor, torch.Tensor] | None = None  # dh and gate * a, of all pieces
        self.weight_rows: tuple[WeightRows, WeightRows] | None = None

    def start(
        self,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        gate_TK: torch.Tensor,
        base: int = 0,
        land: Callable[[], None] | None = None,
    ) -> None:
        """Sort and up-projection of the next piece's rows. Arguments and errors as in moe_experts.

        Experts are counted from `base`, and may be whole numbers of any dtype. land: called before x is read, which may
        still be on its way; the sort of the next piece is then given room beside this up-projection.
        """
        w_gate_up, w_down = self.w_gate_up_E2FD, self.w_down_EDF
        check(x_TD, expert_TK, gate_TK, w_gate_up, w_down, None)
        piece = _Piece(x_TD, gate_TK.contiguous())
        self.pieces.append(piece)
        if expert_TK.numel() > 0 and w_down.numel() > 0:
            piece.config = choose(piece.x_TD, w_gate_up, w_down, expert_TK.numel())
            piece.plan = sort_rows(expert_TK, w_down.shape[0], piece.config.block_m, base=base)
        if land is not None:
            land()
        piece.x_TD = aligned(x_TD)
        if piece.plan is None:
            return
        up = piece.config.up if land is None else leaving(piece.config.up, SORTS)
        piece.h_R2F, piece.a_RF = up_swiglu(piece.x_TD, piece.plan, w_gate_up, up)
        if self.wanted is None:
            piece.h_R2F = None

    def finish(self, number: int, out_TD: torch.Tensor | None = None, more: More | None = None) -> torch.Tensor:
        """Down-projection and weighted sum: y_TD of a piece, in `out_TD` if given and there are rows.

        more: called between the two, for sums made elsewhere that are added (to y, or to dx and dgate).
        """
        piece = self.pieces[number]
        if piece.plan is None:
            return _plus(torch.zeros_like(piece.x_TD), more()[0] if more else None)
        y_RD = grouped_gemm(piece.a_RF, piece.plan, self.w_down_EDF, piece.config.down)
        piece.a_RF = None
        return combine(y_RD, piece.plan, piece.gate_TK, out_TN=out_TD, more=more() if more else None)

    def start_gradients(self, number: int, dy_TD: torch.Tensor, far: bool = False) -> None:
        """From dy to the gradient of the pre-activation; `far`: with its product to dx, where that is wanted."""
        piece = self.pieces[number]
        if piece.plan is None:
            return
        rows = self._rows_of(number)
        piece.dy_TD = aligned(dy_TD)
        _, _, piece.part_RP = down_grad(
            piece.dy_TD, piece.gate_TK, piece.plan, self.w_down_EDF, piece.h_R2F, piece.config.down_grad, rows
        )
        piece.h_R2F, piece.dh_R2F = None, rows[0]
        if far and (self.wanted[0] or self.wanted[1]):
            piece.dx_RD = self._to_dx(piece)
        pieces = self._with_rows()
        if any(self.wanted[2:]) and all(piece.dy_TD is not None for piece in pieces):
            self.weight_rows = several_pieces(*zip(*((piece.plan, piece.x_TD, piece.dy_TD) for piece in pieces)))

    def finish_gradients(
        self, number: int, out_TD: torch.Tensor | None = None, more: More | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """dx_TD and dgate_TK of a piece, None where not wanted; arguments as in `finish`."""
        piece = self.pieces[number]
        if not (self.wanted[0] or self.wanted[1]):
            return None, None
        if piece.plan is None:
            parts = more() if more else (None, None)
            dx_TD, dgate_TK = (_plus(torch.zeros_like(t), p) for t, p in zip((piece.x_TD, piece.gate_TK), parts))
        else:
            dgate_TK = torch.empty_like(piece.gate_TK)
            dx_RD = self._to_dx(piece) if piece.dx_RD is None else piece.dx_RD
            sums = more() if more else None
            dx_TD = combine(dx_RD, piece.plan, None, piece.part_RP, dgate_TK, out_TD, sums)
            piece.dh_R2F = piece.dx_RD = piece.part_RP = None
        return dx_TD if self.wanted[0] else None, dgate_TK if self.wanted[1] else None

    def _to_dx(self, piece: _Piece) -> torch.Tensor:
        w_up_rows = self.w_gate_up_E2FD.flatten(1, 2)
        return grouped_gemm(piece.dh_R2F, piece.plan, w_up_rows, piece.config.dx, transposed=True)

    def weight_gradients(
        self, meanwhile: Callable[[], None] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """dw_gate_up and dw_down over the rows of all pieces, None where not wanted.

        meanwhile: called when they are under way, on a stream beside; a second half in it fills what they leave.
        """
        pieces = self._with_rows()
        weights, wanted = (self.w_gate_up_E2FD, self.w_down_EDF), self.wanted[2:]
        if not pieces or not any(wanted):
            if meanwhile is not None:
                meanwhile()
            return tuple(torch.zeros_like(w) if w_wanted else None for w, w_wanted in zip(weights, wanted))
        dw_gate_up, dw_down = (torch.empty_like(w) if w_wanted else None for w, w_wanted in zip(weights, wanted))
        dh_R2F, a_RF = self.rows
        self.rows = None
        x_TD, dy_TD, (rows_x, rows_dy) = pieces[0].x_TD, pieces[0].dy_TD, self.weight_rows
        config = choose(x_TD, *weights, dh_R2F.shape[0])
        with beside(x_TD.device if meanwhile else None) as join:
            if dw_down is not None:
                weight_grad(dy_TD, a_RF, rows_dy, dw_down, False, config.dw_down)
            if dw_gate_up is not None:
                weight_grad(x_TD, dh_R2F, rows_x, dw_gate_up.flatten(1, 2), True, config.dw_up)
        try:
            if meanwhile is not None:
                meanwhile()
        finally:
            join()  # before any tensor of here is freed: the allocator knows of the usual stream only
        return dw_gate_up, dw_down

    def _with_rows(self) -> list[_Piece]:
        return [piece for piece in self.pieces if piece.plan is not None]

    def _rows_of(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A piece's part of dh and of gate * a, which lie behind each other for the weight gradients."""
        sizes = [0 if piece.plan is None else piece.plan.max_rows for piece in self.pieces]
        if self.rows is None:
            num_f, like = self.w_down_EDF.shape[2], self.w_down_EDF
            self.rows = like.new_empty(sum(sizes), 2 * num_f), like.new_empty(sum(sizes), num_f)
        place = slice(sum(sizes[:number]), sum(sizes[: number + 1]))
        return self.rows[0][place], self.rows[1][place]


def _plus(own: torch.Tensor, parts: torch.Tensor | None) -> torch.Tensor:
    return own if parts is None else own + parts[:, : own.shape[0]].sum(0)
