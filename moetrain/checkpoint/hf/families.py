"""What each family's configuration calls our keys: one table per family, read in both directions.

Values go through flat dictionaries: ours by dotted key (`model.d_model`, `router.scale`), theirs by the attribute of
transformers' configuration class, which understands 4.x names as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Flat = dict[str, Any]
_A, _M = "model.attention", "model.moe"


@dataclass(frozen=True)
class Pair:
    """Keys that are not one to one. read: theirs -> ours. write: ours -> theirs."""

    read: Callable[[Flat], Flat]
    write: Callable[[Flat], Flat]


@dataclass(frozen=True)
class Family:
    """fields: ours -> theirs. ours, theirs: what the family implies without a key, and what we always write.

    refused: their keys that moetrain knows only one value of (or one of several); another value is an error.
    groups: Hydra overrides for the router and balance losses of an imported model.
    """

    name: str
    fields: dict[str, str]
    ours: Flat = field(default_factory=dict)
    theirs: Flat = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()
    refused: dict[str, tuple] = field(default_factory=dict)
    groups: tuple[str, ...] = ("router=softmax",)


_ROPE_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_ROPE_FIELDS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
}


def _read_rope(theirs: Flat) -> Flat:
    rope: Flat = dict(theirs["rope_parameters"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise ValueError(f"rope_parameters.rope_type={kind!r} is not supported; legal: {', '.join(_ROPE_TYPES)}")
    fields = _ROPE_FIELDS.get(kind, {})
    known = {"rope_theta", "rope_type", "type", *fields.values()}
    for key, value in rope.items():
        if key not in known and (key, value) not in {("truncate", True), ("partial_rotary_factor", 1.0)}:
            raise ValueError(f"rope_parameters.{key}={value} is not supported with rope_type={kind}")
    if kind == "yarn":
        if rope.get("factor") is None:
            rope["factor"] = theirs["max_position_embeddings"] / rope["original_max_position_embeddings"]
        if not rope.get("mscale_all_dim"):  # without it transformers takes no notice of mscale
            rope |= {"mscale": 1.0, "mscale_all_dim": 0.0}
        elif not rope.get("mscale"):
            raise ValueError("rope_parameters.mscale_all_dim without mscale is not supported")
    ours = {f"{_A}.rope.theta": rope["rope_theta"], f"{_A}.rope.scaling": _ROPE_TYPES[kind]}
    return ours | {f"{_A}.rope.{here}": rope[there] for here, there in fields.items() if rope.get(there) is not None}


def _write_rope(ours: Flat) -> Flat:
    scaling = ours[f"{_A}.rope.scaling"]
    kind = next(name for name, here in _ROPE_TYPES.items() if here == scaling)
    rope = {"rope_type": kind, "rope_theta": ours[f"{_A}.rope.theta"]}
    rope |= {there: ours[f"{_A}.rope.{here}"] for here, there in _ROPE_FIELDS.get(kind, {}).items()}
    return {"rope_parameters": rope}


def _read_head_dim(theirs: Flat) -> Flat:
    return {f"{_A}.head_dim": theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]}


def _read_sparse(theirs: Flat) -> Flat:
    """Qwen: each decoder_sparse_step-th layer is MoE, but for those in mlp_only_layers."""
    n, step = theirs["num_hidden_layers"], theirs["decoder_sparse_step"]
    only = set(theirs["mlp_only_layers"] or ())
    sparse = [i for i in range(n) if i not in only and (i + 1) % step == 0]
    for every in range(1, n + 1):
        for first in range(n):
            if sparse == [i for i in range(first, n) if (i - first + 1) % every == 0]:
                return {f"{_M}.first_k_dense": first, f"{_M}.every": every}
    raise ValueError(
        f"decoder_sparse_step={step} and mlp_only_layers={sorted(only)} make the layers {sparse} MoE; here they must "
        "be each n-th one after some first dense layers"
    )


def _write_sparse(ours: Flat) -> Flat:
    first, every = ours[f"{_M}.first_k_dense"], ours[f"{_M}.every"]
    if not first:
        return {"decoder_sparse_step": every, "mlp_only_layers": []}
    dense = [i for i in range(ours["model.n_layers"]) if i < first or (i - first + 1) % every]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


_COMMON = {
    "model.vocab_size": "vocab_size",
    "model.d_model": "hidden_size",
    "model.n_layers": "num_hidden_layers",
    "model.norm_eps": "rms_norm_eps",
    "model.tie_embeddings": "tie_word_embeddings",
    "model.init_std": "initializer_range",
    f"{_A}.n_heads": "num_attention_heads",
}
_GQA = _COMMON | {f"{_A}.n_kv_heads": "num_key_value_heads"}
_BIASES = {f"{_A}.qkv_bias": "attention_bias", f"{_A}.out_bias": "attention_bias"}
_WIDE, _EXPERT = {"model.d_ff": "intermediate_size"}, {f"{_M}.d_expert": "moe_intermediate_size"}
_TOP_K = {f"{_M}.top_k": "num_experts_per_tok"}
_NORMALISED = {"router.renormalize": "norm_topk_prob"}
_MLA = {f"{_A}.{key}": key for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")} | {
    f"{_A}.n_kv_heads": "num_key_value_heads"
}

_HEADS = Pair(_read_head_dim, lambda ours: {"head_dim": ours[f"{_A}.head_dim"]})
_ROPE = Pair(_read_rope, _write_rope)
_SPARSE = Pair(_read_sparse, _write_sparse)
_Q_LORA = Pair(
    lambda theirs: {f"{_A}.q_lora_rank": theirs.get("q_lora_rank") or 0},
    lambda ours: {"q_lora_rank": ours[f"{_A}.q_lora_rank"] or None},
)
_SHARED = Pair(
    lambda theirs: {f"{_M}.d_shared": theirs["n_shared_experts"] * theirs["moe_intermediate_size"]},
    lambda ours: {"n_shared_experts": ours[f"{_M}.d_shared"] // ours[f"{_M}.d_expert"]},
)

_DENSE = {f"{_M}.n_experts": 0}
_PLAIN = {f"{_A}.kind": "gqa", f"{_A}.qk_norm": "none", f"{_A}.rope.interleaved": False}
_NO_BIAS = {f"{_A}.qkv_bias": False, f"{_A}.out_bias": False}
_QKV_BIAS = {f"{_A}.qkv_bias": True, f"{_A}.out_bias": False}
_NO_SHARED = {f"{_M}.d_shared": 0, f"{_M}.shared_gate": False}
_ALL_MOE = {f"{_M}.first_k_dense": 0, f"{_M}.every": 1}
_SOFTMAX = {"router.kind": "SoftmaxTopK", "router.scale": 1.0}
_DEEPSEEK = _NO_BIAS | {
    f"{_A}.kind": "mla",
    f"{_A}.qk_norm": "none",
    f"{_M}.every": 1,
    f"{_M}.shared_gate": False,
    "model.norm_eps": 1e-6,  # their latents' norms have no key: always 1e-6
}
_NO_WINDOW = {"sliding_window": (None, 0)}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llama", _GQA | _WIDE | _BIASES, _DENSE | _PLAIN, pairs=(_HEADS, _ROPE), refused={"mlp_bias": (False, None)}
        ),
        Family(
            "mistral",
            _GQA | _WIDE,
            _DENSE | _PLAIN | _NO_BIAS,
            {"sliding_window": None},
            (_HEADS, _ROPE),
            _NO_WINDOW,
        ),
        Family("qwen2", _GQA | _WIDE, _DENSE | _PLAIN | _QKV_BIAS, pairs=(_HEADS, _ROPE), refused=_NO_WINDOW),
        Family(
            "qwen3",
            _GQA | _WIDE | _BIASES,
            _DENSE | _PLAIN | {f"{_A}.qk_norm": "head"},
            pairs=(_HEADS, _ROPE),
            refused=_NO_WINDOW,
        ),
        Family(
            "mixtral",
            _GQA | _TOP_K | {f"{_M}.d_expert": "intermediate_size", f"{_M}.n_experts": "num_local_experts"},
            _PLAIN | _NO_BIAS | _NO_SHARED | _ALL_MOE | _SOFTMAX | {"router.renormalize": True},
            {"sliding_window": None},
            (_HEADS, _ROPE),
            _NO_WINDOW,
        ),
        Family(
            "olmoe",
            _GQA
            | _TOP_K
            | _BIASES
            | _NORMALISED
            | {f"{_M}.d_expert": "intermediate_size", f"{_M}.n_experts": "num_experts"},
            _PLAIN | _NO_SHARED | _ALL_MOE | _SOFTMAX | {f"{_A}.qk_norm": "full"},
            pairs=(_HEADS, _ROPE),
            refused={"clip_qkv": (None,)},
        ),
        Family(
            "qwen2_moe",
            _GQA
            | _TOP_K
            | _WIDE
            | _EXPERT
            | _NORMALISED
            | {
                f"{_A}.qkv_bias": "qkv_bias",
                f"{_M}.n_experts": "num_experts",
                f"{_M}.d_shared": "shared_expert_intermediate_size",
            },
            _PLAIN | _SOFTMAX | {f"{_A}.out_bias": False, f"{_M}.shared_gate": True},
            pairs=(_HEADS, _ROPE, _SPARSE),
            refused=_NO_WINDOW,
        ),
        Family(
            "qwen3_moe",
            _GQA | _TOP_K | _WIDE | _EXPERT | _BIASES | _NORMALISED | {f"{_M}.n_experts": "num_experts"},
            _PLAIN | _NO_SHARED | _SOFTMAX | {f"{_A}.qk_norm": "head"},
            pairs=(_HEADS, _ROPE, _SPARSE),
            refused=_NO_WINDOW,
        ),
        Family(
            "deepseek_v2",
            _COMMON
            | _MLA
            | _TOP_K
            | _WIDE
            | _EXPERT
            | {
                f"{_M}.n_experts": "n_routed_experts",
                f"{_M}.first_k_dense": "first_k_dense_replace",
                "router.scale": "routed_scaling_factor",
            },
            _DEEPSEEK | {f"{_A}.rope.interleaved": True, "router.kind": "SoftmaxTopK", "router.renormalize": False},
            {"topk_method": "greedy", "norm_topk_prob": False},
            (_ROPE, _Q_LORA, _SHARED),
            {"topk_method": ("greedy",), "norm_topk_prob": (False, None), "attention_bias": (False,)},
        ),
        Family(
            "deepseek_v3",
            _COMMON
            | _MLA
            | _TOP_K
            | _WIDE
            | _EXPERT
            | _NORMALISED
            | {
                f"{_A}.rope.interleaved": "rope_interleave",
                f"{_M}.n_experts": "n_routed_experts",
                f"{_M}.first_k_dense": "first_k_dense_replace",
                "router.scale": "routed_scaling_factor",
                "router.n_groups": "n_group",
                "router.topk_groups": "topk_group",
            },
            _DEEPSEEK | {"router.kind": "SigmoidTopK"},
            {"num_nextn_predict_layers": 0},
            (_ROPE, _Q_LORA, _SHARED),
            {"attention_bias": (False,)},
            ("router=sigmoid", "balance=bias"),
        ),
    )
}
