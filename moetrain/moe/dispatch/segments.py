"""How a rank cuts the rows of its peers into parts, each a call of its experts: copy_engine.py."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of rank `source` in part `part` of a rank's peers' rows."""

    part: int
    source: int
    start: int
    stop: int


def cuts(ranks: int, tokens: int, parts: int) -> list[slice]:
    """The parts of the rows of `ranks - 1` peers. The last is at most one peer's: only as many own rows hide its way
    home. The others are equal."""
    total = (ranks - 1) * tokens
    before = total - min(tokens, total // parts)
    ends = [before * part // max(parts - 1, 1) for part in range(parts)] + [total]
    return [slice(*pair) for pair in pairwise(ends)]


def segments(rank: int, ranks: int, tokens: int, parts: int) -> list[Segment]:
    """How `rank` cuts its peers' rows, nearest peer first; every rank can work out every other's."""
    found = []
    for part, cut in enumerate(cuts(ranks, tokens, parts)):
        start, stop = cut.start, cut.stop
        while start < stop:
            peer, token = divmod(start, tokens)
            length = min(stop - start, tokens - token)
            found.append(Segment(part, (rank + 1 + peer) % ranks, token, token + length))
            start += length
    return found
