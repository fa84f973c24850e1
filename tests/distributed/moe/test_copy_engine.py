"""The copy-engine protocol over memory in a shared file: the same flags and copies, with ranks shaken out of step."""

import pytest
import torch
import torch.distributed as dist

from moetrain.comm.peer import unreachable
from moetrain.moe.dispatch import copy_engine
from moetrain.moe.dispatch.base import ExchangeShape
from moetrain.moe.dispatch.chunks import Chunks
from moetrain.moe.dispatch.copy_engine import CopyEngineDispatch, regions
from moetrain.moe.dispatch.local import LocalDispatch
from moetrain.moe.dispatch.segments import cuts, segments
from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.testing import run_ranks
from moetrain.testing.fake import fake_experts, fake_routing, fake_tokens, own_experts
from moetrain.testing.peer import FileMemory

pytestmark = pytest.mark.distributed
D, H, E, K, WORLD, MOST = 8, 6, 8, 3, 4, 11
SHAPE = ExchangeShape(tokens=MOST, d_model=D, top_k=K, dtype=torch.float64, device_type="cpu")
LAYERS = 3


def data(rank, layer):
    """Uneven tokens, none at all, and unused slots; different on every rank and layer."""
    tokens = [MOST, 0 if layer else 5, MOST - 2, 7][rank]
    return fake_tokens(tokens, D, E, K, seed=100 * layer + rank, unused=0.2)


def routing(expert, gate):
    return fake_routing(expert, gate)


def one_rank(directory, chunks, jitter=(0.0,) * WORLD, ignored=()):
    """Several layers over one memory: all forward, then all backward, last first."""
    rank = dist.get_rank()
    memory = FileMemory(dist.group.WORLD, regions(SHAPE, WORLD)[1], directory, jitter[rank], ignored)
    dispatcher = CopyEngineDispatch(E, memory, SHAPE, Chunks("copy_engine", chunks, (), dist.group.WORLD))
    w = own_experts(fake_experts(E, D, H))
    done = []
    for layer in range(LAYERS):
        x, expert, gate, upstream = data(rank, layer)
        done.append((dispatcher(x, routing(expert, gate), ReferenceExperts(), w), x, gate, upstream))
    for y, _, _, upstream in reversed(done):
        y.backward(upstream)
    return [(y.detach(), x.grad, gate.grad) for y, x, gate, _ in done], [t.grad for t in w]


def worst_error(ranks):
    w, worst = tuple(t.requires_grad_() for t in fake_experts(E, D, H)), 0.0
    for layer in range(LAYERS):
        for rank in range(WORLD):
            x, expert, gate, upstream = data(rank, layer)
            y = LocalDispatch()(x, routing(expert, gate), ReferenceExperts(), w)
            y.backward(upstream)
            for got, expected in zip(ranks[rank][0][layer], (y.detach(), x.grad, gate.grad)):
                worst = max(worst, float((got - expected).abs().max()) if got.numel() else 0.0)
    for index, expected in enumerate(w):
        worst = max(worst, float((torch.cat([r[1][index] for r in ranks]) - expected.grad).abs().max()))
    return worst


@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_equals_one_process(chunks, tmp_path):
    assert worst_error(run_ranks(one_rank, WORLD, tmp_path, chunks)) < 1e-12


def test_ranks_out_of_step_read_nothing_early(tmp_path):
    assert worst_error(run_ranks(one_rank, WORLD, tmp_path, 4, (0.003,) * WORLD)) < 1e-12


@pytest.mark.parametrize(("late", "flag"), [(0, 0), (1, WORLD + 1 * copy_engine.MOST_PARTS)], ids=["out", "home"])
def test_a_missing_wait_is_noticed(late, flag, tmp_path):
    """Nobody waits for one flag of a rank that is late."""
    jitter = tuple(0.03 if rank == late else 0.0 for rank in range(WORLD))
    assert worst_error(run_ranks(one_rank, WORLD, tmp_path, 3, jitter, (flag,))) > 1e-3


