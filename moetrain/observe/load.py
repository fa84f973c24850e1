"""How evenly the experts of each layer were used in one step.

Shape suffixes: L MoE layers (of every pipeline stage), E routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moetrain.moe.placement import loads


def load_metrics(
    layers: Sequence[int],
    count_LE: Tensor,
    entropy_L: Tensor,
    dropped_L: Tensor,
    tokens: Tensor | float,
    rank_LE: Tensor | None = None,
) -> dict[str, float]:
    """The `moe/{layer}/...` metrics of one optimizer step, from sums over the whole global batch.

    layers: the decoder's layer numbers, in the order of the tensors' first dim.
    count_LE: how often each expert was chosen by a valid token, before any token is dropped.
    entropy_L: sum over valid tokens of the entropy, in nats, of the router's distribution over experts.
    dropped_L: chosen (token, expert) pairs that capacity dropped.
    tokens: valid tokens of the global batch.
    rank_LE: on the CPU, the rank of the ep group that has each expert, all equally many; None without such ranks.

    Per layer, with c = count over experts and m its mean:
    load_max_over_mean = max(c) / m: 1 is perfect balance, E is collapse onto one expert.
    load_cv = sqrt(mean((c - m)^2)) / m, the coefficient of variation (population deviation): 0 is perfect balance.
    router_entropy = entropy sum / tokens: ln(E) is undecided, 0 is certain.
    dead_experts = experts nobody chose in this step.
    dropped_share = dropped / sum(c).
    rank_load_max_over_mean = as the first, of ranks instead of experts: choices of all experts that a rank has; and,
    without a layer in its name, the largest of all layers. Left out without rank_LE.
    A layer that routed nothing has 0 for all but dead_experts, so that every value is finite.
    """
    assert count_LE.shape[0] == entropy_L.shape[0] == dropped_L.shape[0] == len(layers)
    if not layers:
        return {}
    # One transfer from the device for everything; float64 holds counts up to 2^53 exactly.
    columns = [count_LE.double(), entropy_L.double()[:, None], dropped_L.double()[:, None]]
    packed = torch.cat(columns, dim=1).cpu()
    count_LE, entropy_L, dropped_L = packed[:, :-2], packed[:, -2], packed[:, -1]
    mean_L = count_LE.mean(1)
    per_layer = {
        "load_max_over_mean": _ratio(count_LE.amax(1), mean_L),
        "load_cv": _ratio(count_LE.std(1, unbiased=False), mean_L),
        "router_entropy": _ratio(entropy_L, torch.as_tensor(tokens).to("cpu", torch.float64).expand_as(entropy_L)),
        "dead_experts": (count_LE == 0).sum(1),
        "dropped_share": _ratio(dropped_L, count_LE.sum(1)),
    }
    if rank_LE is not None:
        load_LR = loads(count_LE, rank_LE, int(rank_LE.max()) + 1)
        per_layer["rank_load_max_over_mean"] = _ratio(load_LR.amax(1), load_LR.mean(1))
    values = {name: value_L.tolist() for name, value_L in per_layer.items()}
    metrics = {f"moe/{layer}/{name}": values[name][i] for i, layer in enumerate(layers) for name in values}
    if rank_LE is not None:
        metrics["rank_load_max_over_mean"] = max(values["rank_load_max_over_mean"])
    return metrics


def _ratio(part_L: Tensor, whole_L: Tensor) -> Tensor:
    return torch.where(whole_L > 0, part_L / whole_L, 0.0)
