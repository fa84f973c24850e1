"""What a dispatcher does: bring tokens to their experts and the weighted results back."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moetrain.moe.types import Routing


class ExpertFn(Protocol):
    """This rank's experts: sum over slots of gate * expert(x), for rows that are here.

    x_TD, expert_TK (ids among this rank's experts, -1 for an unused slot), gate_TK -> y_TD.
    """

    def __call__(self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor: ...


class Dispatcher(Protocol):
    """y_TD = sum over the chosen experts, wherever they are, of gate * expert(x).

    Expert e lives on rank e // (E / ep) of the ep group. A token goes once to each rank that holds any of its experts,
    and that rank returns one row: its partial sum. Every rank of the group takes part in every call.
    """

    def __call__(self, x_TD: Tensor, routing: Routing, experts: ExpertFn) -> Tensor: ...
