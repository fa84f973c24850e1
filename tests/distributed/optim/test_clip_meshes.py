"""Norm, clipping and updates of parameters on two folded meshes against one process in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moetrain.optim import adamw, clip
from moetrain.optim.clip import clip_, grad_norm
from moetrain.testing.ranks import run_ranks

pytestmark = pytest.mark.distributed

# Over the same four ranks: dense on dp_replicate x dp_shard, experts on edp_shard x ep. Uneven and empty shards too.
PLACEMENTS = {
    "dense.weight": ("attention", (Replicate(), Shard(0)), (5, 3)),
    "norm.weight": ("attention", (Replicate(), Shard(0)), (1,)),
    "experts.w_EFD": ("expert", (Shard(2), Shard(0)), (4, 3, 6)),
    "experts.up_EFD": ("expert", (Replicate(), Shard(0)), (2, 3, 2)),
    "late.weight": ("expert", (Shard(1), Shard(0)), (4, 4)),  # never has a gradient
}


def _full(seed, what):
    generator = torch.Generator().manual_seed(seed + 100 * what)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, (_, _, shape) in PLACEMENTS.items()
    }


def _one_process(steps):
    parameters = {name: torch.nn.Parameter(value) for name, value in _full(0, 0).items()}
    optimizer = adamw.build(parameters.items(), lr=0.1)
    norms = []
    for step in range(steps):
        for name, value in _full(step, 1).items():
            parameters[name].grad = None if name == "late.weight" else value
        held = [p.grad for p in parameters.values() if p.grad is not None]
        norm = torch.cat([g.flatten() for g in held]).norm()
        for grad in held:
            grad.mul_(min(1.0, 2.0 / norm.item()))
        norms.append(norm)
        optimizer.step()
    return norms, {name: p.detach() for name, p in parameters.items()}


def _ranks(steps):
    meshes = {
        "attention": init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard")),
        "expert": init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp_shard", "ep")),
    }

    def put(name, value):
        mesh, placements, _ = PLACEMENTS[name]
        return distribute_tensor(value, meshes[mesh], placements)

    parameters = {name: torch.nn.Parameter(put(name, value)) for name, value in _full(0, 0).items()}
    optimizer = adamw.build(parameters.items(), lr=0.1)
    assert all(len({p.device_mesh for p in group["params"]}) == 1 for group in optimizer.param_groups)
    norms = []
    for step in range(steps):
        for name, value in _full(step, 1).items():
            parameters[name].grad = None if name == "late.weight" else put(name, value)
        norm = grad_norm(parameters.values())
        clip_(parameters.values(), 2.0, norm)
        norms.append(norm)
        optimizer.step()
    return norms, {name: p.detach().full_tensor() for name, p in parameters.items()}


def _mistaken_norms():
    """The first step's norm under the peers' mistakes: never reduced; every axis reduced, replicated ones too."""
    axes = {
        "undercount": lambda p: (),
        "double count": lambda p: tuple(p.device_mesh.get_group(axis) for axis in range(p.device_mesh.ndim)),
    }
    norms = {}
    for mistake, wrong in axes.items():
        clip._sharded_over = wrong  # in a forked rank: nobody else sees it
        norms[mistake] = _ranks(1)[0][0]
    return norms


def test_norm_clip_and_update_equal_one_process():
    steps = 3
    norms, weights = _one_process(steps)
    for rank_norms, rank_weights in run_ranks(_ranks, 4, steps):
        # fp64 sums of 100 squares, then a few elementwise operations: 1e-13 leaves two digits
        torch.testing.assert_close(rank_norms, norms, rtol=1e-13, atol=0)
        for name, weight in weights.items():
            torch.testing.assert_close(rank_weights[name], weight, rtol=1e-12, atol=1e-13)


def test_counting_mistakes_do_not_pass():
    (right,), _ = _one_process(1)
    for norms in run_ranks(_mistaken_norms, 4):
        assert norms["undercount"] < 0.99 * right
        assert norms["double count"] > 1.01 * right


def _unreduced():
    from torch.distributed.tensor import Partial

    mesh = init_device_mesh("cpu", (2,))
    parameter = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    # `grad`'s setter would refuse nothing here: a Partial gradient has the same global shape
    parameter.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    with pytest.raises(ValueError, match="not reduced yet"):
        grad_norm([parameter])


def test_refuses_a_gradient_that_was_never_reduced():
    run_ranks(_unreduced, 2)
