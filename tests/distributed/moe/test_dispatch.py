"""Every dispatcher against one process with all experts, in fp64, with different tokens on every rank."""

import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from moetrain.moe.dispatch import allgather, auto, collective
from moetrain.moe.dispatch.base import ExchangeShape
from moetrain.moe.dispatch.chunks import Chunks
from moetrain.moe.dispatch.local import LocalDispatch
from moetrain.moe.dispatch.rows import padded
from moetrain.moe.dispatch.sliced import SlicedDispatch
from moetrain.moe.experts.pieces import CallPieces
from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.moe.kept import Kept
from moetrain.testing import run_ranks
from moetrain.testing.fake import fake_experts, fake_routing, fake_tokens, own_experts

pytestmark = pytest.mark.distributed
D, H, E, K, WORLD = 8, 6, 8, 3, 4
CASES = ["plain", "uneven", "nothing_on_rank_1", "all_to_one_expert", "unused_slots"]
SHAPE = ExchangeShape(tokens=14, d_model=D, top_k=K, dtype=torch.float64, device_type="cpu")
PADDED = replace(SHAPE, rows=14)
TRANSPORTS = {
    **{f"collective {chunks}": (collective, chunks) for chunks in (1, 2, 3, 4, 5)},
    **{f"collective {chunks} padded": (collective, chunks) for chunks in (1, 3)},
    **{f"allgather {chunks}": (allgather, chunks) for chunks in (1, 3)},
}


def data(rank, case):
    tokens = {"uneven": 5 + 3 * rank, "nothing_on_rank_1": 0 if rank == 1 else 7}.get(case, 9)
    unused = 0.4 if case == "unused_slots" else 0.0
    x, expert, gate, upstream = fake_tokens(tokens, D, E, K, seed=100 + rank, unused=unused)
    if case == "all_to_one_expert":
        expert = torch.full((tokens, K), -1)
        expert[:, 1] = 5
    return x, expert, gate, upstream


def routing(expert, gate):
    """As if a capacity had bounded it: dispatchers without a bound must not care."""
    return fake_routing(expert, gate, bounded=True)


def make(name):
    module, chunks = TRANSPORTS[name]
    return module.build(E, dist.group.WORLD, PADDED if name.endswith("padded") else SHAPE, chunks)


def one_rank(name, cases):
    """y and all gradients, of every case in turn with one dispatcher."""
    dispatcher, results = make(name), {}
    for case in cases:
        if name.endswith("padded") and case == "nothing_on_rank_1":
            continue  # refused: static shapes are for training, where every rank has tokens
        x, expert, gate, upstream = data(dist.get_rank(), case)
        w = own_experts(fake_experts(E, D, H))
        y = dispatcher(x, routing(expert, gate), ReferenceExperts(), w)
        y.backward(upstream)
        results[case] = y.detach(), x.grad, gate.grad, *(t.grad for t in w)
    return results


def test_static_shapes_without_a_token_are_refused_instead_of_hanging():
    def one():
        x, expert, gate, _ = data(1, "nothing_on_rank_1")
        with pytest.raises(ValueError, match=r"dispatch\.capacity\.pad=true with a rank without tokens"):
            make("collective 3 padded")(
                x, routing(expert, gate), ReferenceExperts(), own_experts(fake_experts(E, D, H))
            )

    run_ranks(one, WORLD)


def test_more_rows_than_static_shapes_have_room_for_are_not_dropped():
    """As those of a router with more slots than model.moe.top_k would be."""
    wanted_RT = torch.tensor([[True, True, False, False], [True, True, True, False]])
    assert int((padded(wanted_RT, 3)[0] >= 0).sum()) == 5
    with pytest.raises(RuntimeError, match=r"more rows for a rank than dispatch\.capacity\.pad has room for"):
        padded(wanted_RT, 2)


