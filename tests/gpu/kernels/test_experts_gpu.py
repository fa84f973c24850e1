"""The expert layer on a GPU against the fp64 reference, with the allocator poisoned by NaN first."""

import pytest
import torch
from moetrain_kernels import moe_experts, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# T, D, F, E, K: awkward sizes, then slices of real layers.
SHAPES = [
    (1, 64, 32, 4, 2),
    (77, 136, 72, 5, 3),
    (300, 200, 104, 130, 6),
    (515, 520, 264, 3, 2),
    (600, 192, 136, 5, 3),
    (1000, 320, 72, 40, 2),
    (2048, 1024, 512, 16, 4),
    (6000, 320, 264, 8, 2),
    (4096, 2048, 768, 96, 1),
]
ROUTINGS = ["uniform", "one", "holes"]
LIMIT = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}


def poison() -> None:
    """Fill the caching allocator's free blocks with NaN, so that anything unwritten is seen."""
    blocks = [torch.full((n,), float("nan"), device="cuda") for n in (1 << 28, 1 << 24, 1 << 20, 1 << 16, 1 << 12, 512)]
    del blocks


def make(shape, dtype, routing, seed=0):
    num_t, num_d, num_f, num_e, top_k = shape
    g = torch.Generator("cuda").manual_seed(seed)

    def randn(*size, scale=1.0):
        return (torch.randn(*size, device="cuda", generator=g) * scale).to(dtype)

    expert = torch.rand(num_t, num_e, device="cuda", generator=g).topk(top_k, dim=1).indices
    if routing == "one":  # every token's first slot goes to the last expert, the other slots are unused
        expert = torch.full_like(expert, -1)
        expert[:, 0] = num_e - 1
    if routing == "holes":
        expert[torch.rand(num_t, top_k, device="cuda", generator=g) < 0.4] = -1
    gate = torch.rand(num_t, top_k, device="cuda", generator=g)
    leaves = [
        randn(num_t, num_d),
        gate,
        randn(num_e, 2, num_f, num_d, scale=num_d**-0.5),
        randn(num_e, num_d, num_f, scale=num_f**-0.5),
    ]
    return leaves, expert, randn(num_t, num_d)


def run(layer, leaves, expert, dy, **kwargs):
    x, gate, w_up, w_down = (leaf.detach().clone().requires_grad_() for leaf in leaves)
    y = layer(x, expert, gate, w_up, w_down, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, (x, gate, w_up, w_down), dy)]


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", list(LIMIT), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(shape, dtype, routing):
    leaves, expert, dy = make(shape, dtype, routing)
    poison()
    got = run(moe_experts, leaves, expert, dy)
    exact = run(reference.moe_experts, [leaf.double() for leaf in leaves], expert, dy.double())
    errors = {n: relative(a, b) for n, a, b in zip(("y", "dx", "dgate", "dw_up", "dw_down"), got, exact)}
    assert all(e <= LIMIT[dtype] for e in errors.values()), errors


def test_bound_on_rows_changes_nothing():
    """With more than 200 rows an expert either way: below that other kernels take over, which round otherwise."""
    leaves, expert, dy = make((500, 256, 128, 4, 4), torch.bfloat16, "holes")
    rows = int((expert >= 0).sum())
    assert rows >= 200 * 4
    free = run(moe_experts, leaves, expert, dy)
    for bound in (rows, rows + 7):
        poison()
        assert all(torch.equal(a, b) for a, b in zip(free, run(moe_experts, leaves, expert, dy, max_rows=bound)))


def test_unaligned_and_expanded_gradients():
    leaves, expert, dy = make((100, 256, 128, 8, 2), torch.bfloat16, "uniform")
    padded = torch.empty(dy.numel() + 1, device="cuda", dtype=dy.dtype)
    unaligned = padded[1:].view_as(dy).copy_(dy)
    assert all(
        torch.equal(a, b)
        for a, b in zip(run(moe_experts, leaves, expert, dy), run(moe_experts, leaves, expert, unaligned))
    )
    ones = torch.ones(1, 1, device="cuda", dtype=dy.dtype).expand_as(dy)
    assert all(
        torch.equal(a, b)
        for a, b in zip(run(moe_experts, leaves, expert, ones), run(moe_experts, leaves, expert, ones.contiguous()))
    )


