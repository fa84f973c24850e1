"""The router after its matmul, forward plus backward, in plain torch and by the kernels:

    PYTHONPATH=kernels python kernels/benchmarks/router.py [--compiled]

From fp32 logits to experts, gates, balance scores, and counts, with gradients of gates and scores. Milliseconds are
medians of device events over rotated inputs; host is the time to launch one step; error is the largest difference from
fp64, relative to the largest entry.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import triton
from moetrain_kernels import reference, route_topk
from shapes import SHAPES, median_ms

GLOBAL_EXPERTS = {"deepseek-v3-ep8": (256, 8)}  # the shape is one of 8 ranks; its router sees all experts


def plain(logit_TE, k, valid_T, *, score="softmax", renormalize=True):
    """The operations of moetrain's routers, without kernels and without host synchronisation."""
    score_TE = logit_TE.softmax(-1) if score == "softmax" else logit_TE.sigmoid()
    expert_TK = score_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    gate_TK = score_TE.gather(-1, expert_TK)
    if renormalize:
        gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
    expert_TK = torch.where(valid_T[:, None], expert_TK, -1)
    gate_TK = torch.where(expert_TK >= 0, gate_TK, 0.0)
    flat = torch.where(expert_TK >= 0, expert_TK, logit_TE.shape[1]).flatten()
    count_E = torch.zeros(logit_TE.shape[1] + 1, dtype=torch.int64, device=flat.device)
    count_E = count_E.scatter_add_(0, flat, torch.ones_like(flat))[:-1]
    balance_TE = score_TE if score == "softmax" else score_TE / score_TE.sum(-1, keepdim=True)
    return expert_TK, gate_TK, balance_TE, count_E


def step(route: Callable, inputs: tuple[torch.Tensor, ...], k: int, score: str) -> list[torch.Tensor]:
    """One forward and backward."""
    logit, valid, dgate, dbalance = inputs
    _, gate, balance, _ = route(logit, k, valid, score=score, renormalize=k > 1)
    grads = torch.autograd.grad((gate, balance), logit, (dgate.to(logit.dtype), dbalance.to(logit.dtype)))
    return [gate.detach(), balance.detach(), *grads]


def host_ms(route: Callable, sets: list, k: int, score: str, repeats: int = 20) -> float:
    """Milliseconds the host needs to launch a step."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(repeats):
        step(route, sets[i % 3], k, score)
    host = (time.perf_counter() - start) * 1e3 / repeats
    torch.cuda.synchronize()
    return host


def make(tokens: int, experts: int, k: int) -> tuple[torch.Tensor, ...]:
    logit = torch.randn(tokens, experts, device="cuda").requires_grad_()
    valid = torch.rand(tokens, device="cuda") < 0.99
    return logit, valid, torch.randn(tokens, k, device="cuda"), torch.randn(tokens, experts, device="cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true", help="also torch.compile the plain operations")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, fp32 logits")
    routes = {"torch": plain, "kernels": route_topk}
    if args.compiled:
        routes["torch compiled"] = torch.compile(plain)
    for shape in SHAPES:
        experts, k = GLOBAL_EXPERTS.get(shape.name, (shape.E, shape.K))
        for score in ("softmax", "sigmoid"):
            torch.manual_seed(0)
            sets = [make(shape.T, experts, k) for _ in range(3)]
            wide = (sets[0][0].detach().double().requires_grad_(), *sets[0][1:])
            want = step(reference.route_topk, wide, k, score)
            line = f"{shape.name:16s} T={shape.T} E={experts} K={k} {score:8s}"
            for name, route in routes.items():
                got = step(route, sets[0], k, score)
                error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want))
                ms = median_ms(lambda i, r=route, s=sets, k=k, score=score: step(r, s[i % 3], k, score))
                line += f"   {name} {ms:.3f} ms, host {host_ms(route, sets, k, score):.3f}, error {error:.0e}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
