"""Time candidate tiles of each kernel: `python kernels/benchmarks/tiles.py [--shapes olmoe ...] [--kernels up ...]`.

Prints milliseconds and the fraction of the dense matmul of the same FLOPs, best first. Candidates are compiled by
all cores before the device is touched. What wins here is written by hand into moetrain_kernels/configs.py.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
import triton
from moetrain_kernels import compile_check, experts, plan
from moetrain_kernels.launch import Ring, Tiles
from shapes import SHAPES, Shape, dense_limit_ms, route

ROWS = [Ring(), Ring(cols=128, bufs=1), Ring(stages=3, cols=128), Ring(stages=3, bufs=4), Ring(group=16), Ring(group=4)]
WGRAD = [Ring(group=4), Ring(cols=128, bufs=1, group=4), Ring(stages=3, bufs=4, group=4), Ring(group=2), Ring(group=8)]
GEMM = [Tiles(128, 256, 64, 8, 3, 1, 2, group=8), Tiles(64, 256, 64, 4, 4, 1, 4), Tiles(64, 256, 64, 8, 4, 1, 4)]
CANDIDATES: dict[str, list[Tiles | Ring]] = {
    "up": [
        Ring(bn=128),
        Ring(bn=128, cols=128, bufs=1),
        Ring(bn=128, stages=3, bufs=3),
        Ring(bn=128, group=16),
        Ring(bn=128, group=4),
        Tiles(128, 128, 64, 8, 3),
        Tiles(64, 128, 64, 8, 4),
    ],
    "down": ROWS + GEMM,
    "down_grad": [Ring(), Ring(stages=3), Ring(group=16), Ring(group=4), *GEMM],
    "dx": ROWS + GEMM,
    "dw_down": [*WGRAD, Tiles(128, 256, 64, 8, 5, group=4), Tiles(128, 256, 64, 8, 5, split=2)],
    "dw_up": [*WGRAD, Tiles(128, 256, 64, 8, 5, group=4), Tiles(128, 256, 64, 8, 5, split=2)],
}


def runner(name: str, shape: Shape, tiles: Tiles | Ring, device: str):
    """A function that launches one kernel on freshly made inputs of the shape."""
    make = torch.randn if device == "cuda" else torch.empty

    def tensor(*size: int) -> torch.Tensor:
        return make(*size, device=device, dtype=torch.bfloat16)

    rows, (d, f, e) = shape.T * shape.K, (shape.D, shape.F, shape.E)
    expert_TK = route(shape, 0.0, device) if device == "cuda" else torch.zeros(shape.T, shape.K, dtype=torch.int64)
    p = plan.sort_rows(expert_TK, e, tiles.bm if not name.startswith("dw") else 128)
    x = tensor(shape.T, d)
    if name == "up":
        w = tensor(e, 2, f, d)
        return lambda i=0: experts.up_swiglu(x, p, w, tiles)
    if name == "down_grad":
        w, gate, h = tensor(e, d, f), tensor(shape.T, shape.K), tensor(rows, 2 * f)
        return lambda i=0: experts.down_grad(x, gate, p, w, h, tiles)
    if name in ("down", "dx"):
        a, w = (tensor(rows, f), tensor(e, d, f)) if name == "down" else (tensor(rows, 2 * f), tensor(e, 2 * f, d))
        return lambda i=0: experts.grouped_gemm(a, p, w, tiles, transposed=name == "dx")
    r, out = (tensor(rows, f), tensor(e, d, f)) if name == "dw_down" else (tensor(rows, 2 * f), tensor(e, 2 * f, d))
    return lambda i=0: experts.weight_grad(x, r, experts.one_piece(p), out, name == "dw_up", tiles)


def memory_bound(shape: Shape):
    """(name, function, MiB that must move) of the kernels around the GEMMs."""
    rows, mib = shape.T * shape.K, 2**20

    def tensor(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    expert_TK, gate = route(shape, 0.0), torch.rand(shape.T, shape.K, device="cuda")
    p = plan.sort_rows(expert_TK, shape.E, 128)
    y, b, h = tensor(rows, shape.D), tensor(rows, shape.F), tensor(rows, 2 * shape.F)
    yield "sort", lambda i: plan.sort_rows(expert_TK, shape.E, 128), 16 * rows / mib
    yield "combine", lambda i: experts.combine(y, p, gate), 2 * shape.D * (rows + shape.T) / mib
    yield "swiglu_grad", lambda i: experts.swiglu_grad(b, gate, p, h), 2 * 6 * rows * shape.F / mib


def device_ms(run: Callable[[], object], repeats: int = 8) -> float:
    """Median milliseconds of run() on the device: a long wait first lets the host queue every launch ahead."""
    for _ in range(2):
        run()
    torch.cuda._sleep(3_000_000)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def blocks(t: Tiles | Ring) -> str:
    """A candidate in one word or two."""
    if isinstance(t, Ring):
        return f"ring 128x{t.bn}x{t.bk} s{t.stages} cols{t.cols}x{t.bufs} group{t.group}"
    return f"{t.bm}x{t.bn}x{t.bk} w{t.warps} s{t.stages} p{t.per_sm} split{t.split} group{t.group}"


def precompile(job: tuple[str, Shape, Tiles | Ring]) -> str | None:
    """Fill Triton's disk cache for one job without a device; returns an error or None."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        with compile_check.compiling_for(90, []):
            runner(*job, device="cpu")()
    except Exception as error:
        return f"{job[0]} {job[1].name} {job[2]}: {str(error)[:200]}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=[s.name for s in SHAPES])
    parser.add_argument("--kernels", nargs="+", default=list(CANDIDATES))
    args = parser.parse_args()
    shapes = [s for s in SHAPES if s.name in args.shapes]

    def bound(tiles: Tiles | Ring) -> Tiles | Ring:
        return replace(tiles, sms=132) if isinstance(tiles, Ring) else replace(tiles, sms=132, tma=True)

    jobs = [(k, s, bound(t)) for s in shapes for k in args.kernels for t in CANDIDATES[k]]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for error in filter(None, pool.imap_unordered(precompile, jobs, chunksize=1)):
            print("compile:", error)
    for shape in shapes:
        limit = dense_limit_ms(shape)
        print(f"{shape.name}: dense matmuls {limit['all']:.3f} ms; triton {triton.__version__}", flush=True)
        for name in args.kernels:
            found = []
            for tiles in CANDIDATES[name]:
                try:
                    found.append((device_ms(runner(name, shape, bound(tiles), "cuda")), tiles))
                except Exception as error:
                    print(f"  {name} {tiles}: {str(error)[:120]}")
            for ms, t in sorted(found, key=lambda pair: pair[0]):
                print(f"  {name:10s} {blocks(t):46s} {ms:7.3f} ms  {limit[name] / ms:5.2f} of dense", flush=True)
        for name, run, mib in memory_bound(shape):
            ms = device_ms(lambda run=run: run(0))
            print(f"  {name:10s} {ms:7.3f} ms  {mib / 1024 / ms:5.2f} TB/s", flush=True)


if __name__ == "__main__":
    main()
