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
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from moetrain.testing.layouts import CASES, Case
from moetrain.testing.machine import describe_machine
from moetrain.testing.ranks import RankFailure
from moetrain.testing.single import FP32_BAR, ROUNDED, Bench, Noise, kept, references
from moetrain.testing.small import write_documents
from moetrain.testing.trajectory import Difference, Step, compare, flips

FP64_BAR, REPLAY_BAR = 1e-9, 3.0
BATCH = 2  # layouts that share one set of CUDA ranks, whose start takes as long as a layout


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
        noise = references(bench)
        head = header(options, noise)
        old = kept_rows(options.write) if options.keep else []
        print("\n".join([*head, *map(line_of, old)]), flush=True)
        done = {row.name for row in old}
        rows = Table(bench, noise, head, options.write, old).fill([case for case in cases if case.name not in done])
    failed = sum(not row.passed for row in rows)
    closing = f"{len(rows) - failed} of {len(rows)} layouts equal one process over {options.steps} steps."
    if left_out:
        closing += f" Left out, because torch {torch.__version__} is too old for them: {'; '.join(left_out)}."
    print(f"\n{closing}")
    if options.write:
        options.write.write_text("\n".join([*head, *map(line_of, rows), "", closing, ""]))
    return 1 if failed else 0


def kept_rows(path: Path) -> list[Row]:
    """The finished rows of an earlier table; a layout that failed is tried again."""
    names = {case.name for case in CASES}
    cells = [line.strip("| ").split(" | ") for line in path.read_text().splitlines()] if path.exists() else []
    return [Row(name, rest, True) for name, *rest in cells if name in names]


@dataclass
class Table:
    """The table as far as it has come, printed and written row by row."""

    bench: Bench
    noise: dict[str, Noise]
    head: list[str]
    write: Path | None
    rows: list[Row]

    def fill(self, cases: list[Case]) -> list[Row]:
        """Run all cases, several sets of ranks at a time; all rows in the order of CASES."""
        size = BATCH if self.bench.device == "cuda" else 1
        waiting: deque[list[Case]] = deque()
        for case in cases:
            if waiting and len(waiting[-1]) < size and waiting[-1][0].world == case.world:
                waiting[-1].append(case)
            else:
                waiting.append([case])
        lock = threading.Lock()

        def work(job: int) -> None:
            while True:
                with lock:
                    if not waiting:
                        return
                    batch = waiting.popleft()
                new = run_batch(batch, self.bench, self.noise, job)
                with lock:
                    self.add(new)
                    if left := batch[len(new) :]:
                        waiting.appendleft(left)

        with ThreadPoolExecutor(self.bench.jobs) as pool:
            list(pool.map(work, range(self.bench.jobs)))
        return self.rows

    def add(self, new: list[Row]) -> None:
        order = {case.name: i for i, case in enumerate(CASES)}
        self.rows = sorted(self.rows + new, key=lambda row: order[row.name.split(" FAILED")[0]])
        if self.write:
            self.write.write_text("\n".join([*self.head, *map(line_of, self.rows), ""]))


def run_batch(batch: list[Case], bench: Bench, noise: dict[str, Noise], job: int) -> list[Row]:
    """The rows of a batch's cases up to the first that crashes, and that one's."""
    done = bench.path / f"rows-{job}.jsonl"
    done.write_text("")
    limit = 120 + 60 * len(batch) if bench.device == "cuda" else 900  # 8 ranks may share two cores
    try:
        bench.on_ranks(measure, batch[0].world, batch, bench, noise, str(done), job=job, timeout_s=limit)
        why = ""
    except RankFailure as error:
        print(error, file=sys.stderr)
        why = str(error).strip().splitlines()[-1]
    rows = [Row(**json.loads(line)) for line in done.read_text().splitlines()]
    if why and len(rows) < len(batch):
        failed = batch[len(rows)]
        rows.append(Row(failed.name, [str(failed.world), f"FAILED: {why}"], False))
        print(line_of(rows[-1]), flush=True)
    return rows


def measure(cases: list[Case], bench: Bench, noise: dict[str, Noise], done: str) -> None:
    """Collective: train each case in every precision; rank 0 prints its row and appends it to the file `done`."""
    first = dist.get_rank() == 0
    runs = kept(bench) if first else {}
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
