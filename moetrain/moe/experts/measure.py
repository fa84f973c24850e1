"""What a candidate backend costs and how far it is from fp64, for the shapes of a run."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from moetrain.moe.experts.base import Divisible, ExpertBackend, Workload
from moetrain.moe.experts.reference import ReferenceExperts

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLE_TOKENS, SAMPLE_EXPERTS = 96, 3
SAMPLE_SLOTS = 512  # for each expert here, at most; kernels choose their blocks by it, in each of two pieces, too
WARMUP, REPEATS = 2, 5
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # x_TD, expert_TK, gate_TK, w_gate_up_E2FD, w_down_EDF


def sample_tokens(tokens: int, local_experts: int, top_k: int) -> int:
    """How many of a rank's tokens a check takes: as many as it needs to run the kernels that all of them run."""
    return min(tokens, max(SAMPLE_TOKENS, SAMPLE_SLOTS * local_experts // top_k))


def error_limit(load: Workload) -> float:
    """The relative L2 error that a correct backend stays below.

    About eight results on the way from x to a weight's gradient are rounded to the dtype; independent roundings add to
    sqrt(8) of one, and 4 units leave a margin. Sums are kept in fp32: its epsilon times the root of the longest.
    """
    tokens = sample_tokens(load.tokens, load.local_experts, load.top_k)
    longest = max(load.d_model, load.d_expert, tokens)
    unit = torch.finfo(DTYPES[load.precision]).eps / 2
    return 4 * unit + 4 * torch.finfo(torch.float32).eps * longest**0.5


def workload_inputs(load: Workload, device: torch.device) -> Inputs:
    """Random tensors of the run's shapes: uniform choices among all experts, of which only this rank's stay."""
    g = torch.Generator(device).manual_seed(0)
    score_TE = torch.rand(load.tokens, load.n_experts, device=device, generator=g)
    expert_TK = score_TE.topk(load.top_k, dim=1).indices
    expert_TK = torch.where(expert_TK < load.local_experts, expert_TK, -1)
    expert_TK = expert_TK[(expert_TK >= 0).any(dim=1)]  # the others are not sent here
    dtype, tokens = DTYPES[load.precision], expert_TK.shape[0]

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device, dtype=dtype, generator=g) * scale).requires_grad_()

    gate_TK = torch.rand(expert_TK.shape, device=device, generator=g).requires_grad_()
    w_gate_up = randn(load.local_experts, 2, load.d_expert, load.d_model, scale=load.d_model**-0.5)
    w_down = randn(load.local_experts, load.d_model, load.d_expert, scale=load.d_expert**-0.5)
    return randn(tokens, load.d_model), expert_TK, gate_TK, w_gate_up, w_down


def step(backend: ExpertBackend, inputs: Inputs, dy_TD: Tensor) -> list[Tensor]:
    """Forward and backward: y, then the gradients of x, gates, and both weights."""
    x_TD, expert_TK, gate_TK, w_gate_up, w_down = inputs
    y_TD = backend(x_TD, expert_TK, gate_TK, w_gate_up, w_down)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, (x_TD, gate_TK, w_gate_up, w_down), dy_TD)]


def step_in_pieces(backend: Divisible, inputs: Inputs, dy_TD: Tensor) -> list[Tensor]:
    """The same as an exchange asks for it: in two pieces, the first of which is finished last."""
    x_TD, expert_TK, gate_TK, *weights = (t.detach() for t in inputs)
    work = backend.divide((weights[0], weights[1]), (True, True, True, True))
    half = -(-len(x_TD) // 2)
    for part in zip(x_TD.split(half), expert_TK.split(half), gate_TK.split(half)):
        work.start(*part, 0, lambda: None)
    pieces = -(-len(x_TD) // half)
    y = {piece: work.finish(piece) for piece in reversed(range(pieces))}
    for piece, part_TD in enumerate(dy_TD.split(half)):
        work.start_gradients(piece, part_TD, True)
    found = {piece: work.finish_gradients(piece) for piece in reversed(range(1, pieces))}
    dw = work.weight_gradients(lambda: found.update({0: work.finish_gradients(0)}))
    rows = [torch.cat(column) for column in zip(*((y[i], *found[i]) for i in range(pieces)))]
    return [*rows, *(t for t in dw if t is not None)]


def check(backend: ExpertBackend, inputs: Inputs) -> float:
    """The largest relative L2 error of y and all gradients against fp64, over `sample_tokens` and three of the experts,
    in one call and, if the backend has its own way of it, in pieces.

    Experts without tokens must have a gradient of zero. NaN if anything is NaN.
    """
    w_gate_up, w_down = inputs[3:]
    used = sorted({0, w_down.shape[0] // 2, w_down.shape[0] - 1})[:SAMPLE_EXPERTS]
    slots = inputs[1].shape[1]
    tokens = sample_tokens(inputs[0].shape[0], w_down.shape[0], slots)
    g = torch.Generator(w_down.device).manual_seed(1)
    among = torch.rand(tokens, len(used) + slots, device=w_down.device, generator=g).topk(slots, dim=1).indices
    few_TK = torch.where(among < len(used), among, -1)  # ids among the used ones; unused slots are ordinary
    used_U = torch.tensor(used, device=w_down.device)
    expert_TK = torch.where(few_TK >= 0, used_U[few_TK.clamp(min=0)], -1)
    x_TD, gate_TK = (inputs[i][:tokens].detach().requires_grad_() for i in (0, 2))
    dy_TD = torch.randn(x_TD.shape, device=x_TD.device, generator=g).to(x_TD.dtype)
    sample = (x_TD, expert_TK, gate_TK, w_gate_up, w_down)
    wide = [t.detach().double().requires_grad_() for t in (x_TD, gate_TK, w_gate_up[used_U], w_down[used_U])]
    want = step(ReferenceExperts(), (wide[0], few_TK, wide[1], wide[2], wide[3]), dy_TD.double())
    errors = _errors(step(backend, sample, dy_TD), want, used_U)
    if isinstance(backend, Divisible):
        errors += _errors(step_in_pieces(backend, sample, dy_TD), want, used_U)
    return max(errors, key=lambda e: (e != e, e))


def _errors(got: list[Tensor], want: list[Tensor], used_U: Tensor) -> list[float]:
    """Of y, dx, dgate, and the weight gradients of the experts in use; and how many others are not zero."""
    rest = torch.ones(len(got[3]), dtype=torch.bool, device=used_U.device).index_fill(0, used_U, False)
    errors = [_relative(a, b) for a, b in zip(got[:3], want[:3])]
    for mine, exact in zip(got[3:], want[3:]):
        errors.append(_relative(mine[used_U], exact))
        errors.append(float(mine[rest].count_nonzero()))
    return errors


def _relative(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def median_ms(backend: ExpertBackend, inputs: Inputs) -> float:
    """Milliseconds of a forward and backward pass: the median of a few, after the first ones have compiled."""
    dy_TD = torch.randn_like(inputs[0])
    for _ in range(WARMUP):
        step(backend, inputs, dy_TD)
    times = []
    for _ in range(REPEATS):
        _wait(dy_TD.device)
        start = time.perf_counter()
        step(backend, inputs, dy_TD)
        _wait(dy_TD.device)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
