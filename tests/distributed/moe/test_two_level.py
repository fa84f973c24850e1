"""Two nodes of two ranks, emulated: all-to-all between them, copy engines over memory in a shared file inside each."""

import functools
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moetrain.comm.nodes import find_nodes, irregular, node_group
from moetrain.moe.dispatch import auto, collective, two_level
from moetrain.moe.dispatch.base import ExchangeShape
from moetrain.moe.dispatch.chunks import Chunks
from moetrain.moe.dispatch.copy_engine import CopyEngineDispatch, regions
from moetrain.moe.dispatch.local import LocalDispatch
from moetrain.moe.dispatch.rows import cut, rows_of_parts
from moetrain.moe.dispatch.two_level import TwoLevelDispatch
from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.moe.kept import Kept
from moetrain.testing import run_ranks
from moetrain.testing.fake import fake_experts, fake_routing, fake_tokens, own_experts
from moetrain.testing.peer import FileMemory

pytestmark = pytest.mark.distributed
D, H, E, K, WORLD, LOCAL, MOST = 8, 6, 8, 3, 4, 2, 11
SHAPE = ExchangeShape(tokens=MOST, d_model=D, top_k=K, dtype=torch.float64, device_type="cpu")
LANDING = replace(SHAPE, tokens=MOST * WORLD // LOCAL)
CASES = ["uneven", "one_node_only", "all_to_one_expert", "nothing"]


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What backward passes and recomputation import for seconds when first used: here, before ranks are forked."""
    import_module("torch.fx.experimental.symbolic_shapes")
    checkpoint(torch.clone, torch.ones(1, requires_grad=True), use_reentrant=False)


def data(rank, case):
    """Different tokens on every rank, unused slots, ranks and nodes without a token."""
    tokens = 0 if case == "nothing" else [MOST, 0, MOST - 2, 7][(rank + CASES.index(case)) % WORLD]
    x, expert, gate, upstream = fake_tokens(tokens, D, E, K, seed=100 * CASES.index(case) + rank, unused=0.2)
    if case == "one_node_only":
        expert = expert.clamp(max=E // 2 - 1)
        expert = torch.where(expert == expert.roll(1, 1), -1, expert)
    if case == "all_to_one_expert":
        expert = torch.full((tokens, K), -1)
        expert[:, 1] = 5
    return x, expert, gate, upstream


def routing(expert, gate, kept=None):
    return fake_routing(expert, gate, kept=kept, bounded=True)


def over_files(directory, chunks, jitter=0.0, fp8=False):
    """Copy engines inside a node, over memory that the other node cannot see."""
    world = dist.group.WORLD
    peers = node_group(world, find_nodes(world, "cpu", LOCAL))
    place = directory / f"node{dist.get_rank() // LOCAL}"
    place.mkdir(exist_ok=True)
    dist.barrier()
    memory = FileMemory(peers, regions(LANDING, LOCAL)[1], place, jitter)
    inside = CopyEngineDispatch(E * LOCAL // WORLD, memory, LANDING, Chunks("copy_engine", 2, (), peers))
    return TwoLevelDispatch(E, world, LOCAL, inside, Chunks("two_level", chunks, (), world), fp8)


def make(inside, directory, chunks, jitter=0.0):
    if inside == "copy_engine":
        return over_files(directory, chunks, jitter)
    return two_level.build(E, dist.group.WORLD, SHAPE, chunks, LOCAL, inside)


def one_rank(inside, directory, chunks, jitter=0.0):
    """1F1B in miniature: all cases forward, another communicator's sums between, then backward, oldest first."""
    other = dist.new_group(list(range(WORLD)))
    dispatcher, w, under_way = make(inside, directory, chunks, jitter), own_experts(fake_experts(E, D, H)), []
    for case in CASES:
        x, expert, gate, upstream = data(dist.get_rank(), case)
        work = dist.all_reduce(torch.ones(1000), group=other, async_op=True)
        under_way.append((dispatcher(x, routing(expert, gate), ReferenceExperts(), w), x, gate, upstream, work))
    for y, _, _, upstream, work in under_way:
        y.backward(upstream)
        work.wait()
    return [(y.detach(), x.grad, gate.grad) for y, x, gate, _, _ in under_way], [t.grad for t in w]


@functools.cache
def one_process():
    """Per case and rank (y, dx, dgate), and the weights' gradients over all cases."""
    w, found = tuple(t.requires_grad_() for t in fake_experts(E, D, H)), []
    for case in CASES:
        of_rank = []
        for rank in range(WORLD):
            x, expert, gate, upstream = data(rank, case)
            y = LocalDispatch()(x, routing(expert, gate), ReferenceExperts(), w)
            y.backward(upstream)
            of_rank.append((y.detach(), x.grad, gate.grad))
        found.append(of_rank)
    return found, [t.grad for t in w]


def assert_equal_to_one_process(ranks):
    found, dw = one_process()
    for index in range(len(CASES)):
        for rank in range(WORLD):
            for got, expected in zip(ranks[rank][0][index], found[index][rank], strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for index, expected in enumerate(dw):
        torch.testing.assert_close(torch.cat([r[1][index] for r in ranks]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("inside", "chunks"), [("copy_engine", 1), ("copy_engine", 2), ("copy_engine", 4)])
def test_equals_one_process(inside, chunks, tmp_path):
    assert_equal_to_one_process(run_ranks(one_rank, WORLD, inside, tmp_path, chunks))


def test_equals_one_process_where_peers_cannot_reach_each_other(tmp_path):
    assert_equal_to_one_process(run_ranks(one_rank, WORLD, "auto", tmp_path, 3))


def test_ranks_out_of_step_read_nothing_early(tmp_path):
    assert_equal_to_one_process(run_ranks(one_rank, WORLD, "copy_engine", tmp_path, 3, 0.003))


def crossings(directory, monkeypatch_target):
    """Per call of the all-to-all: rows sent to each rank, of two cases forward and backward."""
    calls, plain = [], monkeypatch_target.start_all_to_all

    def noted(x, send, receive, group, out=None):
        calls.append((x.shape[1], list(send)))
        return plain(x, send, receive, group, out)

    monkeypatch_target.start_all_to_all = noted
    dispatcher, w, results = over_files(directory, 1), own_experts(fake_experts(E, D, H)), []
    for case in CASES[:2]:
        x, expert, gate, upstream = data(dist.get_rank(), case)
        calls.clear()
        y = dispatcher(x, routing(expert, gate), ReferenceExperts(), w)
        forward = [call for call in calls if call[0] == D]
        calls.clear()
        y.backward(upstream)
        results.append((expert, forward, [call for call in calls if call[0] == D]))
    return results


def test_a_row_crosses_once_to_each_node_and_comes_home_once(tmp_path):
    """By hand: of each rank's tokens those that want any expert of a node, to the rank there with the same number."""
    ranks = run_ranks(crossings, WORLD, tmp_path, collective)
    for index in range(2):
        node_of = lambda expert: int(expert) // (E * LOCAL // WORLD)  # noqa: E731
        wanted = [  # [rank][node]
            [sum(any(int(e) >= 0 and node_of(e) == n for e in row) for row in r[index][0]) for n in range(2)]
            for r in ranks
        ]
        for rank in range(WORLD):
            out, home = [0] * WORLD, [0] * WORLD
            for node in range(2):
                peer = node * LOCAL + rank % LOCAL
                out[peer], home[peer] = wanted[rank][node], wanted[peer][rank // LOCAL]
            _, forward, backward = ranks[rank][index]
            assert [send for _, send in forward] == [out, home]
            assert [send for _, send in backward] == [out, home]


def recomputed(directory):
    """A layer whose first pass keeps nothing, as parallel.recompute=full has it (moe/kept.py)."""
    dispatcher, w = over_files(directory, 3), own_experts(fake_experts(E, D, H))
    x, expert, gate, upstream = data(dist.get_rank(), "uneven")
    kept = Kept()

    def layer(x, gate):
        return dispatcher(x, routing(expert, gate, kept), ReferenceExperts(), w)

    y = checkpoint(layer, x, gate, use_reentrant=False)
    counted = kept.rows
    y.backward(upstream)
    assert kept.rows is counted
    return y.detach(), x.grad, gate.grad


def test_a_recomputed_pass_exchanges_no_counts(tmp_path):
    ranks = run_ranks(recomputed, WORLD, tmp_path)
    for rank in range(WORLD):
        for got, expected in zip(ranks[rank], one_process()[0][0][rank], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
def test_rows_of_parts_are_those_of_cut(chunks):
    receive, send = [3, 0, 5, 7], [1, 2, 5, 0]
    parts = cut(torch.zeros(sum(send)), send, receive, 2, chunks)
    sizes = [len(part.token_N) if part.counts is None else sum(part.counts[1]) for part in parts]
    assert rows_of_parts(receive, 2, chunks) == sizes


def test_nodes(monkeypatch):
    def one(hosts):
        monkeypatch.setattr("socket.gethostname", lambda: hosts[dist.get_rank()])
        return find_nodes(dist.group.WORLD, "cpu")

    assert run_ranks(one, WORLD, "aaaa") == [[[0, 1, 2, 3]]] * WORLD
    assert run_ranks(one, WORLD, "aabb") == [[[0, 1], [2, 3]]] * WORLD
    assert irregular([[0, 1], [2, 3]]) is None
    assert "1, 3 ranks" in irregular([[0], [1, 2, 3]])
    assert "consecutive" in irregular([[0, 2], [1, 3]])


def test_gpus_that_cannot_read_each_other_are_nodes(monkeypatch):
    def one(reaches):
        monkeypatch.setattr(torch.cuda, "current_device", dist.get_rank)
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", reaches)
        return find_nodes(dist.group.WORLD, "cuda")

    assert run_ranks(one, WORLD, lambda a, b: a // 2 == b // 2) == [[[0, 1], [2, 3]]] * WORLD
    assert run_ranks(one, WORLD, lambda a, b: True) == [[[0, 1, 2, 3]]] * WORLD
    chain = run_ranks(one, WORLD, lambda a, b: abs(a - b) == 1)[0]  # 0 reads 1, 1 reads 2, but 0 does not read 2
    assert two_level.unfit(chain) is not None


def test_auto_takes_two_levels_across_nodes_and_says_why(capfd):
    def one(node_size):
        return type(auto.build(E, dist.group.WORLD, SHAPE, 1, node_size)).__name__

    assert set(run_ranks(one, WORLD, 2)) == {"TwoLevelDispatch"}
    said = capfd.readouterr().out
    assert "dispatch two_level (2 nodes of 2 ranks share ep=4)" in said
    assert "inside a node allgather (copy_engine needs GPUs, not cpu)" in said
    assert set(run_ranks(one, WORLD, 1)) == {"CollectiveDispatch"}
    assert "dispatch collective (top_k=3 < 1.5 x ep=4; two_level finds one rank on each node)" in capfd.readouterr().out
    assert set(run_ranks(one, WORLD, "auto")) == {"CollectiveDispatch"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"node_size": 3}, r"dispatch\.node_size=3 does not divide parallel\.ep=4; nearest legal value: auto"),
        ({"node_size": 0}, r"dispatch\.node_size=0 does not divide"),
        ({"node_size": "two"}, r"dispatch\.node_size='two' does not divide"),
        ({"node_size": 4}, "finds its 4 ranks on one node; nearest legal value: dispatch=collective"),
        ({}, "finds its 4 ranks on one node"),
        ({"node_size": 1}, "finds one rank on each node"),
        ({"node_size": 2, "inside": "nvlink"}, r"dispatch\.inside='nvlink' is not one of auto, copy_engine, allgather"),
        ({"node_size": 2, "inside": "copy_engine"}, r"dispatch\.inside=copy_engine needs GPUs.*: allgather"),
        ({"node_size": 2, "chunks": 0}, r"dispatch\.chunks=0"),
        ({"node_size": 2, "wire": "fp8"}, r"dispatch\.wire=fp8 .*not for float64 rows; nearest legal value: full"),
        ({"node_size": 2, "wire": "int8"}, r"dispatch\.wire='int8' is not one of full, fp8"),
    ],
)
def test_refused_by_name(options, message):
    def one():
        with pytest.raises(ValueError, match=message):
            two_level.build(E, dist.group.WORLD, SHAPE, **options)

    run_ranks(one, WORLD)
