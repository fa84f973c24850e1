"""The single process that moetrain/testing/invariance.py compares layouts with, and what rounding does to it."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moetrain.testing.layouts import Case
from moetrain.testing.ranks import run_ranks
from moetrain.testing.trajectory import Difference, Step, compare, farthest, record

FP32_BAR = 1e-5
ROUNDED = {"cpu": ("fp32",), "cuda": ("fp32", "bf16")}  # precisions whose rounding makes routing flip
OTHER_MICRO_STEPS = 1, 4  # of one process; two are the rule
EPS = {"fp32": torch.finfo(torch.float32).eps, "bf16": torch.finfo(torch.bfloat16).eps}
SANE = {"fp32": FP32_BAR, "bf16": 0.1}  # more than this is no rounding, and the bars would mean nothing


@dataclass(frozen=True)
class Bench:
    """What all layouts of one table have in common. directory: data, recorded routing, references, rows so far."""

    device: str
    steps: int
    directory: str
    data: list[str]

    @property
    def path(self) -> Path:
        return Path(self.directory)

    @property
    def backend(self) -> str:
        return "nccl" if self.device == "cuda" else "gloo"

    @property
    def jobs(self) -> int:
        """Sets of ranks at a time. On GPUs as many as there are: most of a layout's time is the host's, compiling."""
        return torch.cuda.device_count() if self.device == "cuda" else 1

    def on_ranks(self, fn: Callable, world: int, *args: Any, job: int = 0, timeout_s: float = 600) -> Any:
        """Rank 0's result. job: which set of ranks this is; sets begin at different GPUs."""
        first = job * world % torch.cuda.device_count() if self.device == "cuda" else 0
        return run_ranks(fn, world, *args, backend=self.backend, timeout_s=timeout_s, first_device=first)[0]

    def train(self, case: Case, precision: str, tape: str = "", label: str = "") -> list[Step]:
        """One run of `case` on the ranks that are running. tape: record=DIR or replay=DIR."""
        run_dir = self.path / re.sub(r"\W+", "-", f"{case.name} {precision} {label}")
        options = case.overrides(self.data, run_dir, precision, cuda=self.device == "cuda")
        return record([*options, *([f"router.{tape}"] if tape else [])], self.steps)[0]

    def tape(self, precision: str) -> Path:
        return self.path / f"routing-{precision}"


@dataclass(frozen=True)
class Noise:
    """How far rounding takes single processes from one in fp64, in the first step and in all.

    eps: one rounding, below which nothing that is computed in this precision can be told apart.
    """

    eps: float
    first: Difference
    all: Difference

    def ratio(self, far: Difference, which: int) -> float:
        """The largest of the three errors of `far`, each in units of this noise. which: 0 the first step, 1 all."""
        bar = (self.first, self.all)[which]
        pairs = (far.loss, bar.loss), (far.norm, bar.norm), (far.gradient, bar.gradient)
        return max(error / max(noise, self.eps) for error, noise in pairs)


def references(bench: Bench) -> dict[str, Noise]:
    """Train the single process in every precision, keep the runs, and return how far rounding takes it from fp64."""
    kinds = ["fp64", *ROUNDED[bench.device]]
    with ThreadPoolExecutor(bench.jobs) as pool:
        jobs = [pool.submit(bench.on_ranks, reference, 1, bench, kind, job=i) for i, kind in enumerate(kinds)]
        noise = {kind: job.result() for kind, job in zip(kinds, jobs)}
    return {kind: bars for kind, bars in noise.items() if bars}


def kept(bench: Bench) -> dict[str, list[Step]]:
    """The single process's runs, by precision."""
    kinds = ["fp64", *ROUNDED[bench.device]]
    return {kind: torch.load(bench.path / f"reference-{kind}.pt", weights_only=False) for kind in kinds}


def reference(bench: Bench, precision: str) -> Noise | None:
    """Train and keep the single process in one precision; what rounding does to it, if it is rounded."""
    alone, keep = Case(1), bench.path / f"reference-{precision}.pt"
    if precision == "fp64":
        run = bench.train(alone, precision)
        assert max(step.row["grad_norm"] for step in run) > 0.5, "clipping took no part"
        torch.save(run, keep)
        return None
    tape = bench.tape(precision)
    run = bench.train(alone, precision, f"record={tape}")
    torch.save(run, keep)
    truth = bench.train(alone, "fp64", f"replay={tape}", precision)
    orders = [Case(1, micro_steps=n) for n in OTHER_MICRO_STEPS]
    rounded = [run, *(bench.train(o, precision, f"replay={tape}", f"{o.micro_steps} steps") for o in orders)]
    first = farthest([compare(other[:1], truth[:1]) for other in rounded])
    assert first.worst < SANE[precision], f"one process in {precision} is not itself in fp64: {first}"
    return Noise(EPS[precision], first, farthest([compare(other, truth) for other in rounded]))
