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
    last: Callable[[Callable[[], None]], None] | None = None,
) -> None:
    """Both halves of every piece's work. One whose rows stay here is begun first and finished last.

    last: what else there is to do while the last rows travel. It is given what comes after it, and calls that once.
    """
    stays = int(trip.first_stays and trip.pieces > 1)
    begun = trip.pieces if trip.ahead else stays
    beside = _begin(begun, work.beside, device, start)
    for piece in range(stays, trip.pieces):
        if piece >= begun:
            start(piece)
        if piece in beside:
            torch.cuda.current_stream(device).wait_event(beside[piece])
        finish(piece)

    def stay() -> None:
        for piece in range(stays):
            finish(piece)

    if last is None:
        stay()
    else:
        last(stay)


def _begin(
    pieces: int, beside: bool, device: torch.device, start: Callable[[int], None]
) -> dict[int, torch.cuda.Event]:
    """First halves, every second one on a stream beside if they may: a piece's kernels then fill the multiprocessors
    that the last round of the piece before leaves, instead of waiting for its end. Returns the ends of those.

    Two streams, not one each: a second half must not begin, and take the multiprocessors on which slots are sorted,
    before the last piece but one is done.
    """
    ends: dict[int, torch.cuda.Event] = {}
    side = _side_stream(device) if beside and device.type == "cuda" and pieces > 1 else None
    if side is not None:
        side.wait_stream(torch.cuda.current_stream(device))
    for piece in range(pieces):
        with nullcontext() if side is None or piece % 2 == 0 else torch.cuda.stream(side):
            start(piece)
            if side is not None and piece % 2 == 1:
                ends[piece] = side.record_event()
    return ends
