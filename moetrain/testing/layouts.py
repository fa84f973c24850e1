"""The layouts of the whole proof (moetrain/testing/invariance.py), and the overrides that train one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moetrain.config.pipeline import runs_here
from moetrain.mesh.layout import Layout, make_layout
from moetrain.testing.small import SMALL_MODEL

# Five layers never divide evenly between stages; two micro-steps of one row on 8 data ranks need 16 rows.
MODEL = [*SMALL_MODEL, "model.n_layers=5", "train.global_batch=16", "train.seq_len=32"]
GLOBAL_BATCH = 16
# On GPUs wide enough, under every layout, for FlexAttention (heads of 16, tiles of 128) and grouped_mm (16 bytes).
CUDA_MODEL = [
    *MODEL,
    "model.d_model=64",
    "model.d_ff=96",
    "model.attention.head_dim=16",
    "model.moe.d_expert=48",
    "model.moe.d_shared=32",
    "train.seq_len=512",
]


@dataclass(frozen=True)
class Case:
    """One layout: world ranks, its degrees, other overrides, micro-steps, and whether the quick table includes it."""

    world: int
    degrees: dict[str, int] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    micro_steps: int = 2
    quick: bool = False

    @property
    def name(self) -> str:
        dp = [f"dp{self.layout.dp}"] if self.layout.dp > 1 else []
        degrees = [f"{key.removeprefix('dp_')}{value}" for key, value in self.degrees.items()]
        return " ".join([*dp, *degrees, *(option.removeprefix("parallel.") for option in self.extra)]) or "one process"

    @property
    def runs_here(self) -> bool:
        """Not on a torch that is too old for its schedule."""
        asked = [option.removeprefix("parallel.schedule=") for option in self.extra if "schedule=" in option]
        return all(map(runs_here, asked))

    @property
    def layout(self) -> Layout:
        return make_layout(self.world, **self.degrees)

    def overrides(self, data: list[str], run_dir: Path, precision: str, cuda: bool = False) -> list[str]:
        """Everything `load_config` needs. data: of `write_documents`."""
        micro_batch = GLOBAL_BATCH // self.layout.dp // self.micro_steps
        run = [f"run.dir={run_dir}", f"train.precision={precision}", f"train.micro_batch={micro_batch}"]
        degrees = [f"parallel.{key}={value}" for key, value in self.degrees.items()]
        # What experts=auto measures to be fastest may differ between layouts, and so may its rounding.
        experts = ["experts=grouped_mm"] if cuda and precision == "bf16" else []
        chunks = ["dispatch.chunks=1"] if cuda else []  # measuring which number is best would take longer than the run
        return [*(CUDA_MODEL if cuda else MODEL), *data, *run, *degrees, *experts, *chunks, *self.extra]


def _case(world: int, *extra: str, micro_steps: int = 2, quick: bool = False, **degrees: int) -> Case:
    return Case(world, degrees, tuple(f"parallel.{option}" for option in extra), micro_steps, quick)


RING, ULYSSES = "cp_method=ring", "cp_method=ulysses"
INTERLEAVED, ZBV, DUALPIPEV = "schedule=interleaved", "schedule=zbv", "schedule=dualpipev"
FULL, SELECTIVE = "recompute=full", "recompute=selective"
CASES = [
    # One axis at a time: these fit on two GPUs.
    _case(2),
    _case(2, ep=2, quick=True),
    _case(2, dp_replicate=2),
    _case(2, etp=2),
    _case(2, tp=2, quick=True),
    _case(2, cp=2, quick=True),
    _case(2, RING, cp=2),
    _case(2, ULYSSES, cp=2),
    _case(2, pp=2, quick=True),
    _case(2, INTERLEAVED, pp=2, micro_steps=4),
    _case(2, ZBV, pp=2, micro_steps=4),
    _case(2, DUALPIPEV, pp=2, micro_steps=4),
    _case(2, FULL, ep=2),
    _case(2, SELECTIVE, tp=2, ep=2),
    _case(2, "pp_layers=[1,4]", FULL, pp=2),
    # Two and three.
    _case(4, ep=4),
    Case(4, {"ep": 4}, ("dispatch=allgather", "dispatch.chunks=2")),
    Case(4, {"ep": 2}, ("dispatch=collective", "dispatch.chunks=4", "parallel.recompute=full")),
    Case(4, {"ep": 4}, ("dispatch=two_level", "dispatch.node_size=2", "dispatch.chunks=3", "parallel.recompute=full")),
    Case(8, {"pp": 2, "ep": 4}, ("dispatch=auto", "dispatch.node_size=2", "parallel.schedule=zbv")),
    _case(4, dp_replicate=2, ep=2, quick=True),
    _case(4, dp_replicate=4, ep=4),
    _case(4, tp=2, ep=2, etp=2),
    _case(4, tp=2, cp=2, ep=4, quick=True),
    _case(4, RING, SELECTIVE, tp=2, cp=2, ep=2),
    _case(4, ULYSSES, FULL, tp=2, cp=2, ep=2, etp=2),
    _case(4, INTERLEAVED, FULL, pp=2, ep=2, micro_steps=4),
    _case(4, ZBV, "pp_layers=[1,1,1,2]", pp=2, tp=2),
    _case(4, DUALPIPEV, RING, pp=2, cp=2, micro_steps=4),
    _case(4, pp=4, micro_steps=4),
    # All 8 ranks.
    _case(8, pp=2, tp=2, cp=2, ep=4),
    _case(8, pp=2, tp=2, ep=2, etp=2),
    _case(8, tp=2, cp=2, ep=8),
    _case(8, dp_replicate=2, cp=2, ep=2),
    _case(8, RING, ZBV, pp=2, tp=2, cp=2, ep=2, etp=2, micro_steps=4),
    _case(8),
    _case(8, ep=8),
    _case(8, ep=2, etp=4),
    _case(8, RING, cp=4, ep=8),
    _case(8, "pp_layers=[4,1]", SELECTIVE, pp=2, dp_replicate=2, tp=2, ep=2),
    _case(8, ULYSSES, INTERLEAVED, pp=2, tp=2, cp=2, ep=4, micro_steps=4),
    _case(8, DUALPIPEV, pp=2, tp=2, ep=4, micro_steps=4),
    _case(8, pp=4, ep=2, micro_steps=4),
]
