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
    start: Callable[[int], None],
    finish: Callable[[int], None],
    last: Callable[[], None] | None = None,
) -> None:
    """Both halves of every piece's work. One whose rows stay here is begun first and finished last.

    last: what else there is to do while the last rows travel.
    """
    stays = int(trip.first_stays and trip.pieces > 1)
    begun = trip.pieces if trip.ahead else stays
    _begin(begun, work.beside, device, start)
    for piece in range(stays, trip.pieces):
        if piece >= begun:
            start(piece)
        finish(piece)
    if last is not None:
        last()
    for piece in range(stays):
        finish(piece)


def _begin(pieces: int, beside: bool, device: torch.device, start: Callable[[int], None]) -> None:
    """First halves, every second one on a stream beside if they may: a piece's kernels then fill the multiprocessors
    that the last round of the piece before leaves, instead of waiting for its end."""
    side = _side_stream(device) if beside and device.type == "cuda" and pieces > 1 else None
    if side is not None:
        side.wait_stream(torch.cuda.current_stream(device))
    for piece in range(pieces):
        with nullcontext() if side is None or piece % 2 == 0 else torch.cuda.stream(side):
            start(piece)
    if side is not None:
        torch.cuda.current_stream(device).wait_stream(side)
