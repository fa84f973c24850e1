"""In which order the pieces of an exchange are worked on, and on which streams."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import torch

from moetrain.moe.dispatch.base import Trip
from moetrain.moe.experts.base import Pieces


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def in_turn(
    trip: Trip,
    work: Pieces,
    device: torch.device,
    lead: int,
    start: Callable[[int], None],
    finish: Callable[[int], None],
    last: Callable[[], None] | None = None,
) -> None:
    """Both halves of every piece's work. One whose rows stay here is begun first and finished last.

    lead: how many pieces are begun before the one in front of them is finished, where they arrive in time for that.
    last: what else there is to do while the last rows travel.

    Where it may be, every second piece is begun on a stream beside: its kernels then fill the multiprocessors that the
    last round of the piece before leaves, instead of waiting for its end.
    """
    stays = int(trip.first_stays and trip.pieces > 1)
    side = _side_stream(device) if trip.ahead and work.beside and device.type == "cuda" else None
    begun = 0
    for piece in range(stays, trip.pieces):
        end = min(trip.pieces, piece + 1 + (lead if trip.ahead else 0))
        _begin(range(begun, end), side, start)
        begun = end
        finish(piece)
    if last is not None:
        last()
    for piece in range(stays):
        finish(piece)


def _begin(pieces: range, side: torch.cuda.Stream | None, start: Callable[[int], None]) -> None:
    here = torch.cuda.current_stream(side.device) if side is not None else None
    if side is not None and here is not None:
        side.wait_stream(here)
    for piece in pieces:
        with nullcontext() if side is None or piece % 2 == 0 else torch.cuda.stream(side):
            start(piece)
    if side is not None and here is not None:
        here.wait_stream(side)
