"""The Triton kernels under Triton's interpreter, each against the reference of the same name in fp64.

Needs TRITON_INTERPRET=1 from the start of the process: test_interpreted.py runs this file in one of its own.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moetrain_kernels import (
    combine,
    configs,
    gemm,
    launch,
    moe_experts,
    plan,
    reference,
    spans,
    swiglu_grad,
    up,
    weight_grad,
)

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not launch.interpreting(), reason="needs TRITON_INTERPRET=1"),
]
CASES = [(1, 16, 8, 2, 1), (19, 24, 20, 3, 2), (40, 32, 16, 5, 3)]


def problem(shape, seed=0, unused=0.2):
    num_t, num_d, num_f, num_e, top_k = shape
    g = torch.Generator().manual_seed(seed)
    expert = torch.randint(0, num_e, (num_t, top_k), generator=g)
    expert[torch.rand(num_t, top_k, generator=g) < unused] = -1

    def randn(*size):
        return torch.randn(*size, generator=g)

    return randn(num_t, num_d), expert, randn(num_t, top_k), randn(num_e, 2, num_f, num_d), randn(num_e, num_d, num_f)


def plans(expert, num_e):
    return plan.sort_rows(expert, num_e, configs.INTERPRETED.block_m), reference.sort_rows(expert, num_e)


def close(got, want, rows=None):
    """fp32 against fp64: elements within 2e-4 of their own size or of 1e-6 of the largest in the tensor."""
    scale = want.abs().max().item() if want.numel() else 0.0
    torch.testing.assert_close(got[:rows].double(), want.double(), rtol=2e-4, atol=1e-6 * scale + 1e-6)


def bound(name, tma):
    return getattr(configs.INTERPRETED.on(3, tma, "ieee"), name)


def check_plan(got, want, num_rows):
    """Every table of a plan against the reference's, whose rows past `num_rows` are dropped."""
    rows = min(want.slot_R.numel(), num_rows)
    spans = [(e, min(start, rows), min(end, rows)) for e, start, end in want.spans()]
    tiles = [(e, row, end) for e, start, end in spans for row in range(start, end, got.block_m)]
    by_count = sorted(want.spans(), key=lambda span: (span[1] - span[2], span[0]))
    assert got.sizes_6.tolist() == [len(tiles), rows, 0, 0, 0, 0]
    assert torch.equal(got.slot_R[:rows].long(), want.slot_R[:rows])
    assert torch.equal(got.row_TK.long(), torch.where(want.row_TK < rows, want.row_TK, -1))
    assert [tuple(span) for span in got.spans_E3.tolist()] == [spans[e] for e, _, _ in by_count]
    assert [tuple(tile) for tile in got.tiles_M3[: len(tiles)].tolist()] == tiles


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_sort_rows(data):
    num_t, top_k, num_e = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    ids = data.draw(st.lists(st.integers(-1, num_e), min_size=num_t * top_k, max_size=num_t * top_k))
    got, want = plans(torch.tensor(ids).view(num_t, top_k), num_e)
    check_plan(got, want, num_t * top_k)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 150), st.integers(1, 4), st.sampled_from([1, 3, 33, 128, 129, 300])),
    st.integers(0, 2**16),
    st.integers(0, 3),
    st.sampled_from([0, 5, 1000]),
    st.sampled_from([torch.int32, torch.int64, torch.float32]),
    st.floats(0.1, 1.0),
    st.floats(0.0, 1.0),
)
def test_sort_rows_of_labels_as_they_travel(shape, seed, behind, base, dtype, bound, skew):
    """Other columns behind the labels, experts counted from a base, ids that no expert has, and a bound on the rows."""
    num_t, top_k, num_e = shape
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(-1, num_e + 3, (num_t, top_k + behind), generator=g)
    label[torch.rand(label.shape, generator=g) < skew] = num_e - 1
    want = reference.sort_rows(label[:, :top_k], num_e)
    label = torch.where(label < 0, -1, label + base).to(dtype)
    num_rows = max(1, int(bound * num_t * top_k))
    check_plan(plan.sort_rows(label[:, :top_k], num_e, 16, num_rows, base), want, num_rows)


def test_rows_past_the_bound_are_dropped_in_bounds():
    expert = torch.randint(0, 3, (20, 2))
    got = plan.sort_rows(expert, 3, 16, max_rows=13)
    assert got.sizes_6[1] == 13
    assert int((got.row_TK >= 0).sum()) == 13
    assert got.spans_E3[:, 1:].max() <= 13


