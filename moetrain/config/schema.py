"""The typed configuration. Hydra composes YAML; `compose.py` turns it into these dataclasses. No torch here.

Plugin groups (router, balance, dispatch, experts, optim, tracker) stay dictionaries with a `_target_`: a plugin's
options are its constructor's arguments, so adding one needs no change here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moetrain.config.data import DataConfig
from moetrain.config.model import ModelConfig


@dataclass
class RunConfig:
    """resume: auto (the newest complete checkpoint of this run, if any) | never | a checkpoint's path."""

    name: str = "run"
    dir: str = "runs/run"
    seed: int = 0
    resume: str = "auto"
    deterministic: bool = False
    log_samples: bool = False


@dataclass
class TrainConfig:
    """global_batch and micro_batch count sequences of seq_len tokens.

    micro_batch: per data-parallel rank and micro-step; 0 takes a rank's whole share at once, without accumulation.

    precision: fp64 | fp32 (both for proofs) | bf16 (compute in bf16, master weights and reductions in fp32).
    eval_every: steps between validations, 0 for none; eval_batches: global batches in one validation.
    max_grad_norm: 0 turns clipping off. log_every: steps between console lines (metrics.jsonl has each step).
    """

    steps: int = 100
    global_batch: int = 16
    micro_batch: int = 0
    seq_len: int = 256
    precision: str = "fp32"
    eval_every: int = 0
    eval_batches: int = 4
    max_grad_norm: float = 1.0
    log_every: int = 10


@dataclass
class ParallelConfig:
    """Degrees of the folded meshes; dp, edp and their splits are derived (mesh/layout.py).

    cp_method: how attention sees the rest of a row that cp ranks share: allgather (keys and values of the whole row on
    each) | ring (they travel, one share at a time) | ulysses (each rank takes whole rows of some heads; n_heads must
    divide by cp).
    recompute: activations kept for the backward pass: none recomputes nothing, full keeps each layer's input only,
    selective recomputes attention and the experts' inside. Routing is never decided again.
    compile: torch.compile attention's projections, dense MLP, and shared experts of each block; not with tp, zbv,
    dualpipev.
    reshard_after_forward: false keeps FSDP's gathered parameters until the backward pass. Null: true without, false
    with a pipeline, whose micro-batches would each gather them again.
    schedule: 1f1b | interleaved | zbv | dualpipev, of the pipeline; its micro-batches are the micro-steps.
    pp_layers: layers of each stage, first stage first; null divides them evenly. interleaved takes any multiple of pp
    as the number of stages (2 pp by default), zbv and dualpipev exactly 2 pp, 1f1b pp.
    """

    pp: int = 1
    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp_replicate: int = 1
    cp_method: str = "allgather"
    recompute: str = "none"
    compile: bool = False
    schedule: str = "1f1b"
    pp_layers: list[int] | None = None
    reshard_after_forward: bool | None = None


@dataclass
class CheckpointConfig:
    """every: steps between checkpoints, 0 for only the final one; keep: newest checkpoints kept, 0 for all."""

    every: int = 0
    keep: int = 2


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init: dict[str, str] = field(default_factory=dict)  # from: a checkpoint whose weights alone start the run
    router: dict[str, Any] = field(default_factory=dict)
    balance: dict[str, Any] = field(default_factory=dict)
    dispatch: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    tracker: dict[str, Any] = field(default_factory=dict)
