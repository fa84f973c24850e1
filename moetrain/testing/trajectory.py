"""Record a training run step by step, to compare layouts: what "the same under every layout" is measured with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.comm.start import start_distributed
from moetrain.config.compose import load_config
from moetrain.config.validate import validate
from moetrain.trainer import Trainer


@dataclass
class Step:
    """One optimizer step: its metrics row and every whole gradient, by parameter name, as the optimizer saw it."""

    row: dict
    gradients: dict[str, Tensor]


def whole(tensor: Tensor) -> Tensor:
    """A DTensor gathered from all ranks, any other tensor as it is; detached, on the CPU."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().clone()


def record(overrides: list[str], steps: int) -> tuple[list[Step], dict[str, Tensor]]:
    """Train `steps` steps of `overrides` on the ranks that are running; return each step and the final weights.

    Collective: call it on every rank (from `run_ranks`), or in a process without ranks.
    """
    alone = not dist.is_initialized()
    trainer = open_trainer(overrides)
    recorded, weights = record_steps(trainer, steps)
    trainer.close()
    if alone:
        dist.destroy_process_group()
    return recorded, weights


def open_trainer(overrides: list[str]) -> Trainer:
    """A trainer on the ranks that are running, or in a world of one; its log is open, its checkpoint restored."""
    config = load_config(overrides)
    alone = not dist.is_initialized()
    layout = validate(config, 1 if alone else dist.get_world_size())
    trainer = Trainer(config, layout, start_distributed() if alone else _rank_device())
    trainer.log.start(trainer.step, {})
    return trainer


def record_steps(trainer: Trainer, steps: int) -> tuple[list[Step], dict[str, Tensor]]:
    """Train `steps` more steps; return each, and the whole weights after the last. Collective."""
    seen: dict[str, Tensor] = {}

    def capture(*_: object) -> None:
        for name, parameter in trainer.model.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            seen[name] = whole(parameter.grad)

    handle = trainer.optimizer.register_step_pre_hook(capture)
    recorded = []
    for _ in range(steps):
        row, _ = trainer.train_step()
        assert row is not None, "a bad step"
        recorded.append(Step(row, dict(seen)))
    handle.remove()
    weights = {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}
    for part in (weights, *(step.gradients for step in recorded)):
        join_stages(part, trainer)
    return recorded, weights


def join_stages(tensors: dict[str, Tensor], trainer: Trainer) -> None:
    """Each rank of a pipeline has the tensors of its stages: add those of the others. Collective."""
    if trainer.pipeline is None:
        return
    group = trainer.pipeline.group
    parts: list[dict[str, Tensor]] = [{}] * group.size()
    dist.all_gather_object(parts, tensors, group=group)
    for part in parts:
        tensors.update(part)


def _rank_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


@dataclass
class Difference:
    """The largest deviations over all steps: relative for loss and norm, relative to the largest entry per gradient."""

    loss: float
    norm: float
    gradient: float
    where: str


def compare(run: list[Step], reference: list[Step]) -> Difference:
    """How far `run` is from `reference`, the worst step and parameter of each kind."""
    assert len(run) == len(reference)
    loss = norm = gradient = 0.0
    where = ""
    for index, (mine, theirs) in enumerate(zip(run, reference)):
        loss = max(loss, abs(mine.row["loss"] / theirs.row["loss"] - 1))
        norm = max(norm, abs(mine.row["grad_norm"] / theirs.row["grad_norm"] - 1))
        assert mine.gradients.keys() == theirs.gradients.keys()
        for name, expected in theirs.gradients.items():
            scale = expected.abs().max().clamp(min=1e-30)
            error = float((mine.gradients[name] - expected).abs().max() / scale)
            if error > gradient:
                gradient, where = error, f"{name} at step {index + 1}"
    return Difference(loss, norm, gradient, where)


def flips(run: list[Step], reference: list[Step]) -> int:
    """(step, MoE layer) pairs whose expert loads differ: in fp64 a single flipped routing choice shows here."""
    keys = [key for key in reference[0].row if key.endswith(("/load_cv", "/load_max_over_mean", "/dead_experts"))]
    assert keys, "no MoE layer reported its load"
    pairs = {
        (index, key.split("/")[1])
        for index, (mine, theirs) in enumerate(zip(run, reference))
        for key in keys
        if abs(mine.row[key] - theirs.row[key]) > 1e-12
    }
    return len(pairs)
