"""Cross-entropy of the next token, in chunks of tokens, without ever keeping [T, V] logits.

T tokens of this rank, D model width, V vocabulary rows. With V = 150,000 the fp32 logits of 8192 tokens are 5 GB, and
autograd would hold their gradient as well. So each chunk's gradients are worked out right after its loss, in the
forward pass, and only d_h [T, D] and d_weight [V, D] live on; the backward pass scales them by the incoming gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.comm.collectives import all_reduce_sum
from moetrain.fused import fused


def chunked_cross_entropy(
    h_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    mask_T: Tensor,
    chunk: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Sum over unmasked tokens of `-log softmax(h @ weight.T)[target]`, in nats.

    h_TD: final hidden states; weight_VD: output embedding, of the same dtype (fp64, fp32, or bf16).
    target_T: int64 in [0, V) wherever mask_T (bool) is true, anything elsewhere: masked tokens add exactly 0 to the
    loss and to both gradients, whatever they hold. chunk: tokens whose logits exist at one time.
    group: ranks that hold equal consecutive parts of the vocabulary in rank order, weight_VD being this rank's, and the
    same h and targets. Each gets the whole loss, its own d_weight, and its part of d_h: the sum over the group is d_h.

    Returns a 0-d SUM in fp64 for fp64 and fp32 otherwise; the caller divides by the global batch's N, because a mean
    over local tokens would depend on the layout. Logits, softmax, and the sum over chunks of d_weight are at least
    fp32. Nothing waits for the device. Raises ValueError if chunk < 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; the nearest legal value is 1")
    if torch.is_grad_enabled() and (h_TD.requires_grad or weight_VD.requires_grad):
        return _ChunkedCrossEntropy.apply(h_TD, weight_VD, target_T, mask_T, chunk, group)
    total = h_TD.new_zeros((), dtype=_wide(h_TD))
    for span in _spans(h_TD.shape[0], chunk):
        loss, _, _ = _chunk_loss(h_TD[span], weight_VD, target_T[span], mask_T[span], group, gradient=False)
        total = total + loss
    return all_reduce_sum(total, group)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_TD: Tensor,
        weight_VD: Tensor,
        target_T: Tensor,
        mask_T: Tensor,
        chunk: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        wide = _wide(h_TD)
        total = h_TD.new_zeros((), dtype=wide)
        grad_h_TD = torch.empty_like(h_TD, dtype=wide) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        for span in _spans(h_TD.shape[0], chunk):
            loss, grad_CV, h_CD = _chunk_loss(h_TD[span], weight_VD, target_T[span], mask_T[span], group)
            assert grad_CV is not None
            total += loss
            if grad_h_TD is not None:
                grad_h_TD[span] = _matmul(grad_CV, weight_VD)
            if grad_weight_VD is not None:
                _add_matmul(grad_weight_VD, grad_CV.T, h_CD)
        ctx.save_for_backward(grad_h_TD, grad_weight_VD)
        ctx.dtype = h_TD.dtype
        return all_reduce_sum(total, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h_TD, grad_weight_VD = (
            None if saved is None else _scaled(saved, grad, ctx.dtype) for saved in ctx.saved_tensors
        )
        return grad_h_TD, grad_weight_VD, None, None, None, None


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if fused(x):
        import moetrain_kernels

        return moetrain_kernels.convert(x, dtype, scale)
    return (x * scale).to(dtype)


def _spans(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a result of at least fp32; on CUDA bf16 operands keep their tensor cores."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with `_matmul`'s dtypes; on CUDA the product is added where it is made."""
    if a.is_cuda and a.dtype not in (torch.float32, torch.float64):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += _matmul(a, b)


def _chunk_loss(
    h_CD: Tensor,
    weight_VD: Tensor,
    target_C: Tensor,
    mask_C: Tensor,
    group: dist.ProcessGroup | None,
    gradient: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Loss sum of one chunk (of the targets that are in this part of the vocabulary), d loss / d logits [C, V] in h's
    dtype if wanted, and h with masked rows zeroed, because 0 * NaN would be NaN."""
    h_CD = h_CD.masked_fill(~mask_C[:, None], 0)
    logit_CV = _matmul(h_CD, weight_VD.T)
    if group is None and fused(h_CD):
        import moetrain_kernels

        dtype = h_CD.dtype if gradient else None
        loss_C, grad_CV = moetrain_kernels.cross_entropy(logit_CV, target_C, mask_C, dtype)
        return loss_C.sum(), grad_CV, h_CD
    log_prob_CV = _log_softmax(logit_CV, group)
    row_C, here_C = _own(target_C, mask_C, weight_VD.shape[0], group)
    picked_C = log_prob_CV.gather(1, row_C[:, None]).squeeze(1)
    loss = -picked_C.masked_fill(~here_C, 0).sum()
    if not gradient:
        return loss, None, h_CD
    return loss, _logit_gradient(log_prob_CV, target_C, mask_C, group).to(h_CD.dtype), h_CD


def _log_softmax(logit_CV: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Over the vocabulary of all ranks of the group, of which this rank has V columns."""
    if group is None:
        return torch.log_softmax(logit_CV, dim=-1)
    largest_C1 = logit_CV.amax(dim=-1, keepdim=True)
    dist.all_reduce(largest_C1, op=dist.ReduceOp.MAX, group=group)
    logit_CV = logit_CV - largest_C1
    return logit_CV - all_reduce_sum(logit_CV.exp().sum(dim=-1, keepdim=True), group).log()


def _own(target_C: Tensor, mask_C: Tensor, rows: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Targets as rows of this rank's part of the vocabulary (0 for others), and which of them count here."""
    row_C = target_C if group is None else target_C - group.rank() * rows
    here_C = mask_C if group is None else mask_C & (row_C >= 0) & (row_C < rows)
    return row_C.masked_fill(~here_C, 0), here_C


def _logit_gradient(log_prob_CV: Tensor, target_C: Tensor, mask_C: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """d loss / d logits = softmax - onehot(target), rows of masked tokens 0. Overwrites its first argument."""
    grad_CV = log_prob_CV.exp_()
    row_C, here_C = _own(target_C, mask_C, grad_CV.shape[1], group)
    grad_CV.scatter_add_(1, row_C[:, None], -here_C[:, None].to(grad_CV.dtype))
    return grad_CV.masked_fill_(~mask_C[:, None], 0)