def test_repeats_bit_for_bit():
    leaves, expert, dy = make((4096, 1024, 512, 16, 4), torch.bfloat16, "uniform")
    first = run(moe_experts, leaves, expert, dy)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(moe_experts, leaves, expert, dy)))


def test_every_backward_pass_of_one_forward_gets_all_tiles():
    """Tiles come from counters that the forward pass sets once: every launch must leave them as it found them."""
    leaves, expert, dy = make((6000, 1024, 512, 16, 4), torch.bfloat16, "holes")
    x, gate, w_up, w_down = (leaf.requires_grad_() for leaf in leaves)
    y = moe_experts(x, expert, gate, w_up, w_down)
    first = torch.autograd.grad(y, (x, gate, w_up, w_down), dy, retain_graph=True)
    for _ in range(3):
        poison()
        again = torch.autograd.grad(y, (x, gate, w_up, w_down), dy, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_layers_in_turn_and_backward_passes_from_another_stream():
    """A plan's counters serve one launch at a time: autograd runs every backward pass where the forward pass ran."""
    problems = [make((6000, 1024, 512, 16, 4), torch.bfloat16, routing, seed) for seed, routing in enumerate(ROUTINGS)]
    alone = [run(moe_experts, *problem)[1:] for problem in problems]
    layers = []
    for leaves, expert, dy in problems:
        x, gate, w_up, w_down = (leaf.detach().clone().requires_grad_() for leaf in leaves)
        layers.append((moe_experts(x, expert, gate, w_up, w_down), (x, gate, w_up, w_down), dy))
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(3)], []
    for i in (2, 1, 1, 0, 2, 0, 1):
        with torch.cuda.stream(streams[len(found) % 3]):
            found.append((i, torch.autograd.grad(*layers[i], retain_graph=True)))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for i, grads in found for a, b in zip(grads, alone[i]))


def test_graphs_of_a_step_and_of_its_backward_pass_alone():
    """The first sets the counters to zero whenever it is replayed, the second never."""
    leaves, expert, dy = make((6000, 1024, 512, 16, 4), torch.bfloat16, "holes")
    want = run(moe_experts, leaves, expert, dy)
    side, graphs = torch.cuda.Stream(), [torch.cuda.CUDAGraph() for _ in range(2)]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x, gate, w_up, w_down = (leaf.detach().clone().requires_grad_() for leaf in leaves)
        y = moe_experts(x, expert, gate, w_up, w_down)
    with torch.cuda.graph(graphs[0], stream=side, capture_error_mode="thread_local"):
        step = run(moe_experts, leaves, expert, dy)
    with torch.cuda.graph(graphs[1], stream=side, capture_error_mode="thread_local"):
        grads = torch.autograd.grad(y, (x, gate, w_up, w_down), dy, retain_graph=True)
    for _ in range(3):
        for tensor in (*step, *grads):
            tensor.fill_(float("nan"))
        for graph in graphs:
            graph.replay()
        assert all(torch.equal(a, b) for a, b in zip((*step, *grads), (*want, *want[1:])))


def test_no_host_synchronisation():
    leaves, expert, dy = make((512, 256, 128, 8, 2), torch.bfloat16, "uniform")
    run(moe_experts, leaves, expert, dy)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(moe_experts, leaves, expert, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_keeps_only_the_pre_activation():
    num_t, num_d, num_f, num_e, top_k = 8192, 512, 256, 16, 4
    leaves, expert, _ = make((num_t, num_d, num_f, num_e, top_k), torch.bfloat16, "uniform")
    x, gate, w_up, w_down = (leaf.requires_grad_() for leaf in leaves)
    before = torch.cuda.memory_allocated()
    y = moe_experts(x, expert, gate, w_up, w_down)
    held = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    assert held <= 1.05 * num_t * top_k * 2 * num_f * 2
