"""The whole proof that the layout never changes the numbers: many layouts against one process, as one table.

    python -m moetrain.testing.invariance [--device cpu|cuda] [--quick] [--only WORDS] [--steps 20] [--write FILE]

Every feature is on (moetrain/testing/small.py): shared experts, qk-norm, packed documents, all balance plugins,
accumulation, clipping; pipelines are cut unevenly. Errors are relative: of loss, of gradient norm, and of each
parameter's gradient (to that gradient's largest entry); the largest of all steps counts.

fp64       all steps, routing free: 1e-9, and no routing choice may differ.
fp32       the first step, 1e-5; all steps with the single process's routing replayed, because one choice that flips by
           rounding makes correct runs drift apart.
bf16       (CUDA only) all steps with the single process's routing replayed.

The bar of a replayed run is measured, not chosen: the single process is trained a second time in fp64 under the same
recorded routing, and how far its own run is from that is what rounding of this precision grows to in these steps,
through the optimizer too. One run is one draw of that, so there are three, which add the same micro-steps up in other
orders (1, 2, and 4 of them), and the farthest counts. Two runs that both are that far from the truth are at most twice
as far from each other; a layout may round once more than the single process wherever it adds parts (rows cut by tp,
keys of cp, slices of etp), which at most doubles its distance. Hence REPLAY_BAR = 1 + 2 = 3 times that distance, for
each of the three errors (never less than one rounding), over all steps and over the first alone, before the optimizer
magnifies it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from moetrain.testing.layouts import CASES, Case
from moetrain.testing.machine import describe_machine
from moetrain.testing.ranks import RankFailure, run_ranks
from moetrain.testing.small import write_documents
from moetrain.testing.trajectory import Difference, Step, compare, farthest, flips, record

FP64_BAR, FP32_BAR, REPLAY_BAR = 1e-9, 1e-5, 3.0
ROUNDED = {"cpu": ("fp32",), "cuda": ("fp32", "bf16")}  # precisions whose rounding makes routing flip
OTHER_MICRO_STEPS = 1, 4  # of one process; two are the rule
EPS = {"fp32": torch.finfo(torch.float32).eps, "bf16": torch.finfo(torch.bfloat16).eps}
RANKS_IN_TURN = 4  # layouts that share one set of CUDA ranks, whose start takes longer than a layout


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


@dataclass(frozen=True)
class Row:
    """A finished row of the table."""

    name: str
    cells: list[str]
    passed: bool


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit 1 if any row fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: layouts that fit on the GPUs")
    parser.add_argument("--quick", action="store_true", help="a few layouts only")
    parser.add_argument("--only", default="", help="layouts whose name matches this regular expression")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    parser.add_argument("--keep", action="store_true", help="keep what FILE already has of an interrupted table")
    options = parser.parse_args(argv)
    most = torch.cuda.device_count() if options.device == "cuda" else max(case.world for case in CASES)
    cases = [case for case in CASES if case.world <= most and re.search(options.only, case.name)]
    cases = [case for case in cases if case.quick or not options.quick]
    left_out = [case.name for case in cases if not case.runs_here]
    cases = [case for case in cases if case.runs_here]
    with tempfile.TemporaryDirectory() as name:
        long = {"count": 1200} if options.device == "cuda" else {"longest": 12}
        bench = Bench(options.device, options.steps, name, write_documents(Path(name), **long))
        noise = run_ranks(references, 1, bench, backend=bench.backend, timeout_s=600)[0]
        lines = header(options, noise)
        kept = kept_rows(options.write) if options.keep else []
        lines += map(line_of, kept)
        print("\n".join(lines), flush=True)
        done = {row.name for row in kept}
        rows = kept + table([case for case in cases if case.name not in done], bench, lines, options.write)
    failed = sum(not row.passed for row in rows)
    closing = f"{len(rows) - failed} of {len(rows)} layouts equal one process over {options.steps} steps."
    if left_out:
        closing += f" Left out, because torch {torch.__version__} is too old for them: {'; '.join(left_out)}."
    print(f"\n{closing}")
    if options.write:
        options.write.write_text("\n".join([*lines, "", closing, ""]))
    return 1 if failed else 0


def kept_rows(path: Path) -> list[Row]:
    """The finished rows of an earlier table; a layout that failed is tried again."""
    names = {case.name for case in CASES}
    cells = [line.strip("| ").split(" | ") for line in path.read_text().splitlines()] if path.exists() else []
    return [Row(name, rest, True) for name, *rest in cells if name in names]


def references(bench: Bench) -> dict[str, Noise]:
    """Train the single process in every precision, keep the runs, and return how far rounding takes it from fp64."""
    alone, runs, noise = Case(1), {}, {}
    runs["fp64"] = bench.train(alone, "fp64")
    assert max(step.row["grad_norm"] for step in runs["fp64"]) > 0.5, "clipping took no part"
    for precision in ROUNDED[bench.device]:
        tape = bench.tape(precision)
        run = runs[precision] = bench.train(alone, precision, f"record={tape}")
        truth = bench.train(alone, "fp64", f"replay={tape}", precision)
        orders = [Case(1, micro_steps=n) for n in OTHER_MICRO_STEPS]
        rounded = [run, *(bench.train(o, precision, f"replay={tape}", f"{o.micro_steps} steps") for o in orders)]
        first = farthest([compare(other[:1], truth[:1]) for other in rounded])
        noise[precision] = Noise(EPS[precision], first, farthest([compare(other, truth) for other in rounded]))
    torch.save((runs, noise), bench.path / "references.pt")
    return noise


def table(cases: list[Case], bench: Bench, lines: list[str], write: Path | None) -> list[Row]:
    """Run all cases, appending a line for each to `lines` and to the file."""
    at_once = RANKS_IN_TURN if bench.device == "cuda" else 1
    waiting = list(cases)
    rows: list[Row] = []
    while waiting:
        first = waiting[0].world
        batch = [case for case in waiting[:at_once] if case.world == first]
        done = bench.path / f"rows-{len(rows)}.jsonl"
        done.touch()
        why = ""
        try:
            limit = 60 + 60 * len(batch) if bench.device == "cuda" else 900  # 8 ranks may share two cores
            run_ranks(measure, first, batch, bench, str(done), backend=bench.backend, timeout_s=limit)
        except RankFailure as error:
            print(error, file=sys.stderr)
            why = str(error).strip().splitlines()[-1]
        new = [Row(**json.loads(line)) for line in done.read_text().splitlines()]
        if why and len(new) < len(batch):
            failed = batch[len(new)]
            new.append(Row(failed.name, [str(failed.world), f"FAILED: {why}"], False))
            print(line_of(new[-1]), flush=True)
        waiting = waiting[len(new) :]
        rows += new
        lines += [line_of(row) for row in new]
        if write:
            write.write_text("\n".join([*lines, ""]))
    return rows


def measure(cases: list[Case], bench: Bench, done: str) -> None:
    """Collective: train each case in every precision; rank 0 prints its row and appends it to the file `done`."""
    first = dist.get_rank() == 0
    runs, noise = torch.load(bench.path / "references.pt", weights_only=False) if first else ({}, {})
    for case in cases:
        start = time.monotonic()
        mine = {"fp64": bench.train(case, "fp64")}
        for precision in ROUNDED[bench.device]:
            mine[precision] = bench.train(case, precision, f"replay={bench.tape(precision)}")
        if first:
            row = judge(case, mine, runs, noise)
            row.cells.append(f"{time.monotonic() - start:.0f}")
            print(line_of(row), flush=True)
            with open(done, "a") as file:
                file.write(json.dumps(asdict(row)) + "\n")


def judge(case: Case, mine: dict[str, list[Step]], runs: dict[str, list[Step]], noise: dict[str, Noise]) -> Row:
    """Compare one layout's runs with the single process's."""
    exact, flipped = compare(mine["fp64"], runs["fp64"]), flips(mine["fp64"], runs["fp64"])
    faults = [exact.where] * (exact.worst >= FP64_BAR) + ["a choice flipped"] * (flipped > 0)
    cells = [str(case.world), f"{exact.loss:.0e}", f"{exact.norm:.0e}", f"{exact.gradient:.0e}", str(flipped)]
    for precision, bars in noise.items():
        run, own = mine[precision], runs[precision]
        first, far = compare(run[:1], own[:1]), compare(run, own)
        ratios = bars.ratio(first, 0), bars.ratio(far, 1)
        if precision == "fp32":  # the replayed first step is the free one if it made no other choice than its own
            cells.append(f"{first.worst:.0e}")
            faults += ["first step in fp32"] * (first.worst >= FP32_BAR or run[0].row["routing_flips"] > 0)
        else:
            cells.append(f"{first.gradient:.0e} ({ratios[0]:.1f})")
        faults += [f"{precision} {far.where}"] * (not max(ratios) < REPLAY_BAR)
        cells += [f"{far.gradient:.0e} ({ratios[1]:.1f})", str(sum(int(step.row["routing_flips"]) for step in run))]
    name = case.name + (f" FAILED ({'; '.join(faults)})" if faults else "")
    return Row(name, cells, not faults)


def line_of(row: Row) -> str:
    return f"| {' | '.join([row.name, *row.cells])} |"


def header(options: argparse.Namespace, noise: dict[str, Noise]) -> list[str]:
    """The table's head, with everything needed to read it."""
    command = ["scripts/invariance.sh", *[f"--device {options.device}"] * (options.device != "cpu")]
    command += ["--quick"] * options.quick + [f"--only '{options.only}'"] * bool(options.only)
    command += [f"--write docs/{options.write.name}"] if options.write else []
    columns = ["layout", "ranks", "fp64 loss", "fp64 norm", "fp64 gradient", "flipped choices"]
    for precision in noise:
        columns += [f"{precision} first step", f"{precision} replayed", f"{precision} flips"]
    columns.append("seconds")
    return [
        f"# Layouts against one process, {'GPU ranks (NCCL)' if options.device == 'cuda' else 'CPU ranks (gloo)'}",
        "",
        f"`{' '.join(command)}`, {options.steps} optimizer steps, on {describe_machine()}.",
        "",
        "Largest relative errors over all steps against one process on the same data. Bars: fp64 1e-9 and no",
        "flipped choice; fp32 1e-5 in the first step; runs that replay the single process's routing, and the first",
        f"step in bf16: {REPLAY_BAR:.0f} times what rounding does to the single process (in brackets: how many times),",
        "its distance from itself in fp64 under the same routing (why: the head of `moetrain/testing/invariance.py`).",
        "Flips are choices that the layout would have made otherwise. What rounding does to the single process:",
        "",
        *(f"- {name}: {_errors(n.first)} in the first step; {_errors(n.all)} in all." for name, n in noise.items()),
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]


def _errors(d: Difference) -> str:
    return f"loss {d.loss:.0e}, norm {d.norm:.0e}, gradient {d.gradient:.0e} ({d.where})"


if __name__ == "__main__":
    sys.exit(main())
