"""Match our tensors with a file's, and say what is left over on either side."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from moetrain.checkpoint.hf.rules import Form, Rule

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
# In some files, in no model: tables that are computed, and heads that predict further tokens (DeepSeek-V3 puts them in
# layers beyond the last).
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_THEIR_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def written_names(
    table: Mapping[str, Rule], name: str, shape: torch.Size, stacked: bool = False
) -> tuple[Form, list[str]]:
    """How `name` of ours is written: the form and their names. Raises ValueError when the family has no such tensor.

    stacked: the last form, which is the stacked one where there are several.
    """
    rule, layer = _find(table, name)
    if rule is None:
        raise ValueError(f"{name} has no counterpart in this family")
    form = rule.forms[-1 if stacked else 0]
    return form, form.names(layer, _experts(shape))


def match(
    table: Mapping[str, Rule], ours: Mapping[str, torch.Size], theirs: Iterable[str]
) -> dict[str, tuple[Form, list[str]]]:
    """For each tensor of ours the form its file uses and the names there.

    Raises ValueError that lists every name of ours the family lacks, every tensor of theirs that is missing, and every
    one that is left over.
    """
    present, found, wrong = set(theirs), {}, []
    for name, shape in ours.items():
        rule, layer = _find(table, name)
        if rule is None:
            wrong.append(f"has no counterpart in this family: {name}")
            continue
        candidates = [(form, form.names(layer, _experts(shape))) for form in rule.forms]
        complete = next((c for c in candidates if present.issuperset(c[1])), None)
        if complete is not None:
            found[name] = complete
            continue
        nearest = max(candidates, key=lambda c: len(present.intersection(c[1])))
        wrong += [f"missing in the source: {n} (for {name})" for n in nearest[1] if n not in present]
    used = {n for _, names in found.values() for n in names}
    wrong += [f"unexpected in the source: {n}" for n in sorted(present - used)]
    if wrong:
        raise ValueError("the tensors do not match:\n" + "\n".join(f"- {line}" for line in wrong))
    return found


def left_out(names: Iterable[str], n_layers: int, extra_layers: int, tied: bool) -> list[str]:
    """Tensors of a source that are known to carry nothing for this model and are not read.

    extra_layers: how many layers beyond n_layers hold multi-token prediction. tied: lm_head repeats the embedding.
    """

    def nothing(name: str) -> bool:
        layer = _THEIR_LAYER.match(name)
        beyond = layer is not None and n_layers <= int(layer[1]) < n_layers + extra_layers
        return beyond or bool(_COMPUTED.fullmatch(name)) or (tied and name == "lm_head.weight")

    return sorted(filter(nothing, names))


def _find(table: Mapping[str, Rule], name: str) -> tuple[Rule | None, int]:
    inside = _LAYER.fullmatch(name)
    if inside is None:
        return table.get(name), 0
    return table.get(f"layers.{{layer}}.{inside[2]}"), int(inside[1])


def _experts(shape: torch.Size) -> int:
    """Only the routed experts' rules have the {expert} wildcard, and E is those tensors' first dim."""
    return shape[0]
