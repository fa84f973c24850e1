"""Compile every kernel for given architectures without a GPU: `python -m moetrain_kernels.compile_check --arch 90 80`.

The package's own host code runs on CPU tensors with each launch turned into a compilation for the named architecture,
so what is compiled is exactly what a launch there would compile. Exit code 1 if a kernel fails or was never reached.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from . import (
    combine,
    configs,
    dense,
    down_grad_ws,
    dtypes,
    experts,
    gemm,
    gemm_ws,
    launch,
    norm,
    pieces,
    plan,
    rotation,
    router,
    softmax_loss,
    spans,
    swiglu_grad,
    up,
    update,
    weight_grad,
    weight_grad_ws,
)

KERNEL_MODULES = (plan, up, gemm, combine, swiglu_grad, weight_grad, spans)
KERNEL_MODULES += (router, softmax_loss, rotation, norm, update, dtypes, dense)
RING_MODULES = (gemm_ws, down_grad_ws, weight_grad_ws)
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return 1000 + self.arch  # Triton keeps one kernel cache per device number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def kernel_names(arch: int) -> set[str]:
    """Every kernel of the package that an architecture launches (helpers are inlined into these)."""
    modules = KERNEL_MODULES + (RING_MODULES if arch == 90 else ())
    names = {n for m in modules for n, v in vars(m).items() if isinstance(v, JITFunction)}
    return {n for n in names if n.endswith("_kernel")}


@contextmanager
def compiling_for(arch: int, report: list[tuple[str, int]]) -> Iterator[None]:
    """Inside, a kernel launch compiles for `arch` and appends (name, shared-memory bytes) to the report."""
    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        report.append((kernel.fn.__name__, compiled.metadata.shared))
        return compiled

    with ExitStack() as stack:
        triton.runtime.driver.set_active(_Driver(arch))
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        stack.enter_context(mock.patch.object(configs, "device_traits", return_value=(132, arch)))
        stack.enter_context(mock.patch.object(pieces, "check"))  # which would ask for CUDA tensors
        yield


def compile_layer(dtype: torch.dtype, num_tokens: int, dims: tuple[int, int] = (2048, 1024)) -> None:
    """Walk the expert layer's forward and backward once; `num_tokens` selects the table entry."""
    num_d, num_f = dims
    num_experts, top_k = 2, 2
    x_TD = torch.empty(num_tokens, num_d, dtype=dtype)
    gate_TK = torch.empty(num_tokens, top_k)
    expert_TK = torch.zeros(num_tokens, top_k, dtype=torch.int64)
    w_up = torch.empty(num_experts, 2, num_f, num_d, dtype=dtype)
    weights = (w_up, torch.empty(num_experts, num_d, num_f, dtype=dtype))
    config = configs.choose(x_TD, *weights, expert_TK.numel())
    rows = plan.sort_rows(expert_TK, num_experts, config.block_m)
    _, h_R2F = experts.forward(x_TD, rows, gate_TK, *weights, config)
    experts.backward(x_TD, x_TD, rows, gate_TK, weights, h_R2F, config, (True, True, True))


def compile_pieces(dtype: torch.dtype, num_tokens: int, dims: tuple[int, int] = (2048, 1024)) -> None:
    """Of two pieces: weight gradients, and an up-projection that leaves room."""
    num_d, num_f = dims
    work = pieces.ExpertPieces(
        torch.empty(2, 2, num_f, num_d, dtype=dtype), torch.empty(2, num_d, num_f, dtype=dtype), (True,) * 4
    )
    x_TD, expert_TK = torch.empty(num_tokens, num_d, dtype=dtype), torch.zeros(num_tokens, 2, dtype=torch.int64)
    for _ in range(2):
        work.start(x_TD.clone(), expert_TK, torch.empty(num_tokens, 2), land=lambda: None)
    for number in range(2):
        work.start_gradients(number, x_TD)
    work.weight_gradients()


def compile_many_experts() -> None:
    """What is made for every expert, of more of them than a block of comparisons can hold squared."""
    expert_TK, x_TD = torch.zeros(64, 2, dtype=torch.int64), torch.empty(64, 64, dtype=torch.bfloat16)
    spans.several_pieces([plan.sort_rows(expert_TK, 2048, 128) for _ in range(2)], [x_TD] * 2, [x_TD] * 2)


def compile_router() -> None:
    """Walk the router's kernels once for each kind of score, at the largest number of experts that is common."""
    logit_TE, valid_T = torch.empty(1024, 256, requires_grad=True), torch.ones(1024, dtype=torch.bool)
    bias_E, given_TK = torch.empty(256), torch.zeros(1024, 8, dtype=torch.int64)
    for score in router.SCORES:
        rule = (score == "sigmoid", False, True, 1.0)
        _, gate_TK, balance_TE, _ = router.RouteTopK.apply(logit_TE, valid_T, bias_E, given_TK, 8, rule)
        torch.autograd.grad((gate_TK, balance_TE), logit_TE, (gate_TK, balance_TE))


