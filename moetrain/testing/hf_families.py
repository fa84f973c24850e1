"""A random model of each family of transformers, small, with nothing at the value an initialiser gives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from moetrain.checkpoint.use import load_weights, resolve
from moetrain.config.schema import Config
from moetrain.model.build import build_model
from moetrain.model.generate import one_document

COMMON: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_TOP_2: dict[str, Any] = {"num_experts_per_tok": 2}
_DEEPSEEK: dict[str, Any] = {
    **_TOP_2,
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3, "attention_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "mixtral": {**_TOP_2, "num_local_experts": 4},
    "olmoe": {**_TOP_2, "num_experts": 4, "norm_topk_prob": False},
    "qwen2_moe": {
        **_TOP_2,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        **_TOP_2,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "norm_topk_prob": True,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
    },
    "deepseek_v2": {**_DEEPSEEK, "q_lora_rank": None, "routed_scaling_factor": 1.5},
    "deepseek_v3": {**_DEEPSEEK, "q_lora_rank": 16, "n_group": 4, "topk_group": 2, "rope_parameters": YARN},
}


def make(family: str, directory: Path, **save: Any) -> nn.Module:
    """Save a random model of the family and return it. Every tensor is noisy: a swapped or skipped one shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})).eval()
    with torch.no_grad():
        for tensor in {**dict(model.named_parameters()), **dict(model.named_buffers(remove_duplicate=True))}.values():
            if tensor.is_floating_point() and not any(tensor is b for n, b in model.named_buffers() if "inv_freq" in n):
                tensor += 0.1 * torch.randn_like(tensor)
    model.save_pretrained(directory, **save)
    return model


@torch.no_grad()
def their_logits(model: nn.Module) -> Tensor:
    """Of a model of transformers, for TOKENS_BS."""
    return model(TOKENS_BS).logits


@torch.no_grad()
def our_logits(checkpoint: Path, config: Config) -> Tensor:
    """Of a checkpoint of ours, for TOKENS_BS."""
    model = build_model(config, "cpu")
    load_weights(resolve(checkpoint), model)
    return model(TOKENS_BS, one_document(TOKENS_BS))


def reload(directory: Path) -> nn.Module:
    """What transformers makes of a directory; it must neither miss a tensor nor be left with one."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def tensors(directory: Path) -> dict[str, Tensor]:
    """Of all safetensors files in a directory."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    path = directory / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


TOKENS_BS = torch.randint(3, 48, (2, 24), generator=torch.Generator().manual_seed(1))
