"""Run by test_triton_shards.py in a process that interprets Triton: experts in pieces behind copy engines."""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from moetrain.moe.dispatch.base import ExchangeShape
from moetrain.moe.dispatch.chunks import Chunks
from moetrain.moe.dispatch.copy_engine import CopyEngineDispatch, regions
from moetrain.moe.dispatch.local import LocalDispatch
from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.moe.experts.triton import TritonExperts
from moetrain.testing import run_ranks
from moetrain.testing.fake import fake_experts, fake_routing, fake_tokens, own_experts
from moetrain.testing.peer import FileMemory

T, D, F, E, K, RANKS, BAR = 19, 16, 12, 6, 2, 3, 1e-5  # sums of at most 57 products in fp32
SHAPE = ExchangeShape(tokens=T, d_model=D, top_k=K, dtype=torch.float32, device_type="cpu")


def data(rank):
    """x, experts, gates, dy; the last rank has fewer tokens."""
    return fake_tokens(T - 5 * (rank == RANKS - 1), D, E, K, seed=rank)


def layer(dispatch, experts, w, rank, dtype):
    """y and all gradients."""
    x, expert, gate, dy = data(rank)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, gate, *w)]
    routing = fake_routing(expert, leaves[1])
    y = dispatch(leaves[0], routing, experts, (leaves[2], leaves[3]))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


def one_rank(directory, chunks):
    memory = FileMemory(dist.group.WORLD, regions(SHAPE, RANKS)[1], directory)
    dispatch = CopyEngineDispatch(E, memory, SHAPE, Chunks("copy_engine", chunks, (), dist.group.WORLD))
    return layer(dispatch, TritonExperts(), own_experts(fake_experts(E, D, F)), memory.rank, torch.float32)


def main() -> None:
    want = [layer(LocalDispatch(), ReferenceExperts(), fake_experts(E, D, F), r, torch.float64) for r in range(RANKS)]
    dw = [sum(column) for column in zip(*(found[3:] for found in want))]
    for chunks in (2, 3):
        with tempfile.TemporaryDirectory() as name:
            got = run_ranks(one_rank, RANKS, Path(name), chunks)
        pairs = [pair for mine, theirs in zip(got, want) for pair in zip(mine[:3], theirs[:3])]
        pairs += [(torch.cat([found[3 + i] for found in got]), dw[i]) for i in range(2)]
        worst = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
        if not worst < BAR:
            sys.exit(f"{chunks} pieces: {worst}")
    print("equal")


if __name__ == "__main__":
    main()
