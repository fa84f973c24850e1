"""Record a training run step by step, to compare layouts: what "the same under every layout" is measured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.comm.shards import local
from moetrain.comm.start import start_distributed
from moetrain.config.validate import validate
from moetrain.parallel.initialize import local_part
from moetrain.train import run_config
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

    Collective: call it on every rank (from `run_ranks`), or in a process without ranks. Raises AssertionError for a
    parameter without gradient, or one of which two ranks hold different copies.
    """
    alone = not dist.is_initialized()
    trainer = open_trainer(overrides)
    recorded, weights = record_steps(trainer, steps)
    trainer.close()
    if alone:
        dist.destroy_process_group()
    return recorded, weights


def new_trainer(overrides: list[str]) -> Trainer:
    """A trainer on the ranks that are running, or in a world of one: checkpoint restored, to `fit`. Collective."""
    config = run_config(overrides)
    alone = not dist.is_initialized()
    layout = validate(config, 1 if alone else dist.get_world_size())
    return Trainer(config, layout, start_distributed() if alone else _rank_device())


def open_trainer(overrides: list[str]) -> Trainer:
    """A `new_trainer` whose log is open: for steps one by one."""
    trainer = new_trainer(overrides)
    trainer.log.start(trainer.step, {})
    return trainer


def record_steps(trainer: Trainer, steps: int) -> tuple[list[Step], dict[str, Tensor]]:
    """Train `steps` more steps; return each, and the weights after the last, experts in logical order. Collective;
    raises as `record`."""
    parameters = dict(trainer.model.named_parameters())
    seen: dict[str, Tensor] = {}

    def capture(*_: object) -> None:
        missing = [name for name, parameter in parameters.items() if parameter.grad is None]
        assert not missing, f"{missing} have no gradient"
        divisor = getattr(trainer.optimizer, "grad_divisor", None)  # an update that clips as it goes
        scale = 1.0 if divisor is None else 1.0 / float(divisor)
        seen.update({name: _here(parameter.grad) * scale for name, parameter in parameters.items()})

    handle = trainer.optimizer.register_step_pre_hook(capture)
    rows, held, slots = [], [], []
    for _ in range(steps):
        slots.append(_slots(trainer))
        row, _ = trainer.train_step()
        assert row, "a bad step"
        rows.append(row)
        held.append(dict(seen))
    handle.remove()
    held.append({name: _here(parameter) for name, parameter in parameters.items()})
    slots.append(_slots(trainer))
    wholes = _assemble(_places(parameters), held)
    *gradients, weights = (_logical(tensors, of_layer) for tensors, of_layer in zip(wholes, slots))
    return [Step(row, gradient) for row, gradient in zip(rows, gradients)], weights


def wholes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by name, from what all ranks hold of them. Collective; AssertionError where two copies differ."""
    (assembled,) = _assemble(_places(tensors), [{name: _here(tensor) for name, tensor in tensors.items()}])
    return assembled


def _slots(trainer: Trainer) -> dict[str, Tensor]:
    """Where the experts of each layer are now."""
    return {str(number): slot_E for number, slot_E in zip(trainer.placement.numbers, trainer.placement.slot_LE)}


def _logical(tensors: dict[str, Tensor], slots: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo the placement of experts."""
    return {name: t[slots[name.split(".")[1]]] if ".experts." in name else t for name, t in tensors.items()}


def _places(tensors: Mapping[str, Tensor]) -> dict[str, tuple]:
    return {name: (tuple(tensor.shape), local_part(tensor)[1]) for name, tensor in tensors.items()}


def _here(tensor: Tensor | None) -> Tensor:
    """What this rank holds, on the CPU."""
    assert tensor is not None
    return local(tensor).detach().cpu().clone()


def _assemble(places: dict[str, tuple], held: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Whole tensors by name, of each element of `held`, from what all ranks hold; collective, one exchange for all.

    places: name -> whole shape, and where the part of this rank begins in it.
    """
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (places, held))
    wholes: list[dict[str, Tensor]] = [{} for _ in held]
    for where, parts in ranks:
        for whole_by_name, part_by_name in zip(wholes, parts):
            for name, part in part_by_name.items():
                shape, offset = where[name]
                if name not in whole_by_name:
                    whole_by_name[name] = part.new_full(shape, torch.nan)
                target = whole_by_name[name][tuple(slice(o, o + n) for o, n in zip(offset, part.shape))]
                assert bool(torch.isnan(target).all()) or torch.equal(target, part), f"ranks differ in {name}"
                target.copy_(part)
    return wholes


def _rank_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


@dataclass
class Difference:
    """The largest deviations over all steps: relative for loss and norm, relative to the largest entry per gradient."""

    loss: float
    norm: float
    gradient: float
    where: str

    @property
    def worst(self) -> float:
        return max(self.loss, self.norm, self.gradient)


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


def farthest(differences: list[Difference]) -> Difference:
    """The largest of each error."""
    worst = max(differences, key=lambda d: d.gradient)
    return Difference(max(d.loss for d in differences), max(d.norm for d in differences), worst.gradient, worst.where)


def worst(run: list[Step], reference: list[Step]) -> float:
    """The largest error of any kind of `run`, which may be shorter than the reference; prints all of them."""
    difference = compare(run, reference[: len(run)])
    print(difference)
    return difference.worst


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