def test_the_sort_sets_the_tile_counters_to_zero(monkeypatch):
    """Replays of a CUDA graph depend on it too: whatever the memory holds, the sort is among what is replayed."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(77))
    assert plan.sort_rows(torch.randint(0, 3, (20, 2)), 3, 16).sizes_6[2:].tolist() == [0] * 4


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_forward_kernels(shape, tma):
    x, expert, gate, w_up, w_down = problem(shape)
    p, rows = plans(expert, shape[3])
    n = rows.slot_R.numel()
    h, a = up.up_swiglu(x, p, w_up, bound("up", tma))
    want_h, want_a = reference.up_swiglu(x, rows, w_up)
    close(h, want_h, n)
    close(a, want_a, n)
    y = gemm.grouped_gemm(a, p, w_down, bound("down", tma))
    close(y, reference.grouped_gemm(want_a, rows, w_down), n)
    close(combine.combine(y, p, gate), reference.combine(y[:n], rows.row_TK, gate))


@pytest.mark.parametrize(("rows", "width", "tokens", "ranks"), [(30, 20, 13, 4), (30, 8, 13, 2), (5, 512, 1, 3)])
def test_sum_rows(rows, width, tokens, ranks):
    g = torch.Generator().manual_seed(rows)
    y, row = torch.randn(rows, width, generator=g), torch.randint(-1, rows, (tokens, ranks), generator=g)
    close(combine.sum_rows(y, row.to(torch.int32)), reference.combine(y.double(), row))


def test_sum_rows_of_nothing():
    nowhere = torch.full((3, 2), -1, dtype=torch.int32)
    assert torch.equal(combine.sum_rows(torch.empty(0, 8), nowhere), torch.zeros(3, 8))
    assert combine.sum_rows(torch.ones(4, 8), nowhere[:0]).shape == (0, 8)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("shape", CASES[1:], ids=str)
def test_backward_kernels(shape, tma, split):
    x, expert, gate, w_up, w_down = problem(shape)
    num_e, (_, num_d, num_f) = shape[3], w_down.shape
    p, rows = plans(expert, num_e)
    n = rows.slot_R.numel()
    dy = torch.randn_like(x)
    h = torch.full((p.max_rows, 2 * num_f), float("nan"))
    h[:n] = reference.up_swiglu(x, rows, w_up)[0]
    b = gemm.grouped_gemm(dy, p, w_down, replace(bound("down_grad", tma), split=split), transposed=True, gather=True)
    token_R = rows.slot_R // shape[4]
    want_b = reference.grouped_gemm(dy[token_R], rows, w_down.transpose(1, 2))
    close(b, want_b, n)
    dh, gated_a, part = swiglu_grad.swiglu_grad(b, gate, p, h)
    want_dh, want_a, want_dgate = reference.swiglu_grad(want_b, gate, rows, h[:n])
    close(dh, want_dh, n)
    close(gated_a, want_a, n)
    close(part.sum(1), want_dgate, n)
    assert not dh[n:].any()
    assert not gated_a[n:].any()
    dw_down = weight_grad.weight_grad(
        dy, gated_a, spans.one_piece(p), torch.empty_like(w_down), False, bound("dw_down", tma)
    )
    close(dw_down, reference.weight_grad(dy[token_R], want_a, rows))
    dw_up = torch.empty(num_e, 2 * num_f, num_d)
    weight_grad.weight_grad(x, dh, spans.one_piece(p), dw_up, True, replace(bound("dw_up", tma), split=split))
    close(dw_up, reference.weight_grad(want_dh, x[token_R], rows))
    dx = gemm.grouped_gemm(dh, p, w_up.flatten(1, 2), bound("dx", tma), transposed=True)
    close(dx, reference.grouped_gemm(want_dh, rows, w_up.flatten(1, 2).transpose(1, 2)), n)


def gradients(layer, leaves, expert, dy, **kwargs):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = layer(leaves[0], expert, *leaves[1:], **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.tuples(
        st.integers(1, 30),
        st.integers(1, 5).map(lambda n: 4 * n),
        st.integers(1, 40),
        st.integers(1, 6),
        st.integers(1, 3),
    ),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.5, 0.95]),
)
def test_layer_matches_reference(shape, seed, unused):
    x, expert, *rest = problem(shape, seed, unused)
    dy = torch.randn_like(x)
    got = gradients(moe_experts, [x, *rest], expert, dy)
    want = gradients(reference.moe_experts, [t.double() for t in (x, *rest)], expert, dy.double())
    for a, b in zip(got, want):
        close(a, b)


def test_one_expert_takes_all_and_a_bound_that_is_exact():
    shape = (24, 16, 16, 4, 2)
    x, expert, *rest = problem(shape)
    expert[:] = torch.tensor([2, -1])
    dy = torch.randn_like(x)
    want = gradients(reference.moe_experts, [t.double() for t in (x, *rest)], expert, dy.double())
    got = gradients(moe_experts, [x, *rest], expert, dy, max_rows=24)
    for a, b in zip(got, want):
        close(a, b)
    assert not got[3][[0, 1, 3]].any()


@pytest.mark.parametrize("num_t", [0, 4])
def test_no_active_slots(num_t):
    x, expert, *rest = problem((num_t, 16, 8, 3, 2), unused=1.1)
    for value in gradients(moe_experts, [x, *rest], expert, torch.randn_like(x)):
        assert not value.any()


def test_refuses_what_does_not_fit():
    x, expert, gate, w_up, w_down = problem((4, 16, 8, 3, 2))
    for arguments, word in [
        ((x[:, :8], expert, gate, w_up, w_down), "D"),
        ((x, expert, gate[:, :1], w_up, w_down), r"\[T, K\]"),
        ((x, expert, gate, w_up[:, :1], w_down), "w_gate_up"),
        ((x, expert.float(), gate, w_up, w_down), "int32"),
        ((x.double(), expert, gate, w_up, w_down), "share one"),
    ]:
        with pytest.raises(ValueError, match=word):
            moe_experts(*arguments)
