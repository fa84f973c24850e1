"""The kernels of attention and loss under Triton's interpreter, against the references of the same names in fp64.

Needs TRITON_INTERPRET=1 from the start of the process: test_interpreted.py runs this file in one of its own.
"""

import pytest
import torch
from moetrain_kernels import adamw, add_rms_norm, convert, cross_entropy, launch, norm_rope, reference, rms_norm, swiglu

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not launch.interpreting(), reason="needs TRITON_INTERPRET=1"),
]


@pytest.mark.parametrize(
    ("rows", "columns", "spread"), [(5, 40, 1.0), (3, 8192, 3.0), (4, 9001, 40.0), (2, 20000, 0.1)]
)
def test_cross_entropy_equals_the_reference(rows, columns, spread):
    g = torch.Generator().manual_seed(columns)
    logit, target = torch.randn(rows, columns, generator=g) * spread, torch.randint(columns, (rows,), generator=g)
    mask = torch.arange(rows) != 1
    loss, grad = cross_entropy(logit, target, mask, torch.float32)
    wanted, wanted_grad = reference.cross_entropy(logit.double(), target, mask, torch.float64)
    # A sum over V exponentials in fp32, each good to a few eps times the logit's size.
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5 * max(spread, 1.0))
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-4, atol=1e-7)


def test_logits_in_any_order_have_the_same_gradient():
    logit, target = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).T, torch.arange(5)
    wanted = cross_entropy(logit.contiguous(), target, target >= 0, torch.float32)
    for found, want in zip(cross_entropy(logit, target, target >= 0, torch.float32), wanted):
        assert torch.equal(found, want)


def test_masked_rows_add_nothing_whatever_they_hold():
    logit, target, mask = torch.full((2, 70), float("nan")), torch.tensor([3, 10**9]), torch.tensor([True, False])
    logit[0] = torch.arange(70) / 10
    loss, grad = cross_entropy(logit, target, mask, torch.bfloat16)
    wanted, wanted_grad = reference.cross_entropy(logit.double(), target, mask, torch.bfloat16)
    assert loss[1] == 0
    assert not grad[1].any()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, wanted_grad, rtol=2**-7, atol=1e-6)  # the interpreter truncates
    assert cross_entropy(logit, target, mask)[1] is None


def test_a_single_row_of_minus_infinity_elsewhere():
    logit = torch.full((1, 20), -float("inf"))
    logit[0, 7], logit[0, 9] = 1.0, 1.0
    loss, grad = cross_entropy(logit, torch.tensor([9]), torch.tensor([True]), torch.float32)
    assert float(loss[0]) == pytest.approx(0.6931472, abs=1e-6)
    assert grad[0, [7, 9]].tolist() == pytest.approx([0.5, -0.5], abs=1e-6)


def inputs(heads, d, layout, shared_tables, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows, length = 2, 9
    wide = torch.randn(rows, length, heads, d + 6, generator=g)
    x = {
        "projected": wide[..., :d].contiguous().transpose(1, 2),  # [B, S, H, d] in memory, as a projection leaves it
        "part": wide[..., 3 : d + 3].transpose(1, 2),  # a part of a wider head, as in MLA
        "heads first": wide[..., :d].transpose(1, 2).contiguous(),
    }[layout]
    angle = torch.rand(1 if shared_tables else rows, 1, length, d // 2, generator=g) * 6
    return x, 1 + 0.3 * torch.randn(d, generator=g), (angle.cos(), angle.sin()), torch.randn(x.shape, generator=g)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "d", "layout", "shared"),
    [(4, 16, "projected", False), (3, 24, "part", False), (1, 6, "heads first", True), (40, 128, "projected", True)],
)
def test_norm_rope_equals_the_reference(heads, d, layout, shared, normed, interleaved):
    x, weight, tables, upstream = inputs(heads, d, layout, shared)
    found = []
    for rotate, dtype in ((norm_rope, torch.float32), (reference.norm_rope, torch.float64)):
        leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()][: 1 + normed]
        exact = [table.to(dtype) for table in tables]
        y = rotate(leaves[0], leaves[1] if normed else None, exact, 1e-6, interleaved)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, upstream.to(dtype))])
    for mine, theirs in zip(*found):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_norm_rope_takes_gradients_of_any_layout():
    x, weight, tables, upstream = inputs(4, 16, "projected", False)
    leaf = x.clone().requires_grad_()
    y = norm_rope(leaf, weight, tables, 1e-6)
    assert y.transpose(1, 2).is_contiguous()
    (straight,) = torch.autograd.grad(y, leaf, upstream, retain_graph=True)
    (strided,) = torch.autograd.grad(y, leaf, upstream.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0))
    assert torch.equal(straight, strided)


