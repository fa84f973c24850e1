"""A checkpoint becomes a directory that transformers, and the serving engines that read its format, open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import CONFIG_MAPPING

from moetrain.checkpoint import manifest
from moetrain.checkpoint.hf.families import Family, Flat
from moetrain.checkpoint.hf.files import FOLDER, SHARD_BYTES, copy_side_files, read_config, write_shards
from moetrain.checkpoint.hf.match import written_names
from moetrain.checkpoint.hf.rules import BIAS, Rule, rules
from moetrain.checkpoint.hf.translate import choose, write
from moetrain.checkpoint.lazy import LazyTensor, stored
from moetrain.checkpoint.use import resolve
from moetrain.config.compose import to_config
from moetrain.config.schema import Config

# Kept whatever the family becomes. Without a tokenizer's own, better none than the family's default.
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_hf(checkpoint: str | Path, out: str | Path, shard_bytes: int = SHARD_BYTES) -> Family:
    """Write a checkpoint of any layout to the new directory `out`; return the family it became. One process.

    The family is that of the imported model's config.json, if there is one and it fits; else the first that can hold
    the model. Weights keep their dtype; memory peaks at a shard and a layer's experts. Raises
    ValueError when no family can hold the model or a tensor has no place in it, and when `out` is not empty.
    """
    path, out = resolve(checkpoint), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} already exists; name a directory that does not")
    config = stored_config(path)
    folder = beside(config, path)
    base = read_config(folder) if folder is not None and (folder / "config.json").is_file() else {}
    family = choose(config, str(base.get("model_type", "")))
    table = rules(family.name, config.model)
    tensors = stored(path / "model") | _zero_biases(table, config, stored(path / "model"))
    names = {name: written_names(table, name, tensor.shape) for name, tensor in tensors.items()}
    sizes: dict[str, int] = {}
    for name, (form, theirs) in names.items():
        parts = form.transform.split(_empty(tensors[name]), len(theirs))
        sizes |= {there: part.numel() * part.element_size() for there, part in zip(theirs, parts)}

    def produce() -> Iterator[tuple[str, Tensor]]:
        for name, (form, theirs) in names.items():
            # A copy of each part: a shard that held views of a layer would keep all of the layer.
            parts = form.transform.split(tensors[name].make(), len(theirs))
            yield from ((there, part.clone()) for there, part in zip(theirs, parts))

    out.mkdir(parents=True, exist_ok=True)
    write_shards(out, sizes, produce(), shard_bytes)
    if folder is not None:
        copy_side_files(folder, out)
    dtype = str(tensors["embed.weight"].dtype).removeprefix("torch.")
    text = json.dumps(config_json(family, config, base, dtype), indent=2, sort_keys=True)
    (out / "config.json").write_text(text + "\n")  # last: a directory with a config.json is complete
    return family


def stored_config(path: Path) -> Config:
    """The configuration of a step directory. Raises ValueError when its manifest has none."""
    config = manifest.read(path).get("config")
    if not config:
        raise ValueError(f"{path} does not say which model it holds (no config in its manifest)")
    return to_config(OmegaConf.create(config))


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
