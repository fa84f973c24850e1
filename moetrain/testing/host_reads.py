"""Counts, without a GPU, what would make the host wait for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Reads(TorchDispatchMode):
    """Operators that read values, or whose shapes depend on them."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = fn.__name__.split(".")[0]
        by_mask = name in ("index", "index_put_") and any(
            t is not None and t.dtype is torch.bool for t in args[1] if t is None or isinstance(t, Tensor)
        )
        if by_mask or any(name.startswith(wait) for wait in self.WAITS):
            self.found.append(name)
        return fn(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """The names of all reads inside, as they happen. Its first use imports for seconds: before ranks are forked."""
    around = ("tolist", "item", "__bool__", "__int__", "cpu")  # these go around the dispatcher of operators
    plain, reads = {method: getattr(Tensor, method) for method in around}, _Reads()
    for method, call in plain.items():
        setattr(Tensor, method, _counted(reads.found, method, call))
    try:
        with reads:
            yield reads.found
    finally:
        for method, call in plain.items():
            setattr(Tensor, method, call)


def _counted(found: list[str], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def read(*args: Any) -> Any:
        found.append(name)
        return call(*args)

    return read
