"""What of a MoE layer a CUDA graph can hold: captured once, replayed with other tokens and routings, against eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.balance.switch import SwitchLoss
from moetrain.moe.capacity import Capacity
from moetrain.moe.dispatch import allgather, collective
from moetrain.moe.dispatch.base import Dispatcher, ExchangeShape
from moetrain.moe.dispatch.local import LocalDispatch
from moetrain.moe.experts.base import ExpertBackend
from moetrain.moe.experts.grouped_mm import GroupedMMExperts
from moetrain.moe.experts.module import Experts
from moetrain.moe.experts.reference import ReferenceExperts
from moetrain.moe.experts.triton import TritonExperts
from moetrain.moe.layer import MoELayer
from moetrain.moe.router.softmax import SoftmaxTopK
from moetrain.moe.types import TokenContext
from moetrain.testing.fake import fake_context, fake_routing

ROWS, S, D, F, E, K = 2, 256, 128, 64, 8, 2
Run = Callable[..., Sequence[Tensor]]
ONE_GPU = ("experts triton", "experts grouped_mm", "layer", "layer with capacity")
TWO_GPUS = ("collective padded 1", "collective padded 3", "allgather 1", "allgather 2")


def differences(run: Run, inputs: Sequence[Sequence[Tensor]]) -> int:
    """How many outputs of replays differ in any bit from eager ones. The first inputs are captured, all replayed."""
    static = [t.clone() for t in inputs[0]]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is only done the first time is not to be captured
        for _ in range(3):
            run(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph, found = torch.cuda.CUDAGraph(), 0
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = run(*static)
    for own in [*inputs[1:], inputs[0]]:
        for place, value in zip(static, own):
            place.copy_(value)
        graph.replay()
        replayed = [t.clone() for t in captured]
        found += sum(not torch.equal(a, b) for a, b in zip(replayed, run(*own), strict=True))
    torch.cuda.synchronize()
    return found


def case(name: str, count: int = 3, device: str = "cuda") -> tuple[Run, list[list[Tensor]]]:
    """One of ONE_GPU or TWO_GPUS, and `count` inputs that differ in every tensor."""
    torch.manual_seed(0)
    kind, *rest = name.split()
    if kind == "layer":
        layer, context = make_layer(device, capacity=bool(rest)), make_context(device)
        run = lambda x_BSD, dy_BSD: through_layer(layer, context, x_BSD, dy_BSD)  # noqa: E731
        return run, [[_normal(device, ROWS, S, D) for _ in range(2)] for _ in range(count)]
    ranks = dist.get_world_size() if kind != "experts" else 1
    weights = [_normal(device, E // ranks, 2, F, D) * D**-0.5, _normal(device, E // ranks, D, F) * F**-0.5]
    backend: ExpertBackend = GroupedMMExperts() if "grouped_mm" in rest else _kernels(device)
    dispatcher: Dispatcher = LocalDispatch()
    if kind != "experts":
        torch.manual_seed(1 + dist.get_rank())
        shape = ExchangeShape(ROWS * S, D, K, torch.bfloat16, device, ROWS * S)
        module = SimpleNamespace(collective=collective, allgather=allgather).__dict__[kind]
        dispatcher = module.build(E, dist.group.WORLD, shape, int(rest[-1]))
    run = lambda *tensors: through_experts(dispatcher, backend, tensors)  # noqa: E731
    inputs = []
    for _ in range(count):
        tokens = ROWS * S
        expert = torch.rand(tokens, E, device=device).argsort(-1)[:, :K]
        expert[torch.rand(tokens, K, device=device) < 0.2] = -1
        gate = torch.rand(tokens, K, device=device)
        inputs.append([_normal(device, tokens, D), expert, gate, *weights, _normal(device, tokens, D)])
    return run, inputs


def through_experts(dispatcher: Dispatcher, backend: ExpertBackend, tensors: Sequence[Tensor]) -> list[Tensor]:
    """x, experts, gates, both weights, dy -> y and the gradients of x, gates, and weights."""
    x_TD, expert_TK, gate_TK, *weights, dy_TD = tensors
    x, gate, up, down = (t.detach().requires_grad_() for t in (x_TD, gate_TK, *weights))
    routing = fake_routing(expert_TK, gate, bounded=True)
    y_TD = dispatcher(x, routing, backend, (up, down))
    return [y_TD.detach(), *torch.autograd.grad(y_TD, (x, gate, up, down), dy_TD)]


def make_layer(device: str, capacity: bool) -> MoELayer:
    """Router, Switch loss, experts; all experts here."""
    experts = Experts(E, D, F, _kernels(device))
    layer = MoELayer(SoftmaxTopK(D, E, K), experts, {"switch": SwitchLoss(E)}, None).to(device)
    torch.nn.init.normal_(layer.router.weight)  # type: ignore[arg-type]
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        weight.data = weight.data.bfloat16()
    layer.capacity = Capacity(1.0, pad=True, n_experts=E) if capacity else None
    return layer


def make_context(device: str) -> TokenContext:
    """Packed rows with padding, numbered as a capacity wants them."""
    context = fake_context(ROWS, S, padding=5)
    named = ("token_BS", "position_BS", "document_BS")
    moved = {name: getattr(context, name).to(device) for name in named}
    totals = replace(context.totals, tokens=context.totals.tokens.to(device))
    index_BS = torch.arange(ROWS * S, device=device).view(ROWS, S)
    return replace(context, totals=totals, index_BS=index_BS, **moved)


def through_layer(layer: MoELayer, context: TokenContext, x_BSD: Tensor, dy_BSD: Tensor) -> list[Tensor]:
    """y and the gradients of x and all parameters, the balance loss's included."""
    layer.stats.reset()
    x = x_BSD.detach().requires_grad_()
    y_BSD, _ = layer(x, context)
    return [y_BSD.detach(), *torch.autograd.grad(y_BSD, (x, *layer.parameters()), dy_BSD)]


def _kernels(device: str) -> ExpertBackend:
    return TritonExperts() if device == "cuda" else ReferenceExperts()


def _normal(device: str, *size: int) -> Tensor:
    return torch.randn(*size, device=device).bfloat16()


def replayed(name: str) -> int:
    """`differences` of a case, on this rank."""
    return differences(*case(name))
