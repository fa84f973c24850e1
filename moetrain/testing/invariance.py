"""The whole proof that the layout never changes the numbers: many layouts against one process, as one table.

    python -m moetrain.testing.invariance [--quick] [--only WORDS] [--steps 20] [--write FILE]

Every feature is on (moetrain/testing/small.py): shared experts, qk-norm, packed documents, all balance plugins,
accumulation, clipping. fp64 over all steps: the largest relative error of loss, gradient norm, and any gradient
(relative to that gradient's largest entry), and routing choices that differ. fp32: the first step, because one choice
that flips by rounding makes correct runs drift afterwards.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from moetrain.mesh.layout import make_layout
from moetrain.testing.ranks import RankFailure, run_ranks
from moetrain.testing.small import SMALL_MODEL, write_documents
from moetrain.testing.trajectory import Difference, compare, flips, record

FP64_BAR, FP32_BAR = 1e-9, 1e-5
GLOBAL_BATCH = 8  # of SMALL_MODEL


@dataclass(frozen=True)
class Case:
    """One layout: world ranks, its degrees, other overrides, and whether the quick table includes it."""

    world: int
    degrees: dict[str, int] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    quick: bool = False

    @property
    def name(self) -> str:
        degrees = " ".join(f"{key}{value}" for key, value in self.degrees.items()) or f"dp{self.world}"
        return " ".join([degrees, *(option.removeprefix("parallel.") for option in self.extra)])


def _case(world: int, *extra: str, quick: bool = False, **degrees: int) -> Case:
    return Case(world, degrees, extra, quick)


CASES = [
    _case(2),
    _case(2, quick=True, ep=2),
    _case(2, dp_replicate=2),
    _case(4),
    _case(4, ep=2),
    _case(4, ep=4),
    _case(4, dp_replicate=2),
    _case(4, quick=True, dp_replicate=2, ep=2),
    _case(4, dp_replicate=4, ep=4),
    _case(8, ep=8),
    _case(8, dp_replicate=2, ep=4),
    _case(2, quick=True, tp=2),
    _case(2, quick=True, cp=2),
    _case(4, quick=True, tp=2, cp=2, ep=4),
    _case(4, tp=2, cp=2, etp=2, ep=2),
    _case(2, quick=True, pp=2),
    _case(4, pp=2, tp=2),
    _case(4, pp=2, cp=2, ep=2),
    _case(4, pp=2, ep=2),
    _case(4, "parallel.schedule=interleaved", pp=2, ep=2),
    _case(4, "parallel.schedule=zbv", pp=2, ep=2),
    _case(4, "parallel.schedule=dualpipev", "train.micro_batch=1", pp=2, ep=2),
]


def overrides(case: Case, documents: list[str], run_dir: Path, precision: str) -> list[str]:
    """Two micro-steps wherever the batch allows, so that accumulation takes part."""
    rows = GLOBAL_BATCH // make_layout(case.world, **case.degrees).dp
    run = [f"run.dir={run_dir}", f"train.precision={precision}", f"train.micro_batch={max(1, rows // 2)}"]
    layers = "model.n_layers=4"  # pipelines of two virtual stages a rank need as many
    return [
        *SMALL_MODEL,
        layers,
        *documents,
        *run,
        *(f"parallel.{k}={v}" for k, v in case.degrees.items()),
        *case.extra,
    ]


def measure(case: Case, documents: list[str], directory: Path, precision: str, steps: int) -> list:
    """The recorded steps of one layout."""
    options = overrides(
        case, documents, directory / f"{case.name}-{precision}".replace(" ", "-").replace("=", "-"), precision
    )
    return run_ranks(record, case.world, options, steps, timeout_s=600)[0][0]


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit 1 if any row fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few layouts only")
    parser.add_argument("--only", default="", help="layouts whose name contains this")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    options = parser.parse_args(argv)
    cases = [case for case in CASES if options.only in case.name and (case.quick or not options.quick)]
    lines = [
        "| layout | ranks | fp64 loss | fp64 norm | fp64 gradient | flipped choices | fp32 first step | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        documents = write_documents(directory)
        alone = Case(1)
        fp64 = measure(alone, documents, directory, "fp64", options.steps)
        fp32 = measure(alone, documents, directory, "fp32", 1)
        for case in cases:
            line, passed = row(case, documents, directory, (fp64, fp32))
            failed += not passed
            lines.append(line)
            print(line, flush=True)
    closing = f"{len(cases) - failed} of {len(cases)} layouts equal one process over {options.steps} steps"
    print(closing)
    if options.write:
        options.write.write_text("\n".join([*lines, "", closing, ""]))
    return 1 if failed else 0


def row(case: Case, documents: list[str], directory: Path, references: tuple[list, list]) -> tuple[str, bool]:
    """A table row and whether it passed."""
    start = time.monotonic()
    fp64, fp32 = references
    try:
        run = measure(case, documents, directory, "fp64", len(fp64))
        exact, flipped = compare(run, fp64), flips(run, fp64)
        first = compare(measure(case, documents, directory, "fp32", 1), fp32)
    except RankFailure as error:
        print(error, file=sys.stderr)
        return f"| {case.name} | {case.world} | FAILED: {str(error).strip().splitlines()[-1]} ||||||", False
    passed = _worst(exact) < FP64_BAR and _worst(first) < FP32_BAR and flipped == 0
    verdict = "" if passed else f" FAILED ({exact.where})"
    cells = [f"{exact.loss:.0e}", f"{exact.norm:.0e}", f"{exact.gradient:.0e}", str(flipped), f"{_worst(first):.0e}"]
    return f"| {case.name}{verdict} | {case.world} | {' | '.join(cells)} | {time.monotonic() - start:.0f} |", passed


def _worst(difference: Difference) -> float:
    return max(difference.loss, difference.norm, difference.gradient)


if __name__ == "__main__":
    sys.exit(main())