def single_process(case):
    """Per rank (y, dx, dgate) and the weights' gradients."""
    w, of_rank = tuple(t.requires_grad_() for t in fake_experts(E, D, H)), []
    for rank in range(WORLD):
        x, expert, gate, upstream = data(rank, case)
        y = LocalDispatch()(x, routing(expert, gate), ReferenceExperts(), w)
        y.backward(upstream)
        of_rank.append((y.detach(), x.grad, gate.grad))
    return of_rank, [t.grad for t in w]


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in TRANSPORTS if name != "collective 4"])
def test_equals_one_process(name):
    ranks = run_ranks(one_rank, WORLD, name, CASES)
    for case in ranks[0]:
        of_rank, dw = single_process(case)
        for rank in range(WORLD):
            for got, expected in zip(ranks[rank][case][:3], of_rank[rank]):
                assert_close(got, expected)
        for index, expected in enumerate(dw, start=3):
            assert_close(torch.cat([r[case][index] for r in ranks]), expected)


def two_in_flight(name):
    """1F1B in miniature: two micro-batches forward, other groups' collectives between, then backward, oldest first."""
    other = dist.new_group(list(range(WORLD)))
    dispatcher, w, under_way = make(name), own_experts(fake_experts(E, D, H)), []
    for case in ("plain", "unused_slots"):
        x, expert, gate, upstream = data(dist.get_rank(), case)
        noise = torch.ones(1000)
        work = dist.all_reduce(noise, group=other, async_op=True)
        under_way.append((dispatcher(x, routing(expert, gate), ReferenceExperts(), w), x, gate, upstream, work))
    for y, _, _, upstream, work in under_way:
        y.backward(upstream)
        work.wait()
    return [(y.detach(), x.grad, gate.grad) for y, x, gate, _, _ in under_way], [t.grad for t in w]


@pytest.mark.parametrize("name", ["collective 3", "allgather 3"])
def test_micro_batches_in_flight_and_other_communicators(name):
    ranks = run_ranks(two_in_flight, WORLD, name)
    total = [0, 0]
    for index, case in enumerate(("plain", "unused_slots")):
        of_rank, dw = single_process(case)
        for rank in range(WORLD):
            for got, expected in zip(ranks[rank][0][index], of_rank[rank]):
                assert_close(got, expected)
        total = [a + b for a, b in zip(total, dw)]
    for index in range(2):
        assert_close(torch.cat([r[1][index] for r in ranks]), total[index])


