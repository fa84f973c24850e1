"""Converting a model of many layers takes the memory of about one layer, on the way in and on the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moetrain.checkpoint.hf.save import export_hf
from moetrain.testing.memory import PeakMemory, in_a_fresh_process
from moetrain.upcycle.convert import build_initializer, convert
from moetrain.upcycle.virtual_group import VirtualGroup

pytestmark = pytest.mark.distributed
D, WIDTH, LAYERS, EXPERTS = 256, 1024, 16, 8
LAYER = 4 * 3 * D * WIDTH * EXPERTS  # bytes of one layer's experts, fp32: 25 MB


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "hf"
    path.mkdir()
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": D,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    (path / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": (64, D), "lm_head.weight": (64, D), "model.norm.weight": (D,)}
    for layer in range(LAYERS):
        here = f"model.layers.{layer}"
        tensors |= {f"{here}.self_attn.{name}_proj.weight": (D, D) for name in "qkvo"}
        tensors |= {f"{here}.{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
        tensors |= {f"{here}.mlp.{name}_proj.weight": (WIDTH, D) for name in ("gate", "up")}
        tensors[f"{here}.mlp.down_proj.weight"] = (D, WIDTH)
    save_file({name: torch.full(shape, 0.01) for name, shape in tensors.items()}, path / "model.safetensors")
    return path


def _upcycle(source: Path, out: Path) -> int:
    initializer, make = build_initializer("virtual_group", {}, EXPERTS, 2, 1), VirtualGroup.make
    with PeakMemory() as peak:

        def watched(*args):
            made = make(*args)
            peak.look()  # whatever the machine is busy with, this much is seen
            return made

        VirtualGroup.make = watched  # in a rank of its own
        convert(source, out, initializer)
    return peak.bytes


def _export(run: Path, out: Path) -> int:
    export_hf(run, out.with_name("first"))  # transformers' modules are loaded on the way
    with PeakMemory() as peak:
        export_hf(run, out, shard_bytes=LAYER // 2)
    return peak.bytes


def test_peak_is_near_one_layer(source, tmp_path):
    whole = LAYERS * LAYER
    peak = in_a_fresh_process(_upcycle, source, tmp_path / "run")
    # A layer's experts, what the writer still holds of the layer before, one expert being made.
    assert 0.9 * LAYER < peak < 2.5 * LAYER < whole / 3
    peak = in_a_fresh_process(_export, tmp_path / "run", tmp_path / "back")
    # A shard twice; a tensor as read from its file, as loaded, and in parts.
    assert peak < 4 * LAYER < whole / 3
