"""The chunked loss against F.cross_entropy in fp64, and what masked tokens may not do."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moetrain.loss import chunked_cross_entropy

pytestmark = pytest.mark.unit

TOKENS, WIDTH, VOCAB = 13, 6, 11
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
)


def _case(dtype=torch.float64, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    h_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(VOCAB, WIDTH, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    target_T = torch.randint(VOCAB, (TOKENS,), generator=generator)
    mask_T = torch.rand(TOKENS, generator=generator) < 0.7
    assert 0 < int(mask_T.sum()) < TOKENS
    h_TD, weight_VD = (x.detach().to(device).requires_grad_() for x in (h_TD, weight_VD))
    return h_TD, weight_VD, target_T.to(device), mask_T.to(device)


def _reference(h_TD, weight_VD, target_T, mask_T):
    h_TD, weight_VD = (x.detach().double().requires_grad_() for x in (h_TD, weight_VD))
    loss = F.cross_entropy((h_TD @ weight_VD.T)[mask_T], target_T[mask_T], reduction="sum")
    return loss, *torch.autograd.grad(loss, (h_TD, weight_VD))


@pytest.mark.parametrize("chunk", [1, 4, TOKENS, 100])
def test_equals_torch_in_fp64(chunk):
    h_TD, weight_VD, target_T, mask_T = _case()
    target_T = target_T.masked_fill(~mask_T, -100)  # what loaders put there is not an index
    loss = chunked_cross_entropy(h_TD, weight_VD, target_T, mask_T, chunk)
    (0.25 * loss).backward()  # an incoming gradient other than 1
    expected, grad_h_TD, grad_weight_VD = _reference(h_TD, weight_VD, target_T, mask_T)
    # sums of fewer than 200 terms of size <= 30 in fp64: 200 * 30 * 1.1e-16 < 1e-12
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(h_TD.grad, 0.25 * grad_h_TD, rtol=0, atol=1e-12)
    torch.testing.assert_close(weight_VD.grad, 0.25 * grad_weight_VD, rtol=0, atol=1e-12)


def test_gradcheck():
    h_TD, weight_VD, target_T, mask_T = _case(seed=1)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, target_T, mask_T, 4) / 3.0, (h_TD, weight_VD)
    )


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs_lose_only_their_own_rounding(dtype, device):
    h_TD, weight_VD, target_T, mask_T = _case(dtype, device=device)
    loss = chunked_cross_entropy(h_TD, weight_VD, target_T, mask_T, 5)
    loss.backward()
    expected, grad_h_TD, grad_weight_VD = _reference(h_TD, weight_VD, target_T, mask_T)  # of the rounded inputs
    assert loss.dtype == torch.float32
    assert h_TD.grad.dtype == weight_VD.grad.dtype == dtype
    # The loss never touches the narrow type. A gradient is rounded once as d_logits and once as the result.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    eps = torch.finfo(dtype).eps
    for got, want in ((h_TD.grad, grad_h_TD), (weight_VD.grad, grad_weight_VD)):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2 * eps * float(want.abs().max()) + 1e-6)


def test_masked_tokens_add_exactly_nothing():
    h_TD, weight_VD, target_T, mask_T = _case()
    poisoned_TD = h_TD.detach().clone()
    poisoned_TD[~mask_T] = math.nan
    poisoned_TD.requires_grad_()
    loss = chunked_cross_entropy(poisoned_TD, weight_VD, target_T, mask_T, 4)
    loss.backward()
    poisoned_grad_VD = weight_VD.grad.clone()
    weight_VD.grad = None
    clean = chunked_cross_entropy(h_TD, weight_VD, target_T, mask_T, 4)
    clean.backward()
    assert torch.equal(loss, clean)
    assert torch.equal(poisoned_grad_VD, weight_VD.grad)
    assert torch.count_nonzero(poisoned_TD.grad[~mask_T]) == 0
    nothing = chunked_cross_entropy(h_TD, weight_VD, target_T, torch.zeros_like(mask_T), 4)
    assert nothing.item() == 0.0
    no_tokens = chunked_cross_entropy(h_TD[:0], weight_VD, target_T[:0], mask_T[:0], 4)
    assert no_tokens.item() == 0.0


def test_without_gradient_gives_the_same_value():
    h_TD, weight_VD, target_T, mask_T = _case()
    loss = chunked_cross_entropy(h_TD, weight_VD, target_T, mask_T, 4)
    with torch.no_grad():
        evaluated = chunked_cross_entropy(h_TD, weight_VD, target_T, mask_T, 4)
    assert not evaluated.requires_grad
    assert torch.equal(evaluated, loss)


def test_only_the_gradients_asked_for():
    h_TD, weight_VD, target_T, mask_T = _case()
    frozen = weight_VD.detach()
    chunked_cross_entropy(h_TD, frozen, target_T, mask_T, 4).backward()
    _, grad_h_TD, _ = _reference(h_TD, frozen, target_T, mask_T)
    torch.testing.assert_close(h_TD.grad, grad_h_TD, rtol=0, atol=1e-12)


def test_keeps_no_logits():
    """What autograd holds between forward and backward grows with T*D and V*D, not T*V."""
    h_TD, weight_VD, target_T, mask_T = _case()
    loss = chunked_cross_entropy(h_TD, weight_VD, target_T, mask_T, 4)
    saved = [x.shape for x in loss.grad_fn.saved_tensors]
    assert saved == [(TOKENS, WIDTH), (VOCAB, WIDTH)]


def test_refuses_an_empty_chunk():
    with pytest.raises(ValueError, match=r"chunk is 0; the nearest legal value is 1"):
        chunked_cross_entropy(*_case(), 0)
