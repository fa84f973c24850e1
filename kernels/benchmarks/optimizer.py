"""AdamW's update by the kernel and by torch's fused one, in turn, over tensors like those of one rank:

    PYTHONPATH=kernels python kernels/benchmarks/optimizer.py

Three rows: the kernel, which divides gradients on the way; torch, which divides them and writes them back; torch
without a divisor. TB/s counts the 28 bytes an element that an update must move (parameter, gradient, and moments read;
all but the gradient written).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import moetrain_kernels
import torch
import triton

LAYER = [(32, 2, 768, 2048), (32, 2048, 768), (4096, 2048), (2048, 4096), (2048, 512), (2048,), (128, 2048)]
SHAPES = LAYER * 12 + [(151936 // 4, 2048)]  # 12 layers of Qwen3-30B-A3B, a quarter of experts and head
RATES = {"lr": 1e-4, "eps": 1e-8, "weight_decay": 0.1}


def updates() -> dict[str, Callable[[], object]]:
    """One update of all tensors, for each row of the table."""
    p, g, m, v = ([make(*s, device="cuda") for s in SHAPES] for make in (torch.randn,) * 2 + (torch.zeros,) * 2)
    steps, divisor = [torch.ones((), device="cuda") for _ in SHAPES], torch.full((), 1.01, device="cuda")
    rule = {"amsgrad": False, "maximize": False, "beta1": 0.9, "beta2": 0.95, **RATES}

    def ours() -> None:
        moetrain_kernels.adamw(p, g, (m, v), steps, betas=(0.9, 0.95), divisor=divisor, **RATES)

    def fused(scale: torch.Tensor | None) -> None:
        torch._fused_adamw_(p, g, m, v, [], steps, grad_scale=scale, **rule)

    return {"kernel": ours, "torch, divided": lambda: fused(divisor), "torch": lambda: fused(None)}


def in_turn(runs: dict[str, Callable[[], object]], repeats: int = 8) -> dict[str, float]:
    """Median milliseconds of each, one of each in turn, after one round that is not counted."""
    events = {name: [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(repeats + 1)] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            events[name][i][0].record()
            run()
            events[name][i][1].record()
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs[1:]) for name, pairs in events.items()}


def main() -> None:
    torch.manual_seed(0)
    count = sum(torch.Size(s).numel() for s in SHAPES)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; {count} elements")
    for name, ms in in_turn(updates()).items():
        print(f"  {name:15s} {ms:7.2f} ms  {28 * count / ms / 1e9:5.2f} TB/s", flush=True)


if __name__ == "__main__":
    main()
