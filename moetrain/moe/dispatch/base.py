"""What a dispatcher does: bring tokens to their experts and the weighted results back.

Shape suffixes: T tokens here, M rows that came to this rank's experts, K expert slots per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moetrain.moe.experts.base import ExpertBackend
from moetrain.moe.types import Routing

Weights = tuple[Tensor, Tensor]  # w_gate_up_E2FD, w_down_EDF of this rank's experts
Slots = tuple[Tensor, Tensor]  # of rows: experts (whole numbers of any dtype, negative for none), gates (fp32 or wider)


Land = Callable[[], None]
Arrived = tuple[Tensor, Slots | None, Land | None]


@dataclass(frozen=True)
class ExchangeShape:
    """What a dispatcher may choose by and size its buffers from.

    tokens: the most that a rank routes at once. dtype: of hidden states. device_type: cpu | cuda.
    rows: the most that a rank sends to another of a routing that is `bounded`; None if nothing is.
    fixed_slots: every token has top_k expert slots, never more.
    """

    tokens: int
    d_model: int
    top_k: int
    dtype: torch.dtype
    device_type: str
    rows: int | None = None
    fixed_slots: bool = True


class Dispatcher(Protocol):
    """y_TD = sum over the chosen experts, wherever they are, of gate * expert(x).

    Expert e lives on rank e // (E / ep) of the ep group. A token goes at most once to each rank, and that rank returns
    one row: the sum over its experts. Every rank of the group takes part in every call, with the same T or its own as
    the dispatcher says. Differentiable in x, the gates, and the weights, which get a gradient even without a token.
    One dispatcher serves all layers of a model, several of whose micro-batches may be under way at once.
    """

    def __call__(self, x_TD: Tensor, routing: Routing, experts: ExpertBackend, weights: Weights) -> Tensor: ...


class Leg(Protocol):
    """Rows on their way, all out and then all home, for one direction of a pass. Used once, in this order.

    Pieces arrive in their order; they are given in the same one, but for a first one that stays, which is last.
    """

    def arrive(self, piece: int) -> Arrived:
        """The rows [M, D] of one piece that came to this rank, and their slots, ready on the current stream. If `land`
        is given, the rows are only when it has been called."""

    def room(self, piece: int) -> Tensor | None:
        """Memory in which rows that will be given are best made, if there is any; they may come from elsewhere."""

    def rest(self) -> Callable[[], tuple[Tensor, Tensor | None]] | None:
        """If the rows of a first piece that stays are all tokens here, in order: what waits for and returns the sums
        that came home from elsewhere, [P, at least T, D] and [P, as many, K]. They must then be given with it."""

    def give(self, piece: int, row_MD: Tensor, gate_MK: Tensor | None = None) -> None:
        """Start the way home of what this rank has for the rows of a piece."""

    def collect(self) -> tuple[Tensor, Tensor | None]:
        """[T, D] and [T, K]: for each token here the sum of all that was given for its rows anywhere."""


class Trip(Protocol):
    """Which rows of one micro-batch go where, in which pieces: what moves in both passes. made once, from the routing.

    pieces: calls of the experts, the same number on every rank; the first should need no waiting.
    first_stays: the first one's rows do not travel: it is begun first, given last, and worked on beside both ways.
    ahead: rows arrive beside computation, however long it is: all pieces are begun before any is finished.
    """

    pieces: int
    first_stays: bool
    ahead: bool

    def start(self, row_TD: Tensor, slots: Slots | None = None) -> Leg:
        """Send every token's row to all ranks that hold any of its experts, on the way out with its slots, of which
        rows that stand for no token have none."""
