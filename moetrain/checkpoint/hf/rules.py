"""Which of our tensors is which of Hugging Face's: one table per family, read in both directions.

A rule names our tensor once and the ways a file may hold it: the first form is what we write, all of them are read.
`{layer}` and `{expert}` are wildcards. Names are those of transformers' files, which for experts are per-expert
matrices in 4.x and 5.x alike; the stacked tensors that 5.x keeps in memory may be on disk too (save_original_format
off), and are read as well.

E experts, F hidden width, D model width: our w_gate_up [E, 2, F, D] and w_down [E, D, F].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config.model import ModelConfig


@dataclass(frozen=True)
class Transform:
    """join: their tensors, in the order of the form's names -> ours of the given shape. split: ours -> n of theirs."""

    join: Callable[[list[Tensor], torch.Size], Tensor]
    split: Callable[[Tensor, int], list[Tensor]]


@dataclass(frozen=True)
class Form:
    """One way a file holds a tensor. Names with {expert} are listed expert by expert."""

    theirs: tuple[str, ...]
    transform: Transform

    def names(self, layer: int, n_experts: int) -> list[str]:
        """Every tensor name of this form for one layer, in the order `transform` takes them."""
        experts = range(n_experts if any("{expert}" in name for name in self.theirs) else 1)
        return [name.format(layer=layer, expert=expert) for expert in experts for name in self.theirs]


@dataclass(frozen=True)
class Rule:
    """A tensor of ours by its name, and the forms that files have of it; the first one is written."""

    ours: str
    forms: tuple[Form, ...]


SAME = Transform(join=lambda theirs, shape: theirs[0], split=lambda ours, n: [ours])
# Matrices that are one tensor here: [n, ...] whatever our leading dims are.
STACK = Transform(
    join=lambda theirs, shape: torch.stack(theirs).reshape(shape),
    split=lambda ours, n: list(ours.reshape(n, *ours.shape[-2:]).unbind()),
)
# [E, 2F, D], gate above up, has the bytes of [E, 2, F, D].
FUSED = Transform(
    join=lambda theirs, shape: theirs[0].reshape(shape),
    split=lambda ours, n: [ours.flatten(-3, -2)],
)


def _same(prefix: str, their_prefix: str, **names: str) -> tuple[Rule, ...]:
    """Rules without a transform: `w_q="q_proj"` maps prefix.w_q.weight, and .bias where there is one."""
    rules = []
    for ours, theirs in names.items():
        for leaf in ("weight", "bias"):
            form = Form((f"{their_prefix}.{theirs}.{leaf}",), SAME)
            rules.append(Rule(f"{prefix}.{ours}.{leaf}", (form,)))
    return tuple(rules)


_HERE, _THERE = "layers.{layer}", "model.layers.{layer}"
_FRAME = (
    Rule("embed.weight", (Form(("model.embed_tokens.weight",), SAME),)),
    Rule("norm.weight", (Form(("model.norm.weight",), SAME),)),
    Rule("head.weight", (Form(("lm_head.weight",), SAME),)),
    *_same(_HERE, _THERE, attention_norm="input_layernorm", ffn_norm="post_attention_layernorm"),
)
_GQA = _same(
    f"{_HERE}.attention",
    f"{_THERE}.self_attn",
    w_q="q_proj",
    w_k="k_proj",
    w_v="v_proj",
    w_o="o_proj",
    q_norm="q_norm",
    k_norm="k_norm",
)
_MLP = _same(f"{_HERE}.mlp", f"{_THERE}.mlp", w_gate="gate_proj", w_up="up_proj", w_down="down_proj")


def _mla(compressed_queries: bool) -> tuple[Rule, ...]:
    """Without a query latent (q_lora_rank 0), the one query matrix is called q_proj, not q_b_proj."""
    return _same(
        f"{_HERE}.attention",
        f"{_THERE}.self_attn",
        w_q_down="q_a_proj",
        q_norm="q_a_layernorm",
        w_q="q_b_proj" if compressed_queries else "q_proj",
        w_kv_down="kv_a_proj_with_mqa",
        kv_norm="kv_a_layernorm",
        w_kv="kv_b_proj",
        w_o="o_proj",
    )


def _moe(block: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Rule, ...]:
    """Router and experts; block, gate, up, down as their files call them. Stacked ones are always below `mlp`."""
    one, stacked = f"{_THERE}.{block}.experts.{{expert}}", f"{_THERE}.mlp.experts"
    routers = dict.fromkeys((f"{_THERE}.{block}.gate.weight", f"{_THERE}.mlp.gate.weight"))
    return (
        Rule(f"{_HERE}.moe.router.weight", tuple(Form((name,), SAME) for name in routers)),
        Rule(
            f"{_HERE}.moe.experts.w_gate_up",
            (
                Form((f"{one}.{gate}.weight", f"{one}.{up}.weight"), STACK),
                Form((f"{stacked}.gate_up_proj",), FUSED),
            ),
        ),
        Rule(
            f"{_HERE}.moe.experts.w_down",
            (Form((f"{one}.{down}.weight",), STACK), Form((f"{stacked}.down_proj",), SAME)),
        ),
    )


def _shared(name: str) -> tuple[Rule, ...]:
    there = f"{_THERE}.mlp.{name}"
    return (
        Rule(
            f"{_HERE}.moe.shared.w_gate_up",
            (Form((f"{there}.gate_proj.weight", f"{there}.up_proj.weight"), STACK),),
        ),
        Rule(f"{_HERE}.moe.shared.w_down", (Form((f"{there}.down_proj.weight",), SAME),)),
        Rule(f"{_HERE}.moe.shared.gate", (Form((f"{there}_gate.weight",), SAME),)),
    )


BIAS = f"{_HERE}.moe.balance.bias.bias_E"  # of the plugin that `balance=bias` names
_CORRECTION = Rule(BIAS, (Form((f"{_THERE}.mlp.gate.e_score_correction_bias",), SAME),))
_TABLES: dict[str, tuple[Rule, ...]] = {
    "llama": _GQA + _MLP,
    "mistral": _GQA + _MLP,
    "qwen2": _GQA + _MLP,
    "qwen3": _GQA + _MLP,
    "mixtral": _GQA + _moe("block_sparse_moe", gate="w1", up="w3", down="w2"),
    "olmoe": _GQA + _moe(),
    "qwen2_moe": _GQA + _MLP + _moe() + _shared("shared_expert"),
    "qwen3_moe": _GQA + _MLP + _moe(),
    "deepseek_v2": _MLP + _moe() + _shared("shared_experts"),
    "deepseek_v3": (*_MLP, *_moe(), *_shared("shared_experts"), _CORRECTION),
}


def rules(family: str, model: ModelConfig) -> dict[str, Rule]:
    """The family's table by our name, `{layer}` standing for the layer's number."""
    table = _FRAME + _TABLES[family]
    if model.attention.kind == "mla":
        table += _mla(model.attention.q_lora_rank > 0)
    return {rule.ours: rule for rule in table}
