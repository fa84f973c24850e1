"""Where a weight gradient finds every expert's rows: in one piece, or in several that were computed one by one.

The pieces' tokens lie wherever they came to; only the rows that the backward pass itself makes (dH, gate * a) lie
behind each other. So one kernel can sum over all pieces and write every weight gradient once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import Launcher, cdiv, power_of_2
from .plan import TABLE_CELLS, RowPlan

UNIT = tl.constexpr(16)  # bytes to which every piece's tokens are aligned


@dataclass(frozen=True)
class WeightRows:
    """What `weight_grad` walks over.

    spans_E [E, 1 + 2P] int32   expert, then (first row, end row) in each piece; experts with most rows first
    slot_R                      row -> slot, of the first piece
    bases_P4 int64              per piece: its tokens and its slot_R as distances from the first piece's (in units of
                                16 bytes, and entries), and its first row in r; None if there is one piece
    """

    spans_E: torch.Tensor
    slot_R: torch.Tensor
    bases_P4: torch.Tensor | None
    top_k: int

    @property
    def pieces(self) -> int:
        return self.spans_E.shape[1] // 2


def one_piece(plan: RowPlan) -> WeightRows:
    """A plan's rows, as they are."""
    return WeightRows(plan.spans_E3, plan.slot_R, None, plan.top_k)


@triton.jit(do_not_specialize=["piece", "first_row"])
def note_piece_kernel(
    x_ptr,
    x0_ptr,
    dy_ptr,
    dy0_ptr,
    slot_R,
    slot0_R,
    spans_E3,
    bases_2P4,
    spans_EP2,
    piece,
    first_row,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One piece's spans in the order of experts, and where its tokens lie: x in bases[0], dy in bases[1]."""
    j = tl.arange(0, E_POW2)
    inside = j < E
    expert = tl.load(spans_E3 + 3 * j, mask=inside, other=0)
    at = spans_EP2 + 2 * (expert * PIECES + piece)
    tl.store(at, tl.load(spans_E3 + 3 * j + 1, mask=inside, other=0), mask=inside)
    tl.store(at + 1, tl.load(spans_E3 + 3 * j + 2, mask=inside, other=0), mask=inside)
    slots = (slot_R.to(tl.int64) - slot0_R.to(tl.int64)) // 4
    base = bases_2P4 + 4 * piece
    tl.store(base, (x_ptr.to(tl.int64) - x0_ptr.to(tl.int64)) // UNIT)
    tl.store(base + 1, slots)
    tl.store(base + 2, first_row.to(tl.int64))
    base += 4 * PIECES
    tl.store(base, (dy_ptr.to(tl.int64) - dy0_ptr.to(tl.int64)) // UNIT)
    tl.store(base + 1, slots)
    tl.store(base + 2, first_row.to(tl.int64))


@triton.jit
def _rows_of(spans_EP2, e, E: tl.constexpr, PIECES: tl.constexpr):
    """Rows of experts in all pieces."""
    rows = e * 0
    for piece in tl.static_range(PIECES):
        at = spans_EP2 + 2 * (e * PIECES + piece)
        rows += tl.load(at + 1, mask=e < E, other=0) - tl.load(at, mask=e < E, other=0)
    return rows


@triton.jit
def order_spans_kernel(
    spans_EP2, spans_E, E: tl.constexpr, E_POW2: tl.constexpr, PIECES: tl.constexpr, TABLE: tl.constexpr
):
    """Experts by the rows of all pieces, most first, ties by id. A program places TABLE of them."""
    e = tl.program_id(0) * TABLE + tl.arange(0, TABLE)
    other = tl.arange(0, E_POW2)
    rows, others = _rows_of(spans_EP2, e, E, PIECES), _rows_of(spans_EP2, other, E, PIECES)
    ahead = (others[:, None] > rows[None, :]) | ((others[:, None] == rows[None, :]) & (other[:, None] < e[None, :]))
    place = tl.sum((ahead & (other < E)[:, None]).to(tl.int32), axis=0)
    out = spans_E + (1 + 2 * PIECES) * place
    tl.store(out, e, mask=e < E)
    for i in tl.static_range(2 * PIECES):
        tl.store(out + 1 + i, tl.load(spans_EP2 + 2 * PIECES * e + i, mask=e < E, other=0), mask=e < E)


launch_note = Launcher(note_piece_kernel)
launch_order = Launcher(order_spans_kernel)


def several_pieces(
    plans: Sequence[RowPlan], x: Sequence[torch.Tensor], dy: Sequence[torch.Tensor]
) -> tuple[WeightRows, WeightRows]:
    """The rows of all pieces, gathered from x and from dy, which are [T of the piece, D] each, aligned to 16 bytes.

    The rows' own tensors hold plan.max_rows rows for each piece, one piece behind the other.
    """
    first, num_experts, pieces = plans[0], plans[0].num_experts, len(plans)
    if pieces == 1:
        return one_piece(first), one_piece(first)
    sizes = {"E": num_experts, "E_POW2": power_of_2(num_experts), "PIECES": pieces}
    bases_2P4 = torch.empty(2, pieces, 4, dtype=torch.int64, device=x[0].device)
    spans_EP2 = torch.empty(num_experts, pieces, 2, dtype=torch.int32, device=x[0].device)
    spans_E = torch.empty(num_experts, 1 + 2 * pieces, dtype=torch.int32, device=x[0].device)
    row = 0
    for i, plan in enumerate(plans):
        args = (x[i], x[0], dy[i], dy[0], plan.slot_R, first.slot_R, plan.spans_E3, bases_2P4, spans_EP2, i, row)
        launch_note((1, 1, 1), args, sizes, num_warps=4)
        row += plan.max_rows
    table = min(sizes["E_POW2"], max(1, TABLE_CELLS // sizes["E_POW2"]))
    grid = (cdiv(num_experts, table), 1, 1)
    launch_order(grid, (spans_EP2, spans_E), {**sizes, "TABLE": table}, num_warps=8)
    return tuple(WeightRows(spans_E, first.slot_R, bases_P4, first.top_k) for bases_P4 in bases_2P4)