def compile_model() -> None:
    """Walk the kernels of attention and loss, in the widths of 128-wide heads and of MLA's rotated parts."""
    logit_CV, target_C = torch.empty(16, 32000), torch.zeros(16, dtype=torch.int64)
    loss_C, grad_CV = torch.empty(16), torch.empty(16, 32000, dtype=torch.bfloat16)
    args = (logit_CV, target_C, torch.ones(16, dtype=torch.uint8), loss_C, grad_CV)
    for gradient in (True, False):
        constants = {"columns": 32000, "BLOCK": softmax_loss.BLOCK, "GRAD": gradient}
        softmax_loss.launch_cross_entropy((16, 1, 1), args, constants, num_warps=8)
    narrow, wide, scale = torch.empty(4096, dtype=torch.bfloat16), torch.empty(4096), torch.empty(())
    for args, scaled in (((narrow, wide, narrow), False), ((wide, narrow, scale), True)):
        dtypes.launch_convert(
            (1, 1, 1), (*args, 4096), {"BLOCK": dtypes.BLOCK, "EVEN": True, "SCALED": scaled}, num_warps=8
        )
    h_T2F = torch.empty(64, 2, 1536, dtype=torch.bfloat16, requires_grad=True)
    y_TF = dense.SwiGLU.apply(h_T2F[:, 0], h_T2F[:, 1])
    torch.autograd.grad(y_TF, h_T2F, y_TF.detach())
    state = torch.empty(6, 4096).unbind()
    args = (*state, 4096, 0, 1e-3, 0.1, 0.05, 1e-8, 1e-4)
    update.launch_adamw((2, 1, 1), args, {"BLOCK": update.BLOCK, "EVEN": True}, num_warps=4)
    for add in (True, False):
        x_TD, weight_D = torch.empty(64, 2048, dtype=torch.bfloat16, requires_grad=True), torch.empty(2048)
        found = norm.RMSNorm.apply(x_TD, x_TD if add else None, weight_D, 1e-6)
        torch.autograd.grad(found, x_TD, found)
    for heads, d, normed, interleaved in ((32, 128, True, False), (32, 128, False, False), (1, 64, False, True)):
        x_BHSd = torch.empty(1, 16, heads, d, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        weight_d = torch.empty(d, dtype=torch.bfloat16) if normed else None
        table = torch.empty(1, 1, 16, d // 2)
        y_BHSd = rotation.NormRope.apply(x_BHSd, weight_d, table, table, 1e-6, interleaved)
        torch.autograd.grad(y_BHSd, x_BHSd, y_BHSd.detach())


def check(arch: int) -> bool:
    """Compile everything for one architecture and print a line per kernel variant."""
    cases = {
        "bf16": partial(compile_layer, torch.bfloat16, 1024),
        "bf16, few rows": partial(compile_layer, torch.bfloat16, 16),
        "fp16, odd D": partial(compile_layer, torch.float16, 1024, (2056, 1024)),
        "fp32": partial(compile_layer, torch.float32, 1024),
        "bf16, pieces": partial(compile_pieces, torch.bfloat16, 1024),
        "fp16, pieces": partial(compile_pieces, torch.float16, 1024, (2056, 1024)),
        "2048 experts": compile_many_experts,
        "router": compile_router,
        "attention, loss": compile_model,
    }
    reached: set[str] = set()
    good = True
    for label, walk in cases.items():
        report: list[tuple[str, int]] = []
        try:
            with compiling_for(arch, report):
                walk()
        except Exception as error:  # any compiler failure is a finding to print, not a crash of the check
            print(f"sm_{arch}  {label:15s} FAILED after {[name for name, _ in report]}: {str(error)[:500]}")
            good = False
        for name, shared in report:
            fits = shared <= SHARED_LIMIT.get(arch, 101376)
            good &= fits
            print(f"sm_{arch}  {label:15s} {name:22s} shared {shared:6d} B  {'ok' if fits else 'TOO LARGE'}")
        reached |= {name for name, _ in report}
    missed = kernel_names(arch) - reached
    if missed:
        print(f"sm_{arch}  never reached: {sorted(missed)}")
    return good and not missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 80], help="compute capabilities, such as 90 80")
    args = parser.parse_args()
    if launch.interpreting():
        print("TRITON_INTERPRET=1 is set: nothing would be compiled")
        return 1
    results = [check(arch) for arch in args.arch]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
