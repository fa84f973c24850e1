"""Checkpoints of one process, small and full of cases: a tied weight, a buffer that is kept and one that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moetrain.checkpoint.store import CheckpointStore
from moetrain.optim import adamw

TRAINER_STATE = {"cursor": {"epoch": 0, "sample": 12}, "losses": [0.1, 1e-300], "name": "é"}


class TiedModel(nn.Module):
    """Nothing but parameters and buffers."""

    def __init__(self, width: int = 3, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.norm = nn.RMSNorm(width)
        self.register_buffer("bias_E", torch.randn(4))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def trained(seed: int = 0, steps: int = 2, **options: Any) -> tuple[TiedModel, Optimizer]:
    """A TiedModel of `options` after `steps` steps, and its optimizer."""
    torch.manual_seed(seed)
    model = TiedModel(**options)
    optimizer = adamw.build(model.named_parameters(), lr=0.1)
    train_on(model, optimizer, steps)
    return model, optimizer


def train_on(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    """`steps` updates by gradients that depend on the number of the step alone."""
    for step in range(steps):
        torch.manual_seed(1000 + step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of all that a checkpoint holds of the two, by name."""
    state = {f"model.{key}": value.clone() for key, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state.update({f"optim.{name}.{key}": value.clone() for key, value in optimizer.state[parameter].items()})
    return state


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Same names, same dtypes, same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def save_trained(run: Path, step: int = 2, keep: int = 0, **options: Any) -> tuple[Path, tuple[TiedModel, Optimizer]]:
    """The step directory in `run`, and what was saved into it."""
    pair = trained(steps=step, **options)
    return CheckpointStore(run, keep).save(step, *pair, TRAINER_STATE, {"world": 1}), pair
