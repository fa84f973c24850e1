"""Every cross-field rule, checked before ranks or GPUs are touched.

Each refusal is a ValueError that names the key, the value, and the nearest legal value.
"""

from __future__ import annotations

import difflib
from typing import Any

from moetrain.config.data import check_data
from moetrain.config.model import check_model
from moetrain.config.pipeline import check_pipeline
from moetrain.config.schema import Config
from moetrain.mesh.layout import Layout, make_layout, nearest_divisor

CHOICES = {
    "train.precision": ("fp64", "fp32", "bf16"),
    "parallel.recompute": ("none", "full", "selective"),
    "parallel.schedule": ("1f1b", "interleaved", "zbv", "dualpipev"),
    "data.documents": ("stop", "cross"),
}
AT_LEAST = {
    "train.steps": 1,
    "train.global_batch": 1,
    "train.micro_batch": 0,
    "train.seq_len": 1,
    "train.eval_every": 0,
    "train.eval_batches": 1,
    "train.max_grad_norm": 0,
    "train.log_every": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 0,
    "model.moe.n_experts": 0,
}
# Legal arithmetic, but the code that runs them is still to come: refused by name rather than ignored.
NOT_RUNNING = {
    "parallel.tp": 1,
    "parallel.cp": 1,
    "parallel.etp": 1,
}


def validate(config: Config, world: int) -> Layout:
    """The layout of `world` ranks under `config`. Raises ValueError for the first rule that is broken."""
    for key, choices in CHOICES.items():
        _check_choice(key, _get(config, key), choices)
    for key, least in AT_LEAST.items():
        if _get(config, key) < least:
            raise _refuse(key, _get(config, key), f"is below {least}", least)
    degrees = {key: getattr(config.parallel, key) for key in ("pp", "tp", "cp", "ep", "etp", "dp_replicate")}
    layout = make_layout(world, **degrees)
    for key, only in NOT_RUNNING.items():
        if _get(config, key) != only:
            raise _refuse(key, _get(config, key), "is not running yet", only)
    _check_batches(config, layout)
    check_model(config.model)
    check_pipeline(config, layout)
    check_data(config.data)
    if config.model.moe.n_experts:
        _check_experts(config, layout)
    elif layout.ep > 1:
        raise _refuse("parallel.ep", layout.ep, "needs experts, but model.moe.n_experts=0", 1)
    _check_init(config)
    _check_tape(config)
    return layout


def _check_batches(config: Config, layout: Layout) -> None:
    train = config.train
    if train.global_batch % layout.dp:
        nearest = max(layout.dp, round(train.global_batch / layout.dp) * layout.dp)
        reason = f"does not divide by the data-parallel degree {layout.dp}"
        raise _refuse("train.global_batch", train.global_batch, reason, nearest)
    per_rank = train.global_batch // layout.dp
    if train.micro_batch and per_rank % train.micro_batch:
        nearest = nearest_divisor(train.micro_batch, per_rank)
        reason = f"does not divide each data rank's {per_rank} sequences"
        raise _refuse("train.micro_batch", train.micro_batch, reason, nearest)


def _check_experts(config: Config, layout: Layout) -> None:
    moe = config.model.moe
    if moe.n_experts % layout.ep:
        legal = [d for d in range(1, layout.world + 1) if layout.world % d == 0 and moe.n_experts % d == 0]
        nearest = min(legal, key=lambda d: abs(d - layout.ep))
        raise _refuse("parallel.ep", layout.ep, f"does not divide model.moe.n_experts={moe.n_experts}", nearest)
    if moe.d_expert % layout.edp_shard:
        # Expert weights are sharded along their hidden width; FSDP wants equal parts there.
        nearest = max(1, round(moe.d_expert / layout.edp_shard)) * layout.edp_shard
        reason = f"does not divide by the {layout.edp_shard} ranks that shard each expert"
        raise _refuse("model.moe.d_expert", moe.d_expert, reason, nearest)


def _check_init(config: Config) -> None:
    unknown = set(config.init) - {"from"}
    if unknown:
        raise ValueError(f"init.{sorted(unknown)[0]}: no such key; did you mean 'init.from'?")


def _check_tape(config: Config) -> None:
    record, replay = config.router.get("record", ""), config.router.get("replay", "")
    if record and record == replay:
        raise _refuse("router.record", record, "would overwrite what router.replay reads", '""')
    for key, value in (("record", record), ("replay", replay)):
        if value and not config.model.moe.n_experts:
            raise _refuse(f"router.{key}", value, "needs experts, but model.moe.n_experts=0", '""')


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)
        raise _refuse(key, repr(value), f"is not one of {', '.join(choices)}", (close or choices)[0])


def _refuse(key: str, value: object, reason: str, nearest: object) -> ValueError:
    return ValueError(f"{key}={value} {reason}; nearest legal value: {nearest}")


def _get(config: Config, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part)
    return node
