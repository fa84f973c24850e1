"""The whole layer under candidate tables of blocks, step by step in turn with the dense limit:

    PYTHONPATH=kernels python kernels/benchmarks/tables.py [--shapes olmoe ...] [--tables chosen hopper ...] [--zipf 0]

A limit timed before the layer, on a cooler GPU, would misjudge it; here every layer step follows a limit step, and all
tables take turns (turns.py). Prints the ratios, and per kernel its device milliseconds inside a step.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
from experts import step
from moetrain_kernels import compile_check, configs, experts, moe_experts, plan
from shapes import SHAPES, Shape, dense_matmuls, tokens, weights
from turns import in_turn

LAUNCHES = {  # of each kernel within a step, in the order in which they start
    "histogram_kernel": ["histogram"],
    "prefix_kernel": ["prefix"],
    "scatter_kernel": ["scatter"],
    "up_swiglu_kernel": ["up"],
    "grouped_gemm_kernel": ["down", "down_grad", "dx"],
    "rows_ws_kernel": ["up", "down", "dx"],
    "down_grad_ws_kernel": ["down_grad"],
    "swiglu_grad_kernel": ["swiglu_grad"],
    "weight_grad_kernel": ["dw_up", "dw_down"],
    "weight_grad_ws_kernel": ["dw_up", "dw_down"],
    "combine_kernel": ["combine y", "combine"],
}


def ring(**changes: object) -> configs.Config:
    """The ring table with every kernel changed."""
    return configs.Config(**{name: replace(r, **changes) for name, r in vars(configs.RING).items()})


TABLES: dict[str, configs.Config | None] = {
    "chosen": None,
    "hopper": configs.HOPPER,
    "few rows": configs.HOPPER_FEW_ROWS,
    "ring": configs.RING,
    "ring s3x2": ring(stages=3, cols=128, bufs=2),
}


def bound(table: configs.Config) -> configs.Config:
    return table.on(132, True, "tf32")


def precompile(job: tuple[Shape, str]) -> None:
    """Fill Triton's disk cache for one table without a device."""
    shape, name = job
    table = TABLES[name]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16)

    with compile_check.compiling_for(90, []):
        x_TD, gate_TK = empty(shape.T, shape.D), torch.empty(shape.T, shape.K)
        expert_TK = torch.zeros(shape.T, shape.K, dtype=torch.int64)
        w = (empty(shape.E, 2, shape.F, shape.D), empty(shape.E, shape.D, shape.F))
        config = bound(table) if table else configs.choose(x_TD, *w, expert_TK.numel())
        rows = plan.sort_rows(expert_TK, shape.E, config.block_m)
        _, h_R2F = experts.forward(x_TD, rows, gate_TK, *w, config)
        experts.backward(x_TD, x_TD, rows, gate_TK, w, h_R2F, config, (True, True, True))


def kernel_ms(run: Callable[[int], object], repeats: int = 6) -> dict[str, float]:
    """Median milliseconds of each launch of a step; kernels beside each other count twice."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for i in range(repeats):
            run(i)
        torch.cuda.synchronize()
    found = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA and e.name in LAUNCHES]
    parts = {}
    for kernel, names in LAUNCHES.items():
        of_kernel = sorted((e for e in found if e.name == kernel), key=lambda e: e.time_range.start)
        if len(of_kernel) == repeats * len(names):
            for i, name in enumerate(names):
                each = [e.time_range.elapsed_us() for e in of_kernel[i :: len(names)]]
                parts[name] = statistics.median(each) / 1e3
    return parts


def runner(shape: Shape, zipf: float) -> Callable[[str], Callable[[int], object]]:
    """A function that makes, for a table's name, a function that runs one step with it."""
    w = tuple(t.requires_grad_() for t in weights(shape))
    sets = [tokens(shape, zipf) for _ in range(3)]
    for x, _, gate, _ in sets:
        x.requires_grad_()
        gate.requires_grad_()
    chosen = experts.choose

    def layer(name: str) -> Callable[[int], object]:
        table = TABLES[name]

        def run(i: int) -> None:
            with mock.patch.object(experts, "choose", lambda *args: bound(table) if table else chosen(*args)):
                step(moe_experts, sets[i % 3], w)

        return run

    return layer


def graphed(run: Callable[[int], object]) -> Callable[[int], object]:
    """`run`'s steps over its three inputs as CUDA graphs: what is left when the host costs nothing."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(0)
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph() for _ in range(3)]
    for i, graph in enumerate(graphs):
        with torch.cuda.graph(graph, stream=side):
            run(i)
    return lambda i: graphs[i % 3].replay()


def measure(shape: Shape, zipf: float, names: list[str], graphs: bool = False) -> None:
    """Print two lines per table: time against the limit, and the kernels' times."""
    matmuls = list(dense_matmuls(shape).values())
    layer = runner(shape, zipf)
    runs = {}
    for name in names:
        try:
            layer(name)(0)
            runs[name] = layer(name)
            if graphs:
                runs[f"{name}, graph"] = graphed(runs[name])
        except Exception as problem:
            print(f"  {name:10s} failed: {str(problem).splitlines()[0][:100]}", flush=True)
    times = in_turn([turn for run in runs.values() for turn in (lambda i: [matmul(i) for matmul in matmuls], run)])
    for (name, run), limit, ms in zip(runs.items(), times[::2], times[1::2]):
        print(f"{shape.name:16s} zipf {zipf} {name:17s} {ms:7.3f} / {limit:7.3f} ms = {ms / limit:5.3f}", flush=True)
        parts = kernel_ms(run)
        kernels = " ".join(f"{k} {v:.3f}" for k, v in parts.items())
        print(f"    sum {sum(parts.values()):.3f}: {kernels}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[s.name for s in SHAPES], choices=[s.name for s in SHAPES])
    parser.add_argument("--tables", nargs="+", default=["chosen"], choices=list(TABLES))
    parser.add_argument("--graphs", action="store_true", help="also time each table's step as a CUDA graph")
    parser.add_argument("--zipf", nargs="+", type=float, default=[0.0])
    args = parser.parse_args()
    jobs = [(shape, name) for shape in SHAPES if shape.name in args.shapes for name in args.tables]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        pool.map(precompile, jobs, chunksize=1)
    for shape in SHAPES:
        for zipf in args.zipf if shape.name in args.shapes else []:
            torch.manual_seed(0)
            measure(shape, zipf, args.tables, args.graphs)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
