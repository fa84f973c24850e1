"""Rotation, loss, and router logits on a GPU in bf16 against the references in fp64, at the widths of real models."""

import pytest
import torch
from moetrain_kernels import adamw, add_rms_norm, convert, cross_entropy, norm_rope, reference, rms_norm

from moetrain.loss import chunked_cross_entropy
from moetrain.moe.router.common import router_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16 = 2**-8  # half a unit in the last place


def near(got, wanted, units=1.0):
    """Within `units` roundings of each element, and of the largest: sums cancel."""
    scale = float(wanted.abs().max())
    torch.testing.assert_close(got.double(), wanted.double(), rtol=units * BF16, atol=units * BF16 * scale / 8)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("heads", "d", "interleaved"), [(32, 128, False), (4, 128, False), (16, 64, True)])
def test_norm_rope(heads, d, interleaved, normed):
    g = torch.Generator("cuda").manual_seed(heads)
    x = torch.randn(2, 512, heads, d, generator=g, device="cuda").bfloat16().transpose(1, 2)
    weight = (1 + 0.2 * torch.randn(d, generator=g, device="cuda")).bfloat16()
    angle = torch.rand(2, 1, 512, d // 2, generator=g, device="cuda") * 100
    upstream = torch.randn(x.shape, generator=g, device="cuda").bfloat16()
    found = []
    for rotate, dtype in ((norm_rope, torch.bfloat16), (reference.norm_rope, torch.float64)):
        leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()][: 1 + normed]
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        tables = (angle.cos().to(wide), angle.sin().to(wide))
        y = rotate(leaves[0], leaves[1] if normed else None, tables, 1e-6, interleaved)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, upstream.to(dtype))])
    for mine, theirs in zip(*found):
        near(mine, theirs)


@pytest.mark.parametrize("width", [2048, 4096, 7168])
def test_rms_norm(width):
    g = torch.Generator("cuda").manual_seed(width)
    x, delta, up_sum, up = (torch.randn(3000, width, generator=g, device="cuda").bfloat16() for _ in range(4))
    weight = (1 + 0.2 * torch.randn(width, generator=g, device="cuda")).bfloat16()
    leaves = [x.clone().requires_grad_(), delta.clone().requires_grad_(), weight.clone().requires_grad_()]
    total, y = add_rms_norm(*leaves, 1e-6)
    assert torch.equal(total, x + delta)
    exact = [total.detach().double().requires_grad_(), weight.double().requires_grad_()]  # of the sum as it is stored
    wanted = reference.rms_norm(*exact, 1e-6)
    near(y.detach(), wanted.detach())
    grads = torch.autograd.grad((total, y), leaves, (up_sum, up))
    wanted_grads = torch.autograd.grad(wanted, exact, up.double())
    near(grads[0], wanted_grads[0] + up_sum.double())
    assert torch.equal(grads[0], grads[1])
    near(grads[2], wanted_grads[1])
    near(rms_norm(total.detach(), weight, 1e-6), wanted.detach())


@pytest.mark.parametrize("columns", [32000, 151936])
def test_cross_entropy(columns):
    g = torch.Generator("cuda").manual_seed(columns)
    logit = torch.randn(64, columns, generator=g, device="cuda") * 4
    target = torch.randint(columns, (64,), generator=g, device="cuda")
    mask = torch.arange(64, device="cuda") % 7 != 3
    loss, grad = cross_entropy(logit, target, mask, torch.bfloat16)
    wanted, wanted_grad = reference.cross_entropy(logit.double(), target, mask, torch.float64)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=BF16 + 1e-5, atol=1e-9)


def test_the_whole_loss():
    g = torch.Generator("cuda").manual_seed(0)
    tokens, width, columns = 1000, 256, 5003
    h = (torch.randn(tokens, width, generator=g, device="cuda") / 4).bfloat16()
    weight = (torch.randn(columns, width, generator=g, device="cuda") / 4).bfloat16()
    target = torch.randint(columns, (tokens,), generator=g, device="cuda")
    mask = torch.arange(tokens, device="cuda") % 5 != 0
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [h.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        loss = chunked_cross_entropy(*leaves, target, mask, 256)
        found.append([loss.detach(), *torch.autograd.grad(loss / mask.sum(), leaves)])
    torch.testing.assert_close(found[0][0].double(), found[1][0], rtol=1e-5, atol=0)
    near(found[0][1], found[1][1], 2)  # the gradient of the logits is rounded, and so is the result
    near(found[0][2], found[1][2], 2)


def test_router_logits():
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4096, 2048, generator=g, device="cuda").bfloat16()
    weight = (torch.randn(128, 2048, generator=g, device="cuda") / 45).bfloat16()
    upstream = torch.randn(4096, 128, generator=g, device="cuda")
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        logit = router_logits(*leaves)
        found.append([logit.detach(), *torch.autograd.grad(logit, leaves, upstream.to(logit.dtype))])
    assert found[0][0].dtype == torch.float32
    # Sums of 2048 products in fp32: far below what bf16 logits (2^-8) or TF32 gradients (2^-11) would be off.
    torch.testing.assert_close(found[0][0].double(), found[1][0], rtol=1e-4, atol=2e-5)
    near(found[0][1], found[1][1])
    near(found[0][2], found[1][2])


def test_convert():
    g = torch.Generator("cuda").manual_seed(0)
    x, scale = torch.randn(1001, 513, generator=g, device="cuda"), torch.tensor(0.37, device="cuda")
    assert torch.equal(convert(x.bfloat16(), torch.float32), x.bfloat16().float())
    assert torch.equal(convert(x.T, torch.bfloat16, scale), (x.T * scale).bfloat16())


def test_adamw():
    g = torch.Generator("cuda").manual_seed(0)
    sizes = [(3, 1001), (4096, 2048), (5,)]
    start = [[torch.randn(size, generator=g, device="cuda") for size in sizes] for _ in range(4)]
    rates = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    found = []
    for update, dtype in ((adamw, torch.float32), (reference.adamw, torch.float64)):
        p, grad, m, v = ([t.to(dtype, copy=True) for t in tensors] for tensors in start)
        v = [t.square() for t in v]
        steps = [torch.tensor(float(n), dtype=dtype, device="cuda") for n in (1, 2, 30)]
        update(p, grad, (m, v), steps, divisor=torch.tensor(3.0, dtype=dtype, device="cuda"), **rates)
        found.append([*p, *m, *v])
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)
