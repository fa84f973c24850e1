"""A model small enough for fp64 proofs that still has every feature on, and documents that pack unevenly."""

from __future__ import annotations

import json
import random
from pathlib import Path

# Dense first layer, then MoE with gated shared experts, qk-norm, all three balance plugins, and clipping that bites.
SMALL_MODEL = [
    "model.n_layers=3",
    "model.d_model=32",
    "model.d_ff=48",
    "model.attention.head_dim=8",
    "model.attention.n_heads=4",
    "model.attention.n_kv_heads=2",
    "model.attention.qk_norm=head",
    "model.moe.d_expert=24",
    "model.moe.first_k_dense=1",
    "model.moe.d_shared=16",
    "model.moe.shared_gate=true",
    "train.seq_len=64",
    "train.global_batch=8",
    "train.max_grad_norm=0.5",
    "train.steps=20",
    "optim.lr=0.003",
    "balance=[switch,z_loss,bias]",
    "balance.switch.coefficient=0.1",
    "balance.bias.rate=0.01",
]

# As small as it can be with experts, and with shards of both meshes on two ranks.
SMALLEST_MODEL = [
    "model.n_layers=2",
    "model.d_model=16",
    "model.attention.head_dim=8",
    "model.attention.n_heads=2",
    "model.attention.n_kv_heads=1",
    "model.moe.d_expert=8",
    "train.seq_len=16",
    "train.global_batch=4",
]


def write_documents(directory: Path, count: int = 400, longest: int = 60) -> list[str]:
    """Write documents of 1 to `longest` words: rows hold several, and documents cross rows; return data overrides."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(50)]
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(1, longest)))}) for _ in range(count)]
    path = directory / "documents.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return ["data=jsonl", f"data.sources.jsonl.path={path}", f"data.cache_dir={directory / 'cache'}"]
