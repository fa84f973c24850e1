"""Token rounding against its definition, written out expert by expert with Python lists."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.moe.balance.switch import SwitchLoss
from moetrain.moe.router.rounding import round_to
from moetrain.moe.router.sigmoid import SigmoidTopK
from moetrain.moe.router.softmax import SoftmaxTopK
from moetrain.testing.fake import fake_context

pytestmark = pytest.mark.unit
D = 12


def build(cls=SoftmaxTopK, experts=6, k=2, tile=4, mode="nearest", **options):
    torch.manual_seed(1)
    router = cls(D, experts, k, rounding={"tile": tile, "mode": mode}, **options).double()
    torch.nn.init.normal_(router.weight)
    return router


def inputs(rows=3, length=24, padding=0, seed=2):
    x = torch.randn(rows * length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, fake_context(rows, length, padding=padding)


def plain(router, x, context):
    with torch.no_grad():  # evaluations route by plain top-k
        return router(x, context)


def by_hand(own, score, context, tile, mode):
    """expert -> kept tokens: sort by (chose it, share or score, earlier place), keep a rounded number."""
    rows, experts = context.rows, score.shape[1]
    length = score.shape[0] // rows
    kept = {}
    for row in range(rows):
        valid = [t for t in range(row * length, (row + 1) * length) if context.valid_T[t]]
        for e in range(experts):
            ranked = []
            for t in valid:
                slots = own.expert_TK[t].tolist()
                if e in slots and len(slots) > 1:
                    value = float(own.gate_TK[t, slots.index(e)] / own.gate_TK[t].sum())
                else:
                    value = float(score[t, e])
                ranked.append((e not in slots, -value, t))
            chosen = sum(not r[0] for r in ranked)
            count = {"nearest": int(chosen / tile + 0.5), "up": -(-chosen // tile), "down": chosen // tile}[mode] * tile
            count = min(count, len(valid) // tile * tile)
            kept[row, e] = sorted(t for _, _, t in sorted(ranked)[:count])
    return kept


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_equals_the_definition(data):
    cls, tile = data.draw(st.sampled_from([SoftmaxTopK, SigmoidTopK])), data.draw(st.sampled_from([1, 3, 4, 8]))
    mode, k = data.draw(st.sampled_from(["nearest", "up", "down"])), data.draw(st.integers(1, 3))
    options = {"renormalize": False} if cls is SoftmaxTopK and k == 1 else {}
    router = build(cls, 6, k, tile, mode, **options)
    x, context = inputs(padding=data.draw(st.sampled_from([0, 5])), seed=data.draw(st.integers(0, 20)))
    own, routing = plain(router, x, context), router(x, context)
    score = own.logit_TE.softmax(-1) if cls is SoftmaxTopK else own.logit_TE.sigmoid()
    kept = by_hand(own, score, context, tile, mode)
    for (row, e), tokens in kept.items():
        mine = (routing.expert_TK == e).any(1).nonzero().flatten().tolist()
        assert [t for t in mine if t // 24 == row] == tokens
        own_tokens = {t for t in range(row * 24, row * 24 + 24) if e in own.expert_TK[t].tolist()}
        assert len(tokens) % tile == 0
        assert own_tokens <= set(tokens) or set(tokens) <= own_tokens
        room = len(tokens) + tile <= int(context.valid_T.view(3, -1)[row].sum())
        if mode == "nearest" and room:
            assert abs(len(tokens) - len(own_tokens)) <= tile / 2
    for t in range(x.shape[0]):
        for slot, e in enumerate(routing.expert_TK[t].tolist()):
            gate = float(routing.gate_TK[t, slot])
            mine = own.expert_TK[t].tolist()
            if e < 0:
                assert gate == 0
            elif e in mine:
                assert gate == float(own.gate_TK[t, mine.index(e)])
            else:
                assert gate == pytest.approx(float(score[t, e]) * router.scale, rel=1e-12)


@pytest.mark.parametrize("mode", ["nearest", "up", "down"])
def test_rounding_of_counts(mode):
    count = torch.arange(13)
    wanted = {"nearest": [0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12], "up": [0] + [4] * 4 + [8] * 4 + [12] * 4}
    wanted["down"] = [0] * 4 + [4] * 4 + [8] * 4 + [12]
    assert round_to(count, 4, mode).tolist() == wanted[mode]


def test_a_tile_of_one_changes_nothing():
    x, context = inputs()
    router = build(tile=1)
    own, routing = plain(router, x, context), router(x, context)
    assert torch.equal(own.expert_TK, routing.expert_TK)
    torch.testing.assert_close(own.gate_TK, routing.gate_TK, rtol=0, atol=0)


def test_balance_statistics_count_the_choice_and_not_the_rounding():
    x, context = inputs(padding=3)
    router = build(tile=8)
    own, routing = plain(router, x, context), router(x, context)
    assert routing.expert_TK.shape[1] > 2, "nobody was taken over: this test needs it"
    assert torch.equal(own.count_E, routing.count_E)
    loss = SwitchLoss(6)
    assert float(loss.on_routing(routing)) == pytest.approx(float(loss.on_routing(own)), rel=1e-12)


def test_a_recomputed_pass_repeats_choice_and_gates():
    for cls in (SoftmaxTopK, SigmoidTopK):
        x, context = inputs(padding=3)
        router = build(cls, tile=8)
        first = router(x, context)
        assert (first.expert_TK < -1).any(), "nobody was dropped: this test needs it"
        again = router(x, replace(context, chosen_TK=first.expert_TK))
        assert torch.equal(first.expert_TK, again.expert_TK)
        assert torch.equal(first.gate_TK, again.gate_TK)


def test_slots_have_few_widths():
    """Kernels are compiled for a number of slots."""
    widths, taken = set(), set()
    for seed in range(12):
        router = build(experts=12, tile=8, mode="up")
        routing = router(*inputs(rows=1, seed=seed))
        widths.add(routing.expert_TK.shape[1] - 2)
        taken.add(int((routing.expert_TK[:, 2:] >= 0).sum(1).max()))
    assert len(taken - {1, 2, 4, 8, 12}) >= 2, "this test needs widths that are not powers of 2"
    assert widths <= {1, 2, 4, 8, 12}


def test_gradients_reach_the_router_through_kept_and_taken_slots():
    x, context = inputs()
    router = build(tile=8)
    routing = router(x, context)
    own, taken = routing.gate_TK[:, :2], routing.gate_TK[:, 2:]
    for part in (own, taken):
        (grad,) = torch.autograd.grad(part.sum(), routing.logit_TE, retain_graph=True)
        assert grad.abs().max() > 0
    torch.autograd.grad(routing.gate_TK[routing.expert_TK < 0].sum(), routing.logit_TE, retain_graph=True)


def test_tokens_that_differ_by_rounding_only_are_told_apart_by_their_place():
    """The first tokens of two documents are the same token in the same surroundings: a layout must not decide."""
    x, context = inputs(rows=1, length=16)
    x = x[:1].repeat(16, 1)
    router = build(tile=8, experts=4, k=1, renormalize=False)
    routing = router(x, context)
    noisy = router(x * (1 + 1e-13 * torch.randn(16, 1, dtype=torch.float64)), context)
    assert torch.equal(routing.expert_TK, noisy.expert_TK)


def test_a_row_without_tokens():
    x, context = inputs(rows=2, length=8)
    context = replace(context, document_BS=torch.where(torch.arange(2)[:, None] == 0, -1, context.document_BS))
    routing = build(tile=4)(x, context)
    assert (routing.expert_TK[:8] < 0).all()
    assert torch.isfinite(routing.gate_TK).all()


@pytest.mark.parametrize(
    ("rounding", "words"),
    [
        ({"tile": -1}, "nearest legal value: 0"),
        ({"tile": 2.5}, "nearest legal value: 0"),
        ({"tile": 4, "mode": "closest"}, "nearest legal value: nearest"),
        ({"tiles": 4}, "tiles: no such key"),
    ],
)
def test_impossible_options_are_refused(rounding, words):
    for cls in (SoftmaxTopK, SigmoidTopK):
        with pytest.raises(ValueError, match=words):
            cls(D, 6, 2, rounding=rounding)


def test_impossible_kernels_are_refused():
    with pytest.raises(ValueError, match="nearest legal value: torch"):
        SoftmaxTopK(D, 6, 2, kernels="cuda")
    with pytest.raises(ValueError, match="n_groups=2; nearest legal value: torch"):
        SigmoidTopK(D, 6, 2, n_groups=2, kernels="triton")
