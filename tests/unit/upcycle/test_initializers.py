"""Every initializer in fp64: what it promises, and that any division of the experts makes the same model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moetrain.moe.experts.module import Experts
from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.moe.layer import MoELayer
from moetrain.moe.router.softmax import SoftmaxTopK
from moetrain.testing.fake import fake_context
from moetrain.upcycle.base import DenseFFN
from moetrain.upcycle.clusters import balanced_clusters
from moetrain.upcycle.copy import Copy
from moetrain.upcycle.diversify import Diversify
from moetrain.upcycle.drop import Drop
from moetrain.upcycle.split import Split
from moetrain.upcycle.virtual_group import VirtualGroup

pytestmark = pytest.mark.unit
D, WIDTH, T = 12, 48, 30
LAYER, SEED = 3, 7
EXACT = 1e-13  # fp64: a sum of 48 products, in another order

ALL = [
    lambda: Copy(4, 2),
    lambda: Copy(4, 2, noise=0.1),
    lambda: Diversify(4, 2),
    lambda: VirtualGroup(4, 2, 3),
    lambda: Drop(4, 2),
    lambda: Drop(4, 2, shared_indices=False),
    lambda: Split(4, 2),
    lambda: Split(4, 2, 2, by="clustering"),
]


@pytest.fixture
def ffn():
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(WIDTH, D, generator=generator, dtype=torch.float64) for _ in range(3))
    return DenseFFN(gate, up, down.T.contiguous())


@pytest.fixture
def x_TD():
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def dense(ffn, x_TD):
    return F.linear(F.silu(F.linear(x_TD, ffn.w_gate_FD)) * F.linear(x_TD, ffn.w_up_FD), ffn.w_down_DF)


def layer(initializer, ffn, order="pre", router=None):
    """The MoE layer that the initializer means, and the routing it makes."""
    made = initializer.make(ffn, LAYER, range(initializer.n_experts), SEED)
    routing = SoftmaxTopK(D, initializer.n_experts, initializer.n_chosen, order, renormalize=initializer.normalized)
    experts = Experts(initializer.n_experts, D, initializer.d_expert(WIDTH), ReferenceExperts())
    router_ND = initializer.router(ffn, LAYER, SEED) if router is None else router
    with torch.no_grad():
        for parameter, value in (
            (routing.weight, router_ND),
            (experts.w_gate_up, made.w_gate_up_n2fD),
            (experts.w_down, made.w_down_nDf),
        ):
            parameter.data = value
    return MoELayer(routing, experts, {}, None)


@torch.no_grad()
def run(moe, x_TD):
    context = fake_context(1, T)
    return moe(x_TD[None], context)[0][0], moe.router(x_TD, context)


def deviation(got, want):
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Copy(4, 2),
        lambda: Copy(3, 3),
        lambda: VirtualGroup(4, 2, 3),
        lambda: VirtualGroup(8, 2, 4),
        lambda: VirtualGroup(5, 1, 2),
        lambda: VirtualGroup(4, 2, 1),
        lambda: Drop(4, 2, ratio=0.0),
        lambda: Diversify(4, 2, mask=0.0),
    ],
)
def test_exact_with_gates_that_sum_to_one(make, order, ffn, x_TD):
    got, _ = run(layer(make(), ffn, order), x_TD)
    assert deviation(got, dense(ffn, x_TD)) < EXACT


@pytest.mark.parametrize(
    "make", [lambda: Copy(4, 2, normalized=False), lambda: VirtualGroup(4, 2, 3, normalized=False)]
)
def test_plain_probabilities_are_exact_for_a_uniform_router_only(make, ffn, x_TD):
    uniform = torch.zeros(make().n_experts, D, dtype=torch.float64)
    # Ties go to the lowest index, so the choice is the first k experts: whole groups.
    got, _ = run(layer(make(), ffn, router=uniform), x_TD)
    assert deviation(got, dense(ffn, x_TD)) < EXACT
    sharp = torch.randn(4, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got, _ = run(layer(make(), ffn, router=0.5 * sharp.repeat_interleave(make().granularity, 0)), x_TD)
    assert deviation(got, dense(ffn, x_TD)) > 0.1


def test_virtual_group_scale_is_the_published_one():
    groups, chosen, parts = 8, 2, 4
    assert VirtualGroup(groups, chosen, parts).scale == pytest.approx(parts)
    physical_k = chosen * parts
    plain = VirtualGroup(groups, chosen, parts, normalized=False).scale
    assert plain == pytest.approx(groups * parts * parts / physical_k)


def test_every_token_chooses_whole_groups(ffn, x_TD):
    initializer = VirtualGroup(8, 2, 4, router_std=1.0)
    _, routing = run(layer(initializer, ffn), x_TD)
    groups_TK = (routing.expert_TK // 4).sort(dim=-1).values
    assert torch.equal(groups_TK.view(T, 2, 4), groups_TK.view(T, 2, 4)[..., :1].expand(-1, -1, 4))
    assert groups_TK.unique().numel() > 4
    parts_TK = (routing.expert_TK % 4).sort(dim=-1).values
    assert torch.equal(parts_TK, torch.arange(4).repeat_interleave(2).expand(T, -1))


def test_the_cube_root_split_would_be_wrong(ffn, x_TD):
    """Why all of the scale is on the down projection: spread over three matrices it misses, by over a tenth where
    pre-activations are near 1 (far from 0 SiLU is nearly ReLU, which would not mind)."""
    initializer = VirtualGroup(4, 2, 3)
    moe = layer(initializer, ffn)
    root = initializer.scale ** (1 / 3)
    with torch.no_grad():
        moe.experts.w_gate_up *= root
        moe.experts.w_down *= root / initializer.scale
    got, _ = run(moe, 0.25 * x_TD)
    assert deviation(got, dense(ffn, 0.25 * x_TD)) > 0.1


@pytest.mark.parametrize("make", ALL)
def test_any_range_of_experts_is_a_slice_of_all(make, ffn):
    initializer = make()
    n = initializer.n_experts
    whole = initializer.make(ffn, LAYER, range(n), SEED)
    for width in (1, n // 2):
        for start in range(0, n, width):
            part = initializer.make(ffn, LAYER, range(start, start + width), SEED)
            assert torch.equal(part.w_gate_up_n2fD, whole.w_gate_up_n2fD[start : start + width])
            assert torch.equal(part.w_down_nDf, whole.w_down_nDf[start : start + width])


@pytest.mark.parametrize("make", [ALL[1], ALL[2], *ALL[4:]])
def test_random_initializers_depend_on_layer_and_seed(make, ffn):
    made = [make().make(ffn, layer, range(4), seed).w_down_nDf for layer, seed in ((0, 0), (1, 0), (0, 1))]
    if make().__class__ is not Split:
        assert not torch.equal(made[0][0], made[0][1])  # experts differ
    if getattr(make(), "by", "") == "clustering":
        return  # the layer only starts the search, which may end in the same clusters
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_router_rows():
    ffn = DenseFFN(torch.zeros(1, 4096), torch.zeros(1, 4096), torch.zeros(4096, 1))
    router_ND = VirtualGroup(4, 2, 3).router(ffn, 0, SEED)
    groups = router_ND.view(4, 3, 4096)
    assert torch.equal(groups, groups[:, :1].expand(-1, 3, -1))
    assert router_ND.std() == pytest.approx(0.02, rel=0.05)  # 16384 draws: 0.6% standard error
    assert not torch.equal(groups[0], groups[1])
    assert not torch.equal(router_ND, VirtualGroup(4, 2, 3).router(ffn, 1, SEED))
    assert torch.equal(Copy(4, 2).router(ffn, 0, SEED), groups[:, 0])  # by group, not by expert


def test_noise_hits_its_share(ffn):
    wide = DenseFFN(*(torch.zeros(400, 400, dtype=torch.float64) for _ in range(3)))
    made = Copy(2, 2, noise=0.02, noise_share=0.25).make(wide, 0, range(2), 0)
    changed = made.w_gate_up_n2fD != 0
    assert changed.double().mean() == pytest.approx(0.25, abs=0.005)  # 640000 draws: 0.0005 standard error
    assert made.w_gate_up_n2fD[changed].std() == pytest.approx(0.02, rel=0.02)


def test_diversify_masks_its_share():
    wide = DenseFFN(*(torch.ones(400, 400, dtype=torch.float64) for _ in range(3)))
    made = Diversify(2, 2, mask=0.25).make(wide, 0, range(2), 0)
    for weight in (made.w_gate_up_n2fD[0, 0], made.w_gate_up_n2fD[1, 1], made.w_down_nDf[0]):
        assert (weight == 0).double().mean() == pytest.approx(0.25, abs=0.005)  # 160000 draws: 0.001 standard error
        assert weight.max() == 1
    assert not torch.equal(made.w_down_nDf[0], made.w_down_nDf[1])


def test_untied_parts_are_chosen_one_by_one(ffn, x_TD):
    initializer = VirtualGroup(8, 2, 4, router_std=1.0, tied=False)
    got, routing = run(layer(initializer, ffn), x_TD)
    groups_TK = (routing.expert_TK // 4).sort(dim=-1).values.view(T, 2, 4)
    assert not torch.equal(groups_TK, groups_TK[..., :1].expand(-1, -1, 4))
    assert deviation(got, dense(ffn, x_TD)) > 0.1


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_drop_redraws_floor_of_ratio(ratio, ffn):
    made = Drop(2, 2, ratio=ratio).make(ffn, LAYER, range(2), SEED)
    for e in range(2):
        rows = [
            (made.w_gate_up_n2fD[e, 0] != ffn.w_gate_FD).any(1),
            (made.w_gate_up_n2fD[e, 1] != ffn.w_up_FD).any(1),
            (made.w_down_nDf[e] != ffn.w_down_DF).any(0),
        ]
        assert all(int(r.sum()) == int(ratio * WIDTH) for r in rows)
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(rows[0], rows[2])


def test_drop_can_draw_neurons_per_matrix(ffn):
    made = Drop(2, 2, shared_indices=False).make(ffn, LAYER, range(2), SEED)
    gate = (made.w_gate_up_n2fD[0, 0] != ffn.w_gate_FD).any(1)
    up = (made.w_gate_up_n2fD[0, 1] != ffn.w_up_FD).any(1)
    assert int(gate.sum()) == int(up.sum()) == WIDTH // 2
    assert not torch.equal(gate, up)


def test_drop_draws_from_what_it_replaces():
    wide = torch.randn(600, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3 + 2.0
    made = Drop(1, 1, ratio=0.5, normalized=False).expert(DenseFFN(wide, wide, wide.T), 0, 0, 0)
    fresh = made.w_gate_FD[(made.w_gate_FD != wide).any(1)]
    assert fresh.mean() == pytest.approx(2.0, abs=0.005)  # 90000 draws: 0.001 standard error
    assert fresh.std() == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("by", ["random", "clustering"])
@pytest.mark.parametrize("normalized", [True, False])
def test_split_is_a_partition_whose_sum_is_the_dense_layer(by, normalized, ffn, x_TD):
    initializer = Split(4, 2, 2, normalized, by=by)
    parts, _ = initializer.partition(ffn, LAYER, SEED)
    assert parts.shape == (8, WIDTH // 8)
    assert torch.equal(parts.flatten().sort().values, torch.arange(WIDTH))
    made = initializer.make(ffn, LAYER, range(8), SEED)
    each = [dense(DenseFFN(gu[0], gu[1], down), x_TD) for gu, down in zip(made.w_gate_up_n2fD, made.w_down_nDf)]
    # Of the N experts k are chosen: scaled by N/k, and by what their gates take away.
    assert initializer.scale == pytest.approx(8 / 4 * (4 if normalized else 8))
    assert deviation(sum(each) / initializer.scale, dense(ffn, x_TD)) < EXACT


def test_split_is_exact_when_all_experts_are_chosen_alike(ffn, x_TD):
    initializer = Split(4, 4, router_std=0.0)
    got, _ = run(layer(initializer, ffn), x_TD)
    assert deviation(got, dense(ffn, x_TD)) < EXACT


def test_clusters_are_equal_and_found():
    """Rows around four directions, shuffled: each cluster is one direction."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.arange(32)[torch.randperm(32, generator=generator)] % 4
    rows = torch.eye(4, 16, dtype=torch.float64)[direction] * (1 + direction[:, None])
    rows += 0.05 * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    best = max(
        sum(
            len(direction[cluster].unique()) == 1
            for cluster in balanced_clusters(rows, 4, torch.Generator().manual_seed(s))
        )
        for s in range(3)
    )
    assert best == 4  # k-means may stop in a local optimum from an unlucky start, not from three
    crowded = torch.cat([rows[direction == 0]] * 4)  # all alike: clusters are equal all the same
    assert balanced_clusters(crowded, 4, generator).flatten().sort().values.equal(torch.arange(32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Copy(4, 2, 2), "granularity=2"),
        (lambda: Drop(4, 2, 3), "granularity=3"),
        (lambda: Copy(4, 5), "top_k=5 .* nearest legal value: 4"),
        (lambda: Diversify(4, 2, mask=-0.5), "mask=-0.5; nearest legal value: 0"),
        (lambda: Drop(4, 2, ratio=1.5), "ratio=1.5; nearest legal value: 1"),
        (lambda: VirtualGroup(4, 2, 5).d_expert(48), "granularity=5 .* nearest legal value: 4"),
        (lambda: Split(5, 2).d_expert(48), "nearest legal value of their product: 4"),
        (lambda: Split(4, 2, by="magic"), "by='magic'; nearest legal value: random"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