@pytest.mark.parametrize(("shape", "add"), [((3, 5, 16), True), ((7, 40), False), ((1, 6), True), ((33, 1000), True)])
def test_rms_norm_equals_the_reference(shape, add):
    g = torch.Generator().manual_seed(0)
    x, delta, up_sum, up = (torch.randn(shape, generator=g) for _ in range(4))
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=g)
    found = []
    for module, dtype in ((None, torch.float32), (reference, torch.float64)):
        plain, summed = (rms_norm, add_rms_norm) if module is None else (module.rms_norm, module.add_rms_norm)
        a, b, w = (t.to(dtype).requires_grad_() for t in (x, delta, weight))
        results = summed(a, b, w, 0.01) if add else (plain(a, w, 0.01),)
        upstream = [t.to(dtype) for t in ([up_sum, up] if add else [up])]
        grads = torch.autograd.grad(results, [a, b, w] if add else [a, w], upstream)
        alone = torch.autograd.grad(summed(a, b, w, 0.01)[1], [a, b, w], up.to(dtype))  # the sum goes nowhere
        found.append([*(t.detach() for t in results), *grads, *alone])
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divided", [False, True])
def test_adamw_equals_the_reference(divided):
    g = torch.Generator().manual_seed(0)
    shapes, first = [(5000,), (3, 7), (0, 4)], [1.0, 1000.0, 3.0]
    start = [[torch.randn(shape, generator=g) for shape in shapes] for _ in range(4)]
    rates = {"lr": 0.01, "betas": (0.9, 0.9995), "eps": 1e-6, "weight_decay": 0.3}
    found = []
    for update, dtype in ((adamw, torch.float32), (reference.adamw, torch.float64)):
        p, grad, m, v = ([t.to(dtype, copy=True) for t in tensors] for tensors in start)
        v = [t.square() for t in v]
        for later in range(3):
            steps = [torch.tensor(n + later, dtype=dtype) for n in first]
            divisor = torch.tensor(2.5, dtype=dtype) if divided else None
            update(p, grad, (m, v), steps, divisor=divisor, **rates)
        found.append([*p, *m, *v])
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(5000,), (3, 7), (0, 4), (4096, 2)])
def test_convert_equals_the_reference(shape):
    g = torch.Generator().manual_seed(0)
    x, scale = torch.randn(shape, generator=g), torch.tensor(0.37)
    assert torch.equal(convert(x.bfloat16(), torch.float32), x.bfloat16().float())
    scaled = convert(x.transpose(0, -1), torch.bfloat16, scale)  # not contiguous
    assert scaled.dtype == torch.bfloat16
    torch.testing.assert_close(
        scaled, (x.transpose(0, -1) * scale).bfloat16(), rtol=2**-7, atol=0
    )  # the interpreter truncates


@pytest.mark.parametrize("shape", [(5, 3, 40), (7, 3000), (0, 8)])
def test_swiglu_equals_the_reference(shape):
    g = torch.Generator().manual_seed(0)
    both, upstream = torch.randn(*shape[:-1], 2, shape[-1], generator=g) * 3, torch.randn(shape, generator=g)
    found = []
    for multiply, dtype in ((swiglu, torch.float32), (reference.swiglu, torch.float64)):
        joint = both.to(dtype, copy=True).requires_grad_()  # gate and up as halves of one product, and apart
        apart = [t.contiguous().requires_grad_() for t in both.to(dtype, copy=True).unbind(-2)]
        y, z = multiply(*joint.unbind(-2)), multiply(*apart)
        assert y.is_contiguous()
        weights = upstream.to(dtype)
        grads = [*torch.autograd.grad(y, joint, weights), *torch.autograd.grad(z, apart, weights)]
        found.append([y.detach(), z.detach(), *grads])
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="fp32"):
        cross_entropy(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), torch.ones(2) > 0)
    x, weight, tables, _ = inputs(1, 6, "projected", False)
    with pytest.raises(ValueError, match="fp32"):
        convert(torch.zeros(2), torch.float64)
    half = [torch.zeros(2, dtype=torch.bfloat16)]
    with pytest.raises(ValueError, match="fp32"):
        adamw(half, half, (half, half), [torch.ones(())], lr=0.1, betas=(0.9, 0.9), eps=0.1, weight_decay=0.0)
    with pytest.raises(ValueError, match="float64"):
        norm_rope(x.double(), weight, tables)
