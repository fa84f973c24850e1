"""Tensor parallelism with sequence parallelism, for dense layers, embedding, and head.

Between attention and feed-forward each tp rank holds an equal stretch of every row: norms, routers, MoE layers, and
residuals work on those tokens. Attention and the dense MLP gather the row, compute this rank's heads or columns, and
scatter the sums back ("Reducing Activation Recomputation in Large Transformer Models", arXiv:2205.05198).

Divided weights are DTensors over the mesh's `tp` axis. Weights that every tp rank keeps whole (norms, routers, shared
experts, biases, MLA's projections into latents) are each used for this rank's tokens or heads only, so each rank has a
part of their gradient: `sum_replicated_gradients` adds the parts, once a step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moetrain.comm.shards import gather_shards, local, sum_everywhere, sum_scatter
from moetrain.mesh.build import Meshes
from moetrain.model.block import Block
from moetrain.model.decoder import Decoder
from moetrain.model.norm import RMSNorm
from moetrain.moe.types import TokenContext

COLUMN = ("w_q", "w_k", "w_v", "w_kv", "w_gate", "w_up")  # outputs divided: heads, or the MLP's hidden width
ROW = ("w_o", "w_down")  # inputs divided: each rank's result is a part of the sum
SEQUENCE = 1  # the dim of [B, S, D]


@dataclass(frozen=True)
class Share:
    """This rank's place among those that divide one layer."""

    mesh: DeviceMesh
    group: dist.ProcessGroup
    rank: int
    size: int


def share_of(meshes: Meshes) -> Share:
    """This rank's place among its tp ranks."""
    mesh = meshes.dense["tp"]
    return Share(mesh, mesh.get_group(), mesh.get_local_rank(), mesh.size())


def apply_tp(model: Decoder, meshes: Meshes) -> None:
    """Divide dense layers over tp and fill the seams where rows are gathered. Parameters are still on meta."""
    if meshes.layout.tp == 1:
        return
    tp = share_of(meshes)
    gather = partial(gather_shards, dim=SEQUENCE, group=tp.group)
    model.gather = gather
    if model.embed is not None:
        model.embed = VocabEmbedding(model.embed, tp)  # type: ignore[assignment]
    if model.head is not None:
        model.head.weight = _divide(model.head.weight, 0, tp)
    for block in model.layers.values():
        assert isinstance(block, Block)
        block.own_tokens = partial(own_tokens, tp=tp)
        for layer in (block.attention, None if block.is_moe else block.mlp):
            if layer is not None:
                layer.gather = gather
                _divide_layer(layer, tp)


def _divide_layer(layer: nn.Module, tp: Share) -> None:
    for name, child in list(layer.named_children()):
        if name in COLUMN:
            assert isinstance(child, nn.Linear)
            setattr(layer, name, ColumnLinear(child, tp))
        elif name in ROW:
            assert isinstance(child, nn.Linear)
            setattr(layer, name, RowLinear(child, tp))
    attention = getattr(layer, "config", None)
    if attention is not None and attention.qk_norm == "full":
        for name in ("q_norm", "k_norm"):
            setattr(layer, name, DividedRMSNorm(getattr(layer, name), tp))


def own_tokens(context: TokenContext, tp: Share) -> TokenContext:
    """The part of a row's context that belongs to this rank's tokens."""
    known: dict[str, Any] = {field.name: getattr(context, field.name) for field in fields(TokenContext)}
    known |= {name: _stretch(value, tp) for name, value in known.items() if name.endswith("_BS")}
    return TokenContext(**known)


def _stretch(t_BS: Tensor | None, tp: Share) -> Tensor | None:
    return None if t_BS is None else t_BS.chunk(tp.size, dim=SEQUENCE)[tp.rank]


class ColumnLinear(nn.Module):
    """weight [out / tp, in]; whole rows in, this rank's outputs out. The bias is kept whole: it is tiny."""

    def __init__(self, linear: nn.Linear, tp: Share) -> None:
        super().__init__()
        self.weight, self.bias, self.tp = _divide(linear.weight, 0, tp), _bias(linear), tp

    def forward(self, x_BSD: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.chunk(self.tp.size)[self.tp.rank]
        return F.linear(x_BSD, local(self.weight), bias)


class RowLinear(nn.Module):
    """weight [out, in / tp]; this rank's inputs for whole rows in, sums for this rank's tokens out."""

    def __init__(self, linear: nn.Linear, tp: Share) -> None:
        super().__init__()
        self.weight, self.bias, self.tp = _divide(linear.weight, 1, tp), _bias(linear), tp

    def forward(self, x_BSF: Tensor) -> Tensor:
        y_BSD = sum_scatter(F.linear(x_BSF, local(self.weight)), SEQUENCE, self.tp.group)
        return y_BSD if self.bias is None else y_BSD + self.bias  # after the sum: once


class VocabEmbedding(nn.Module):
    """weight [V / tp, D]: whole rows of ids in, the embeddings of this rank's tokens out."""

    def __init__(self, embedding: nn.Embedding, tp: Share) -> None:
        super().__init__()
        self.weight, self.tp = _divide(embedding.weight, 0, tp), tp

    def forward(self, token_BS: Tensor) -> Tensor:
        weight_VD = local(self.weight)
        row_BS = token_BS - self.tp.rank * weight_VD.shape[0]
        elsewhere_BS = (row_BS < 0) | (row_BS >= weight_VD.shape[0])
        x_BSD = F.embedding(row_BS.masked_fill(elsewhere_BS, 0), weight_VD)
        return sum_scatter(x_BSD.masked_fill(elsewhere_BS[..., None], 0.0), SEQUENCE, self.tp.group)


class DividedRMSNorm(nn.Module):
    """An RMSNorm over all heads at once (qk_norm=full) when this rank has some of them: squares are summed over tp."""

    def __init__(self, norm: RMSNorm, tp: Share) -> None:
        super().__init__()
        self.dim, self.eps, self.weight, self.tp = norm.dim, norm.eps, norm.weight, tp

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = sum_everywhere(wide.square().sum(-1, keepdim=True), self.tp.group)
        normalised = (wide * torch.rsqrt(square / self.dim + self.eps)).to(x.dtype)
        return normalised * self.weight.chunk(self.tp.size)[self.tp.rank]


def _bias(linear: nn.Linear) -> nn.Parameter | None:
    return linear.bias


def _divide(parameter: Tensor, dim: int, tp: Share) -> nn.Parameter:
    assert parameter.is_meta, "a parameter was materialised before it was divided"
    shape = list(parameter.shape)
    shape[dim] //= tp.size
    block = torch.empty(shape, dtype=parameter.dtype, device="meta")
    return nn.Parameter(DTensor.from_local(block, tp.mesh, [Shard(dim)], run_check=False))


@torch.no_grad()
def sum_replicated_gradients(parameters: list[nn.Parameter], meshes: Meshes) -> None:
    """Add over tp the gradients of dense parameters that tp does not divide, in place, by one all-reduce.

    After the last backward of a step: sharded by FSDP and in its reduction's precision, they are at their smallest.
    """
    if meshes.layout.tp == 1:
        return
    grads = [local(p.grad) for p in parameters if p.grad is not None and _replicated(p)]
    if not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat, group=meshes.dense.get_group("tp"))
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(total.view_as(grad))


def _replicated(parameter: nn.Parameter) -> bool:
    assert isinstance(parameter, DTensor)
    axes = parameter.device_mesh.mesh_dim_names or ()
    return "fsdp" in axes and "tp" not in axes  # experts are on another mesh, and their tokens come from all of tp
