"""Inputs at the edge of what is legal, under every layout: training must neither hang nor lose a gradient.

    python -m moetrain.testing.extremes [--only WORDS] [--steps 50]

A rank that waits for a message nobody sends fails by its time limit, with the stacks of all ranks.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.router.softmax import SoftmaxTopK
from moetrain.moe.types import Routing, TokenContext
from moetrain.testing.layouts import CASES, Case
from moetrain.testing.ranks import RankFailure, run_ranks
from moetrain.testing.small import write_documents
from moetrain.testing.trajectory import open_trainer
from moetrain.trainer import Trainer


class OneExpert(SoftmaxTopK):
    """Every token chooses expert 0, so the ranks of all other experts receive nothing."""

    def forward(
        self, x_TD: Tensor, context: TokenContext, bias_E: Tensor | None = None, carry: Tensor | None = None
    ) -> Routing:
        first_E = torch.zeros(self.weight.shape[0], device=x_TD.device)
        first_E[0] = 1e6
        return super().forward(x_TD, context, first_E, carry)


class SilentRanks(SoftmaxTopK):
    """Ranks with an odd number send no token to any expert, as if all of theirs were padding."""

    def forward(
        self, x_TD: Tensor, context: TokenContext, bias_E: Tensor | None = None, carry: Tensor | None = None
    ) -> Routing:
        if dist.get_rank() % 2:
            context = replace(context, document_BS=torch.full_like(context.document_BS, -1))
        return super().forward(x_TD, context, bias_E, carry)


def scenarios(case: Case) -> dict[str, list[str]]:
    """Name -> overrides. The shortest rows leave one token, where rows are cut for attention two, on each rank."""
    layout = case.layout
    shortest = layout.tp * layout.cp * (2 if layout.cp > 1 else 1)
    one = ["model.moe.top_k=1", "router.renormalize=false"]
    return {
        "one expert": ["router._target_=moetrain.testing.extremes.OneExpert", *one],
        "silent ranks": ["router._target_=moetrain.testing.extremes.SilentRanks"],
        "one token": [f"train.seq_len={shortest}", "model.moe.n_experts=64"],
    }


def survive(case: Case, data: list[str], directory: str, steps: int) -> dict[str, float]:
    """Collective: train `steps` steps of each scenario; returns the last loss of each.

    Raises AssertionError for a loss that is not finite, or a parameter without gradient or optimizer state.
    """
    losses: dict[str, float] = {}
    for number, (name, more) in enumerate(scenarios(case).items()):
        options = [*case.overrides(data, Path(directory) / str(number), "fp32"), f"train.steps={steps}", *more]
        trainer = open_trainer(options)
        checked: list[int] = []
        hook = trainer.optimizer.register_step_pre_hook(lambda *_, t=trainer, c=checked: c.append(_check_gradients(t)))
        for _ in range(steps):
            row, _ = trainer.train_step()
            assert row, f"{name}: a bad step"
            assert math.isfinite(row["loss"]), f"{name}: {row}"
            losses[name] = row["loss"]
        hook.remove()
        assert len(checked) == steps
        assert min(checked) > 0
        _check_state(trainer)
        trainer.close()
    return losses


def _check_gradients(trainer: Trainer) -> int:
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert bool(torch.isfinite(_local(parameter.grad)).all()), f"{name} has a gradient that is not finite"
    return len(trainer.parameters)


def _check_state(trainer: Trainer) -> None:
    for name, parameter in trainer.model.named_parameters():
        state = trainer.optimizer.state[parameter]
        for slot in ("exp_avg", "exp_avg_sq"):
            assert slot in state, f"{name} has no {slot}"
            assert state[slot].shape == parameter.shape, f"{name}: {slot} has shape {state[slot].shape}"


def _local(x: Any) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def main(argv: list[str] | None = None) -> int:
    """A line for each layout; exit 1 if any of them fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="layouts whose name matches this regular expression")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one layout")
    options = parser.parse_args(argv)
    cases = [case for case in CASES if case.runs_here and re.search(options.only, case.name)]
    failed = 0
    for case in cases:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            data = write_documents(Path(name), longest=12)
            try:
                run_ranks(survive, case.world, case, data, name, options.steps, timeout_s=options.timeout)
                verdict = f"ok, {time.monotonic() - start:.0f} s"
            except RankFailure as error:
                failed += 1
                verdict = f"FAILED\n{error}"
        print(f"{case.name}: {verdict}", flush=True)
    print(f"{len(cases) - failed} of {len(cases)} layouts survive {options.steps} steps of each extreme")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
