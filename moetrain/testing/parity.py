"""How each initializer's model compares with the dense one it was made from: scripts/parity.sh.

    python -m moetrain.testing.parity [--only WORDS] [--write FILE]

Trains the dense quick-start model for a short while, converts it every way, and measures both on held-out text in fp32.
Initializers that claim to be exact must have the same loss to 1e-6; exit 1 if one has not. For gates that are plain
probabilities, the layer's output is off by the factor (N/k) * (sum of the chosen gates): the table gives what random
logits of the router's size make of it and what was measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.checkpoint.tensors import model_tensors
from moetrain.data.batch import Batch
from moetrain.data.loader import Loader
from moetrain.model.build import build_model
from moetrain.moe.layer import MoELayer
from moetrain.moe.types import TokenContext, Totals
from moetrain.testing.ranks import run_ranks
from moetrain.testing.upcycle_run import train
from moetrain.upcycle.base import Model, Upcycle
from moetrain.upcycle.convert import build_initializer, open_source, upcycled_config, upcycled_tensors

BAR = 1e-6
QUICK_START = ["experiment=quickstart", "model.moe.n_experts=0", "tracker=none", "train.eval_every=1000000"]


@dataclass(frozen=True)
class Case:
    """experts, top_k, granularity as the command takes them. order: softmax before (pre) or after (post) the choice.

    exact: what the initializer claims. sources: how many dense models; more than one have been trained apart.
    """

    name: str
    experts: int
    top_k: int
    granularity: int = 1
    order: str = "pre"
    exact: bool = False
    sources: int = 1
    options: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        options = {"granularity": self.granularity, **self.options} if self.granularity > 1 else self.options
        return " ".join([self.name, *(f"{key}={value}" for key, value in options.items())])

    @property
    def gates(self) -> str:
        if self.options.get("normalized") == "false":
            return "before, as they are"
        return "after" if self.order == "post" else "before, normalised"


def _exact(name: str, experts: int, top_k: int, granularity: int = 1, sources: int = 1, **options: str) -> list[Case]:
    return [Case(name, experts, top_k, granularity, order, True, sources, options) for order in ("pre", "post")]


RAW = {"normalized": "false"}
CASES = [
    *_exact("copy", 8, 2),
    *_exact("virtual_group", 8, 2, 4),
    *_exact("virtual_group", 4, 1, 8),
    *_exact("drop", 8, 2, ratio="0"),
    *_exact("diversify", 8, 2, mask="0"),
    *_exact("merge", 8, 2),
    *_exact("split", 8, 8, router_std="0"),
    *_exact("split", 6, 6, router_std="0", shared_experts="2", by="importance"),
    *_exact("efficient_scale", 4, 2, 1, width="2"),
    *_exact("efficient_scale", 4, 2, 2, width="1", layers="7"),
    *_exact("efficient_scale", 4, 2, 4, width="2", layers="6"),
    Case("copy", 8, 2, options=RAW),
    Case("copy", 8, 2, options={**RAW, "router_std": "0"}),
    Case("virtual_group", 8, 2, 4, options=RAW),
    Case("virtual_group", 8, 2, 4, options={"tied": "false"}),
    Case("copy", 8, 2, options={"noise": "0.02"}),
    Case("drop", 8, 2, options={"ratio": "0.5"}),
    Case("drop", 8, 2, options={"ratio": "0.5", "shared_indices": "false"}),
    Case("drop", 8, 2, options={"ratio": "0.1"}),
    Case("diversify", 8, 2, options={"mask": "0.1"}),
    Case("merge", 4, 2, sources=2),
    Case("split", 8, 8),
    Case("split", 8, 6),
    Case("split", 8, 6, options={"by": "clustering", "router_rows": "gate_mean"}),
    Case("split", 8, 6, options={"by": "importance"}),
    Case("split", 6, 4, options={"shared_experts": "2"}),
    Case("efficient_scale", 4, 2, 1, options={"width": "2", "width_by": "aki"}),
    Case("efficient_scale", 4, 2, 1, options={"width": "1", "layers": "6", "depth_by": "interpolate"}),
    Case("efficient_scale", 4, 2, 1, options={"width": "1", "layers": "6", "depth_by": "stack"}),
]


@dataclass(frozen=True)
class Measured:
    """Mean loss in nats a token; the mean over tokens and layers of the sum of gates and of the router's input^2."""

    loss: float
    gates: float
    x_squared: float


def held_out(model: Model, cache_dir: Path, rows: int = 16) -> list[Batch]:
    """Held-out rows of the quick start's data."""
    config = model.config
    config.data.cache_dir = str(cache_dir)
    loader = Loader(
        config.data,
        seq_len=256,
        global_batch=rows,
        micro_batch=rows,
        dp_rank=0,
        dp_size=1,
        seed=0,
        vocab_size=config.model.vocab_size,
    )
    try:
        return [batch for step in loader.validation(1) for batch in step]
    finally:
        loader.close()


