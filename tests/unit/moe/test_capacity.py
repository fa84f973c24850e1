"""Which choices a capacity drops, against counts by hand and the rules' own invariants."""

import math
from dataclasses import replace

import pytest
import torch

from moetrain.moe.capacity import Capacity, rows_bound, without_dropped
from moetrain.moe.types import Routing
from moetrain.testing.fake import fake_context

pytestmark = pytest.mark.unit
DROPS = ("position", "probability", "batch_priority", "random")
E, K, ROWS, LENGTH = 6, 2, 3, 40


def context(rows=ROWS, length=LENGTH, padding=0, step=0, first=0):
    index = (first + torch.arange(rows * length)).view(rows, length)
    return replace(fake_context(rows, length, padding=padding), index_BS=index, step=step)


def make(expert, gate, ctx):
    none = torch.empty(0)
    expert = torch.where(ctx.valid_T[:, None], expert, -1)
    return Routing(expert, torch.where(expert >= 0, gate, 0.0), none, none, none, none, ctx)


def skewed(ctx, seed=0):
    """Popular first experts, gates in descending order."""
    g = torch.Generator().manual_seed(seed)
    score = torch.rand(ctx.rows * ctx.token_BS.shape[1], E, generator=g, dtype=torch.float64) + torch.linspace(1, 0, E)
    gate, expert = score.topk(K)
    return make(expert, gate / gate.sum(-1, keepdim=True), ctx)


def capacity(factor, drop, **more):
    return Capacity(factor, drop, n_experts=E, seed=(0, "layer"), **more)


@pytest.mark.parametrize("drop", DROPS)
def test_no_expert_takes_more_and_none_less_than_it_could(drop):
    routing = skewed(context(padding=7))
    keep = capacity(0.8, drop).keep(routing).view(ROWS, LENGTH, K)
    expert = routing.expert_TK.view(ROWS, LENGTH, K)
    most = math.ceil(0.8 * K * (LENGTH - 7) / E)  # padding is not counted
    for row in range(ROWS):
        for e in range(E):
            chosen = int((expert[row] == e).sum())
            assert int((keep[row] & (expert[row] == e)).sum()) == min(chosen, most)
    assert not (keep & (expert < 0)).any()


@pytest.mark.parametrize("drop", DROPS)
def test_enough_capacity_drops_nothing(drop):
    routing = skewed(context(padding=3))
    assert torch.equal(capacity(E / K, drop).keep(routing), routing.expert_TK >= 0)


def pairs(routing, keep, row, e):
    expert = routing.expert_TK.view(ROWS, LENGTH, K)[row] == e
    kept, dropped = expert & keep.view(ROWS, LENGTH, K)[row], expert & ~keep.view(ROWS, LENGTH, K)[row]
    return kept.nonzero().tolist(), dropped.nonzero().tolist()


@pytest.mark.parametrize("drop", ["position", "probability", "batch_priority"])
def test_who_stays_comes_before_who_goes(drop):
    routing = skewed(context())
    gate = routing.gate_TK.view(ROWS, LENGTH, K)
    keep = capacity(0.7, drop).keep(routing)
    some = 0
    for row in range(ROWS):
        rank = {
            "position": lambda t, k: t,
            "probability": lambda t, k, row=row: (-float(gate[row, t, k]), t),
            "batch_priority": lambda t, k, row=row: (k, -float(gate[row, t].max()), t),
        }[drop]
        for e in range(E):
            kept, dropped = pairs(routing, keep, row, e)
            some += len(dropped)
            if kept and dropped:
                assert max(rank(*pair) for pair in kept) < min(rank(*pair) for pair in dropped)
    assert some


def test_random_depends_on_seed_step_layer_and_place_only():
    routing = skewed(context())
    keep = capacity(0.6, "random").keep(routing)
    assert torch.equal(keep, capacity(0.6, "random").keep(routing))
    later = replace(routing, context=replace(routing.context, step=1))
    other = Capacity(0.6, "random", n_experts=E, seed=(0, "another layer"))
    for different in (capacity(0.6, "random").keep(later), other.keep(routing)):
        assert (different != keep).any()
    last = slice(2 * LENGTH, None)  # alone in its micro-batch, the row is treated as before
    alone = make(routing.expert_TK[last], routing.gate_TK[last], context(rows=1, first=2 * LENGTH))
    assert torch.equal(capacity(0.6, "random").keep(alone), keep[last])
    share = torch.stack([capacity(0.6, "random").keep(replace(routing, context=context(step=s))) for s in range(200)])
    first = share[:, routing.expert_TK == 0].double().mean(0)  # of choices of the fullest expert: no place is favoured
    assert first.std() < 0.06


def test_scope_rank_counts_the_micro_batch_as_one():
    routing = skewed(context())
    keep = capacity(0.6, "position", scope="rank").keep(routing)
    for e in range(E):
        kept = (keep & (routing.expert_TK == e)).nonzero()[:, 0]
        dropped = (~keep & (routing.expert_TK == e)).nonzero()[:, 0]
        assert len(kept) == min(math.ceil(0.6 * K * ROWS * LENGTH / E), len(kept) + len(dropped))
        assert not len(dropped) or kept.max() < dropped.min()


@pytest.mark.parametrize("renormalize", [False, True])
def test_gates_of_what_is_left(renormalize):
    routing = skewed(context())
    routing = replace(routing, gate_TK=routing.gate_TK.requires_grad_())
    rule = capacity(0.6, "probability", renormalize=renormalize)
    keep = rule.keep(routing)
    left = without_dropped(routing, keep, rule)
    assert torch.equal(left.expert_TK >= 0, keep)
    assert torch.equal(left.gate_TK > 0, keep)
    half = keep.sum(-1) == 1
    assert half.any()
    assert (keep.sum(-1) == 0).any()
    expected = torch.ones(int(half.sum()), dtype=torch.float64) if renormalize else routing.gate_TK[half][keep[half]]
    torch.testing.assert_close(left.gate_TK[half].sum(-1), expected)
    left.gate_TK.sum().backward()
    assert routing.gate_TK.grad.isfinite().all()


@pytest.mark.parametrize("scope", ["sequence", "rank"])
@pytest.mark.parametrize("drop", DROPS)
def test_no_rank_is_sent_more_than_the_bound(scope, drop):
    rule = capacity(0.3, drop, scope=scope, pad=True)
    routing = skewed(context())
    left = without_dropped(routing, rule.keep(routing), rule)
    bound = rows_bound(rule, ROWS, LENGTH, LENGTH, K, ranks=3)
    for rank in range(3):
        assert int((left.expert_TK // 2 == rank).any(-1).sum()) <= bound < ROWS * LENGTH
    assert left.bounded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": -1.0}, "dispatch.capacity.factor=-1.0"),
        ({"drop": "last"}, "dispatch.capacity.drop='last'.*position"),
        ({"scope": "batch"}, "dispatch.capacity.scope='batch'.*sequence"),
        ({"minimum": -1}, "dispatch.capacity.minimum=-1.*: 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Capacity(**{"factor": 1.0, **options}, n_experts=E)
