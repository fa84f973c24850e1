"""AdamW's update of one tensor in one pass: four tensors read, three written, and nothing else.

torch's fused update does the same for lists of tensors, but in chunks that keep memory less busy, and writes gradients
back where it divides them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Launcher, cdiv, interpreting

BLOCK = 2048


@triton.jit(do_not_specialize=["size", "number"])
def adamw_kernel(
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    correction_N2,
    divisor_ptr,
    size,
    number,
    lr,
    rest1,
    rest2,
    eps,
    decay,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Elements [BLOCK * program, ...) of parameter, gradient, and moments. rest: 1 - beta."""
    correction1 = tl.load(correction_N2 + 2 * number)
    correction2 = tl.load(correction_N2 + 2 * number + 1)
    divisor = tl.load(divisor_ptr)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if EVEN:  # a mask whose edge is unknown cuts every access to four bytes
        inside = tl.full((BLOCK,), 1, tl.int1)
    p = tl.load(p_ptr + at, mask=inside, other=0.0)
    g = tl.load(g_ptr + at, mask=inside, other=0.0) / divisor
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    m += (g - m) * rest1
    v += (g * g - v) * rest2
    p -= p * decay
    p -= (lr / correction1) * m / (tl.sqrt(v) / tl.sqrt(correction2) + eps)
    tl.store(p_ptr + at, p, mask=inside)
    tl.store(m_ptr + at, m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)


launch_adamw = Launcher(adamw_kernel)


def adamw(
    parameters: list[torch.Tensor],
    grads: list[torch.Tensor],
    moments: tuple[list[torch.Tensor], list[torch.Tensor]],
    steps: list[torch.Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    divisor: torch.Tensor | None = None,
) -> None:
    """Update in place (Loshchilov & Hutter 2019, arXiv:1711.05101). steps: 0-d fp32, each counting this update already.

    divisor: 0-d fp32, what gradients are divided by first. Nothing waits for the device. Raises ValueError for tensors
    that are not fp32, contiguous, and on a GPU.
    """
    if not parameters:
        return
    device = parameters[0].device
    if device.type != "cuda" and not interpreting():
        raise ValueError(f"the update kernel needs a CUDA tensor; got one on {device}")
    for tensor in [*parameters, *grads, *moments[0], *moments[1]]:
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"the update kernel takes contiguous fp32; got {tensor.dtype}, strides {tensor.stride()}")
    step_N1 = torch.stack(steps).double()[:, None]  # in fp64: 1 - beta2^step would lose its digits
    correction_N2 = torch.cat([1.0 - beta**step_N1 for beta in betas], dim=1).float()
    divisor = torch.ones((), device=device) if divisor is None else divisor
    rates = (lr, 1.0 - betas[0], 1.0 - betas[1], eps, lr * weight_decay)
    for number, (p, g, m, v) in enumerate(zip(parameters, grads, *moments)):
        if p.numel():
            args = (p, g, m, v, correction_N2, divisor, p.numel(), number, *map(float, rates))
            constants = {"BLOCK": BLOCK, "EVEN": p.numel() % BLOCK == 0}
            launch_adamw((cdiv(p.numel(), BLOCK), 1, 1), args, constants, num_warps=4)
