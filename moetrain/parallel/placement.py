"""Experts move between the ranks of an ep group, and everything that belongs to them follows.

`moe/placement.py` says where to. A router's numbers, and whatever is counted by them, stay logical: only
`Experts.slot_E`, between router and dispatcher, knows the slots. Weights and optimizer state lie in slot order, but not
in checkpoints, which know no placement (docs/decisions/070-experts-move-in-place.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moetrain.comm.shards import local
from moetrain.config.plugins import build_plugin
from moetrain.config.schema import Config
from moetrain.mesh.build import Meshes
from moetrain.moe.layer import MoELayer
from moetrain.moe.placement import Placement, rank_of


def make_placement(config: Config) -> Placement:
    """Raises ValueError for a wrong option."""
    options = config.dispatch.get("placement")
    return build_plugin("dispatch.placement", options) if options else Placement()


class ExpertPlacement:
    """Where the experts of all MoE layers are. Every rank knows all of it and plans the same.

    numbers: the decoder's numbers of all MoE layers, L. layers: those that are here, by number.
    slot_LE: int64 on the CPU, see moe/placement.py. count_LE: choices since the last decision.
    """

    def __init__(
        self, config: Config, meshes: Meshes, layers: dict[int, MoELayer], optimizer: torch.optim.Optimizer
    ) -> None:
        self.rule, self.layers, self.optimizer = make_placement(config), layers, optimizer
        self.numbers = [layer for layer in range(config.model.n_layers) if config.model.is_moe(layer)]
        self.n_experts, self.ranks = config.model.moe.n_experts, meshes.layout.ep
        self.group = meshes.ep.get_group()
        self.slot_LE = self._logical()
        self.count_LE: Tensor | None = None
        if self.rule.every:
            self._check()
            for layer in layers.values():
                # One place more, for the -1 of unused slots.
                device = local(layer.experts.w_down).device
                layer.experts.slot_E = torch.tensor([*range(self.n_experts), -1], device=device)

    @property
    def rank_LE(self) -> Tensor | None:
        """The rank of the ep group that has each expert; None when there is but one."""
        return rank_of(self.slot_LE, self.ranks) if self.ranks > 1 else None

    def after_step(self, step: int, count_LE: Tensor) -> int:
        """Count a step's choices (of the whole global batch, on the CPU) and decide if it is time to; returns how many
        experts moved. Collective. Call it when gradients are gone and `Saver.before_update` was called."""
        if not self.rule.every:
            return 0
        count_LE = count_LE.long()  # exact, however long the window; and as JSON gives it back
        self.count_LE = count_LE if self.count_LE is None else count_LE + self.count_LE
        if step % self.rule.every:
            return 0
        plan_LE = self.rule.plan(self.count_LE, self.slot_LE, self.ranks)
        moved = int((plan_LE != self.slot_LE).sum())
        self.count_LE = None
        self._move(plan_LE)
        return moved

    @contextmanager
    def logical(self, before_update: Callable[[], None]) -> Iterator[None]:
        """Weights and optimizer state in logical order, for a checkpoint; afterwards back to where they were, so that a
        save changes nothing. before_update: of the saver, before that."""
        slot_LE = self.slot_LE
        self._move(self._logical())
        yield
        if not torch.equal(slot_LE, self.slot_LE):
            before_update()
            self._move(slot_LE)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint's trainer_state: a run that is resumed goes on with the same placement. {} when off."""
        if not self.rule.every:
            return {}
        counts = None if self.count_LE is None else self.count_LE.tolist()
        return {"placement": {"slots": self.slot_LE.tolist(), "counts": counts}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """After weights and optimizer state were restored, in logical order. state: a trainer_state. Collective."""
        stored = state.get("placement") if self.rule.every else None
        self._set(self._logical())
        self.count_LE = None
        if stored:
            self._move(torch.tensor(stored["slots"]))
            self.count_LE = None if stored["counts"] is None else torch.tensor(stored["counts"])

    def _logical(self) -> Tensor:
        return torch.arange(self.n_experts).repeat(len(self.numbers), 1)

    @torch.no_grad()
    def _move(self, slot_LE: Tensor) -> None:
        assert torch.equal(slot_LE.sort(1).values, self._logical()), "not a permutation"
        for number, old_E, new_E in zip(self.numbers, self.slot_LE, slot_LE):
            if number in self.layers and not torch.equal(old_E, new_E):
                source_S = old_E[new_E.argsort()].tolist()  # for each slot, where its next expert is now
                for tensor in following(self.layers[number], self.optimizer):
                    exchange_rows(tensor, source_S, self.group)
        self._set(slot_LE)

    def _set(self, slot_LE: Tensor) -> None:
        self.slot_LE = slot_LE
        for number, slot_E in zip(self.numbers, slot_LE):
            if number in self.layers and (known := self.layers[number].experts.slot_E) is not None:
                known[:-1].copy_(slot_E)

    def _check(self) -> None:
        """Raise ValueError for optimizer state that could not follow its expert."""
        for parameter in (p for layer in self.layers.values() for p in layer.experts.parameters()):
            assert isinstance(parameter, DTensor)
            for name, value in self.optimizer.state.get(parameter, {}).items():
                if value.dim() and not (isinstance(value, DTensor) and value.placements == parameter.placements):
                    raise ValueError(
                        f"dispatch.placement.every={self.rule.every}: the optimizer's {name!r} is not divided as the "
                        "experts are and cannot follow them; nearest legal value: 0"
                    )


def following(layer: MoELayer, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What this rank holds for its experts, one row for each: weights, and optimizer state but for its counters."""
    if isinstance(layer.experts, FSDPModule):
        # An evaluation leaves gathered copies in the parameters' place where nothing reshards them after a forward.
        layer.experts.reshard()
    tensors: list[Tensor] = []
    for parameter in layer.experts.parameters():
        tensors += [parameter, *(value for value in optimizer.state.get(parameter, {}).values() if value.dim())]
    return [local(tensor).detach() for tensor in tensors]


def exchange_rows(tensor: Tensor, source_S: list[int], group: dist.ProcessGroup) -> None:
    """Put into each slot the row that is in slot source_S[slot] now. Collective over `group`.

    tensor: this rank's rows [S / ranks, ...], changed in place. source_S: the same permutation on every rank.
    """
    here, rank, ranks = tensor.shape[0], group.rank(), group.size()
    assert len(source_S) == here * ranks

    def wanted(by: int, of: int) -> list[int]:
        """Slots of rank `by` whose next row is on rank `of`."""
        slots = range(by * here, (by + 1) * here)
        return [slot for slot in slots if source_S[slot] != slot and source_S[slot] // here == of]

    out, back = [wanted(other, rank) for other in range(ranks)], [wanted(rank, other) for other in range(ranks)]
    leaving = [source_S[slot] % here for slots in out for slot in slots]
    coming = [slot % here for slots in back for slot in slots]
    sent = tensor[leaving]
    received = tensor.new_empty(len(coming), *tensor.shape[1:])
    dist.all_to_all_single(received, sent, [len(s) for s in back], [len(s) for s in out], group=group)
    tensor[coming] = received
