"""The expert layer in pieces on a GPU against fp64 over all rows, with the allocator poisoned by NaN first."""

import pytest
import torch
from moetrain_kernels import ExpertPieces, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# T, D, F, E, K: plain Triton kernels, the ring's for weight gradients only, and the ring's everywhere.
SHAPES = [(515, 520, 264, 3, 2), (600, 192, 136, 5, 3), (2048, 1024, 512, 16, 4), (3000, 256, 128, 100, 2)]
LIMIT = {torch.float32: 2e-5, torch.bfloat16: 6e-3}


def poison() -> None:
    """Fill the caching allocator's free blocks with NaN, so that anything unwritten is seen."""
    blocks = [torch.full((n,), float("nan"), device="cuda") for n in (1 << 28, 1 << 24, 1 << 20, 1 << 16, 1 << 12, 512)]
    del blocks


def problem(shape, dtype):
    """Every expert's number of rows differs; the last one and a third of the slots are unused."""
    num_t, num_d, num_f, num_e, top_k = shape
    g = torch.Generator("cuda").manual_seed(0)

    def randn(*size, scale=1.0):
        return (torch.randn(*size, device="cuda", generator=g) * scale).to(dtype)

    popularity_E = torch.arange(1, num_e, device="cuda").float().rsqrt()
    expert = torch.multinomial(popularity_E.expand(num_t, -1), min(top_k, num_e - 1), generator=g)
    expert[torch.rand(expert.shape, device="cuda", generator=g) < 0.3] = -1
    gate = torch.rand(expert.shape, device="cuda", generator=g)
    w_up, w_down = randn(num_e, 2, num_f, num_d, scale=num_d**-0.5), randn(num_e, num_d, num_f, scale=num_f**-0.5)
    return randn(num_t, num_d), expert, gate, w_up, w_down, randn(num_t, num_d)


def in_pieces(x, expert, gate, w_up, w_down, dy, cut):
    """As an exchange does it: the first piece's second halves come last. y, dx, dgate, both dw."""
    work, order = ExpertPieces(w_up, w_down, (True,) * 4), [*range(1, len(cut)), 0]
    parts = [[t.clone() for t in part] for part in zip(x.split(cut), expert.split(cut), gate.split(cut), dy.split(cut))]
    for x_part, expert_part, gate_part, _ in parts:
        work.start(x_part, expert_part, gate_part)
    y = {i: work.finish(i) for i in order}
    for i, part in enumerate(parts):
        work.start_gradients(i, part[3], far=i == 1)
    found = {i: work.finish_gradients(i) for i in order[:-1]}
    dw = work.weight_gradients(lambda: found.update({0: work.finish_gradients(0)}))
    rows = [torch.cat(column) for column in zip(*((y[i], *found[i]) for i in range(len(cut))))]
    return [*rows, *dw]


@pytest.mark.parametrize("dtype", list(LIMIT), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [(0.5, 0.5), (0.1, 0.0, 0.6, 0.3)], ids=str)
def test_pieces_match_fp64(shape, dtype, share):
    x, expert, gate, w_up, w_down, dy = problem(shape, dtype)
    cut = [int(len(x) * part) for part in share[1:]]
    cut = [len(x) - sum(cut), *cut]
    poison()
    got = in_pieces(x, expert, gate, w_up, w_down, dy, cut)
    assert all(torch.equal(a, b) for a, b in zip(got, in_pieces(x, expert, gate, w_up, w_down, dy, cut)))
    leaves = [t.double().requires_grad_() for t in (x, gate, w_up, w_down)]
    y = reference.moe_experts(leaves[0], expert, *leaves[1:])
    want = [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]
    for name, a, b in zip(("y", "dx", "dgate", "dw_up", "dw_down"), got, want):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error <= LIMIT[dtype], (name, error)
    assert not got[3][-1].any()
