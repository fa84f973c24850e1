"""What dispatch.wire=fp8 changes in a MoE layer: the table of docs/dispatch.md.

    python -m moetrain.testing.wire_error [--device cpu|cuda] [--ranks 4]

Relative L2 distance from the same layer in fp64 in one process, of the output and of each gradient over all ranks; bf16
tokens, weights, and gradients of the output. "plain": normal tokens; "outliers": eight of their columns 100 times as
large, as hidden states of trained models have them.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.dispatch import collective
from moetrain.moe.dispatch.base import ExchangeShape
from moetrain.moe.dispatch.local import LocalDispatch
from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.testing.fake import fake_routing
from moetrain.testing.machine import describe_machine
from moetrain.testing.ranks import run_ranks

T, D, F, E, K = 256, 512, 256, 16, 4
PARTS = ("y", "dx", "dgate", "dw_gate_up", "dw_down")


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=4)
    options = parser.parse_args(argv)
    backend = "nccl" if options.device == "cuda" else "gloo"
    print(f"{describe_machine()}; {options.ranks} ranks; T={T} a rank, D={D}, F={F}, {K} of {E} experts\n")
    print(f"| tokens | wire | {' | '.join(PARTS)} |\n|{'---|' * (len(PARTS) + 2)}")
    for outliers in (False, True):
        for wire in ("full", "fp8"):
            ranks = run_ranks(one_rank, options.ranks, wire, outliers, options.device, backend=backend)
            errors = " | ".join(f"{error:.1e}" for error in ranks[0])
            print(f"| {'outliers' if outliers else 'plain'} | {wire} | {errors} |", flush=True)
    return 0


def data(rank: int, outliers: bool, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, experts, gates, dy of a rank."""
    g = torch.Generator().manual_seed(rank)
    x, dy = (torch.randn(T, D, generator=g).bfloat16() for _ in range(2))
    if outliers:
        x[:, :8] *= 100
    expert = torch.rand(T, E, generator=g).argsort(-1)[:, :K]
    return x.to(device), expert.to(device), torch.rand(T, K, generator=g).softmax(-1).to(device), dy.to(device)


def weights(device: str) -> tuple[Tensor, Tensor]:
    """Of all experts, the same on every rank."""
    g = torch.Generator().manual_seed(1000)
    w_gate_up, w_down = torch.randn(E, 2, F, D, generator=g) * D**-0.5, torch.randn(E, D, F, generator=g) * F**-0.5
    return w_gate_up.bfloat16().to(device), w_down.bfloat16().to(device)


def one_rank(wire: str, outliers: bool, device: str) -> list[float]:
    """Errors by PARTS, of all ranks together."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, expert, gate, dy = data(rank, outliers, device)
    routing = fake_routing(expert, gate.requires_grad_())
    shape = ExchangeShape(T, D, K, torch.bfloat16, device)
    dispatcher = collective.build(E, dist.group.WORLD, shape, 1, wire)
    own = tuple(w.chunk(ranks)[rank].clone().requires_grad_() for w in weights(device))
    y = dispatcher(x.requires_grad_(), routing, ReferenceExperts(), (own[0], own[1]))
    got = [y, *torch.autograd.grad(y, (x, gate, *own), dy)]
    x64, gate64, *w64 = (t.detach().double().requires_grad_() for t in (x, gate, *weights(device)))
    whole = fake_routing(expert, gate64)
    y64 = LocalDispatch()(x64, whole, ReferenceExperts(), (w64[0], w64[1]))
    want = [y64, *torch.autograd.grad(y64, (x64, gate64, *w64), dy.double())]
    for index in (3, 4):
        dist.all_reduce(want[index])
        want[index] = want[index].chunk(ranks)[rank]
    sums = torch.stack([torch.stack([(a - b).square().sum(), b.square().sum()]) for a, b in zip(got, want)]).detach()
    dist.all_reduce(sums)
    return (sums[:, 0] / sums[:, 1]).sqrt().tolist()


if __name__ == "__main__":
    sys.exit(main())
