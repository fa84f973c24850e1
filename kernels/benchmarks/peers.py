"""Other projects' expert layers, behind the signature of moetrain_kernels.moe_experts.

A peer whose package is not installed is printed as absent. Where a peer stores weights in another order, `pack` brings
ours into it before anything is timed, and `unpack` brings its gradients back to be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional

Weights = tuple[torch.Tensor, ...]


def _same(*weights: torch.Tensor) -> Weights:
    return weights


@dataclass(frozen=True)
class Layer:
    """run(x_TD, expert_TK, gate_TK, *packed weights) -> y_TD; needs: the modules it imports."""

    run: Callable[..., torch.Tensor]
    pack: Callable[..., Weights] = _same
    unpack: Callable[..., Weights] = _same
    needs: tuple[str, ...] = ()


@cache
def _transformers_experts(experts: int, d_model: int, d_expert: int) -> torch.nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(num_experts=experts, hidden_size=d_model, moe_intermediate_size=d_expert)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        return Qwen3MoeExperts(config)


def transformers(x_TD, expert_TK, gate_TK, w_gate_up_E2FD, w_down_EDF):
    """transformers' experts by its own grouped_mm implementation; [gate, up] is its order too."""
    experts, d_model, d_expert = w_down_EDF.shape
    module = _transformers_experts(experts, d_model, d_expert)
    weights = {"gate_up_proj": w_gate_up_E2FD.flatten(1, 2), "down_proj": w_down_EDF}
    return torch.func.functional_call(module, weights, (x_TD, expert_TK, gate_TK.to(x_TD.dtype)))


def scattermoe(x_TD, expert_TK, gate_TK, w_up_E2FD, w_down_EDF):
    """ScatterMoE's two scattered matmuls around a SwiGLU, as its GLUMLP calls them (up before gate)."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    order = flatten_sort_count(expert_TK, num_experts=w_down_EDF.shape[0])
    h_RG = parallel_linear(x_TD, w_up_E2FD.flatten(1, 2).permute(0, 2, 1), expert_TK.shape[1], *order, grouped_out=True)
    up_RF, gate_RF = h_RG.chunk(2, dim=-1)
    a_RF = functional.silu(gate_RF) * up_RF
    gates = gate_TK.to(x_TD.dtype)
    return parallel_linear(a_RF, w_down_EDF.permute(0, 2, 1), 1, *order, gates=gates, grouped_in=True)


def _swap_gate_and_up(w_up: torch.Tensor, w_down: torch.Tensor) -> Weights:
    return w_up.flip(1).contiguous(), w_down


def megablocks(x_TD, expert_TK, gate_TK, w_gate_EFD, w_up_EFD, w_down_EFD):
    """MegaBlocks' dropless GLU by grouped matmuls, between its own gather and scatter."""
    from megablocks import ops
    from megablocks.layers.glu import memory_optimized_grouped_glu

    experts, top_k = w_down_EFD.shape[0], expert_TK.shape[1]
    sorted_S, order_S = ops.sort(expert_TK.flatten().int(), max(1, (experts - 1).bit_length()))
    counts_E = ops.histogram(expert_TK.flatten().int(), experts)
    ends_E = ops.inclusive_cumsum(counts_E, 0)
    rows_RD = ops.gather(x_TD, order_S, sorted_S, ends_E, top_k)
    weights = (w_gate_EFD, w_up_EFD, w_down_EFD)
    y_RD = memory_optimized_grouped_glu(rows_RD, *weights, counts_E.cpu().long(), functional.silu)
    gates_S = gate_TK.flatten().to(x_TD.dtype)
    return ops.scatter(y_RD, order_S, sorted_S, gates_S, ends_E, top_k)


def _megablocks_pack(w_up: torch.Tensor, w_down: torch.Tensor) -> Weights:
    return w_up[:, 0].contiguous(), w_up[:, 1].contiguous(), w_down.transpose(1, 2).contiguous()


def _megablocks_unpack(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Weights:
    return torch.stack([gate, up], dim=1), down.transpose(1, 2)


def sonicmoe(x_TD, expert_TK, gate_TK, w_up_EFxD, w_down_EDF):
    """SonicMoE with routing given; gate and up rows alternate, tensors are [rows, columns, E] views."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    tokens, top_k = expert_TK.shape
    token_S = torch.arange(tokens, device=x_TD.device, dtype=torch.int32).repeat_interleave(top_k)
    inputs = (x_TD, gate_TK.flatten(), token_S, expert_TK.flatten().int())
    weights = (w_up_EFxD.permute(1, 2, 0), None, w_down_EDF.permute(1, 2, 0), None)
    stream = torch.cuda.current_stream().cuda_stream
    y_TD, _ = moe_general_routing_inputs(*inputs, *weights, w_down_EDF.shape[0], stream, ActivationType.SWIGLU)
    return y_TD


def _sonicmoe_pack(w_up: torch.Tensor, w_down: torch.Tensor) -> Weights:
    return w_up.transpose(1, 2).flatten(1, 2).contiguous(), w_down


def _sonicmoe_unpack(up: torch.Tensor, down: torch.Tensor) -> Weights:
    return up.unflatten(1, (-1, 2)).transpose(1, 2), down


PEERS: dict[str, Layer] = {
    "transformers": Layer(transformers, needs=("transformers",)),
    "sonicmoe": Layer(sonicmoe, _sonicmoe_pack, _sonicmoe_unpack, ("sonicmoe",)),
    "megablocks": Layer(megablocks, _megablocks_pack, _megablocks_unpack, ("megablocks", "grouped_gemm")),
    "scattermoe": Layer(scattermoe, _swap_gate_and_up, _swap_gate_and_up, ("scattermoe",)),
}
