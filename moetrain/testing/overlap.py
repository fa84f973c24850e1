"""What dispatch costs beside the experts' work, on the GPUs of one host: the table of docs/dispatch.md.

    scripts/bench_overlap.sh [--dry-run] [--shapes stand-in qwen3 mixtral] [--routing balanced skewed] [--timeline]

Every rank has different tokens; ep is the number of GPUs. `compute only` is one call of the fastest expert backend on
the rows that a rank's experts get, already there; it and a layer take turns, and ratios are within a pair. Times are
medians of device events of the slowest rank, in ms, with the host ahead of the device as it is in a training step;
behind each stands the host's own time to launch it, which is what counts where that is the longer one. error is the
largest relative L2 distance of y, dx, dgates, dw from the same backend in one process. --timeline also prints what rank
0's device did in one forward and backward pass of each, kernel by kernel and copy by copy.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.start import start_distributed, stop_distributed
from moetrain.moe.dispatch import allgather, collective, copy_engine
from moetrain.moe.dispatch.base import ExchangeShape, Weights
from moetrain.moe.dispatch.local import LocalDispatch
from moetrain.moe.experts.base import ExpertBackend
from moetrain.testing import device_events
from moetrain.testing.problem import SHAPES, Layer, Problem, Shape, distance, make_problem, own_share, step

REPEATS, WARMUP = 7, 3
HEAD_START = 20_000_000  # device cycles, about 10 ms: what the host may launch meanwhile
BAR = 2.0**-6  # bf16 rounds to 2^-9; a result is a sum of rounded parts of rounded products


ZIPF = {"balanced": 0.0, "skewed": 0.6}
TRANSPORTS = {  # name: (module, chunk counts, a row each)
    "copy_engine": (copy_engine, (2, 3, 4)),
    "allgather": (allgather, (1, 2, 4)),
    "NCCL serial": (collective, (1,)),
    "NCCL chunked": (collective, (2,)),  # more gained 1% at best and cost half at worst
}


@dataclass(frozen=True)
class Took:
    """ms of one call, of the slowest rank: on the device, and on the host, which waits for nothing."""

    device: float
    host: float

    def cells(self, limit: Took) -> str:
        """In a row of the table."""
        return f"{self.device:.3f} | {self.device / limit.device:.2f} | {self.host:.2f}"


def meet() -> None:
    """Ranks meet on the device, so that none is charged for another's lag, which is kept waiting, so that none is
    charged for its host's."""
    here = torch.zeros(1, device="cuda")
    torch.cuda._sleep(HEAD_START)
    dist.all_reduce(here)


def slowest_ms(*runs: Callable[[], object]) -> list[Took]:
    """Medians of each, the runs taking turns: a GPU under power slows down by a tenth within 0.1 s."""
    events, hosts = [], []
    for _ in range(WARMUP + REPEATS):
        for run in runs:
            meet()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            clock = time.perf_counter()
            run()
            hosts.append(1e3 * (time.perf_counter() - clock))
            end.record()
            events.append((begin, end))
    torch.cuda.synchronize()
    kinds, n = ([begin.elapsed_time(end) for begin, end in events], hosts), len(runs)
    columns = [[statistics.median(times[n * WARMUP + i :: n]) for times in kinds] for i in range(n)]
    took = torch.tensor(columns, device="cuda")
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return [Took(*column) for column in took.tolist()]


def backends(shape: Shape) -> dict[str, ExpertBackend]:
    """Those that run here."""
    from moetrain.moe.experts import grouped_mm, triton

    found = {}
    for name, module in (("triton", triton), ("grouped_mm", grouped_mm)):
        try:
            found[name] = module.build("bf16", "cuda", shape.D, shape.F)
        except ValueError as error:
            print(error, file=sys.stderr)
    return found


