"""Whether a step may change the weights: a NaN or an exploded loss must reach neither the optimizer nor a checkpoint.

`train.on_bad_step`: stop the run, skip the update, or roll back to the newest checkpoint and go on with the data behind
the bad batch (as PaLM's authors did at loss spikes: Chowdhery et al. 2022, arXiv:2204.02311, section 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.config.schema import Config


class BadStepGuard:
    """Judges steps and weights, the same on every rank. bad: bad steps of the run so far, kept in its checkpoints."""

    def __init__(self, config: Config) -> None:
        train = config.train
        self.policy, self.most = train.on_bad_step, train.max_bad_steps
        self.max_loss = 3 * math.log(config.model.vocab_size) if train.max_loss is None else train.max_loss
        self.bad = 0

    def flag(self, ce_loss: Tensor, loss: Tensor, norm: Tensor) -> Tensor:
        """0-d, positive if on any rank something is wrong with a step of these sums. Collective; waits for nothing.

        ce_loss, loss: nats/token over the global batch. norm: of the gradient, before clipping.
        """
        fine = loss.isfinite() & norm.isfinite() & (ce_loss <= (self.max_loss or math.inf))
        return _flagged(~fine)

    def judge(self, wrong: bool, ce_loss: float, loss: float, norm: float) -> str:
        """What is wrong with a step whose `flag` was `wrong`, with the same sums; empty if nothing is."""
        if not wrong:
            return ""
        self.bad += 1
        limit = self.max_loss or math.inf
        above = f", above train.max_loss={limit:.4g}" if ce_loss > limit else ""
        return f"loss {loss:.6g} (cross-entropy {ce_loss:.6g}{above}), gradient norm {norm:.6g}"

    def verdict(self, step: int, wrong: str, read: list[tuple[int, list[str]]]) -> tuple[str, str]:
        """skip or rollback, and a line about the step just judged bad. Raises RuntimeError with that line to stop.

        read: of every rank, its data-parallel rank and the ids of its samples.
        """
        action = self.policy if self.bad <= self.most else "stop"
        samples = "; ".join(f"dp {dp}: {', '.join(ids)}" for dp, ids in sorted(dict(read).items()))
        text = f"step {step}: {wrong}; no update was made; {action}, bad step {self.bad} of the run; samples: {samples}"
        if action == "stop":
            raise RuntimeError(text)
        return action, text

    def check_weights(self, parameters: Iterable[Tensor], step: int) -> None:
        """Raise RuntimeError on every rank if any weight is not finite: call it before a checkpoint. Collective."""
        local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
        largest = torch._foreach_norm([p.detach() for p in local if p.numel()], ord=math.inf)
        if _flagged(~torch.stack([x.double() for x in largest]).isfinite().all()).item():
            raise RuntimeError(f"weights are not finite after step {step}: no checkpoint of it is written")


def _flagged(flag: Tensor) -> Tensor:
    """Whether any rank's 0-d flag is set, as a number on the device."""
    seen = flag.int()
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return seen
