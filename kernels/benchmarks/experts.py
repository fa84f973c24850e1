"""The expert layer, forward plus backward, for every backend that runs here:

    PYTHONPATH=kernels python kernels/benchmarks/experts.py [--shapes olmoe ...] [--backends triton ...] [--zipf 0 0.6]

Prints per shape and routing: milliseconds (median of device events over rotated inputs, sort included), the fraction of
the limit that is reached, MiB held from forward to backward (without x and y), peak MiB above what was allocated
before, and the largest relative L2 error of y, dx, dgate, and the weight gradients against fp64. The limit is the dense
cuBLAS matmuls of the same FLOPs; it and the layer take turns (turns.py). Peers that are not installed are printed as
absent.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import backends
import torch
import triton
from moetrain_kernels import reference
from shapes import SHAPES, Shape, dense_matmuls, tokens, weights
from turns import in_turn

MIB = 2**20


def exact(inputs: tuple[torch.Tensor, ...], w_up: torch.Tensor, w_down: torch.Tensor) -> list[torch.Tensor]:
    """y, dx, dgate, dw_up, dw_down in fp64."""
    x, expert, gate, dy = inputs
    leaves = [t.double().requires_grad_() for t in (x, gate, w_up, w_down)]
    y = reference.moe_experts(leaves[0], expert, *leaves[1:])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


def step(layer: Callable, inputs: tuple[torch.Tensor, ...], w: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """One forward and backward."""
    x, expert, gate, dy = inputs
    y = layer(x, expert, gate, *w)
    return [y.detach(), *torch.autograd.grad(y, (x, gate, *w), dy)]


def memory(layer: Callable, inputs: tuple[torch.Tensor, ...], w: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """(MiB held between forward and backward without y, peak MiB), both above what is allocated now."""
    x, expert, gate, dy = inputs
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = layer(x, expert, gate, *w)
    held = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    grads = torch.autograd.grad(y, (x, gate, *w), dy)
    torch.cuda.synchronize()
    del grads
    return held / MIB, (torch.cuda.max_memory_allocated() - before) / MIB


def profile(layer: Callable, sets: list[tuple[torch.Tensor, ...]], w: tuple[torch.Tensor, ...]) -> None:
    """Print the device milliseconds of each kernel in one step, and the host's milliseconds to launch it."""
    repeats = 10
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        for i in range(repeats):
            step(layer, sets[i % 3], w)
        torch.cuda.synchronize()
    for event in sorted(trace.key_averages(), key=lambda e: -e.self_device_time_total)[:16]:
        ms = event.self_device_time_total / 1e3 / repeats
        print(f"      {event.key[:60]:60s} {event.count / repeats:4.1f} x  {ms:7.3f} ms", flush=True)
    start = time.perf_counter()
    for i in range(repeats):
        step(layer, sets[i % 3], w)
    host = (time.perf_counter() - start) * 1e3 / repeats
    torch.cuda.synchronize()
    print(f"      host {host:.3f} ms per step", flush=True)


def worst_error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Largest relative L2 error; NaN if anything is."""
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want)]
    return max(errors, key=lambda e: (e != e, e))


def measure(shape: Shape, zipf: float, names: list[str], check: bool, with_profile: bool) -> None:
    """Print the rows of one shape and routing."""
    matmuls = list(dense_matmuls(shape).values())
    print(f"\n{shape}  zipf {zipf}", flush=True)
    w = tuple(t.requires_grad_() for t in weights(shape))
    sets = [tokens(shape, zipf) for _ in range(3)]
    for x, _, gate, _ in sets:
        x.requires_grad_()
        gate.requires_grad_()
    want = exact(sets[0], *w) if check else None
    torch.cuda.empty_cache()
    poison = [torch.full((n,), float("nan"), device="cuda") for n in (1 << 30, 1 << 28, 1 << 24, 1 << 20, 1 << 16)]
    del poison
    for name in names:
        backend = backends.BACKENDS[name]
        absent = backends.missing(backend)
        if absent:
            print(f"  {name:22s} absent: {', '.join(absent)} not installed", flush=True)
            continue
        layer, packed = backend.run, tuple(t.detach().requires_grad_() for t in backend.pack(*w))
        try:
            error = float("nan")
            if check:
                y, dx, dgate, *dw = step(layer, sets[0], packed)
                error = worst_error([y, dx, dgate, *backend.unpack(*dw)], want)
                del y, dx, dgate, dw
            held, peak = memory(layer, sets[1], packed)
            limit, ms = in_turn(
                [
                    lambda i: [matmul(i) for matmul in matmuls],
                    lambda i, layer=layer, packed=packed: step(layer, sets[i % 3], packed),
                ]
            )
        except Exception as problem:  # one backend that cannot run must not end the table
            print(f"  {name:22s} failed: {str(problem).splitlines()[0][:120]}", flush=True)
            continue
        print(
            f"  {name:22s} {ms:8.3f} / {limit:7.3f} ms = {ms / limit:6.3f} ({100 * limit / ms:3.0f}% of the limit)  "
            f"held {held:7.0f} MiB  peak {peak:7.0f} MiB  "
            f"error {error:.1e}",
            flush=True,
        )
        if with_profile:
            profile(layer, sets, packed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[s.name for s in SHAPES], choices=[s.name for s in SHAPES])
    parser.add_argument("--backends", nargs="+", default=list(backends.BACKENDS), choices=list(backends.BACKENDS))
    parser.add_argument("--zipf", nargs="+", type=float, default=[0.0, 0.6])
    parser.add_argument("--no-check", action="store_true", help="skip the fp64 comparison")
    parser.add_argument("--profile", action="store_true", help="also print each backend's kernels")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bf16")
    for shape in SHAPES:
        for zipf in args.zipf if shape.name in args.shapes else []:
            torch.manual_seed(0)
            measure(shape, zipf, args.backends, not args.no_check, args.profile)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