@torch.no_grad()
def measure(model: Model, batches: list[Batch]) -> Measured:
    """In fp32, on the CPU."""
    built = build_model(model.config, "cpu").float()
    own = model_tensors(built)
    for name, lazy in model.weights.items():
        own[name].copy_(lazy.make())
    gates: list[Tensor] = []
    squares: list[Tensor] = []

    def watch(_: Any, inputs: Any, routing: Any) -> None:
        squares.append(inputs[0].double().square().sum(-1).mean())
        gates.append(routing.gate_TK.double().sum(-1).mean())

    for layer in built.modules():
        if isinstance(layer, MoELayer):
            layer.router.register_forward_hook(watch)
    total, count = 0.0, 0
    for batch in batches:
        one = torch.ones(())
        context = TokenContext(batch.token_BS, batch.position_BS, batch.document_BS, Totals(one, one, 1, 1))
        logit_BSV = built(batch.token_BS, context)
        loss_BS = F.cross_entropy(logit_BSV.double().transpose(1, 2), batch.target_BS, reduction="none")
        total += float((loss_BS * batch.loss_mask_BS).sum())
        count += int(batch.loss_mask_BS.sum())
    return Measured(
        total / count,
        float(torch.stack(gates).mean()) if gates else 0.0,
        float(torch.stack(squares).mean()) if squares else 0.0,
    )


def convert_in_memory(case: Case, sources: list[Model]) -> tuple[Model, Upcycle]:
    """The case's MoE, nothing written."""
    initializer = build_initializer(case.name, case.options, case.experts, case.top_k, case.granularity)
    dense = initializer.prepare(sources)
    config = upcycled_config(dense.config, initializer)
    config.router["order"] = case.order
    return Model(config, upcycled_tensors(dense, config, initializer, seed=0)), initializer


def expected_factor(initializer: Upcycle, x_squared: float, draws: int = 4000) -> float:
    """(N/k) * the mean sum of the k largest of softmax(z), z ~ N(0, router_std^2 |x|^2), groups sharing a logit."""
    random = torch.Generator().manual_seed(0)
    size = initializer.router_std * x_squared**0.5
    logit = torch.randn(draws, initializer.experts, generator=random, dtype=torch.float64) * size
    chosen = logit.softmax(-1).topk(initializer.top_k).values.sum(-1).mean()
    return float(chosen) * initializer.experts / initializer.top_k


def row(case: Case, sources: list[Model], batches: list[Batch], dense: float) -> tuple[str, bool]:
    """A table row and whether the claim holds."""
    moe, initializer = convert_in_memory(case, sources)
    measured = measure(moe, batches)
    difference = measured.loss - dense
    holds = not case.exact or abs(difference) < BAR
    note = "exact" if case.exact else "not exact"
    if not initializer.normalized:
        note = "exact for a uniform router only"
        factor = measured.gates * initializer.n_experts / initializer.n_chosen
        note += f"; layer output x {expected_factor(initializer, measured.x_squared):.3f} expected, {factor:.3f} found"
    if not holds:
        note += " FAILED"
    shape = f"{initializer.n_experts} top {initializer.n_chosen}"
    return (
        f"| {case.label} | {shape} | {case.gates} | {dense:.7f} | {measured.loss:.7f} | {difference:+.1e} | {note} |",
        holds,
    )


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="initializers whose name contains this")
    parser.add_argument("--steps", type=int, default=160, help="of the dense model")
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    options = parser.parse_args(argv)
    lines = [
        "| initializer | experts | softmax and choice | dense loss | MoE loss | difference | |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        sources = dense_models(Path(name), options.steps)
        batches = held_out(sources[0], Path(name) / "cache")
        dense = [measure(source, batches).loss for source in sources]
        for case in CASES:
            if options.only not in case.label:
                continue
            several = sources[1:] if case.sources > 1 else sources[:1]
            line, holds = row(case, several, batches, dense[1] if case.sources > 1 else dense[0])
            failed += not holds
            lines.append(line)
            print(line, flush=True)
    closing = f"sources of merge: {dense[1]:.7f} and {dense[2]:.7f}; {failed} claims failed"
    print(closing)
    if options.write:
        options.write.write_text("\n".join([*lines, "", closing, ""]))
    return 1 if failed else 0


def dense_models(directory: Path, steps: int) -> list[Model]:
    """The quick-start model, and two that went on from it apart, each on data of its own."""
    common = [*QUICK_START, f"data.cache_dir={directory / 'cache'}"]
    runs = [directory / name for name in ("parent", "one", "two")]
    run_ranks(train, 1, [*common, f"run.dir={runs[0]}", f"train.steps={steps}"], timeout_s=900)
    for seed, run in enumerate(runs[1:], start=1):
        more = [f"init.from={runs[0]}", f"run.dir={run}", f"run.seed={seed}", f"train.steps={max(1, steps // 5)}"]
        run_ranks(train, 1, [*common, *more], timeout_s=900)
    return [open_source(run)[0] for run in runs]


if __name__ == "__main__":
    sys.exit(main())
