"""Cross-entropy and its gradient from logits: one launch, one program a row, which reads the row twice.

Written apart from the matmuls around it: these run at their own best, and the logits of a chunk of tokens are the only
large tensor between them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Launcher, interpreting, power_of_2

BLOCK = 8192  # logits of one step through a row


@triton.jit
def cross_entropy_kernel(
    logit_ptr,
    target_C,
    mask_C,
    loss_C,
    grad_ptr,
    columns: tl.constexpr,
    BLOCK: tl.constexpr,
    GRAD: tl.constexpr,
):
    """Loss of one row, 0 where its mask is; with GRAD also softmax - onehot, likewise."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    first = row * columns
    if tl.load(mask_C + row) != 0:
        target = tl.load(target_C + row)
        high_B = tl.full((BLOCK,), -float("inf"), tl.float32)
        sum_B = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):  # every lane keeps its own maximum: no reduction inside the loop
            logit_B = tl.load(logit_ptr + first + start + column, mask=start + column < columns, other=-float("inf"))
            new_B = tl.maximum(high_B, logit_B)
            base_B = tl.where(new_B == -float("inf"), 0.0, new_B)
            sum_B = sum_B * tl.exp(high_B - base_B) + tl.exp(logit_B - base_B)
            high_B = new_B
        high = tl.max(high_B, axis=0)
        total = tl.sum(sum_B * tl.exp(high_B - high), axis=0)
        lse = high + tl.log(total)
        tl.store(loss_C + row, lse - tl.load(logit_ptr + first + target))
        if GRAD:
            for start in range(0, columns, BLOCK):
                inside = start + column < columns
                logit_B = tl.load(logit_ptr + first + start + column, mask=inside, other=0.0)
                grad_B = tl.exp(logit_B - lse) - tl.where(start + column == target, 1.0, 0.0)
                tl.store(grad_ptr + first + start + column, grad_B.to(grad_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(loss_C + row, 0.0)
        if GRAD:
            for start in range(0, columns, BLOCK):
                zero_B = tl.zeros((BLOCK,), grad_ptr.dtype.element_ty)
                tl.store(grad_ptr + first + start + column, zero_B, mask=start + column < columns)


launch_cross_entropy = Launcher(cross_entropy_kernel)


@torch.compiler.disable
def cross_entropy(
    logit_CV: torch.Tensor, target_C: torch.Tensor, mask_C: torch.Tensor, grad_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`loss_C` = -log softmax(logit)[target] in fp32 and, in `grad_dtype`, its gradient `grad_CV`; None asks for none.

    logit_CV fp32; target_C int64 in [0, V) where mask_C (bool) is true, anything elsewhere: there both results are 0,
    whatever the logits hold. Not differentiable: it gives the gradient itself. Raises ValueError for other dtypes.
    """
    if logit_CV.dtype != torch.float32 or (logit_CV.device.type != "cuda" and not interpreting()):
        raise ValueError(f"the loss kernel needs fp32 logits on a GPU; got {logit_CV.dtype} on {logit_CV.device}")
    logit_CV = logit_CV.contiguous()  # before a gradient is made like it, which the kernel writes row by row
    rows, columns = logit_CV.shape
    loss_C = torch.empty(rows, dtype=torch.float32, device=logit_CV.device)
    grad_CV = None if grad_dtype is None else torch.empty_like(logit_CV, dtype=grad_dtype)
    if rows:
        block = min(BLOCK, power_of_2(columns))
        args = (
            logit_CV,
            target_C.contiguous(),
            mask_C.to(torch.uint8),
            loss_C,
            loss_C if grad_CV is None else grad_CV,
        )
        constants = {"columns": columns, "BLOCK": block, "GRAD": grad_CV is not None}
        launch_cross_entropy((rows, 1, 1), args, constants, num_warps=8 if block >= 2048 else 4)
    return loss_C, grad_CV
