"""The loss over a divided vocabulary against F.cross_entropy of the whole one, in fp64."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from moetrain.loss import chunked_cross_entropy
from moetrain.testing import run_ranks

pytestmark = pytest.mark.distributed
TOKENS, WIDTH, VOCAB, WORLD = 13, 6, 12, 3


def case():
    generator = torch.Generator().manual_seed(0)
    h_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=generator)
    weight_VD = torch.randn(VOCAB, WIDTH, dtype=torch.float64, generator=generator)
    target_T = torch.randint(VOCAB, (TOKENS,), generator=generator)
    mask_T = torch.rand(TOKENS, generator=generator) < 0.7
    return h_TD, weight_VD, target_T.masked_fill(~mask_T, -100), mask_T


def one_rank(chunk):
    h_TD, weight_VD, target_T, mask_T = case()
    h_TD[~mask_T] = float("nan")  # a masked token must add exactly nothing
    part_VD = weight_VD.chunk(WORLD)[dist.get_rank()].clone().requires_grad_()
    h_TD.requires_grad_()
    loss = chunked_cross_entropy(h_TD, part_VD, target_T, mask_T, chunk, dist.group.WORLD)
    (0.25 * loss).backward()
    with torch.no_grad():
        evaluated = chunked_cross_entropy(h_TD, part_VD, target_T, mask_T, chunk, dist.group.WORLD)
    return loss.detach(), evaluated, h_TD.grad, part_VD.grad


@pytest.mark.parametrize("chunk", [4, 100])
def test_equals_one_process(chunk):
    h_TD, weight_VD, target_T, mask_T = case()
    h_TD.requires_grad_()
    weight_VD.requires_grad_()
    expected = F.cross_entropy((h_TD @ weight_VD.T)[mask_T], target_T[mask_T], reduction="sum")
    (0.25 * expected).backward()
    losses, evaluated, grads_h, grads_weight = zip(*run_ranks(one_rank, WORLD, chunk))
    # sums of fewer than 200 terms of size <= 30 in fp64: 200 * 30 * 1.1e-16 < 1e-12
    for loss in (*losses, *evaluated):
        torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-12)
    grad_h_TD = sum(grads_h)
    torch.testing.assert_close(grad_h_TD, h_TD.grad, rtol=0, atol=1e-12)
    assert all((grad[~mask_T] == 0).all() for grad in grads_h)
    torch.testing.assert_close(torch.cat(grads_weight), weight_VD.grad, rtol=0, atol=1e-12)
