"""Where a run begins: at the checkpoint that `run.resume` means, with the weights of `init.from`, or at nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moetrain.checkpoint.agree import on_rank0
from moetrain.checkpoint.store import CheckpointStore
from moetrain.checkpoint.use import load_weights, resolve


@dataclass
class Beginning:
    """state: the restored trainer_state, and path where it was; None for step 0. own: in this run's directory.

    notes: to be told. skipped: damaged steps and why.
    """

    state: dict[str, Any] | None = None
    path: Path | None = None
    own: bool = False
    notes: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Updates already done."""
        return int(self.state["step"]) if self.state else 0

    @property
    def keeps(self) -> int:
        """Checkpoints of later steps are superseded; -1: all that are here, which this run does not go on with."""
        return self.step if self.own else -1


def begin(
    resume: str, init: dict[str, Any], store: CheckpointStore, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Beginning:
    """Restore model and optimizer in place. resume, init: `run.resume` and `init` of the configuration.

    Collective. Raises ValueError as `CheckpointStore.load` and `newest_intact` do. Once nothing else refuses the run,
    `store.set_aside_newer(keeps)`.
    """
    found = Beginning()
    path, allow = None, init.get("allow", [])
    on_rank0(store.clean)
    if resume == "auto":
        path, found.skipped = store.newest_intact()
    elif resume != "never":
        path = on_rank0(lambda: resolve(resume))
    if path is not None:
        found.path, found.own = path, path.parent.resolve() == store.root.resolve()
        checked = resume == "auto"
        found.state = store.load(path, model, optimizer, allow, checked, found.notes.append)
    elif init.get("from"):
        load_weights(on_rank0(lambda: resolve(init["from"])), model, allow, found.notes.append)
    return found
