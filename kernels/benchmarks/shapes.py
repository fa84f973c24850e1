"""Shapes, inputs and timing shared by the benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """T tokens, D model, F expert hidden, E experts, K slots per token."""

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int


SHAPES = (
    Shape("olmoe", 16384, 2048, 1024, 64, 8),
    Shape("qwen3-30b-a3b", 16384, 2048, 768, 128, 8),
    Shape("mixtral-8x7b", 8192, 4096, 14336, 8, 2),
    Shape("deepseek-v3-ep8", 16384, 7168, 2048, 32, 1),
    Shape("fine-grained-7b", 24576, 1536, 256, 128, 8),
    Shape("sigma-moe-tiny", 16384, 1536, 768, 96, 1),
)


def route(shape: Shape, zipf: float, device: str = "cuda") -> torch.Tensor:
    """`expert_TK`: K distinct experts per token, popularity rank^-zipf (0: uniform) over shuffled experts."""
    weight_E = torch.arange(1, shape.E + 1, device=device, dtype=torch.float64) ** -zipf
    weight_E = weight_E[torch.randperm(shape.E, device=device)]
    gumbel_TE = -torch.log(-torch.log(torch.rand(shape.T, shape.E, device=device, dtype=torch.float64)))
    return (weight_E.log() + gumbel_TE).topk(shape.K, dim=1).indices


def weights(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """`w_gate_up_E2FD`, `w_down_EDF`, scaled so that activations keep their variance."""
    up = torch.randn(shape.E, 2, shape.F, shape.D, device="cuda", dtype=dtype) * shape.D**-0.5
    down = torch.randn(shape.E, shape.D, shape.F, device="cuda", dtype=dtype) * shape.F**-0.5
    return up, down


def tokens(shape: Shape, zipf: float, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """`x_TD`, `expert_TK`, `gate_TK` (fp32), `dy_TD`."""
    x_TD = torch.randn(shape.T, shape.D, device="cuda", dtype=dtype)
    gate_TK = torch.rand(shape.T, shape.K, device="cuda").softmax(1)
    return x_TD, route(shape, zipf), gate_TK, torch.randn_like(x_TD)


def median_ms(run: Callable[[int], object], repeats: int = 12, warmup: int = 3) -> float:
    """Median milliseconds of run(i) by device events; i lets the caller rotate inputs."""
    for i in range(warmup):
        run(i)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (start, end) in enumerate(events):
        start.record()
        run(i)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def dense_matmuls(shape: Shape) -> dict[str, Callable[[int], object]]:
    """The six cuBLAS matmuls with the layer's FLOPs, as one dense layer over all routed rows."""
    rows, d, f = shape.T * shape.K, shape.D, shape.F

    def operand(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    x, h, a = operand(rows, d), operand(rows, 2 * f), operand(rows, f)
    w_up, w_down = operand(2 * f, d), operand(d, f)
    return {
        "up": lambda i: x @ w_up.T,
        "down": lambda i: a @ w_down.T,
        "down_grad": lambda i: x @ w_down,
        "dx": lambda i: h @ w_up,
        "dw_down": lambda i: x.T @ a,
        "dw_up": lambda i: h.T @ x,
    }


def dense_limit_ms(shape: Shape) -> dict[str, float]:
    """Milliseconds of each dense matmul, and their sum under "all", timed as one sequence."""
    matmuls = dense_matmuls(shape)
    times = {name: median_ms(run) for name, run in matmuls.items()}
    times["all"] = median_ms(lambda i: [run(i) for run in matmuls.values()])
    return times
