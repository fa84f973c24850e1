"""Four ranks save under FSDP2 with experts split over ep; 4, 2 (folded otherwise) and 1 load the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moetrain.checkpoint import agree, manifest
from moetrain.checkpoint.store import CheckpointStore
from moetrain.checkpoint.use import load_weights
from moetrain.optim import adamw
from moetrain.testing.ranks import run_ranks

pytestmark = pytest.mark.distributed

EXPERTS, WIDTH, HIDDEN = 4, 6, 5  # 5 and 6 do not divide by 4: shards are uneven


class _Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_EFD = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(WIDTH, HIDDEN)
        self.experts = _Experts()
        self.register_buffer("bias_E", torch.randn(EXPERTS))

    def forward(self, x):
        return self.dense(x)


def _shard(model: _Model, replicate: int, ep: int, device: str) -> None:
    """Dense on [dp_replicate, dp_shard], experts on [edp_shard, ep], over the same ranks."""
    world = dist.get_world_size()
    attention = init_device_mesh(device, (replicate, world // replicate), mesh_dim_names=("dp_replicate", "dp_shard"))
    expert = init_device_mesh(device, (world // ep, ep), mesh_dim_names=("edp_shard", "ep"))
    whole = model.experts.w_EFD.detach()
    model.experts.w_EFD = nn.Parameter(distribute_tensor(whole, expert["ep"], [Shard(0)]))
    fully_shard(model.experts, mesh=expert["edp_shard"], shard_placement_fn=lambda _: Shard(2))
    fully_shard(model, mesh=attention)


def _train(model, optimizer, first, last):
    for step in range(first, last):
        torch.manual_seed(100 + step)
        for parameter in model.parameters():
            grad = torch.randn(parameter.shape).to(parameter.device)
            if isinstance(parameter, DTensor):
                grad = _like(grad, parameter.device_mesh, parameter)
            parameter.grad = grad
        optimizer.step()


def _like(value: torch.Tensor, mesh: DeviceMesh, parameter: DTensor) -> DTensor:
    """`value` in the parameter's placement, cut out by offsets: `distribute_tensor` takes no strided shards."""
    shape, offset = compute_local_shape_and_global_offset(value.shape, mesh, parameter.placements)
    local = value[tuple(slice(o, o + s) for o, s in zip(offset, shape))].contiguous()
    return DTensor.from_local(
        local, mesh, parameter.placements, shape=value.shape, stride=value.stride(), run_check=False
    )


def _state(model, optimizer):
    held = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        held.update({f"optim.{name}.{slot}": value for slot, value in optimizer.state[parameter].items()})
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).cpu().clone() for name, v in held.items()}


def _build(seed, layout, device="cpu"):
    torch.manual_seed(seed)
    model = _Model().to(device)
    if layout is not None:
        _shard(model, *layout, device)
    return model, adamw.build(model.named_parameters(), lr=0.1)


def _save(run, layout, device="cpu"):
    pair = _build(0, layout, device)
    _train(*pair, 0, 2)
    saved = _state(*pair)
    with torch.no_grad():
        pair[0](torch.zeros(1, WIDTH, device=device))  # an evaluation leaves the root's parameters gathered
    path = CheckpointStore(run).save(2, *pair, {"rank": dist.get_rank()}, {"ep": layout[1]})
    _train(*pair, 2, 4)
    return str(path), saved, _state(*pair)


def _load(path, layout, device="cpu"):
    pair = _build(1, layout, device)
    state = CheckpointStore(Path(path).parent.parent).load(path, *pair)
    assert state == {"rank": 0}
    loaded = _state(*pair)
    _train(*pair, 2, 4)
    return loaded, _state(*pair)


def _assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    results = run_ranks(_save, 4, str(run), (2, 2))
    path, state, later = results[0]
    one = _build(0, None)
    _train(*one, 0, 2)
    for name, value in _state(*one).items():  # it is the whole model's state that the ranks hold between them
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-6)
    return path, state, later


@pytest.mark.parametrize(("world", "layout"), [(4, (2, 2)), (4, (1, 4)), (2, (1, 2)), (2, (2, 1))])
def test_ranks_restore_the_same_bits(saved, world, layout):
    path, state, later = saved
    for loaded, continued in run_ranks(_load, world, path, layout):
        _assert_equal(loaded, state)
        if (world, layout) == (4, (2, 2)):
            _assert_equal(continued, later)  # a resume on one layout is exact


def test_one_process_restores_the_same_bits(saved):
    path, state, _ = saved
    _assert_equal(_load(path, None)[0], state)
    model = _build(1, None)[0]
    load_weights(path, model)
    assert torch.equal(model.experts.w_EFD, state["model.experts.w_EFD"])  # every ep rank's experts, not one's


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpus_save_and_resume_exactly_and_a_cpu_reads_it(tmp_path):
    world = min(2, torch.cuda.device_count())
    path, state, later = run_ranks(_save, world, str(tmp_path), (1, world), device="cuda", backend="nccl")[0]
    for loaded, continued in run_ranks(_load, world, path, (1, world), device="cuda", backend="nccl"):
        _assert_equal(loaded, state)
        _assert_equal(continued, later)
    _assert_equal(_load(path, None)[0], state)


def test_replicated_state_is_stored_once(saved):
    path, state, _ = saved
    stored = sum(entry["size"] for name, entry in manifest.read(Path(path))["files"].items() if "distcp" in name)
    needed = sum(value.numel() * value.element_size() for value in state.values())
    pieces = 4 * len(state)  # each at most about 2 KiB of container around its numbers
    assert needed <= stored < needed + pieces * 2048


def _fail_on_one_rank(run, rank):
    pair = _build(0, (1, 2))
    if dist.get_rank() == rank:

        def full(_):
            raise OSError(28, "No space left on device")

        manifest.digest = full  # a forked rank's own copy
    CheckpointStore(run).save(1, *pair, {}, {})


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_that_cannot_write_stops_the_save_on_all(tmp_path, rank):
    def everyone_raises():
        with pytest.raises((OSError, RuntimeError), match="No space left on device"):
            _fail_on_one_rank(tmp_path, rank)
        dist.barrier()
        return [p.name for p in (tmp_path / "checkpoints").iterdir()]

    assert run_ranks(everyone_raises, 2, timeout_s=60) == [[], []]


def _flip(path):
    file = next(Path(path).glob("model/__1_*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_damage_found_by_one_rank_is_refused_by_all(tmp_path):
    ((path, _, _), *_) = run_ranks(_save, 2, str(tmp_path), (1, 2))
    _flip(path)

    def refuse():
        with pytest.raises(ValueError, match=r"model/__1_0.distcp is damaged"):
            _load(path, (2, 1))

    run_ranks(refuse, 2, timeout_s=60)


def _gone():
    raise OSError("gone")


def _agree():
    rank = dist.get_rank()
    assert agree.gather(dist.get_rank) == [0, 1]
    assert agree.on_rank0(lambda: rank + 7) == 7
    with pytest.raises(OSError if rank == 0 else RuntimeError, match="gone" if rank == 0 else "rank 0: OSError: gone"):
        agree.on_rank0(_gone)

    def refuse():
        if rank == 1:
            raise ValueError("bad key")

    with pytest.raises(ValueError, match="bad key" if rank == 1 else "rank 1: ValueError: bad key"):
        agree.gather(refuse)


def test_ranks_agree_on_results_and_on_failures():
    run_ranks(_agree, 2, timeout_s=60)
