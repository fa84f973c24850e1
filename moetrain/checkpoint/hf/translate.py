"""Our configuration from a Hugging Face one and back. A key that would not survive the way is an error."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from transformers import CONFIG_MAPPING

from moetrain.checkpoint.hf.families import FAMILIES, Family, Flat
from moetrain.config.compose import load_config
from moetrain.config.model import AttentionConfig, ModelConfig, MoEConfig, RopeConfig, check_model
from moetrain.config.plugins import router_options
from moetrain.config.schema import Config

_MODEL, _ROUTER = "model.", "router."
_UNSUPPORTED = {
    "gpt_oss": "it has attention sinks, alternating sliding windows, biases in experts and router, and a clamped SwiGLU"
}
# A router's options that change how it is trained or computed, not what it computes once it is.
_TRAINING_ONLY = ("warmup_steps", "tied", "rounding", "kernels")


def family_of(theirs: Flat) -> Family:
    """The family of a config.json. Raises ValueError for one that is not known."""
    name = theirs.get("model_type")
    if name in _UNSUPPORTED:
        raise ValueError(f"model_type={name!r} is not supported: {_UNSUPPORTED[name]}; one of: {', '.join(FAMILIES)}")
    if name not in FAMILIES:
        raise ValueError(f"model_type={name!r} is not supported; one of: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def from_hf(theirs: Flat) -> Config:
    """A whole configuration for a config.json's content, with `model` and `router` as it says and the rest default.

    Raises ValueError that names their key for what moetrain cannot represent.
    """
    family = family_of(theirs)
    ours = read(family, theirs)
    config = load_config([*family.groups])
    model = {key.removeprefix(_MODEL): value for key, value in ours.items() if key.startswith(_MODEL)}
    config.model = _model(model, family.name)
    check_model(config.model)
    for key, value in ours.items():
        if key.startswith(_ROUTER) and key != "router.kind":
            config.router[key.removeprefix(_ROUTER)] = value
    config.router["top_k"] = config.model.moe.top_k
    return config


def read(family: Family, theirs: Flat) -> Flat:
    """Our flat keys. transformers' class fills in defaults and understands the names of 4.x."""
    full: Flat = CONFIG_MAPPING[family.name].from_dict(dict(theirs)).to_dict()
    names: dict[str, str] = CONFIG_MAPPING[family.name].attribute_map
    if theirs.get("quantization_config"):
        raise ValueError("quantization_config is not supported: convert the checkpoint to plain bf16 or fp32 first")
    refused = {"hidden_act": ("silu",)} | family.refused
    for key, legal in refused.items():
        if full.get(key, legal[0]) not in legal:
            raise ValueError(f"{key}={full[key]!r} is not supported; nearest legal value: {legal[0]!r}")
    ours = dict(family.ours)
    for here, there in family.fields.items():
        value = full.get(names.get(there, there))
        if value is None:
            raise ValueError(f"{there} is missing in the source's config.json")
        if here in family.ours and family.ours[here] != value:
            raise ValueError(f"{there}={value} is not supported; nearest legal value: {family.ours[here]}")
        ours[here] = value
    for pair in family.pairs:
        ours |= pair.read(full)
    return ours


def write(family: Family, config: Config) -> Flat:
    """Their keys for our configuration, by the names of transformers 5.x; see `differences` for what they miss."""
    ours = flatten(config)
    theirs = {there: ours[here] for here, there in family.fields.items() if here in ours}
    for pair in family.pairs:
        theirs |= pair.write(ours)
    return theirs | family.theirs


def differences(family: Family, config: Config) -> list[str]:
    """A line for each of our keys that this family cannot express; empty when `write` says everything."""
    want = flatten(config)
    try:
        got = family.ours | read(family, {"model_type": family.name, **write(family, config)})
    except (ValueError, KeyError, ZeroDivisionError) as error:
        return [str(error)]
    return [
        f"{key}={value} would be {got.get(key, 'left out')}"
        for key, value in want.items()
        if key in _meaningful(config) and got.get(key) != value
    ]


def choose(config: Config, preferred: str = "") -> Family:
    """The preferred family if it can express the configuration, else the first that can.

    Raises ValueError with what is in the way of the nearest family when none can.
    """
    order = [FAMILIES[preferred], *FAMILIES.values()] if preferred in FAMILIES else list(FAMILIES.values())
    lacking = {family.name: differences(family, config) for family in order}
    for family in order:
        if not lacking[family.name]:
            return family
    name = min(lacking, key=lambda n: len(lacking[n]))
    raise ValueError(f"no supported family holds this model; the nearest is {name}, but " + "; ".join(lacking[name]))


def flatten(config: Config) -> Flat:
    """Our flat keys. `order=post` is the same function as normalised `pre`, and is called that."""
    flat: Flat = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    walk(asdict(config.model), _MODEL)
    if config.model.moe.n_experts:
        router = router_options(config.router)
        flat["router.kind"] = str(router.pop("_target_")).rpartition(".")[2].removeprefix("Warmup")
        for key in _TRAINING_ONLY:
            router.pop(key, None)
        if router.pop("order", "pre") == "post":
            router["renormalize"] = True
        walk(router, _ROUTER)
    return flat


def _meaningful(config: Config) -> set[str]:
    """The keys that the model's function depends on."""
    model, attention = config.model, config.model.attention
    keys = {key for key in flatten(config) if not key.startswith("model.attention.rope.")} - {"model.name"}
    scaling = {
        "none": (),
        "linear": ("factor",),
        "llama3": ("factor", "original_max_position", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", "original_max_position", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    }[attention.rope.scaling]
    keys |= {f"model.attention.rope.{key}" for key in ("theta", "scaling", "interleaved", *scaling)}
    if attention.kind == "mla":
        keys -= {"model.attention.n_kv_heads", "model.attention.head_dim"}
    else:
        latent = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        keys -= {f"model.attention.{key}" for key in latent}
    if not model.moe.n_experts:
        keys -= {key for key in keys if key.startswith("model.moe.")} - {"model.moe.n_experts"}
    if all(model.is_moe(layer) for layer in range(model.n_layers)):
        keys -= {"model.d_ff"}
    # How routing is computed, and rounding, which evaluations do not have, are no part of the function either.
    return {key for key in keys if not key.startswith("router.rounding.")} - {"router.top_k", "router.kernels"}


def _model(flat: Flat, name: str) -> ModelConfig:
    def part(kind: type, prefix: str) -> Flat:
        own = {field.name for field in fields(kind)}
        return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix) and k[len(prefix) :] in own}

    rope = RopeConfig(**part(RopeConfig, "attention.rope."))
    attention = AttentionConfig(**part(AttentionConfig, "attention."), rope=rope)
    moe = MoEConfig(**part(MoEConfig, "moe."))
    return ModelConfig(**{**part(ModelConfig, ""), "name": name}, attention=attention, moe=moe)