def arrived(p: Problem, weights: Weights, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_MD, slots, gates of the rows that this rank's experts get."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(x_MD: Tensor, slot_MK: Tensor, gate_MK: Tensor, *_: Tensor) -> Tensor:
        seen.append((x_MD, slot_MK, gate_MK))
        return torch.zeros_like(x_MD)

    group = dist.group.WORLD
    assert group is not None
    some = ExchangeShape(len(p.x_TD), p.x_TD.shape[1], p.routing.expert_TK.shape[1], p.x_TD.dtype, "cuda")
    with torch.no_grad():
        collective.build(n_experts, group, some, 1)(p.x_TD, p.routing, note, weights)  # type: ignore[arg-type]
    return seen[0]


@dataclass
class Limit:
    """The fastest backend on the rows that a rank gets, already there, in one call: what layers are compared with."""

    there: Problem
    weights: Weights
    backend: ExpertBackend
    name: str

    def run(self, backward: bool) -> list[Tensor]:
        return step(LocalDispatch(), self.there, self.weights, self.backend, backward)


def compute_only(p: Problem, weights: Weights, shape: Shape) -> Limit:
    """Forward and backward decide which backend that is."""
    x_MD, slot_MK, gate_MK = arrived(p, weights, shape.E)
    there = Problem(x_MD, torch.randn_like(x_MD), replace(p.routing, expert_TK=slot_MK, gate_TK=gate_MK), p.weights)
    limits = [Limit(there, weights, backend, name) for name, backend in backends(shape).items()]
    assert limits, "no expert backend runs here"
    took = slowest_ms(*(lambda limit=limit: limit.run(True) for limit in limits))  # type: ignore[misc]
    return min(zip(took, limits), key=lambda pair: pair[0].device)[1]


def one_process(p: Problem, backend: ExpertBackend, rank: int, ranks: int) -> list[Tensor]:
    """What the exchange must give: this rank's tokens with all experts here; weight gradients summed over ranks."""
    return own_share(step(LocalDispatch(), p, p.weights, backend, True), rank, ranks)


def turns(layer: Layer, p: Problem, weights: Weights, limit: Limit, backward: bool) -> list[Took]:
    """A layer and the limit, in turn."""
    return slowest_ms(lambda: step(layer, p, weights, limit.backend, backward), lambda: limit.run(backward))


def show(label: str, run: Callable[[], object]) -> None:
    """Collective: the device's events of one run, with the host as far ahead as in `slowest_ms`, on rank 0's stderr."""

    def met() -> None:
        meet()
        run()

    events = device_events.record(met)
    slept = max((i for i, event in enumerate(events) if "spin" in event.name), default=-2)
    if dist.get_rank() == 0:  # behind the sleep and the meeting
        print(label, *device_events.describe(events[slept + 2 :]), sep="\n", file=sys.stderr, flush=True)


def measure(shape: Shape, kind: str, transports: list[str], timeline: bool) -> list[str]:
    """The table's rows of one shape and routing."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    p = make_problem(shape, ZIPF[kind], rank)
    weights = p.block(rank, ranks)
    limit = compute_only(p, weights, shape)
    want = one_process(p, limit.backend, rank, ranks)
    head = f"| {shape.name} EP={ranks} {kind}"
    rows: list[str] = []
    some = ExchangeShape(shape.T, shape.D, shape.K, torch.bfloat16, "cuda")
    for label in transports:
        shown = len(rows)
        module, counts = TRANSPORTS[label]
        try:
            for chunks in counts:
                layer = module.build(shape.E, dist.group.WORLD, some, chunks)  # type: ignore[attr-defined]
                error = distance(step(layer, p, weights, limit.backend, True), want)
                took, least = turns(layer, p, weights, limit, True)
                alone, forward = turns(layer, p, weights, limit, False)
                if timeline:
                    if not rows:
                        show(f"{head} | compute only", lambda: limit.run(True))
                    show(f"{head} | {label}, chunks={chunks}", lambda: step(layer, p, weights, limit.backend, True))  # noqa: B023
                if not rows:
                    rows.append(
                        f"{head} | compute only ({limit.name}) | {forward.cells(forward)} | {least.cells(least)} | |"
                    )
                verdict = "" if error < BAR else " WRONG"
                cells = f"{alone.cells(forward)} | {took.cells(least)} | {error:.1e}{verdict} |"
                rows.append(f"{head} | {label}, chunks={chunks} | {cells}")
        except (ValueError, RuntimeError) as problem:  # a transport that cannot run must not end the table
            rows.append(f"{head} | {label} | failed: {str(problem).splitlines()[0][:100]} |||||||")
        if rank == 0:
            print(*rows[shown:], sep="\n", file=sys.stderr, flush=True)
    return rows


def plan(shapes: list[Shape], kinds: list[str], transports: list[str]) -> str:
    """What a run would measure."""
    lines = ["torchrun --standalone --nproc-per-node GPUS -m moetrain.testing.overlap, EP = GPUS (2, 4, or 8), bf16:"]
    for shape in shapes:
        lines.append(f"  {shape}, routing {' and '.join(kinds)}")
    lines.append("  each: compute only (fastest of triton, grouped_mm), then forward and forward + backward of")
    lines += [f"    {name}, chunks={TRANSPORTS[name][1]}" for name in transports]
    lines.append(f"  {WARMUP} warm-up and {REPEATS} timed repeats; errors above {BAR:.1e} are marked WRONG")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table on rank 0; exit 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the plan; needs no GPU")
    parser.add_argument("--shapes", nargs="+", default=[s.name for s in SHAPES], choices=[s.name for s in SHAPES])
    parser.add_argument("--routing", nargs="+", default=list(ZIPF), choices=list(ZIPF))
    parser.add_argument("--transports", nargs="+", default=list(TRANSPORTS), choices=list(TRANSPORTS))
    parser.add_argument("--timeline", action="store_true", help="also the device's events of a pass")
    options = parser.parse_args(argv)
    shapes = [shape for shape in SHAPES if shape.name in options.shapes]
    if options.dry_run:
        print(plan(shapes, options.routing, options.transports))
        return 0
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    if start_distributed(300.0).type != "cuda" or dist.get_world_size() < 2:
        print("needs two GPUs or more; --dry-run prints the plan", file=sys.stderr)
        return 1
    rank, ranks = dist.get_rank(), dist.get_world_size()
    head = "| layer | transport | forward ms | x compute | host | forward + backward ms | x compute | host | error |"
    lines = [head, "|---" * 9 + "|"]
    for shape in shapes:
        for kind in options.routing:
            lines += measure(shape, kind, options.transports, options.timeline)
            torch.cuda.empty_cache()
        lines += [f"| {shape.name} EP=4 | not measured: {ranks} GPUs ||||||||"] * (ranks != 4)
    if rank == 0:
        print(f"{ranks} x {torch.cuda.get_device_name()}, torch {torch.__version__}", *lines, sep="\n")
    stop_distributed()
    return 1 if any("WRONG" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
