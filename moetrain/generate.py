"""Continue a prompt with a checkpoint's model: a sanity check, in one process, whatever layout it was trained in."""

from __future__ import annotations

from dataclasses import replace

import torch
from omegaconf import OmegaConf

from moetrain.checkpoint import manifest
from moetrain.checkpoint.use import load_weights, resolve
from moetrain.comm.start import start_distributed, stop_distributed
from moetrain.config.compose import load_config, to_config
from moetrain.config.schema import Config, ParallelConfig
from moetrain.config.validate import validate
from moetrain.data.tokenizer import load_tokenizer
from moetrain.mesh.build import build_meshes
from moetrain.model.generate import generate
from moetrain.parallel.apply import build_parallel_model

NUMBERS = {"max_tokens": (int, 200), "temperature": (float, 0.7), "top_k": (int, 0), "seed": (int, 0)}


def generate_text(options: dict[str, str]) -> str:
    """The prompt and its continuation. options: checkpoint, prompt, and the keys of NUMBERS, as strings.

    Raises ValueError for an option that is unknown, missing, or not a number, and for an unusable checkpoint.
    """
    known = {"checkpoint", "prompt", *NUMBERS}
    for key in options:
        if key not in known:
            raise ValueError(f"{key}: no such key; generate takes {', '.join(sorted(known))}")
    for key in ("checkpoint", "prompt"):
        if not options.get(key):
            raise ValueError(f"{key}= is missing: moetrain generate checkpoint=runs/quickstart prompt='def '")
    values = {key: _number(key, kind, options.get(key, str(default))) for key, (kind, default) in NUMBERS.items()}
    path = resolve(options["checkpoint"])
    stored = manifest.read(path).get("config")
    if not stored:
        raise ValueError(f"{path} does not say which model it holds (no config in its manifest)")
    config = alone(to_config(OmegaConf.create(stored)))
    device = start_distributed()
    try:
        model = build_parallel_model(config, build_meshes(validate(config, 1), device.type), device).model
        load_weights(path, model)
        tokenizer = load_tokenizer(config.data.tokenizer, config.data.eos_token)
        prompt = tokenizer.encode([options["prompt"]])[0].tolist()
        count, temperature = int(values["max_tokens"]), float(values["temperature"])
        with torch.no_grad():
            tokens = generate(model, prompt, count, temperature, int(values["top_k"]), int(values["seed"]))
        return options["prompt"] + tokenizer.decode(tokens)
    finally:
        stop_distributed()


def alone(config: Config) -> Config:
    """A run's configuration for one process that continues one text: no layout, nobody to exchange tokens with."""
    train = replace(config.train, global_batch=1, micro_batch=1)  # what experts=auto is to be fast for
    return replace(config, parallel=ParallelConfig(), dispatch=load_config([]).dispatch, train=train)


def _number(key: str, kind: type, text: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{key}={text!r} is not a number; nearest legal value: {NUMBERS[key][1]}") from None
