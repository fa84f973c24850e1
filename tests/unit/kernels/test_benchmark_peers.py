"""The benchmark's adapters: weights go into a peer's order and its gradients come back; absent peers are named."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from moetrain_kernels import reference

pytestmark = pytest.mark.unit
BENCHMARKS = str(Path(__file__).parents[3] / "kernels" / "benchmarks")


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, BENCHMARKS)
    try:
        yield importlib.import_module("backends"), importlib.import_module("peers")
    finally:
        sys.path.remove(BENCHMARKS)
        for name in ("backends", "peers", "shapes"):
            sys.modules.pop(name, None)


def weights(experts=3, d_model=16, d_expert=8):
    g = torch.Generator().manual_seed(0)
    up = torch.randn(experts, 2, d_expert, d_model, generator=g)
    return up, torch.randn(experts, d_model, d_expert, generator=g)


@pytest.mark.parametrize("name", ["transformers", "sonicmoe", "megablocks", "scattermoe"])
def test_packing_is_undone(name, modules):
    layer = modules[1].PEERS[name]
    packed = layer.pack(*weights())
    assert all(torch.equal(a, b) for a, b in zip(layer.unpack(*packed), weights()))


def test_alternating_rows_are_gate_then_up(modules):
    up, down = weights()
    packed, _ = modules[1].PEERS["sonicmoe"].pack(up, down)
    assert torch.equal(packed[:, 0], up[:, 0, 0])
    assert torch.equal(packed[:, 1], up[:, 1, 0])
    assert torch.equal(packed[:, 2], up[:, 0, 1])


@pytest.mark.parametrize("name", ["transformers", "grouped_mm"])
def test_layers_that_run_on_the_cpu_equal_the_reference(name, modules):
    g = torch.Generator().manual_seed(1)
    x, gate = torch.randn(11, 16, generator=g), torch.rand(11, 2, generator=g)
    expert = torch.stack([torch.randperm(3, generator=g)[:2] for _ in range(11)])
    results = []
    for layer in (modules[0].BACKENDS[name].run, reference.moe_experts):
        leaves = [t.clone().requires_grad_() for t in (x, gate, *weights())]
        y = layer(leaves[0], expert, *leaves[1:])
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for mine, theirs in zip(*results):
        # Sums of up to 22 fp32 terms, in three matmuls.
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_what_is_not_installed_is_named(modules):
    backends, peers = modules
    assert backends.missing(peers.Layer(print, needs=("json", "no_such_module"))) == ["no_such_module"]
    assert backends.missing(backends.BACKENDS["triton"]) == []
