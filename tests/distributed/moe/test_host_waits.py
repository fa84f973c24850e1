"""How often a layer has the host wait for a GPU, under each dispatcher; tests/gpu/test_dispatch_gpu.py asks the GPU."""

import pytest
import torch
import torch.distributed as dist

from moetrain.comm.nodes import find_nodes, node_group
from moetrain.moe.dispatch import allgather, collective, local, two_level
from moetrain.moe.dispatch.base import ExchangeShape
from moetrain.moe.dispatch.chunks import Chunks
from moetrain.moe.dispatch.copy_engine import CopyEngineDispatch, regions
from moetrain.moe.dispatch.two_level import TwoLevelDispatch
from moetrain.moe.experts.grouped_mm import GroupedMMExperts
from moetrain.testing import run_ranks
from moetrain.testing.fake import fake_routing, fake_tokens
from moetrain.testing.host_reads import host_reads
from moetrain.testing.peer import FileMemory

pytestmark = pytest.mark.distributed
D, F, E, K, WORLD, T = 8, 8, 8, 3, 4, 9
SHAPE = ExchangeShape(tokens=T, d_model=D, top_k=K, dtype=torch.float32, device_type="cpu")
PADDED = ExchangeShape(tokens=T, d_model=D, top_k=K, dtype=torch.float32, device_type="cpu", rows=T)


def of_chunks(chunks):
    return Chunks("test", chunks, (), dist.group.WORLD)


def copy_engines(group, shape, n_experts, directory):
    directory.mkdir(exist_ok=True)
    dist.barrier()
    memory = FileMemory(group, regions(shape, group.size())[1], directory)
    return CopyEngineDispatch(n_experts, memory, shape, of_chunks(3))


def two_levels(directory):
    world = dist.group.WORLD
    peers = node_group(world, find_nodes(world, "cpu", 2))
    landing = ExchangeShape(2 * T, D, K, torch.float32, "cpu")
    inside = copy_engines(peers, landing, E // 2, directory / f"node{dist.get_rank() // 2}")
    return TwoLevelDispatch(E, world, 2, inside, of_chunks(3))


DISPATCHERS = {  # made on a rank, and how often the host waits in a forward pass
    "local": (lambda _: local.build(E, None, SHAPE), 0),
    "collective 1": (lambda _: collective.build(E, dist.group.WORLD, SHAPE, 1), 1),
    "collective 3": (lambda _: collective.build(E, dist.group.WORLD, SHAPE, 3), 1),
    "collective 3 fp8": (lambda _: collective.CollectiveDispatch(E, dist.group.WORLD, of_chunks(3), fp8=True), 1),
    "collective 3 padded": (lambda _: collective.build(E, dist.group.WORLD, PADDED, 3), 0),
    "allgather 3": (lambda _: allgather.build(E, dist.group.WORLD, SHAPE, 3), 0),
    "copy_engine 3": (lambda directory: copy_engines(dist.group.WORLD, SHAPE, E, directory), 0),
    "two_level 3": (two_levels, 1),
    "two_level 3 allgather": (lambda _: two_level.build(E, dist.group.WORLD, SHAPE, 3, 2, "allgather"), 1),
}


@pytest.fixture(scope="module", autouse=True)
def imported():
    with host_reads():
        torch.ones(1) + 1


def one_rank(name, directory):
    """Reads of one layer forward, and backward."""
    dispatcher = DISPATCHERS[name][0](directory)
    x, expert, gate, _ = fake_tokens(T, D, E, K, seed=dist.get_rank(), unused=0.4)
    x, gate = (t.detach().float().requires_grad_() for t in (x, gate))
    here = E if name == "local" else E // WORLD
    w = (torch.ones(here, 2, F, D).requires_grad_(), torch.ones(here, D, F).requires_grad_())
    routing = fake_routing(expert, gate, bounded=True)
    with host_reads() as found:
        y = dispatcher(x, routing, GroupedMMExperts(), w)
        forward = list(found)
        y.backward(torch.ones_like(y))
        return forward, found[len(forward) :]


@pytest.mark.parametrize("name", DISPATCHERS)
def test_host_waits_of_a_layer(name, tmp_path):
    for forward, backward in run_ranks(one_rank, WORLD, name, tmp_path):
        assert len(forward) == DISPATCHERS[name][1], forward
        assert not backward


def test_a_reading_host_is_noticed(monkeypatch, tmp_path):
    plain = collective.wanted_by_rank
    monkeypatch.setattr(collective, "wanted_by_rank", lambda *a: plain(*a) & bool(plain(*a).any()))
    assert len(run_ranks(one_rank, WORLD, "collective 1", tmp_path)[0][0]) > 1
