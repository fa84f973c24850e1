"""How much the loss depends on each hidden neuron of a dense model, with one layer in memory at a time.

The score is LLaMA-MoE's, |h * dL/dh| averaged over tokens: what removing the neuron would change to first order.
Forward keeps each layer's input, which is small beside its weights; backward then visits the layers from the last to
the first, each rebuilt, run once more, and differentiated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.model.block import Block
from moetrain.model.core import ForwardContext, share
from moetrain.model.generate import one_document
from moetrain.model.norm import RMSNorm
from moetrain.upcycle.base import Model, Weights


def importance(dense: Model, token_BS: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[L, F] in `dtype`, on the CPU. token_BS: int64 ids of whole documents."""
    model, weights = dense.config.model, dense.weights
    context = share(one_document(token_BS), model.attention, dtype, documents=False)
    entering = [F.embedding(token_BS, weights["embed.weight"].make()).to(dtype)]
    for layer in range(model.n_layers):
        with torch.no_grad():
            entering.append(_block(dense, layer, dtype)(entering[-1], context, None)[0])
    grad_BSD = _grad_of_loss(dense, entering.pop(), token_BS)
    rows = []
    for layer in reversed(range(model.n_layers)):
        grad_BSD, row_F = _backward(_block(dense, layer, dtype), entering.pop(), context, grad_BSD)
        rows.append(row_F)
    return torch.stack(rows[::-1])


def _block(dense: Model, layer: int, dtype: torch.dtype) -> Block:
    def no_experts(layer: int) -> nn.Module:
        raise AssertionError("a dense model has no experts")

    with torch.device("meta"):
        block = Block(dense.config.model, layer, no_experts)
    names = {name: f"layers.{layer}.{name}" for name in block.state_dict()}
    block.load_state_dict({name: dense.weights[there].make().to(dtype) for name, there in names.items()}, assign=True)
    return block.requires_grad_(False)


def _backward(block: Block, x_BSD: Tensor, context: ForwardContext, grad_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """The loss's gradient by the layer's input, and the mean of |h * dL/dh| over tokens."""
    kept: list[Tensor] = []
    x_BSD = x_BSD.requires_grad_()
    handle = block.mlp.w_down.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    y_BSD, _ = block(x_BSD, context, None)
    handle.remove()
    (h_BSF,) = kept
    below_BSD, grad_BSF = torch.autograd.grad(y_BSD, (x_BSD, h_BSF), grad_BSD)
    return below_BSD, (h_BSF.detach() * grad_BSF).abs().flatten(0, 1).mean(0)


def _grad_of_loss(dense: Model, x_BSD: Tensor, token_BS: Tensor) -> Tensor:
    x_BSD = x_BSD.requires_grad_()
    model, weights = dense.config.model, dense.weights
    norm = RMSNorm(model.d_model, model.norm_eps)
    norm.load_state_dict({"weight": weights["norm.weight"].make().to(x_BSD.dtype)}, assign=True)
    head_VD = _head(weights).to(x_BSD.dtype)
    logit_BSV = F.linear(norm(x_BSD), head_VD)
    loss = F.cross_entropy(logit_BSV[:, :-1].flatten(0, 1), token_BS[:, 1:].flatten())
    return torch.autograd.grad(loss, x_BSD)[0]


def _head(weights: Weights) -> Tensor:
    return weights["head.weight" if "head.weight" in weights else "embed.weight"].make()