def rooms(directory, most):
    """Of each cut into pieces: whether experts may write every part's sums where peers read them, rows in order."""
    memory = FileMemory(dist.group.WORLD, regions(SHAPE, WORLD)[1], directory)
    found = []
    for chunks in (2, 3, 4, 5):
        dispatcher = CopyEngineDispatch(E, memory, SHAPE, Chunks("copy_engine", chunks, (), dist.group.WORLD))
        leg = copy_engine._Leg(copy_engine._Trip(dispatcher, 3, chunks, most), torch.zeros(3, D).double(), None)
        home = dispatcher.buffer(memory.rank, "home_rows").flatten(0, 1)
        found.append(0)
        assert leg.room(0) is None  # own rows stay
        for part in range(chunks - 1):
            room, rows = leg.room(part + 1), leg.cuts[part]
            if room is not None:
                assert room.data_ptr() == home[rows].data_ptr()
                assert len(room) == rows.stop - rows.start
                found[-1] += 1
    return found


def test_sums_of_several_peers_are_made_where_they_read_them(tmp_path):
    assert run_ranks(rooms, WORLD, tmp_path, MOST) == [[1, 2, 3, 4]] * WORLD


def home_after_first_part(directory):
    """What has come home when the first part of peers' rows is done, and no other part has even been begun."""
    memory = FileMemory(dist.group.WORLD, regions(SHAPE, WORLD)[1], directory)
    dispatcher = CopyEngineDispatch(E, memory, SHAPE, Chunks("copy_engine", 3, (), dist.group.WORLD))
    rows = torch.full((MOST, D), 1.0 + memory.rank, dtype=torch.float64)
    leg = copy_engine._Leg(copy_engine._Trip(dispatcher, MOST, 3, MOST), rows, None)
    leg.home_RTD.zero_()
    row_MD, _, land = leg.arrive(1)
    land()
    leg.give(1, 10 * row_MD)
    dist.barrier()
    return leg.home_RTD[:, :, 0].tolist()


def test_sums_go_home_while_experts_work_on_the_next_part(tmp_path):
    """Two peers' rows are a rank's first part, so two of three peers have sums for it."""
    for rank, home in enumerate(run_ranks(home_after_first_part, WORLD, tmp_path)):
        assert home == [[10.0 * (rank + 1)] * MOST] * 2 + [[0.0] * MOST]


class Noted(FileMemory):
    """Notes copies, marks, what waits for them, and flags, with their lanes."""

    def copy(self, to, source, lane):
        self.did.append(("copy", lane))
        super().copy(to, source, lane)

    def mark(self, lane=None):
        self.did.append(("mark", lane))

    def after(self, mark, lane=None):
        self.did.append(("after", lane))

    def post(self, rank, flag, value, lane=None):
        self.did.append(("post", lane))
        super().post(rank, flag, value, lane)


def passes(directory):
    """The memory and a leg with tokens, then with gradients; what it notes begins with the leg. All ranks in step."""
    memory = Noted(dist.group.WORLD, regions(SHAPE, WORLD)[1], directory)
    dispatcher = CopyEngineDispatch(E, memory, SHAPE, Chunks("copy_engine", 2, (), dist.group.WORLD))
    trip, rows = copy_engine._Trip(dispatcher, MOST, 2, MOST), torch.zeros(MOST, D).double()
    for slots in ((torch.zeros(MOST, K).long(), torch.zeros(MOST, K).double()), None):
        memory.did = []
        yield memory, copy_engine._Leg(trip, rows, slots)
        dist.barrier()


def lanes(directory):
    """Of the copies that start each pass."""
    return [[lane for what, lane in memory.did if what == "copy"] for memory, _ in passes(directory)]


def test_gradients_are_put_out_before_kernels_that_leave_no_room(tmp_path):
    """On a GPU a copy inside it needs multiprocessors: beside the experts' first half it came after that."""
    rows = copy_engine.ROWS
    tokens = [rows] + [rows, rows, rows] * (WORLD - 1)
    assert run_ranks(lanes, WORLD, tmp_path) == [[tokens, [None] + [rows] * (WORLD - 1)]] * WORLD


