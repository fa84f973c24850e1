"""Run by test_triton_backend.py in a process that interprets Triton: the backend against the reference in fp64."""

import torch

from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.moe.experts.triton import build

tokens, d_model, d_expert, n_experts, slots = 9, 32, 16, 4, 3
g = torch.Generator().manual_seed(0)
expert = torch.stack([torch.randperm(n_experts, generator=g)[:slots] for _ in range(tokens)])
expert[torch.rand(tokens, slots, generator=g) < 0.3] = -1
exact = [
    torch.randn(tokens, d_model, generator=g),
    torch.rand(tokens, slots, generator=g),
    torch.randn(n_experts, 2, d_expert, d_model, generator=g),
    torch.randn(n_experts, d_model, d_expert, generator=g),
]
upstream = torch.randn(tokens, d_model, generator=g)


def run(backend, dtype):
    x, gate, w_gate_up, w_down = (t.detach().to(dtype).requires_grad_() for t in exact)
    y = backend(x, expert, gate, w_gate_up, w_down)
    y.backward(upstream.to(dtype))
    return [y.detach(), x.grad, gate.grad, w_gate_up.grad, w_down.grad]


backend = build("fp32", "cuda", d_model, d_expert)
for name, mine, reference in zip(
    ("y", "dx", "dgate", "dw_gate_up", "dw_down"), run(backend, torch.float32), run(ReferenceExperts(), torch.float64)
):
    error = float((mine.double() - reference).norm() / reference.norm())
    assert error < 1e-5, f"{name}: {error}"  # sums of at most 48 fp32 products
print("equal")
