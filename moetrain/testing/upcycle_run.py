"""Does a model made into a Mixture-of-Experts learn more than its dense parent, given the same further steps?

    python -m moetrain.testing.upcycle_run [--seeds 0 1 2] [--ranks 2] [--write FILE]

Trains the dense quick-start model, upcycles it three ways, and trains parent and children on: same data, same schedule.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moetrain.testing.ranks import run_ranks
from moetrain.testing.trajectory import new_trainer
from moetrain.upcycle.convert import build_initializer, convert

LR = 0.002
FIRM = (("router_std", "0.15"),)  # tokens keep their experts while hidden states move, so experts come to differ sooner


@dataclass(frozen=True)
class Way:
    """One way to upcycle: experts, top_k, granularity as `python -m moetrain upcycle` takes them."""

    name: str
    experts: int
    top_k: int
    granularity: int
    options: tuple[tuple[str, str], ...] = ()


WAYS = (
    Way("copy", 4, 2, 1, FIRM),
    Way("virtual_group", 4, 2, 4, FIRM),
    Way("drop", 4, 2, 1, (*FIRM, ("ratio", "0.25"))),
)


@dataclass(frozen=True)
class Plan:
    """Steps of the parent, and of everyone afterwards; sizes of a step."""

    parent_steps: int = 160
    steps: int = 60
    seq_len: int = 256
    ranks: int = 2


def train(overrides: list[str]) -> float:
    """One training run on the ranks that are there; returns its last held-out loss."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = new_trainer(overrides)
        try:
            trainer.fit()
        finally:
            trainer.close()
    rows = [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
    return next(row["val_loss"] for row in reversed(rows) if "val_loss" in row)


def upcycle(source: Path, out: Path, way: Way, seed: int) -> None:
    """On the ranks that are there."""
    initializer = build_initializer(way.name, dict(way.options), way.experts, way.top_k, way.granularity)
    convert(source, out, initializer, seed)


def compare(directory: Path, seed: int, plan: Plan, ways: tuple[Way, ...] = WAYS) -> dict[str, float]:
    """Held-out losses: `parent` before, `dense` after the further steps, and each way's after as many."""
    common = ["experiment=quickstart", f"train.seq_len={plan.seq_len}", f"data.cache_dir={directory / 'cache'}"]
    common += ["tracker=none", f"optim.lr={LR}"]
    parent = directory / f"parent-{seed}"
    first = ["model.moe.n_experts=0", f"run.seed={seed}", f"run.dir={parent}", f"train.steps={plan.parent_steps}"]
    losses = {"parent": run_ranks(train, plan.ranks, [*common, *first], timeout_s=900)[0]}
    # Another seed: the data goes on instead of beginning again.
    then = [*common, f"run.seed={1000 + seed}", f"train.steps={plan.steps}", "optim.schedule.warmup_steps=5"]
    dense = [f"init.from={parent}", f"run.dir={directory / f'dense-{seed}'}"]
    losses["dense"] = run_ranks(train, plan.ranks, [*then, *dense], timeout_s=900)[0]
    for way in ways:
        made = directory / f"{way.name}-{seed}"
        run_ranks(upcycle, plan.ranks, parent, made, way, seed)
        mine = [f"init.from={made}", f"run.dir={made}-run", f"parallel.ep={plan.ranks}"]
        losses[way.name] = run_ranks(train, plan.ranks, [*then, *mine], timeout_s=900)[0]
    return losses


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit 1 if any child ends above its parent's continuation."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    options = parser.parse_args(argv)
    plan = Plan(ranks=options.ranks)
    names = [way.name for way in WAYS]
    lines = [f"| seed | parent | dense, {plan.steps} more steps | " + " | ".join(names) + " |", "|---" * 6 + "|"]
    print("\n".join(lines), flush=True)
    worse = 0
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as name:
            losses = compare(Path(name), seed, plan)
        cells = [f"{losses[key]:.4f}" for key in ("parent", "dense")]
        cells += [f"{losses[key]:.4f} ({losses[key] - losses['dense']:+.4f})" for key in names]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
        worse += sum(losses[key] >= losses["dense"] for key in names)
    if options.write:
        options.write.write_text("\n".join([*lines, ""]))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
