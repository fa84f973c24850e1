"""The layer in pieces under Triton's interpreter, against the reference over all rows at once in fp64.

Needs TRITON_INTERPRET=1 from the start of the process: test_interpreted.py runs this file in one of its own.
"""

import pytest
import torch
from moetrain_kernels import ExpertPieces, configs, launch, plan, reference, spans, weight_grad

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not launch.interpreting(), reason="needs TRITON_INTERPRET=1"),
]
SHAPE = (41, 24, 12, 4, 2)
CUTS = [[20, 21], [0, 41], [7, 0, 30, 4]]


def problem(seed):
    num_t, num_d, num_f, num_e, top_k = SHAPE
    g = torch.Generator().manual_seed(seed)
    expert = torch.randint(-1, num_e, (num_t, top_k), generator=g)

    def randn(*size):
        return torch.randn(*size, generator=g)

    return randn(num_t, num_d), expert, randn(num_t, top_k), randn(num_e, 2, num_f, num_d), randn(num_e, num_d, num_f)


def close(got, want):
    """fp32 against fp64: elements within 2e-4 of their own size or of 1e-6 of the largest in the tensor."""
    torch.testing.assert_close(got.double(), want.double(), rtol=2e-4, atol=1e-6 * want.abs().max().item() + 1e-6)


def wanted(x, expert, gate, w_up, w_down, dy):
    leaves = [t.double().requires_grad_() for t in (x, gate, w_up, w_down)]
    y = reference.moe_experts(leaves[0], expert, *leaves[1:])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("first_last", [False, True])
def test_pieces_equal_the_whole(cut, first_last):
    """Also when the first piece ends last, and adds sums made elsewhere, and one piece uses no expert."""
    x, expert, gate, w_up, w_down = problem(3)
    if cut[-1] == 4:
        expert[-4:] = -1
    dy = torch.randn_like(x)
    want = wanted(x, expert, gate, w_up, w_down, dy)
    pieces = ExpertPieces(w_up, w_down, (True,) * 4)
    order = list(range(len(cut)))
    order = order[1:] + order[:1] if first_last else order
    labels = torch.cat([torch.where(expert < 0, -1, expert + 2), gate], dim=1)  # as they travel
    for part, label in zip(x.split(cut), labels.split(cut)):
        pieces.start(part, *label.chunk(2, dim=1), 2)
    more = torch.randn(2, len(x), x.shape[1]), torch.randn(2, len(x), gate.shape[1])
    with_more = {0: lambda: more} if first_last else {}
    y = {i: pieces.finish(i, torch.empty_like(x[: cut[i]]), with_more.get(i)) for i in order}
    for i, part in enumerate(dy.split(cut)):
        pieces.start_gradients(i, part, far=i == 0)

    def finish(numbers):
        return {i: pieces.finish_gradients(i, torch.empty_like(x[: cut[i]]), with_more.get(i)) for i in numbers}

    found = finish(order[:-1])
    dw = pieces.weight_gradients(lambda: found.update(finish(order[-1:])))
    if first_last:
        for total, part in zip(want, (more[0], more[0], more[1])):
            total[: cut[0]] += part[:, : cut[0]].sum(0)
    columns = [torch.cat(part) for part in zip(*((y[i], *found[i]) for i in range(len(cut))))]
    for a, b in zip([*columns, *dw], want):
        close(a, b)


@pytest.mark.parametrize("num_d", [24, 22])  # 22: rows of the second piece begin at no multiple of 16 bytes
def test_rows_are_not_read_before_they_land(num_d):
    x, expert, gate, w_up, w_down = problem(5)
    x, w_up, w_down = x[:, :num_d].contiguous(), w_up[..., :num_d].contiguous(), w_down[:, :num_d].contiguous()
    dy = torch.randn_like(x)
    want = wanted(x, expert, gate, w_up, w_down, dy)
    coming, pieces = torch.full_like(x, float("nan")), ExpertPieces(w_up, w_down, (True,) * 4)
    parts = [slice(0, 9), slice(9, 41)]
    for part in parts:
        pieces.start(coming[part], expert[part], gate[part], 0, lambda part=part: coming[part].copy_(x[part]))
    close(torch.cat([pieces.finish(i) for i in range(2)]), want[0])
    for i, part in enumerate(parts):
        pieces.start_gradients(i, dy[part])
    found = [pieces.finish_gradients(i)[0] for i in range(2)]
    for got, expected in zip((torch.cat(found), *pieces.weight_gradients()), (want[1], *want[3:])):
        close(got, expected)


