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
    """resume: auto (the newest complete checkpoint of this run, if any) | never | a checkpoint's path.

    hang_timeout_s: seconds without a finished step, evaluation, or checkpoint after which the run reports where every
    rank is and ends; 0 for no limit.
    """

    name: str = "run"
    dir: str = "runs/run"
    seed: int = 0
    resume: str = "auto"
    deterministic: bool = False
    log_samples: bool = False
    hang_timeout_s: float = 1200.0


@dataclass
class TrainConfig:
    """global_batch and micro_batch count sequences of seq_len tokens.

    micro_batch: per data-parallel rank and micro-step; 0 takes a rank's whole share at once, without accumulation.

    precision: fp64 | fp32 (both for proofs) | bf16 (compute in bf16, master weights and reductions in fp32).
    eval_every: steps between validations, 0 for none; eval_batches: global batches in one validation.
    max_grad_norm: 0 turns clipping off. log_every: steps between console lines (metrics.jsonl has each step).
    on_bad_step: what a NaN or exploded loss leads to: stop | skip (no update, go on) | rollback (to the newest
    checkpoint, then on with the data behind the bad batch). max_bad_steps: in the whole run; one more stops it.
    max_loss: nats/token; a cross-entropy above it has exploded. Null: three times ln(vocabulary); 0: never.
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
    on_bad_step: str = "stop"
    max_bad_steps: int = 10
    max_loss: float | None = None


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
    """every: steps between checkpoints, 0 for only the final one.

    keep: newest checkpoints kept, 0 for all. keep_every: those whose step divides by this stay as well, 0 for none.
    keep_best: so do this many with the lowest val_loss, 0 for none.

    asynchronous: copy the state to host memory and write it beside the training. when_busy: what a save does when the
    one before it is still being written: wait | skip. grace_s: seconds from SIGTERM or SIGUSR1 to the end of the run,
    last checkpoint included; a run that takes longer reports where it is and exits with 1.
    """

    every: int = 0
    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0
    asynchronous: bool = False
    when_busy: str = "wait"
    grace_s: float = 240.0


@dataclass
class Config:
    """Everything that a run is made of. Groups that are a `dict` hold plugins: a `_target_` and its own options."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    # from: a checkpoint whose weights alone start the run. allow: patterns of names that a checkpoint may lack or have
    # in excess, here and on a resume.
    init: dict[str, Any] = field(default_factory=dict)
    router: dict[str, Any] = field(default_factory=dict)
    balance: dict[str, Any] = field(default_factory=dict)
    dispatch: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    tracker: dict[str, Any] = field(default_factory=dict)
