"""Data parallelism by FSDP2, with gradients that are sums.

Dense parameters are sharded over the attention mesh, experts over the expert mesh; both may have replicas. FSDP
averages by default; here every reduction is a plain sum, because each rank's loss is already its part of the global
objective (divided by the global token count).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moetrain.mesh.build import Meshes
from moetrain.model.decoder import Decoder
from moetrain.moe.layer import MoELayer
from moetrain.parallel.ep import EXPERT_MODEL_DIM, EXPERT_WIDTH_DIM


def apply_fsdp(model: Decoder, blocks: list[nn.Module], meshes: Meshes, precision: str, reshard: bool) -> None:
    """Shard experts, then each block, embedding and head, then what is left (the final norm, a tied embedding).

    reshard: free gathered parameters after the forward pass and gather them again for the backward pass; False keeps
    them, for memory. Experts that no other rank holds are not sharded at all: they only change their dtype, once a
    micro-step and way, where FSDP would copy them three times.
    """
    policy = _policy(precision)
    layers = [m for m in model.modules() if isinstance(m, MoELayer)]
    alone = meshes.expert_fsdp.size() == 1
    apart = {p for layer in layers for p in layer.experts.parameters()} if alone else set()
    for layer in layers:
        if alone:
            layer.experts.compute_dtype = policy.param_dtype
            continue
        # Along a dim that neither ep (E) nor etp (F) divides: two axes on one dim would interleave the shards.
        free = EXPERT_WIDTH_DIM if meshes.layout.etp == 1 else EXPERT_MODEL_DIM
        dims = {id(p): free[name] for name, p in layer.experts.named_parameters()}
        fully_shard(
            layer.experts,
            mesh=meshes.expert_fsdp,
            mp_policy=policy,
            reshard_after_forward=reshard,
            shard_placement_fn=lambda p, dims=dims: Shard(dims[id(p)]),  # type: ignore[misc]
        )
    free_dim = partial(_free_dim, shards=meshes.dense_fsdp.size(-1))
    dense = partial(
        fully_shard, mesh=meshes.dense_fsdp, mp_policy=policy, shard_placement_fn=free_dim, ignored_params=apart
    )
    for block in blocks:
        dense(block, reshard_after_forward=reshard)
    _shard_ends(model, dense, reshard)
    dense(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _shard_ends(model: Decoder, dense: Callable[..., Any], reshard: bool) -> None:
    """The vocabulary's two matrices by themselves: with the root's they would be gathered before the first layer runs
    and their gradients reduced after its backward pass, beside nothing. A tied one stays with the root."""
    if model.config.tie_embeddings:
        return
    if model.embed is not None:
        dense(model.embed, reshard_after_forward=reshard).set_unshard_in_backward(False)  # its gradient needs ids only
    if model.head is not None:
        dense(model.head, reshard_after_forward=False)  # the first that the backward pass needs


def _free_dim(parameter: nn.Parameter, shards: int) -> Shard:
    """The first dim, unless tp divides that: two axes on one dim would interleave the shards.

    A first dim with fewer places than ranks would be padded to one each, as often as not many times the parameter (the
    two matrices of shared experts [2, F, D]): then the first dim that divides evenly, if there is one.
    """
    if isinstance(parameter, DTensor) and parameter.placements[0].is_shard(0):
        return Shard(1)
    even = [dim for dim, size in enumerate(parameter.shape) if size % shards == 0]
    return Shard(even[0] if even and parameter.shape[0] < shards else 0)


def _policy(precision: str) -> MixedPrecisionPolicy:
    if precision == "bf16":
        # Inputs stay as they are: hidden states follow the weights, while gates and token counts must not be rounded.
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy(cast_forward_inputs=False)
