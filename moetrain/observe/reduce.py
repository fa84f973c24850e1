"""One all-reduce for everything a step reports: losses, expert counts, and whether any rank was asked to stop; and one
transfer to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.collectives import all_reduce_sum
from moetrain.moe.layer import MoELayer
from moetrain.moe.types import Totals


@dataclass(frozen=True)
class StepSums:
    """Sums over all ranks and micro-batches of one step, on the device. L MoE layers, E experts.

    ce_loss, losses: 0-d fp64 terms of the objective. stop: ranks that were asked to stop. count_LE: int64.
    entropy_L: fp64, nats times tokens. dropped_L: fp64, choices that capacity dropped.
    """

    ce_loss: Tensor
    stop: Tensor
    losses: dict[str, Tensor]
    count_LE: Tensor
    entropy_L: Tensor
    dropped_L: Tensor

    @property
    def loss(self) -> Tensor:
        """The objective: cross-entropy and every auxiliary loss."""
        return sum(self.losses.values(), start=self.ce_loss)


@dataclass(frozen=True)
class Told:
    """What the host knows of a step: StepSums with tensors on the CPU, all numbers in `values` by their metric's name.

    wrong: some rank flagged the step. stop: some rank was asked to stop.
    """

    wrong: bool
    stop: bool
    values: dict[str, float]
    count_LE: Tensor
    entropy_L: Tensor
    dropped_L: Tensor


def read_step(sums: StepSums, norm: Tensor, totals: Totals, flag: Tensor) -> Told:
    """All that the host learns of a step, in one transfer and before the update: while the device makes that, the host
    is on its way into the next step. flag: positive if the step must not be taken."""
    assert totals.attended is not None
    terms = {"loss": sums.loss, "ce_loss": sums.ce_loss, **sums.losses, "grad_norm": norm, "tokens": totals.tokens}
    terms["attended"] = totals.attended
    scalars = torch.stack([x.double() for x in (flag, sums.stop, *terms.values())])
    parts = [scalars, sums.entropy_L, sums.dropped_L, sums.count_LE.double().flatten()]
    scalars, entropy_L, dropped_L, count_N = torch.cat(parts).cpu().split([part.numel() for part in parts])
    wrong, stop, *values = scalars.tolist()
    count_LE = count_N.view(sums.count_LE.shape)
    return Told(wrong > 0, stop > 0, dict(zip(terms, values)), count_LE, entropy_L, dropped_L)


def reduce_step(
    ce_loss: Tensor,
    stop: bool,
    layers: list[MoELayer | None],
    names: list[str],
    n_experts: int,
    groups: list[dist.ProcessGroup],
) -> StepSums:
    """Sum this step over each of `groups` in turn and empty the layers' statistics. fp64 holds counts up to 2^53.

    layers: all MoE layers of the model in order, None for those of other pipeline stages; each has n_experts.
    names: the losses to report. groups: the data ranks, then the pipeline's if there is one.
    """
    here = [layer for layer in layers if layer is not None]
    zero = torch.zeros((), dtype=torch.float64, device=ce_loss.device)
    of_loss = [sum((layer.stats.losses.get(name, zero) for layer in here), start=zero) for name in names]
    head = [ce_loss.double(), torch.full_like(zero, float(stop)), *of_loss]
    entropies, dropped, counts = [], [], []
    for layer in layers:
        if layer is None:
            entropies.append(zero)
            dropped.append(zero)
            counts.append(zero.expand(n_experts))
            continue
        assert layer.stats.count_E is not None, "a MoE layer routed nothing in this step"
        assert layer.stats.entropy is not None
        entropies.append(layer.stats.entropy)
        dropped.append(zero if layer.stats.dropped is None else layer.stats.dropped.double())
        counts.append(layer.stats.count_E.double())
        layer.stats.reset()
    flat = torch.cat([torch.stack(head + entropies + dropped), *counts])
    for group in groups:
        flat = all_reduce_sum(flat, group)
    scalars, rest = flat.tensor_split([len(head) + 2 * len(layers)])
    entropy_L, dropped_L = scalars[len(head) :].tensor_split(2)
    return StepSums(
        ce_loss=scalars[0],
        stop=scalars[1],
        losses={f"aux/{name}": scalars[2 + i] for i, name in enumerate(names)},
        count_LE=rest.view(len(layers), -1).long() if layers else rest.view(0, 0).long(),
        entropy_L=entropy_L,
        dropped_L=dropped_L,
    )
