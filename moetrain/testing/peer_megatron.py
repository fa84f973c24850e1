"""The other peer of scripts/bench_train.sh: the same model as Megatron-Core 0.16.1 builds it, on the same tokens.

    torchrun ... -m moetrain.testing.peer_megatron OUT STEPS ROUTING OVERRIDES...

Expert parallelism over all ranks, Megatron's own "alltoall" dispatcher, GroupedMLP, DistributedDataParallel (gradients
added and reduced in fp32, reduction and gather overlapped) and DistributedOptimizer (fp32 master weights and moments),
bf16 compute, no recomputation. Without TransformerEngine and APEX, so its fused permutation, rotation, norms and
gradient norm are not there; what it takes from torch instead: RMSNorm, AdamW (fused), torch.compile for its small
kernels, and, through the adapters below, grouped_mm for the grouped_gemm package and our SDPA call for attention.
The model is the same to the last parameter: norms of heads, untied head, router scores in fp32, gates renormalised.
Not the same: master weights start from values rounded to bf16, and decay spares vectors, as Megatron has it. Balance
losses of natural routing are Megatron's. Writes the same rows as metrics.jsonl to OUT.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.comm.start import start_distributed, stop_distributed
from moetrain.config.compose import load_config
from moetrain.config.schema import Config
from moetrain.data.batch import Batch
from moetrain.model.core import masked_attention
from moetrain.moe.router.forced import forced_choice
from moetrain.moe.types import TokenContext
from moetrain.testing.peer_transformers import append_row, open_loader

VERSION = "0.16.1"
BALANCE = {"sequence": "seq_aux_loss", "global_batch": "global_aux_loss"}  # our scopes, as Megatron names them


def main(out: str, steps: int, routing: str, overrides: list[str]) -> None:
    """Train `steps` steps; rank 0 appends a row a step."""
    config = load_config(overrides)
    device = start_distributed()
    try:
        model = build(config, routing)
        optimizer = build_optimizer(model)
        loader = open_loader(config)
        start = time.perf_counter()
        for step in range(1, steps + 1):
            loss, _ = train_step(model, optimizer, [batch.to(device) for batch in loader.next_step()])
            now = time.perf_counter()  # the loss was read, so the step is finished up to its optimizer
            if dist.get_rank() == 0:
                tokens = config.train.global_batch * config.train.seq_len
                append_row(out, step, loss, tokens / (now - start) / dist.get_world_size(), device)
            start = now
        loader.close()
    finally:
        stop_distributed()


def build(config: Config, routing: str, dtype: torch.dtype = torch.bfloat16, overlap: bool = True) -> Any:
    """Megatron's DistributedDataParallel around its GPTModel, with random weights: dense ones equal on all ranks."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe import grouped_gemm_util, moe_utils

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            expert_model_parallel_size=dist.get_world_size(), create_gloo_process_groups=False
        )
    adapter = SimpleNamespace(ops=SimpleNamespace(gmm=grouped_gemm))
    grouped_gemm_util.grouped_gemm, grouped_gemm_util.ops = adapter, adapter.ops
    moe_utils.te_general_gemm = None  # its router asks for this name, which 0.16.1 leaves undefined without TE
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
        raise ValueError(f"model={shape.name}: the Megatron peer knows layers like those of qwen3_30b_a3b, mixtral_8x7b")
    switch = config.balance.get("switch", {"scope": "sequence", "coefficient": 0.0})
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
    from contextlib import nullcontext

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


def grouped_gemm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """grouped_gemm.ops.gmm by torch: rows a [N, K], of which b [E, K, M]'s expert e multiplies batch_sizes[e]."""
    end_E = batch_sizes.cumsum(0).to(torch.int32).to(a.device, non_blocking=True)
    return F.grouped_mm(a, b.transpose(-2, -1) if trans_b else b, offs=end_E)


class CausalAttention(nn.Module):
    """Megatron's core attention by SDPA, without its mask of S x S: q [S, B, H, d], k and v [S, B, G, d] -> [S, B, H d]."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.scale = config.kv_channels**-0.5

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: Any) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return masked_attention(q, k, v, None, self.scale).permute(2, 0, 1, 3).flatten(2)


def force(model: nn.Module, routing: str, k: int) -> None:
    """Replace every router's choice by the forced one, for the tokens and positions of this forward."""
    held: dict[str, TokenContext] = {}

    def remember(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        token_BS = args[0]
        position_BS = torch.arange(token_BS.shape[1], device=token_BS.device).expand_as(token_BS)
        held["context"] = TokenContext(token_BS, position_BS, torch.zeros_like(token_BS), None)  # type: ignore[arg-type]

    def routed(logit_SBE: Tensor, padding_mask: None = None) -> tuple[Tensor, Tensor]:
        rows, columns = logit_SBE.shape[1], logit_SBE.shape[0]
        index_TK = forced_choice(held["context"], logit_SBE.transpose(0, 1).flatten(0, 1), k, routing, 0.6)
        index_TK = index_TK.view(rows, columns, k).transpose(0, 1).flatten(0, 1)  # Megatron's tokens: row after row
        logit_TE = logit_SBE.flatten(0, 1)
        gate_TK = logit_TE.gather(-1, index_TK).softmax(-1)
        gate_TE = torch.zeros_like(logit_TE).scatter(1, index_TK, gate_TK)
        return gate_TE, torch.zeros_like(logit_TE, dtype=torch.bool).scatter(1, index_TK, True)

    model.register_forward_pre_hook(remember, with_kwargs=True)
    for layer in model.decoder.layers:
        layer.mlp.router.routing = routed


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
