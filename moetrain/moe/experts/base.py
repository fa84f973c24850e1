"""What an expert backend computes. A backend is any callable with this signature; it holds no parameters.

Weights, one block per expert of this rank: w_gate_up_E2FD [E, 2, F, D] (0 the gate, 1 the up projection) and
w_down_EDF [E, D, F]. expert_e(x) = w_down_e (silu(w_gate_e x) * (w_up_e x)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class ExpertBackend(Protocol):
    """y_t = sum_k gate_tk * expert_{expert_tk}(x_t); a slot whose expert is outside [0, E) contributes nothing.

    x_TD, expert_TK int64, gate_TK -> y_TD in x's dtype. Differentiable in x, gates, and both weights; every
    weight gets a gradient (zeros if unused), also when T is 0, because sharded gradients are reduced collectively.
    """

    def __call__(
        self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor
    ) -> Tensor: ...


Wanted = tuple[bool, bool, bool, bool]  # whether x, gates, w_gate_up, w_down want a gradient

More = Callable[[], tuple[Tensor, Tensor | None]]  # sums made elsewhere: [P, at least M, D] and [P, as many, K]


class Pieces(Protocol):
    """What an ExpertBackend computes, of rows that come in pieces, outside autograd.

    A piece's work has two halves, so that what travels can travel beside either; the second comes any time after the
    first. Pieces are numbered as they are started, all forward before the first backward. Each is asked for once.

    beside: a piece's first half may run on another stream, which waits for all work before the first piece; its second
    half waits for it.
    """

    beside: bool

    def start(
        self, x_MD: Tensor, expert_MK: Tensor, gate_MK: Tensor, base: int, land: Callable[[], None] | None = None
    ) -> None:
        """The first half of the next piece. Experts are whole numbers of any dtype, counted from `base`.

        land: if given, x is there for what follows on the current stream when it has been called, and pieces are
        started one beside the other.
        """

    def finish(self, piece: int, out_MD: Tensor | None = None, more: More | None = None) -> Tensor:
        """y_MD, best in `out_MD` if that is given, but it may be another tensor; plus what `more` returns, if given."""

    def start_gradients(self, piece: int, dy_MD: Tensor, far: bool) -> None:
        """The first half of a piece's backward pass; `far`: all that needs none of `more`."""

    def finish_gradients(
        self, piece: int, out_MD: Tensor | None = None, more: More | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """dx_MD and dgate_MK; None where none is wanted. Arguments as in `finish`."""

    def weight_gradients(self, meanwhile: Callable[[], None] | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Of all pieces, when all have been through the first half: work beside which the last rows travel.

        meanwhile: called once while they are made, to do what may be done beside them.
        """


@runtime_checkable
class Divisible(Protocol):
    """A backend that does more for pieces than one call each (others: pieces.py)."""

    def divide(self, weights: tuple[Tensor, Tensor], wanted: Wanted | None) -> Pieces:
        """The work of one exchange. wanted: None if no backward pass will follow."""


@dataclass(frozen=True)
class Workload:
    """What one rank's experts are given in one micro-step, for a backend that measures before it chooses.

    tokens: of all ranks whose tokens can come here. n_experts: all routed experts; local_experts of them are here, each
    with d_expert columns. precision: train.precision.
    """

    tokens: int
    top_k: int
    n_experts: int
    local_experts: int
    d_model: int
    d_expert: int
    precision: str


@runtime_checkable
class Undecided(Protocol):
    """A backend that chooses another one once the shapes and the device of a run are known (parallel/experts.py)."""

    def decide(self, load: Workload, device: torch.device, timed: bool) -> tuple[str, str]:
        """On one rank: the name of the choice, and a line that says why. timed: False must not look at a clock."""

    def use(self, name: str) -> None:
        """On every rank: compute with the backend of this name from now on."""
