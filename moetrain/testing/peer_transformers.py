"""The peer of scripts/bench_train.sh: the same model as transformers builds it, under FSDP2, on the same tokens.

    torchrun ... -m moetrain.testing.peer_transformers OUT STEPS ROUTING OVERRIDES...

fp32 master weights and gradient reduction, bf16 compute, grouped_mm experts, SDPA attention, fused AdamW, no expert
parallelism and no recomputation. Writes the same rows as metrics.jsonl to OUT.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_

from moetrain.checkpoint.hf.save import config_json
from moetrain.checkpoint.hf.translate import choose
from moetrain.comm.start import start_distributed, stop_distributed
from moetrain.config.compose import load_config
from moetrain.config.schema import Config
from moetrain.data.batch import Batch
from moetrain.data.loader import Loader
from moetrain.moe.router.forced import forced_choice
from moetrain.moe.types import TokenContext


def main(out: str, steps: int, routing: str, overrides: list[str]) -> None:
    """Train `steps` steps; rank 0 appends a row a step."""
    config = load_config(overrides)
    device = start_distributed()
    try:
        model = build(config, routing, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        timed_steps(config, device, out, steps, lambda batches: _step(model, optimizer, batches))
    finally:
        stop_distributed()


def timed_steps(
    config: Config, device: torch.device, out: str, steps: int, step: Callable[[list[Batch]], float]
) -> None:
    """Call `step` with the micro-batches of one step after another; rank 0 appends a row for each to `out`.

    step: trains, and returns the loss as a number, so that it is finished up to its optimizer.
    """
    loader = open_loader(config)
    start = time.perf_counter()
    for number in range(1, steps + 1):
        loss = step([batch.to(device) for batch in loader.next_step()])
        now = time.perf_counter()
        if dist.get_rank() == 0:
            tokens = config.train.global_batch * config.train.seq_len
            append_row(out, number, loss, tokens / (now - start) / dist.get_world_size(), device)
        start = now
    loader.close()


def build(config: Config, routing: str, device: torch.device) -> nn.Module:
    """The model in fp32 on `device`, its layers and its root sharded over all ranks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = config_json(choose(config), config, {}, "float32")
    hf = AutoConfig.for_model(theirs.pop("model_type"), **theirs)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf, attn_implementation="sdpa", experts_implementation="grouped_mm")
    if routing != "natural":
        force(model, routing, config.model.moe.top_k)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            nn.init.ones_(parameter) if "norm" in name else nn.init.normal_(parameter, std=0.02)
    rope = model.model.rotary_emb
    model.model.rotary_emb = type(rope)(hf).to(device)  # its buffers were on meta
    return model.train()


def force(model: nn.Module, routing: str, k: int) -> None:
    """Replace every router's choice by the forced one, from the tokens and positions of this forward."""
    held: dict[str, TokenContext] = {}

    def remember(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        token_BS: Tensor = kwargs["input_ids"]
        position_BS = torch.arange(token_BS.shape[1], device=token_BS.device).expand_as(token_BS)
        held["context"] = TokenContext(token_BS, position_BS, torch.zeros_like(token_BS), None)  # type: ignore[arg-type]

    def choose_forced(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        logit_TE = output[0]
        index_TK = forced_choice(held["context"], logit_TE.float(), k, routing, 0.6)
        gate_TK = logit_TE.float().softmax(-1).gather(-1, index_TK)
        return logit_TE, (gate_TK / gate_TK.sum(-1, keepdim=True)).to(output[1].dtype), index_TK

    model.register_forward_pre_hook(remember, with_kwargs=True)
    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    assert routers, "transformers named its routers differently"
    for router in routers:
        router.register_forward_hook(choose_forced)


def open_loader(config: Config) -> Loader:
    world, train = dist.get_world_size(), config.train
    return Loader(
        config.data,
        seq_len=train.seq_len,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch or train.global_batch // world,
        dp_rank=dist.get_rank(),
        dp_size=world,
        seed=config.run.seed,
        vocab_size=config.model.vocab_size,
    )


def _step(model: Any, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> float:
    total = torch.zeros((), device=batches[0].token_BS.device)
    for number, batch in enumerate(batches):
        model.set_requires_gradient_sync(number == len(batches) - 1)
        loss = model(input_ids=batch.token_BS, labels=batch.target_BS, shift_labels=batch.target_BS).loss
        (loss / len(batches)).backward()
        total += loss.detach() / len(batches)
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(total)


def append_row(out: str, step: int, loss: float, speed: float, device: torch.device) -> None:
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    row = {"step": step, "loss": loss, "tokens_per_s_per_gpu": speed, "peak_memory_gb": peak}
    with open(out, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