def test_what_is_not_wanted_is_not_made():
    x, expert, gate, w_up, w_down = problem(0)
    pieces = ExpertPieces(w_up, w_down, (False, True, False, True))
    pieces.start(x, expert, gate)
    pieces.finish(0)
    pieces.start_gradients(0, torch.ones_like(x))
    dx, dgate = pieces.finish_gradients(0)
    dw_up, dw_down = pieces.weight_gradients()
    assert dx is None
    assert dw_up is None
    want = wanted(x, expert, gate, w_up, w_down, torch.ones_like(x))
    close(dgate, want[2])
    close(dw_down, want[4])


def test_weights_that_are_kept_as_they_are_need_none():
    """Experts that are not trained, as in fine-tuning of the rest."""
    x, expert, gate, w_up, w_down = problem(0)
    pieces = ExpertPieces(w_up, w_down, (True, True, False, False))
    for part in (slice(0, 20), slice(20, 41)):
        pieces.start(x[part], expert[part], gate[part])
    for i, part in enumerate((slice(0, 20), slice(20, 41))):
        pieces.finish(i)
        pieces.start_gradients(i, torch.ones_like(x[part]), far=True)
    found = [pieces.finish_gradients(1)]
    assert pieces.weight_gradients(lambda: found.insert(0, pieces.finish_gradients(0))) == (None, None)
    want = wanted(x, expert, gate, w_up, w_down, torch.ones_like(x))
    close(torch.cat([dx for dx, _ in found]), want[1])
    close(torch.cat([dgate for _, dgate in found]), want[2])


@pytest.mark.parametrize("num_e", [3, 200, 1500])
def test_experts_are_ordered_by_the_rows_of_all_pieces(num_e):
    g = torch.Generator().manual_seed(num_e)
    experts = [torch.randint(-1, num_e, (40, 2), generator=g) % (num_e // 2 + 1) for _ in range(3)]
    plans, x = [plan.sort_rows(part, num_e, 16) for part in experts], [torch.zeros(40, 8) for _ in experts]
    rows = spans.several_pieces(plans, x, x)[0].spans_E
    counts = sum(torch.bincount(part.flatten(), minlength=num_e) for part in experts)
    assert rows[:, 0].tolist() == sorted(range(num_e), key=lambda e: (-counts[e].item(), e))
    found = sum(rows[:, i + 1] - rows[:, i] for i in (1, 3, 5))
    assert torch.equal(found, counts[rows[:, 0]].int())


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("cut", [[25, 16], [3, 30, 8]], ids=str)
def test_weight_gradient_over_pieces(cut, flip, tma):
    """x of every piece in memory of its own; rows of r behind each other, with unused ones between, which hold 0."""
    x, expert, _, _, _ = problem(1)
    num_e, num_n = SHAPE[3], 28
    want, plans, r_parts = 0.0, [], []
    for part_x, part_expert in zip(x.split(cut), expert.split(cut)):
        rows = reference.sort_rows(part_expert, num_e)
        r = torch.zeros(part_expert.numel(), num_n)
        r[: rows.slot_R.numel()] = torch.randn(rows.slot_R.numel(), num_n)
        want = want + reference.weight_grad(
            part_x[rows.slot_R // SHAPE[4]].double(), r[: rows.slot_R.numel()].double(), rows
        )
        plans.append(plan.sort_rows(part_expert, num_e, 16))
        r_parts.append(r)
    xs = [part.clone() for part in x.split(cut)]
    both = spans.several_pieces(plans, xs, [torch.cat([part, part]) for part in xs])
    counts = [sum(end - start for start, end in zip(row[1::2], row[2::2])) for row in both[0].spans_E.tolist()]
    assert counts == sorted(counts, reverse=True)
    out = torch.full((num_e, num_n, x.shape[1]) if flip else (num_e, x.shape[1], num_n), float("nan"))
    weight_grad.weight_grad(xs[0], torch.cat(r_parts), both[0], out, flip, configs.INTERPRETED.on(3, tma, "ieee").dw_up)
    close(out, want.transpose(1, 2) if flip else want)