def one_rank_of_slices(cases, ep, chunks):
    """ep blocks of experts, the width cut over the other ranks: world = ep * etp, etp fastest."""
    rank, etp, results = dist.get_rank(), WORLD // ep, {}
    block = slice(rank // etp * E // ep, (rank // etp + 1) * E // ep)
    width = slice(rank % etp * H // etp, (rank % etp + 1) * H // etp)
    mesh = init_device_mesh("cpu", (ep, etp), mesh_dim_names=("ep", "etp"))
    inner = collective.build(E, mesh.get_group("ep"), SHAPE, chunks) if ep > 1 else LocalDispatch()
    dispatcher = SlicedDispatch(inner, mesh.get_group("etp"))
    for case in cases:
        x, expert, gate, upstream = data(rank, case)
        w1, w2 = fake_experts(E, D, H)
        w1, w2 = w1[block, :, width].clone().requires_grad_(), w2[block, :, width].clone().requires_grad_()
        y = dispatcher(x, routing(expert, gate), ReferenceExperts(), (w1, w2))
        y.backward(upstream)
        results[case] = y.detach(), x.grad, gate.grad, w1.grad, w2.grad
    return results, block, width


def scaled(x_TD, slot_TK, gate_TK, *weights):
    """In place of experts, whose products round otherwise with another number of rows."""
    here_TK = (slot_TK >= 0) & (slot_TK < E // WORLD)
    return x_TD * (gate_TK * here_TK).sum(1, keepdim=True).sin()


def sums(names):
    """y and gradients of tokens and gates, fp32, of one case under each name."""
    found, wide = [], torch.float32
    for name in names:
        x, expert, gate, upstream = data(dist.get_rank(), "plain")
        x, gate = (t.detach().to(wide).requires_grad_() for t in (x, gate))
        module, chunks = TRANSPORTS[name]
        dispatcher = module.build(E, dist.group.WORLD, replace(SHAPE, dtype=wide), chunks)
        weights = [t.detach().to(wide) for t in own_experts(fake_experts(E, D, H))]
        y = dispatcher(x, routing(expert, gate), scaled, weights)
        found.append([y.detach(), *torch.autograd.grad(y, (x, gate), upstream.to(wide))])
    return found


def test_the_number_of_pieces_changes_no_bit_of_a_tokens_sums():
    """They are added up rank by rank, whenever they come home."""
    for first, *others in run_ranks(sums, WORLD, [f"collective {chunks}" for chunks in (1, 2, 3, 4, 5)]):
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize(("ep", "chunks"), [(1, 1), (2, 1), (2, 3)])
def test_slices_of_experts_equal_one_process(ep, chunks, monkeypatch):
    monkeypatch.setitem(globals(), "H", 8)  # a width that four ranks can share
    cases = ["uneven", "nothing_on_rank_1", "all_to_one_expert"]
    ranks = run_ranks(one_rank_of_slices, WORLD, cases, ep, chunks)
    for case in cases:
        of_rank, (dw1, dw2) = single_process(case)
        for rank, (results, block, width) in enumerate(ranks):
            for got, expected in zip(results[case][:3], of_rank[rank]):
                assert_close(got, expected)
            assert_close(results[case][3], dw1[block, :, width])
            assert_close(results[case][4], dw2[block, :, width])


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_token_travels_once_per_rank_not_once_per_expert(chunks):
    def one():
        rows = []
        x, expert, gate, _ = data(dist.get_rank(), "plain")
        count = lambda x, slots, gates, *w: rows.append(len(x)) or x * 0  # noqa: E731
        with torch.no_grad():
            make(f"collective {chunks}")(x, routing(expert, gate), count, fake_experts(E, D, H))
        return expert, sum(rows)

    ranks = run_ranks(one, WORLD)
    expert = torch.cat([r[0] for r in ranks])
    for rank in range(WORLD):
        wanted = sum(any(int(e) // (E // WORLD) == rank for e in row) for row in expert)
        assert ranks[rank][1] == wanted


@pytest.mark.parametrize(("top_k", "kind"), [(6, "AllGatherDispatch"), (5, "CollectiveDispatch")])
def test_auto_chooses_by_bytes(top_k, kind, capfd):
    shape = ExchangeShape(tokens=14, d_model=D, top_k=top_k, dtype=torch.float64, device_type="cpu")
    built = run_ranks(lambda: type(auto.build(E, dist.group.WORLD, shape)).__name__, WORLD)
    assert set(built) == {kind}
    said = capfd.readouterr().out
    assert f"top_k={top_k}" in said
    assert ("copy_engine needs GPUs" in said) == (top_k == 6)


def test_auto_takes_copy_engines_where_gpus_reach_each_other(monkeypatch):
    """They move what an all-gather does, beside the experts; not if that is ruled out, nor for slots that vary."""

    def one():
        monkeypatch.setattr(auto, "unreachable", lambda group, device_type: None)
        monkeypatch.setattr(auto.copy_engine, "build", lambda *args: "copy_engine")
        shape = ExchangeShape(tokens=14, d_model=D, top_k=6, dtype=torch.float64, device_type="cpu")
        few, varying = replace(shape, top_k=5), replace(shape, fixed_slots=False)
        asked = [(shape, "auto"), (shape, 3), (shape, 1), (few, "auto"), (varying, "auto"), (shape, "auto", 1)]
        built = [auto.build(E, dist.group.WORLD, *args) for args in asked]
        return [made if isinstance(made, str) else type(made).__name__ for made in built]

    gathered = "AllGatherDispatch"
    assert run_ranks(one, WORLD) == [["copy_engine"] * 2 + [gathered, "CollectiveDispatch", gathered, gathered]] * WORLD


def test_ranks_agree_on_the_chunks_whose_slowest_rank_is_fastest(capfd):
    def one():
        choice = Chunks("collective", "auto", (1, 2, 4), dist.group.WORLD)
        seconds = [[0.001, 0.002, 0.003], [0.009, 0.004, 0.001]][dist.get_rank()]
        return choice.agree(seconds, torch.device("cpu"))

    assert run_ranks(one, 2) == [4, 4]
    assert capfd.readouterr().out.count("chunks=4") == 1


def ask_twice(factor):
    """The gradient of x for dy and, of the same pass, for `factor` dy."""
    x, expert, gate, upstream = data(dist.get_rank(), "plain")
    w = own_experts(fake_experts(E, D, H))
    y = make("collective 1")(x, routing(expert, gate), ReferenceExperts(), w)
    first = torch.autograd.grad(y, x, upstream, retain_graph=True)[0]
    try:
        return torch.equal(first, torch.autograd.grad(y, x, factor * upstream)[0])
    except RuntimeError as error:
        return str(error)


def test_a_pass_gives_one_gradient_and_says_so_if_asked_for_another():
    assert run_ranks(ask_twice, WORLD, 1.0) == [True] * WORLD
    assert all("twice for different gradients" in str(found) for found in run_ranks(ask_twice, WORLD, 2.0))


WANTED = [(x, gate, w) for x in (False, True) for gate in (False, True) for w in (False, True)]


def trained_in_part():
    """Gradients of tokens, gates, and weights of a layer whose experts, router, or input ask for none."""
    found = []
    for wanted in WANTED:
        x, expert, gate, upstream = data(dist.get_rank(), "plain")
        leaves = [x.detach(), gate.detach(), *(t.detach() for t in own_experts(fake_experts(E, D, H)))]
        for leaf, asks in zip(leaves, (*wanted, wanted[2]), strict=True):
            leaf.requires_grad_(asks)
        y = make("collective 3")(leaves[0], routing(expert, leaves[1]), ReferenceExperts(), (leaves[2], leaves[3]))
        assert y.requires_grad == any(wanted)
        if y.requires_grad:
            y.backward(upstream)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    return found


def test_whatever_is_trained_has_its_gradient():
    """Also where only routers are, whose first layer's input has none."""
    ranks, (of_rank, dw) = run_ranks(trained_in_part, WORLD), single_process("plain")
    for rank, found in enumerate(ranks):
        expected = [*of_rank[rank], *(w.chunk(WORLD)[rank] for w in dw)]
        for wanted, got in zip(WANTED, found, strict=True):
            for asks, a, b in zip((True, *wanted, wanted[2]), got, expected, strict=True):
                assert (a is not None) == asks
                if asks:
                    assert_close(a, b)


class Followed(ReferenceExperts):
    """Counts works that are still there: they hold the rows that came."""

    def __init__(self):
        self.works = []

    def divide(self, weights, wanted):
        work = CallPieces(ReferenceExperts(), weights, wanted)
        self.works.append(weakref.ref(work))
        return work

    def alive(self):
        return sum(work() is not None for work in self.works)


def works_alive():
    """After the forward and the backward pass of a layer whose output is still held, plainly and recomputed; answers
    that are kept between two askings, and after them."""
    dispatcher, w, found = make("collective 3"), own_experts(fake_experts(E, D, H)), []
    x, expert, gate, upstream = data(dist.get_rank(), "plain")
    for kept in (None, Kept()):
        experts = Followed()

        def layer(x, gate, kept=kept, experts=experts):
            return dispatcher(x, fake_routing(expert, gate, kept=kept), experts, w)

        y = checkpoint(layer, x, gate, use_reentrant=False) if kept else layer(x, gate)
        found.append(experts.alive())
        y.backward(upstream)
        found += [experts.alive(), y.grad_fn.job.answer is not None]
    y = dispatcher(x, routing(expert, gate), ReferenceExperts(), w)
    for again in (True, False):
        torch.autograd.grad(y, x, upstream, retain_graph=again)
        found.append(y.grad_fn.job.answer is not None)
    return found


def test_nothing_is_held_longer_than_it_is_needed():
    assert run_ranks(works_alive, WORLD) == [[1, 0, False, 0, 0, False, True, False]] * WORLD
