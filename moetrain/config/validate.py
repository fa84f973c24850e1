"""Every cross-field rule, checked before ranks or GPUs are touched.

Each refusal is a ValueError that names the key, the value, and the nearest legal value.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any

from moetrain.config.data import check_data
from moetrain.config.model import check_model
from moetrain.config.pipeline import V_SCHEDULES, check_pipeline
from moetrain.config.router import check_router
from moetrain.config.schema import Config
from moetrain.config.values import check_values
from moetrain.mesh.layout import Layout, make_layout, nearest_divisor

CHOICES = {
    "train.precision": ("fp64", "fp32", "bf16"),
    "parallel.cp_method": ("allgather", "ring", "ulysses"),
    "parallel.recompute": ("none", "full", "selective"),
    "parallel.schedule": ("1f1b", "interleaved", "zbv", "dualpipev"),
    "data.documents": ("stop", "cross"),
    "checkpoint.when_busy": ("wait", "skip"),
    "train.on_bad_step": ("stop", "skip", "rollback"),
}
AT_LEAST = {
    "run.seed": 0,
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
    "checkpoint.grace_s": 1,
    "run.hang_timeout_s": 0,
    "train.max_bad_steps": 0,
    "checkpoint.keep_every": 0,
    "checkpoint.keep_best": 0,
    "model.moe.n_experts": 0,
}


def validate(config: Config, world: int) -> Layout:
    """The layout of `world` ranks under `config`. Raises ValueError for the first rule that is broken."""
    for key, choices in CHOICES.items():
        _check_choice(key, _get(config, key), choices)
    for key, least in AT_LEAST.items():
        if not _get(config, key) >= least:  # NaN is not
            raise _refuse(key, _get(config, key), f"is below {least}", least)
    check_values(config)
    degrees = {key: getattr(config.parallel, key) for key in ("pp", "tp", "cp", "ep", "etp", "dp_replicate")}
    if (folder := config.run.dir).startswith("~"):
        raise _refuse("run.dir", folder, "would be a folder of that name here", Path(folder).expanduser())
    if not folder:
        raise _refuse("run.dir", '""', "would spread a run over the folder it is started in", f"runs/{config.run.name}")
    layout = make_layout(world, **degrees)
    _check_batches(config, layout)
    check_model(config.model)
    _check_cp(config, layout)
    check_pipeline(config, layout)
    _check_compile(config, layout)
    check_data(config.data)
    if layout.tp > 1:
        _check_tp(config, layout)
    if config.model.moe.n_experts:
        _check_experts(config, layout)
    else:
        for key in ("ep", "etp"):
            if getattr(layout, key) > 1:
                raise _refuse(f"parallel.{key}", getattr(layout, key), "needs experts, but model.moe.n_experts=0", 1)
    _check_placement(config, layout)
    check_init(config)
    _check_retention(config)
    _check_tape(config)
    check_router(config)
    _check_bad_steps(config)
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


def _check_tp(config: Config, layout: Layout) -> None:
    model, attention, tp = config.model, config.model.attention, layout.tp
    heads = {"n_heads": attention.n_heads}
    if attention.kind == "gqa":
        heads["n_kv_heads"] = attention.n_kv_heads
    for key, value in heads.items():
        if value % tp:
            stage = layout.world // layout.pp
            nearest = nearest_divisor(tp, math.gcd(stage, *heads.values()))
            raise _refuse("parallel.tp", tp, f"does not divide model.attention.{key}={value}", nearest)
    ranks = f"parallel.tp={tp}"
    _check_multiple("model.vocab_size", model.vocab_size, tp, ranks)
    _check_multiple("train.seq_len", config.train.seq_len, tp * layout.cp, f"{ranks} times parallel.cp={layout.cp}")
    if not all(model.is_moe(layer) for layer in range(model.n_layers)):
        _check_multiple("model.d_ff", model.d_ff, tp, ranks)
    # Weights whose rows tp divides are sharded by FSDP along their columns, in equal parts.
    columns = {"model.d_model": model.d_model}
    if attention.kind == "mla":
        columns["model.attention.kv_lora_rank"] = attention.kv_lora_rank
        columns["model.attention.q_lora_rank"] = attention.q_lora_rank
    shards = layout.dp_shard * layout.cp
    for key, value in columns.items():
        _check_multiple(key, value, shards, f"the {shards} ranks (dp_shard x cp) that shard each tp rank's weights")


def _check_cp(config: Config, layout: Layout) -> None:
    chunks, seq_len, heads = 2 * layout.cp, config.train.seq_len, config.model.attention.n_heads
    if layout.cp == 1:
        return
    if seq_len % chunks:
        reason = f"does not divide into the {chunks} chunks of parallel.cp={layout.cp}"
        raise _refuse("train.seq_len", seq_len, reason, max(1, round(seq_len / chunks)) * chunks)
    if config.parallel.cp_method == "ulysses" and heads % (layout.cp * layout.tp):
        shared = f"tp={layout.tp} x cp={layout.cp}" if layout.tp > 1 else f"cp={layout.cp}"
        reason = f"cannot divide model.attention.n_heads={heads} between {shared}"
        raise _refuse("parallel.cp_method", "ulysses", reason, "allgather")


def _check_compile(config: Config, layout: Layout) -> None:
    if not config.parallel.compile:
        return
    if layout.tp > 1:
        reason = f"with parallel.tp={layout.tp} would compile exchanges between ranks"
        raise _refuse("parallel.compile", "true", reason, "false")
    if config.parallel.schedule in V_SCHEDULES:
        reason = f"with parallel.schedule={config.parallel.schedule}: a compiled backward pass cannot be split"
        raise _refuse("parallel.compile", "true", reason, "false")


def _check_experts(config: Config, layout: Layout) -> None:
    moe = config.model.moe
    if moe.n_experts % layout.ep:
        legal = [d for d in range(1, layout.world + 1) if layout.world % d == 0 and moe.n_experts % d == 0]
        nearest = min(legal, key=lambda d: abs(d - layout.ep))
        raise _refuse("parallel.ep", layout.ep, f"does not divide model.moe.n_experts={moe.n_experts}", nearest)
    # FSDP shards an expert along its hidden width, or along d_model when etp has cut the width, and wants equal parts.
    by_width, by_model = (layout.edp_shard, 1) if layout.etp == 1 else (layout.etp, layout.edp_shard)
    _check_multiple("model.moe.d_expert", moe.d_expert, by_width, f"the {by_width} ranks that share each expert")
    _check_multiple("model.d_model", config.model.d_model, by_model, f"the {by_model} ranks that shard each slice")


def _check_placement(config: Config, layout: Layout) -> None:
    """An option that could never move or drop anything is a mistake."""
    placement, n_experts = config.dispatch.get("placement") or {}, config.model.moe.n_experts
    if not n_experts and (factor := (config.dispatch.get("capacity") or {}).get("factor")):
        raise _refuse("dispatch.capacity.factor", factor, "needs experts, but model.moe.n_experts=0", 0)
    if not (every := placement.get("every", 0)):
        return
    key, each = "dispatch.placement.every", n_experts // layout.ep
    if not n_experts:
        raise _refuse(key, every, "needs experts, but model.moe.n_experts=0", 0)
    if layout.ep == 1:
        raise _refuse(key, every, "has no ranks to move experts between, because parallel.ep=1", 0)
    if each == 1:
        reason = f"cannot even out ranks with one expert each: parallel.ep={layout.ep}, model.moe.n_experts={n_experts}"
        raise _refuse(key, every, reason, 0)


def _check_multiple(key: str, value: int, of: int, what: str) -> None:
    if value % of:
        raise _refuse(key, value, f"does not divide by {what}", max(1, round(value / of)) * of)


def check_init(config: Config) -> None:
    """The rules of `init`, which `init.from` needs before the rest. Raises ValueError."""
    unknown = sorted(set(config.init) - {"from", "allow"})
    if unknown:
        close = difflib.get_close_matches(unknown[0], ("from", "allow"), n=1, cutoff=0.0)
        raise ValueError(f"init.{unknown[0]}: no such key; did you mean 'init.{close[0]}'?")
    if not isinstance(source := config.init.get("from") or "", str):
        nearest = source[0] if isinstance(source, list) and len(source) == 1 else '""'
        raise _refuse("init.from", source, "is not one path", nearest)
    allow = config.init.get("allow", [])
    if not isinstance(allow, list) or not all(isinstance(name, str) and name for name in allow):
        nearest = [allow] if isinstance(allow, str) and allow else []
        raise _refuse("init.allow", repr(allow), "is not a list of names or patterns", nearest)


def _check_retention(config: Config) -> None:
    """An option that could never keep anything is a mistake."""
    kept, evaluated = config.checkpoint, config.train.eval_every
    if kept.keep_every and not kept.every:
        reason = f"leaves checkpoint.keep_every={kept.keep_every} nothing to keep"
        raise _refuse("checkpoint.every", 0, reason, kept.keep_every)
    if kept.keep_every and kept.every and kept.keep_every % kept.every:
        nearest = max(1, round(kept.keep_every / kept.every)) * kept.every
        reason = f"is not a multiple of checkpoint.every={kept.every}"
        raise _refuse("checkpoint.keep_every", kept.keep_every, reason, nearest)
    if kept.keep_best and not evaluated:
        raise _refuse("checkpoint.keep_best", kept.keep_best, "needs a val_loss, but train.eval_every=0", 0)
    if kept.keep_best and not kept.every:
        reason = f"leaves checkpoint.keep_best={kept.keep_best} nothing to choose from"
        raise _refuse("checkpoint.every", 0, reason, evaluated)
    if kept.keep_best and kept.every % evaluated:
        reason = f"needs a val_loss of each checkpoint, but checkpoint.every={kept.every} is not a multiple of it"
        raise _refuse("train.eval_every", evaluated, reason, nearest_divisor(evaluated, kept.every))


def _check_bad_steps(config: Config) -> None:
    if config.train.on_bad_step == "rollback" and not config.checkpoint.every:
        raise _refuse("checkpoint.every", 0, "leaves train.on_bad_step=rollback nothing to go back to", 1)
    if config.train.max_loss is not None and not config.train.max_loss >= 0:
        raise _refuse("train.max_loss", config.train.max_loss, "is below 0", 0)


def _check_tape(config: Config) -> None:
    record, replay = config.router.get("record", ""), config.router.get("replay", "")
    if record and record == replay:
        raise _refuse("router.record", record, "would overwrite what router.replay reads", '""')
    for key, value in (("record", record), ("replay", replay)):
        if value and not config.model.moe.n_experts:
            raise _refuse(f"router.{key}", value, "needs experts, but model.moe.n_experts=0", '""')
    if replay and not Path(replay).is_dir():
        raise _refuse("router.replay", replay, "is not a directory, as router.record writes", '""')


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        # Of equally close ones the last: fp16 is meant to be fast, as bf16 is and fp64 is not.
        nearest = max(reversed(choices), key=lambda c: difflib.SequenceMatcher(None, str(value), c).ratio())
        raise _refuse(key, repr(value), f"is not one of {', '.join(choices)}", nearest)


def _refuse(key: str, value: object, reason: str, nearest: object) -> ValueError:
    return ValueError(f"{key}={value} {reason}; nearest legal value: {nearest}")


def _get(config: Config, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part)
    return node