@pytest.mark.parametrize(
    ("ranks", "parts", "lengths"),
    [(4, 1, [21]), (4, 2, [14, 7]), (4, 3, [7, 7, 7]), (8, 3, [21, 21, 7]), (2, 2, [4, 3]), (4, 4, [5, 5, 6, 5])],
)
def test_the_last_part_is_at_most_one_peers(ranks, parts, lengths):
    assert [cut.stop - cut.start for cut in cuts(ranks, 7, parts)] == lengths


@pytest.mark.parametrize(("ranks", "tokens", "parts"), [(2, 5, 1), (4, 7, 3), (4, 7, 5), (3, 2, 7), (8, 1, 3)])
def test_segments_cover_every_peers_tokens_once(ranks, tokens, parts):
    for rank in range(ranks):
        found = segments(rank, ranks, tokens, parts)
        covered = [(seg.source, token) for seg in found for token in range(seg.start, seg.stop)]
        assert sorted(covered) == [(r, t) for r in range(ranks) if r != rank for t in range(tokens)]
        assert covered[:tokens] == [((rank + 1) % ranks, token) for token in range(tokens)]  # the nearest peer first
        assert [seg.part for seg in found] == sorted(seg.part for seg in found)


def test_regions_lie_apart():
    placed, total = regions(SHAPE, WORLD)
    ends = [(r.offset, r.offset + torch.Size(r.shape).numel() * r.dtype.itemsize) for r in placed.values()]
    assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:]))  # noqa: RUF007
    assert ends[-1][1] <= total


def test_refused_without_peer_access():
    def one():
        assert unreachable(dist.group.WORLD, "cpu")
        with pytest.raises(ValueError, match=r"dispatch=copy_engine needs GPUs.*dispatch=collective"):
            copy_engine.build(E, dist.group.WORLD, SHAPE)
        with pytest.raises(ValueError, match=r"dispatch\.chunks=1.*: 2"):
            copy_engine.build(E, dist.group.WORLD, SHAPE, 1)
        with pytest.raises(ValueError, match=r"dispatch\.chunks=34.*: 33"):  # parts without flags of their own
            copy_engine.build(E, dist.group.WORLD, SHAPE, 34)

    run_ranks(one, 2)


def order_of_giving(directory):
    """Sums of tokens, then of gradients: what is done first."""
    found, rows = [], (WORLD - 1) * MOST
    for memory, leg in passes(directory):
        memory.did = []
        leg.give(1, torch.zeros(rows, D).double(), None if leg.slots else torch.zeros(rows, K).double())
        found.append(memory.did[:3])
    return found


def test_flags_follow_what_they_announce(tmp_path):
    """A flag from a lane waits for the current stream, on which the sums are made."""
    for tokens, gradients in run_ranks(order_of_giving, WORLD, tmp_path):
        assert tokens[0] == ("post", None)
        assert gradients == [("mark", None), ("after", copy_engine.NUMBERS), ("post", copy_engine.NUMBERS)]


def order_of_putting_out(directory):
    """Of each pass what is done up to the first flag, but for slots, which are written."""
    return [memory.did[: memory.did.index(("post", copy_engine.ROWS)) + 1] for memory, _ in passes(directory)]


def test_copies_wait_for_what_the_current_stream_did(tmp_path):
    """No lane begins before the current stream is done with the memory into which it copies; a flag from a lane waits
    for what was put out elsewhere. Memory in files cannot miss either: there the host is the current stream."""
    rows, numbers = copy_engine.ROWS, copy_engine.NUMBERS
    free = [("mark", None), ("after", rows), ("mark", None), ("after", numbers)]
    tokens = [*free, ("copy", rows), ("mark", numbers), ("after", rows), ("post", rows)]
    gradients = [*free, ("copy", None), ("mark", None), ("after", rows), ("post", rows)]
    assert run_ranks(order_of_putting_out, WORLD, tmp_path) == [[tokens, gradients]] * WORLD


def test_a_graph_whose_replays_would_wait_for_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(copy_engine, "captured", lambda x_TD: True)

    def one():
        with pytest.raises(ValueError, match=r"CUDA graph.*nearest legal value: dispatch=allgather"):
            one_rank(tmp_path, 2)

    run_ranks(one, WORLD)
