"""A checkpoint becomes a directory that transformers, and the serving engines that read its format, open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from moetrain.checkpoint.agree import on_rank0
from moetrain.checkpoint.hf.families import Family, Flat
from moetrain.checkpoint.hf.files import FOLDER, SHARD_BYTES, copy_side_files, read_config, write_shards
from moetrain.checkpoint.hf.match import written_names
from moetrain.checkpoint.hf.rules import BIAS, Rule, rules
from moetrain.checkpoint.hf.translate import choose, write
from moetrain.checkpoint.lazy import LazyTensor, in_memory, stored
from moetrain.checkpoint.stored import stored_config
from moetrain.checkpoint.use import resolve
from moetrain.config.schema import Config

SILENT_WIDTH = 64  # hidden width of shared experts that do nothing
# Kept whatever the family becomes. Without a tokenizer's own, better none than the family's default.
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_hf(checkpoint: str | Path, out: str | Path, shard_bytes: int = SHARD_BYTES, stacked: bool = False) -> Family:
    """Write a checkpoint of any layout to the new directory `out`; return the family it became. All ranks call it.

    The family is that of the imported model's config.json, if there is one and it fits; else the first that can hold
    the model. Weights keep their dtype. The ranks share the shards out; at its peak each holds a shard twice (as
    tensors and as bytes to write) and a layer's experts a few times over, however many layers there are.
    stacked: a layer's experts as one tensor, the way transformers 5 holds them, instead of one by one.
    Raises ValueError when no family can hold the model or a tensor has no place in it, and when `out` is not empty.
    """
    path, out = resolve(checkpoint), Path(out)
    on_rank0(lambda: _make_empty(out))
    config = stored_config(path)
    folder = beside(config, path)
    base = read_config(folder) if folder is not None and (folder / "config.json").is_file() else {}
    family, config, added = _fit(config, stored(path / "model"), str(base.get("model_type", "")))
    table = rules(family.name, config.model)
    tensors = stored(path / "model") | added
    tensors |= _zero_biases(table, config, tensors)
    names = {name: written_names(table, name, tensor.shape, stacked) for name, tensor in tensors.items()}
    sizes: dict[str, int] = {}
    for name, (form, theirs) in names.items():
        parts = form.transform.split(_empty(tensors[name]), len(theirs))
        sizes |= {there: part.numel() * part.element_size() for there, part in zip(theirs, parts)}

    def produce(shard: list[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = set(shard)
        for name, (form, theirs) in names.items():
            if not wanted.isdisjoint(theirs):
                # A copy of each part: a shard that held views of a layer would keep all of the layer.
                parts = form.transform.split(tensors[name].make(), len(theirs))
                yield from ((there, part.clone()) for there, part in zip(theirs, parts) if there in wanted)

    write_shards(out, sizes, produce, shard_bytes)
    dtype = str(tensors["embed.weight"].dtype).removeprefix("torch.")
    text = json.dumps(config_json(family, config, base, dtype), indent=2, sort_keys=True)
    on_rank0(lambda: _finish(out, folder, text))
    return family


def _make_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} already exists; name a directory that does not")
    out.mkdir(parents=True, exist_ok=True)


def _finish(out: Path, folder: Path | None, config_text: str) -> None:
    if folder is not None:
        copy_side_files(folder, out)
    (out / "config.json").write_text(config_text + "\n")  # last: a directory with a config.json is complete


def _fit(
    config: Config, tensors: Mapping[str, LazyTensor], preferred: str
) -> tuple[Family, Config, dict[str, LazyTensor]]:
    """The family, the configuration that it holds, and tensors that the model has not and the family's files need.

    A model without shared experts may fit a family only as one whose shared experts are silent: weights of zero.
    """
    try:
        return choose(config, preferred), config, {}
    except ValueError:
        moe = config.model.moe
        if not moe.n_experts or moe.d_shared:
            raise
        silent = deepcopy(config)
        silent.model.moe = replace(moe, d_shared=SILENT_WIDTH, shared_gate=True)
        try:
            family = choose(silent, preferred)
        except ValueError:
            family = None
        if family is None:
            raise
    width, dtype = config.model.d_model, tensors["embed.weight"].dtype
    shapes = {"w_gate_up": (2, SILENT_WIDTH, width), "w_down": (width, SILENT_WIDTH), "gate": (1, width)}
    zeros = {
        f"layers.{layer}.moe.shared.{leaf}": in_memory(torch.zeros(shape, dtype=dtype))
        for layer in range(config.model.n_layers)
        if config.model.is_moe(layer)
        for leaf, shape in shapes.items()
    }
    return family, silent, zeros


def config_json(family: Family, config: Config, base: Flat, dtype: str) -> Flat:
    """Their configuration by the names of transformers 5.x, and by those of 4.x where they differ.

    base: a config.json whose other keys are kept if it is of the same family, else its token ids and context length.
    """
    kind = CONFIG_MAPPING[family.name]
    same = base.get("model_type") == family.name
    full: Flat = kind.from_dict(dict(base)).to_dict() if same else {key: base.get(key) for key in _TOKENS}
    if not same:
        full["max_position_embeddings"] = base.get("max_position_embeddings", config.train.seq_len)
    if same and base.get("num_hidden_layers") != config.model.n_layers:
        full.pop("layer_types", None)
    full |= {kind.attribute_map.get(key, key): value for key, value in write(family, config).items()}
    full["architectures"] = [kind.__name__.removesuffix("Config") + "ForCausalLM"]
    theirs: Flat = kind.from_dict(full).to_dict() | {"dtype": dtype, "torch_dtype": dtype}
    rope = dict(theirs["rope_parameters"])
    theirs["rope_theta"] = rope.pop("rope_theta")
    theirs["rope_scaling"] = rope | {"type": rope["rope_type"]} if rope["rope_type"] != "default" else None
    if family.name == "qwen3_moe":
        theirs["num_experts"] = config.model.moe.n_experts
    return theirs


def beside(config: Config, step: Path) -> Path | None:
    """Where the tokenizer lies, and an imported model's config.json: data.tokenizer, or FOLDER of the run directory."""
    path = Path(config.data.tokenizer).expanduser()
    candidates = (path, path.parent if path.is_file() else path, step.parent.parent / FOLDER)
    return next((folder for folder in candidates if folder.is_dir()), None)


def _zero_biases(table: Mapping[str, Rule], config: Config, have: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Correction biases that the family's files must have and a model balanced by losses alone has not."""
    shape = torch.Size([config.model.moe.n_experts])
    layers = [i for i in range(config.model.n_layers) if config.model.is_moe(i)] if BIAS in table else []
    names = [BIAS.format(layer=layer) for layer in layers]
    return {n: LazyTensor(shape, torch.float32, lambda: torch.zeros(shape)) for n in names if n not in have}


def _empty(tensor: LazyTensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
