"""Do something on one rank or on all, and make every rank raise if any of them failed.

A rank that raises alone leaves the others in their next collective until it times out. These two turn a failure
anywhere into an error everywhere. In one process without torch.distributed they just call the function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather(fn: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """`fn()` of every rank, in rank order. fn must not communicate; what it returns must pickle.

    group: another one of all ranks, for a thread that must not disturb the run's own collectives.

    Raises on every rank if it raised on any: its own error where it did, elsewhere ValueError if the first one to fail
    raised that and RuntimeError otherwise, with the failing rank named.
    """
    _, world = rank_and_world()
    if world == 1:
        return [fn()]
    mine: tuple[T | None, str, bool]
    error: Exception | None = None
    try:
        mine = (fn(), "", False)
    except Exception as caught:
        error = caught
        mine = (None, f"{type(caught).__name__}: {caught}", isinstance(caught, ValueError))
    everyone: list = [None] * world
    dist.all_gather_object(everyone, mine, group=group)
    if error is not None:
        raise error
    for failed, (_, message, is_value_error) in enumerate(everyone):
        if message:
            raise (ValueError if is_value_error else RuntimeError)(f"rank {failed}: {message}")
    return [value for value, _, _ in everyone]


def on_rank0(fn: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """`fn()` of rank 0, on every rank; errors as in `gather`."""
    rank, _ = rank_and_world()
    return gather(fn if rank == 0 else lambda: None, group)[0]  # type: ignore[arg-type, return-value]
