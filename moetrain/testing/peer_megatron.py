"""The other peer of scripts/bench_train.sh: the same model as Megatron-Core 0.16.1 builds it, on the same tokens.

    torchrun ... -m moetrain.testing.peer_megatron OUT STEPS ROUTING OVERRIDES...

Expert parallelism over all ranks, Megatron's own "alltoall" dispatcher, GroupedMLP, DistributedDataParallel (gradients
added and reduced in fp32, reduction and gather overlapped) and DistributedOptimizer (fp32 master weights and moments),
bf16 compute, no recomputation. Without TransformerEngine and APEX, so its fused permutation, rotation, norms and
gradient norm are not there; what it takes from torch instead: RMSNorm, AdamW (fused), torch.compile for its small
kernels, and, through megatron_parts.py, grouped_mm for the grouped_gemm package and our SDPA call for attention.
The model is the same to the last parameter: norms of heads, untied head, router scores in fp32, gates renormalised.
Not the same: master weights start from values rounded to bf16, and decay spares vectors, as Megatron has it. Balance
losses of natural routing are Megatron's. Writes the same rows as metrics.jsonl to OUT.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from moetrain.comm.start import start_distributed, stop_distributed
from moetrain.config.compose import load_config
from moetrain.config.schema import Config
from moetrain.data.batch import Batch
from moetrain.testing.megatron_parts import CausalAttention, complete, force
from moetrain.testing.peer_transformers import timed_steps

BALANCE = {"sequence": "seq_aux_loss", "global_batch": "global_aux_loss"}  # our scopes, as Megatron names them


def main(out: str, steps: int, routing: str, overrides: list[str]) -> None:
    """Train `steps` steps; rank 0 appends a row a step."""
    config = load_config(overrides)
    device = start_distributed()
    try:
        model = build(config, routing)
        optimizer = build_optimizer(model)
        timed_steps(config, device, out, steps, lambda batches: train_step(model, optimizer, batches)[0])
    finally:
        stop_distributed()


def build(config: Config, routing: str, dtype: torch.dtype = torch.bfloat16, overlap: bool = True) -> Any:
    """Megatron's DistributedDataParallel around its GPTModel, with random weights: dense ones equal on all ranks."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            expert_model_parallel_size=dist.get_world_size(), create_gloo_process_groups=False
        )
    complete()
    theirs, shape = transformer_config(config, dtype), config.model
    layer = get_gpt_layer_local_spec(
        num_experts=shape.moe.n_experts,
        moe_grouped_gemm=True,
        moe_use_legacy_grouped_gemm=True,
        qk_layernorm=theirs.qk_layernorm,
        normalization=theirs.normalization,
    )
    layer.submodules.self_attention.submodules.core_attention = CausalAttention
    model = GPTModel(
        theirs,
        layer,
        vocab_size=shape.vocab_size,
        max_sequence_length=config.train.seq_len,
        share_embeddings_and_output_weights=shape.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.attention.rope.theta,
    )
    if routing != "natural":
        force(model, routing, shape.moe.top_k)
    model.to(torch.cuda.current_device()).to(dtype)
    torch.manual_seed(config.run.seed + dist.get_rank())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            nn.init.ones_(parameter) if "norm" in name else nn.init.normal_(parameter, std=0.02)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        use_distributed_optimizer=True,
    )
    parallel = DistributedDataParallel(theirs, ddp, model)
    parallel.broadcast_params()
    return parallel.train()


def transformer_config(config: Config, dtype: torch.dtype) -> Any:
    """Megatron's TransformerConfig of our model; ValueError for what these benchmarks' models do not have."""
    from megatron.core.transformer import TransformerConfig

    shape, attention, moe = config.model, config.model.attention, config.model.moe
    plain = attention.kind == "gqa" and attention.rope.scaling == "none" and not attention.rope.interleaved
    if not plain or attention.qk_norm == "full" or moe.d_shared or moe.first_k_dense or moe.every != 1:
        raise ValueError(
            f"model={shape.name}: the Megatron peer knows layers like those of qwen3_30b_a3b, mixtral_8x7b"
        )
    switch = config.balance.get("switch", {"scope": "sequence", "coefficient": 0.0})
    if set(config.balance) - {"switch"} or switch["scope"] not in BALANCE:
        raise ValueError(f"balance={list(config.balance)}: the Megatron peer knows switch, of {' or '.join(BALANCE)}")
    # Megatron divides its loss of the global batch by all ranks' tokens, and DDP the sum of the gradients by the ranks.
    again = dist.get_world_size() if switch["scope"] == "global_batch" else 1
    return TransformerConfig(
        num_layers=shape.n_layers,
        hidden_size=shape.d_model,
        ffn_hidden_size=moe.d_expert,
        num_attention_heads=attention.n_heads,
        num_query_groups=attention.n_kv_heads,
        kv_channels=attention.head_dim,
        qk_layernorm=attention.qk_norm == "head",
        add_qkv_bias=attention.qkv_bias,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=moe.n_experts,
        moe_ffn_hidden_size=moe.d_expert,
        moe_router_topk=moe.top_k,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type=BALANCE[switch["scope"]] if switch["coefficient"] else "none",
        moe_aux_loss_coeff=switch["coefficient"] * again,
        moe_grouped_gemm=True,
        moe_use_legacy_grouped_gemm=True,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=dist.get_world_size(),
        bf16=True,  # GroupedMLP asserts it
        params_dtype=dtype,
        perform_initialization=False,
        bias_dropout_fusion=True,
        cross_entropy_loss_fusion=dtype == torch.bfloat16,  # its gradient is bf16
        cross_entropy_fusion_impl="native",
    )


def build_optimizer(model: Any) -> Any:
    """DistributedOptimizers of dense and of expert parameters over torch's fused AdamW, as the other peer's."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        lr=1e-4,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
        overlap_param_gather=model.ddp_config.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, [model], use_gloo_process_groups=False)
    for each in optimizer.chained_optimizers:
        for group in each.optimizer.param_groups:
            group["fused"] = True
    return optimizer


def train_step(model: Any, optimizer: Any, batches: list[Batch]) -> tuple[float, float]:
    """One optimizer step over a rank's micro-batches; this rank's mean loss, and the norm of the whole gradient."""
    from megatron.core.distributed import finalize_model_grads

    model.zero_grad_buffer()
    optimizer.zero_grad()
    total = torch.zeros((), device=batches[0].token_BS.device)
    for number, batch in enumerate(batches):
        with nullcontext() if number == len(batches) - 1 else model.no_sync():
            loss_BS = model(batch.token_BS, batch.position_BS, None, labels=batch.target_BS.clamp(min=0))
            loss = (loss_BS * batch.loss_mask_BS).sum() / batch.loss_mask_BS.sum() / len(batches)
            loss.backward()
        total += loss.detach()
    finalize_model_grads([model])
    _, norm, _ = optimizer.step()
    return float(total), norm


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
