"""Data parallelism by FSDP2, with gradients that are sums.

Dense parameters are sharded over the attention mesh, experts over the expert mesh; both may have replicas. FSDP
averages by default; here every reduction is a plain sum, because each rank's loss is already its part of the global
objective (divided by the global token count).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moetrain.mesh.build import Meshes
from moetrain.moe.layer import MoELayer
from moetrain.parallel.ep import EXPERT_MODEL_DIM, EXPERT_WIDTH_DIM


def apply_fsdp(model: nn.Module, blocks: list[nn.Module], meshes: Meshes, precision: str, reshard: bool) -> None:
    """Shard experts, then each block, then what is left (embedding, final norm, head) with the root.

    reshard: free gathered parameters after the forward pass and gather them again for the backward pass; False keeps
    them, for memory. The root's stay in either case: they are the first that the backward pass needs.
    """
    policy = _policy(precision)
    for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
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
    for block in blocks:
        fully_shard(
            block,
            mesh=meshes.dense_fsdp,
            mp_policy=policy,
            reshard_after_forward=reshard,
            shard_placement_fn=free_dim,
        )
    fully_shard(model, mesh=meshes.dense_fsdp, mp_policy=policy, shard_placement_fn=free_dim)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


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
