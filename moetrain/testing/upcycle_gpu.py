"""The parts of scripts/upcycle_gpu.sh: a dense model of the 1B class, its conversion, and training without checkpoints.

python -m moetrain.testing.upcycle_gpu dense OUT [LAYERS]
torchrun ... -m moetrain.testing.upcycle_gpu convert SOURCE OUT INITIALIZER EXPERTS TOP_K GRANULARITY
torchrun ... -m moetrain.testing.upcycle_gpu train CHECKPOINT STEPS OVERRIDES...
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.checkpoint.agree import gather
from moetrain.checkpoint.hf.files import write_shards
from moetrain.checkpoint.hf.load import expected
from moetrain.checkpoint.hf.match import written_names
from moetrain.checkpoint.hf.rules import rules
from moetrain.checkpoint.hf.translate import from_hf
from moetrain.comm.env import is_rank0
from moetrain.comm.start import start_distributed, stop_distributed
from moetrain.plan.params import count
from moetrain.testing.memory import PeakMemory
from moetrain.train import run_config, running
from moetrain.upcycle.convert import build_initializer, convert

N_LAYERS = 16
# The shape of Llama-3.2-1B.
DENSE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def write_dense(out: Path, n_layers: int) -> str:
    """Random bf16 weights, N(0, 0.02^2) and norms of 1, as a Hugging Face directory."""
    theirs = {**DENSE, "num_hidden_layers": n_layers}
    config = from_hf(theirs)
    table, wanted = rules("llama", config.model), expected(config)
    names = {ours: written_names(table, ours, empty.shape)[1][0] for ours, empty in wanted.items()}

    def produce(theirs: list[str]) -> Iterator[tuple[str, Tensor]]:
        random = torch.Generator().manual_seed(0)
        for ours, empty in wanted.items():
            if names[ours] in theirs:
                value = torch.ones(empty.shape) if "norm" in ours else torch.randn(empty.shape, generator=random) * 0.02
                yield names[ours], value.bfloat16()

    out.mkdir(parents=True)
    write_shards(out, {names[ours]: 2 * empty.numel() for ours, empty in wanted.items()}, produce)
    (out / "config.json").write_text(json.dumps(theirs))
    return f"dense       {count(config.model).total:,} parameters in bf16"


def measure_convert(source: str, out: str, name: str, experts: int, top_k: int, granularity: int) -> str:
    """Convert on all ranks; wall time, what was written by it, and the most host memory any rank took."""
    start_distributed()
    try:
        initializer = build_initializer(name, {}, experts, top_k, granularity)
        dist.barrier()
        start = time.monotonic()
        with PeakMemory() as peak:
            made = convert(source, out, initializer)
        seconds = time.monotonic() - start
        peaks = gather(lambda: peak.bytes)
    finally:
        stop_distributed()
    written = sum(path.stat().st_size for path in (made.path / "model").iterdir())
    moe = made.config.model.moe
    layer = 2 * 3 * moe.n_experts * moe.d_expert * made.config.model.d_model
    total = count(made.config.model)
    return "\n".join(
        [
            f"{name}: {moe.n_experts} experts of width {moe.d_expert}, top {moe.top_k}: {total.total:,} parameters, "
            f"{total.active:,} active",
            f"  {len(peaks)} ranks  {seconds:.1f} s  {written / 1e9:.2f} GB  {written / seconds / 1e9:.2f} GB/s",
            f"  host memory of a rank, at most {max(peaks) / 1e9:.2f} GB; one layer's experts {layer / 1e9:.2f} GB",
        ]
    )


def train(checkpoint: str, steps: int, overrides: list[str]) -> None:
    """Train without saving; rank 0 prints every tenth step."""
    start = time.monotonic()
    run_dir = Path(checkpoint).parent / "run"
    own = [f"init.from={checkpoint}", f"run.dir={run_dir}", "run.resume=never", f"train.steps={steps}"]
    with running(run_config([*own, *overrides])) as trainer:
        ready = time.monotonic() - start
        for _ in range(steps):
            row, _ = trainer.train_step()
            assert row, "a bad step"
            if trainer.rank0 and (row["step"] == 1 or row["step"] % 10 == 0):
                memory = torch.cuda.max_memory_allocated() / 2**30 if trainer.device.type == "cuda" else 0.0
                print(
                    f"  step {row['step']:3d}  loss {row['loss']:.4f}  grad {row['grad_norm']:.3g}  "
                    f"{row['tokens_per_s']:,.0f} tok/s  {memory:.1f} GiB",
                    flush=True,
                )
        if trainer.rank0:
            print(f"  ready after {ready:.1f} s, {steps} steps in {time.monotonic() - start - ready:.1f} s")


def main(arguments: list[str]) -> None:
    """Run one part."""
    part, rest = arguments[0], arguments[1:]
    if part == "dense":
        print(write_dense(Path(rest[0]), int(rest[1]) if len(rest) > 1 else N_LAYERS))
    elif part == "convert":
        text = measure_convert(rest[0], rest[1], rest[2], int(rest[3]), int(rest[4]), int(rest[5]))
        if is_rank0():
            print(text)
    else:
        train(rest[0], int(rest[1]), rest[2:])


if __name__ == "__main__":
    main(sys.argv[1:])
