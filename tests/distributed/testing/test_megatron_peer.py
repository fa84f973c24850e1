"""Megatron-Core as the benchmark builds it is our model: the same parameters, loss, and gradient norm.

Skipped where megatron-core 0.16.1 is not installed. It is written for CUDA alone, so its ranks here run under a
translation of the CUDA calls on its path; dtypes, collectives (gloo), routing, experts, and the optimizer are its own.
"""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from moetrain.config.compose import load_config
from moetrain.config.validate import validate
from moetrain.plan.params import count
from moetrain.testing.bench_train import MEGATRON, Case
from moetrain.testing.peer_transformers import open_loader
from moetrain.testing.ranks import run_ranks
from moetrain.trainer import Trainer

ABSENT = Case("bench_qwen3_12l", "balanced", MEGATRON, gpus=1, steps=1).absent
pytestmark = [pytest.mark.distributed, pytest.mark.skipif(bool(ABSENT), reason=ABSENT)]

MODEL = [
    "model=qwen3_30b_a3b",
    "model.vocab_size=264",
    "model.n_layers=2",
    "model.d_model=64",
    "model.attention.n_heads=4",
    "model.attention.n_kv_heads=2",
    "model.attention.head_dim=16",
    "model.moe.n_experts=8",
    "model.moe.top_k=2",
    "model.moe.d_expert=32",
    "train.seq_len=64",
    "train.global_batch=4",
    "data.documents=cross",
]
CASES = {
    "natural": ["balance=none"],
    "zipf": ["balance=none", "router=forced", "router.distribution=zipf", "model.attention.qk_norm=none"],
    "natural, sequence": ["balance=[switch]", "balance.switch.coefficient=1"],
    "natural, global_batch": ["balance=[switch]", "balance.switch.coefficient=1", "balance.switch.scope=global_batch"],
}


class OnCpu(TorchFunctionMode):
    """device="cuda" means the CPU, and the CPU's tensor types have CUDA's names."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def translate_cuda():
    """In a forked rank, which ends with its test."""
    event = SimpleNamespace(synchronize=lambda: None)
    stream = SimpleNamespace(wait_stream=lambda other: None, record_event=lambda: event)
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.Stream = torch.cuda.current_stream = torch.cuda.default_stream = lambda *args, **kwargs: stream
    torch.cuda.stream = lambda stream: nullcontext()
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its small kernels: minutes of compilation, the same numbers
    from megatron.core.transformer.moe import token_dispatcher

    def to_host(x, as_numpy=False, record_stream=False):
        return x.numpy() if as_numpy and x is not None else x

    token_dispatcher.maybe_move_tensor_to_cpu = to_host


def ours(overrides, directory):
    """The weights we start from, and the loss and gradient norm of our first step."""

    def rank():
        config = load_config([*MODEL, *overrides, f"run.dir={directory}", "run.resume=never"])
        trainer = Trainer(config, validate(config, 1), torch.device("cpu"))
        weights = {name: p.full_tensor().detach().clone() for name, p in trainer.model.named_parameters()}
        row, _ = trainer.train_step()
        trainer.close()
        return weights, row["ce_loss"], row["grad_norm"]

    return run_ranks(rank, 1)[0]


def theirs(overrides, weights, routing, dtype, overlap):
    """Parameters over all ranks, the mean losses of three steps on one batch, and the first's gradient norm."""

    def rank():
        translate_cuda()
        from moetrain.testing import peer_megatron as peer

        config = load_config([*MODEL, *overrides])
        with OnCpu():
            model = peer.build(config, routing, dtype, overlap)
            load(model.module, weights, config.model)
            optimizer, loader = peer.build_optimizer(model), open_loader(config)
            batches = loader.next_step()
            steps = [peer.train_step(model, optimizer, batches) for _ in range(3)]
        loader.close()
        experts = sum(p.numel() for name, p in model.module.named_parameters() if ".experts." in name)
        dense = sum(p.numel() for p in model.module.parameters()) - experts
        loss = torch.tensor([loss for loss, _ in steps])
        dist.all_reduce(loss)
        return dense + dist.get_world_size() * experts, loss / dist.get_world_size(), steps[0][1]

    return run_ranks(rank, 2)[0]


def load(model, weights, shape):
    """Our weights into Megatron's parameters: queries, keys, and values by group; experts as [E, in, out]."""
    share = shape.moe.n_experts // dist.get_world_size()
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    groups = shape.attention.n_kv_heads
    named = {
        "embedding.word_embeddings": weights["embed.weight"],
        "decoder.final_layernorm": weights["norm.weight"],
        "output_layer": weights["head.weight"],
    }
    for i in range(shape.n_layers):
        w = {name.removeprefix(f"layers.{i}."): p for name, p in weights.items() if name.startswith(f"layers.{i}.")}
        qkv = [w[f"attention.w_{part}.weight"].unflatten(0, (groups, -1)) for part in "qkv"]
        named |= {
            f"decoder.layers.{i}.input_layernorm": w["attention_norm.weight"],
            f"decoder.layers.{i}.self_attention.linear_qkv": torch.cat(qkv, dim=1).flatten(0, 1),
            f"decoder.layers.{i}.self_attention.linear_proj": w["attention.w_o.weight"],
            f"decoder.layers.{i}.pre_mlp_layernorm": w["ffn_norm.weight"],
            f"decoder.layers.{i}.mlp.router": w["moe.router.weight"],
            f"decoder.layers.{i}.mlp.experts.weight1": w["moe.experts.w_gate_up"][mine].flatten(1, 2).mT,
            f"decoder.layers.{i}.mlp.experts.weight2": w["moe.experts.w_down"][mine].mT,
        }
        for x in "qk" if shape.attention.qk_norm == "head" else "":
            named[f"decoder.layers.{i}.self_attention.{x}_layernorm"] = w[f"attention.{x}_norm.weight"]
    for name, p in model.named_parameters():
        p.data.copy_(named.pop(name.removesuffix(".weight")).reshape(p.shape))
    assert not named


@pytest.mark.parametrize("case", CASES)
def test_the_first_step_in_fp32_is_ours(case, tmp_path):
    weights, loss, norm = ours(CASES[case], tmp_path)
    parameters, losses, their_norm = theirs(CASES[case], weights, case.split(",")[0], torch.float32, overlap=False)
    assert parameters == count(load_config([*MODEL, *CASES[case]]).model).total
    assert losses[0].item() == pytest.approx(loss, rel=1e-5)
    assert their_norm == pytest.approx(norm, rel=1e-4)


def test_bf16_steps_with_overlapped_communication_train(tmp_path):
    weights, loss, norm = ours(CASES["zipf"], tmp_path)
    _, losses, their_norm = theirs(CASES["zipf"], weights, "zipf", torch.bfloat16, overlap=True)
    assert losses[0].item() == pytest.approx(loss, rel=2**-8)
    assert their_norm == pytest.approx(norm, rel=0.05)  # roundings of 2^-9 of every activation and gradient
    assert losses[0] > losses[1] > losses[2]
