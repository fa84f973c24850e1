"""The whole proof that any layout continues what any other saved, as one table.

    python -m moetrain.testing.reshape [--quick] [--only WORDS] [--write docs/reshape.md]

Every feature of moetrain/testing/small.py is on, in fp64. A layout trains two steps and saves. Another one loads that:
parameters, balance biases, optimizer state, and data cursor, gathered from its ranks, must be the bits that were saved.
It then trains three more steps, each of which must equal the single process that was never interrupted: the samples and
their order exactly; loss, learning rate, gradient norm, every gradient, and the final weights to 1e-9.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.checkpoint.tensors import model_tensors, optimizer_tensors
from moetrain.mesh.layout import make_layout
from moetrain.testing.ranks import RankFailure, run_ranks
from moetrain.testing.small import SMALL_MODEL, write_documents
from moetrain.testing.trajectory import Step, compare, open_trainer, record_steps, wholes
from moetrain.trainer import Trainer

BAR, SAVED_AT, MORE = 1e-9, 2, 3
GLOBAL_BATCH = 8  # of SMALL_MODEL

# Layout -> its ranks and overrides of `parallel`.
LAYOUTS: dict[str, tuple[int, dict[str, int | str]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "ep2": (2, {"ep": 2}),
    "tp2": (2, {"tp": 2}),
    "cp2": (2, {"cp": 2}),
    "pp2": (2, {"pp": 2}),
    "etp2": (2, {"etp": 2}),
    "dp4": (4, {}),
    "ep4": (4, {"ep": 4}),
    "ep2 dp4": (4, {"ep": 2}),
    "hsdp2 ep2": (4, {"dp_replicate": 2, "ep": 2}),
    "tp2 cp2 ep4": (4, {"tp": 2, "cp": 2, "ep": 4}),
    "tp2 dp2": (4, {"tp": 2, "ep": 2}),
    "cp2 etp2 ep2": (4, {"cp": 2, "etp": 2, "ep": 2}),
    "pp2 ep2": (4, {"pp": 2, "ep": 2}),
    "pp2 interleaved": (4, {"pp": 2, "ep": 2, "schedule": "interleaved"}),
    "pp2 zbv": (4, {"pp": 2, "ep": 2, "schedule": "zbv"}),
    "pp2 dualpipev": (4, {"pp": 2, "tp": 2, "schedule": "dualpipev"}),
    "ep8": (8, {"ep": 8}),
    "hsdp2 ep4": (8, {"dp_replicate": 2, "ep": 4}),
    "pp2 tp2 ep2": (8, {"pp": 2, "tp": 2, "ep": 2}),
}

# Optimizer -> pairs (saved by, loaded by).
PAIRS = {
    "adamw": [
        ("ep4", "ep2"),
        ("ep4", "one"),
        ("ep2", "one"),
        ("one", "ep4"),
        ("ep4", "tp2 cp2 ep4"),
        ("tp2 cp2 ep4", "ep2"),
        ("tp2 cp2 ep4", "pp2 zbv"),
        ("tp2 dp2", "tp2"),
        ("tp2 dp2", "one"),
        ("tp2", "tp2 dp2"),
        ("cp2", "dp4"),
        ("cp2 etp2 ep2", "cp2"),
        ("cp2 etp2 ep2", "etp2"),
        ("etp2", "hsdp2 ep2"),
        ("hsdp2 ep2", "ep2 dp4"),
        ("hsdp2 ep2", "dp2"),
        ("pp2", "one"),
        ("pp2 ep2", "pp2 interleaved"),
        ("pp2 ep2", "ep4"),
        ("pp2 interleaved", "pp2 dualpipev"),
        ("pp2 zbv", "pp2"),
        ("pp2 zbv", "tp2 cp2 ep4"),
        ("pp2 dualpipev", "pp2 zbv"),
        ("pp2 dualpipev", "dp2"),
        ("ep8", "ep4"),
        ("ep8", "one"),
        ("hsdp2 ep4", "ep2"),
        ("hsdp2 ep4", "pp2 ep2"),
        ("pp2 tp2 ep2", "tp2 cp2 ep4"),
        ("one", "pp2 tp2 ep2"),
        ("one", "ep8"),
    ],
    "muon": [
        ("ep4", "one"),
        ("one", "tp2 cp2 ep4"),
        ("tp2 cp2 ep4", "hsdp2 ep2"),
        ("hsdp2 ep2", "cp2 etp2 ep2"),
        ("cp2 etp2 ep2", "pp2 zbv"),
        ("pp2 zbv", "ep2"),
    ],
}
QUICK = {
    "adamw": [("tp2 cp2 ep4", "pp2 zbv"), ("tp2 cp2 ep4", "one"), ("pp2 zbv", "hsdp2 ep2")],
    "muon": [("hsdp2 ep2", "tp2 cp2 ep4")],
}


@dataclass
class State:
    """What a checkpoint must bring back: every whole tensor by part and name, and the data cursor."""

    tensors: dict[str, Tensor]
    cursor: dict


@dataclass
class Continued:
    """A run from step SAVED_AT on: its state there, its steps, final weights, and sample ids by step, in order."""

    state: State
    steps: list[Step]
    weights: dict[str, Tensor]
    samples: dict[int, list[str]]


def state_of(trainer: Trainer) -> State:
    """Gathered from all ranks. Collective."""
    model, optim = model_tensors(trainer.model), optimizer_tensors(trainer.model, trainer.optimizer)
    tensors = {f"model/{name}": t for name, t in model.items()} | {f"optim/{name}": t for name, t in optim.items()}
    return State(wholes(tensors), trainer.loader.state_dict())


def save(options: list[str]) -> State | None:
    """Train SAVED_AT steps and save; rank 0 returns what was saved."""
    trainer = open_trainer(options)
    for _ in range(SAVED_AT):
        trainer.train_step()
    state = state_of(trainer)
    trainer.save()
    trainer.close()
    return state if dist.get_rank() == 0 else None


def resume(options: list[str]) -> Continued | None:
    """Load what `options` name, if anything, and go on to step SAVED_AT + MORE; rank 0 returns it all."""
    trainer = open_trainer(options)
    while trainer.step < SAVED_AT:
        trainer.train_step()
    state = state_of(trainer)
    steps, weights = record_steps(trainer, MORE)
    trainer.close()
    if dist.get_rank() != 0:
        return None
    return Continued(state, steps, weights, _samples(trainer))


def _samples(trainer: Trainer) -> dict[int, list[str]]:
    """Sample ids of each step after SAVED_AT as the global batch orders them: micro-step, data rank, row."""
    rows = [json.loads(line) for line in (trainer.run_dir / "samples.jsonl").read_text().splitlines()]
    micro = trainer.config.train.micro_batch
    by_step: dict[int, list[list[str]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["dp"]):
        if row["step"] > SAVED_AT:
            by_step[row["step"]].append(row["ids"])
    return {
        step: [sample for at in range(0, len(ranks[0]), micro) for ids in ranks for sample in ids[at : at + micro]]
        for step, ranks in by_step.items()
    }


class Matrix:
    """Runs pairs below `directory`; every layout saves once, and the uninterrupted process runs once per optimizer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.documents = write_documents(directory)
        self.references: dict[str, Continued] = {}
        self.saved: dict[tuple[str, str], State] = {}

    def pair(self, optimizer: str, source: str, target: str) -> tuple[list[str], bool]:
        """Table cells of one pair, and whether it passed. Raises RankFailure if a rank did."""
        if optimizer not in self.references:
            self.references[optimizer] = self._run(resume, "one", optimizer, "reference")
        reference = self.references[optimizer]
        if (optimizer, source) not in self.saved:
            self.saved[optimizer, source] = self._run(save, source, optimizer, "saved")
        saved = self.saved[optimizer, source]
        step = self._run_dir(optimizer, source, "saved") / "checkpoints" / f"step_{SAVED_AT:08d}"
        got = self._run(resume, target, optimizer, f"from {source}", f"run.resume={step}")
        return verdict(got, saved, reference)

    def _run(self, fn, layout: str, optimizer: str, purpose: str, *extra: str):  # type: ignore[no-untyped-def]
        world, degrees = LAYOUTS[layout]
        rows = GLOBAL_BATCH // make_layout(world, **{k: v for k, v in degrees.items() if isinstance(v, int)}).dp
        micro = 1 if degrees.get("schedule") == "dualpipev" else max(1, rows // 2)
        options = [
            *SMALL_MODEL,
            "model.n_layers=4",  # pipelines of two virtual stages a rank need as many
            *self.documents,
            f"optim={optimizer}",
            f"run.dir='{self._run_dir(optimizer, layout, purpose)}'",
            "run.log_samples=true",
            "train.precision=fp64",
            f"train.micro_batch={micro}",
            *(f"parallel.{key}={value}" for key, value in degrees.items()),
            *(f"{key}='{value}'" for key, _, value in (option.partition("=") for option in extra)),
        ]
        return run_ranks(fn, world, options, timeout_s=600)[0]

    def _run_dir(self, optimizer: str, layout: str, purpose: str) -> Path:
        return self.directory / f"{optimizer} {layout} {purpose}".replace(" ", "-")


def verdict(got: Continued, saved: State, reference: Continued) -> tuple[list[str], bool]:
    """Cells: tensors that came back bit-equal, samples in order, errors of what follows; and whether all is well."""
    assert saved.tensors.keys() == reference.state.tensors.keys(), "the checkpoint is not that of the whole model"
    unequal = sorted(name for name in saved.tensors.keys() | got.state.tensors.keys() if not _same(got, saved, name))
    samples = got.samples == reference.samples and got.state.cursor == saved.cursor
    rates = [step.row["lr"] for step in got.steps] == [step.row["lr"] for step in reference.steps]
    difference = compare(got.steps, reference.steps)
    weights = max(_error(got.weights[name], expected) for name, expected in reference.weights.items())
    errors = [difference.loss, difference.norm, difference.gradient, weights]
    passed = not unequal and samples and rates and max(errors) < BAR
    equal = f"{len(saved.tensors) - len(unequal)} of {len(saved.tensors)}"
    cells = [equal + (f" (not {unequal[0]})" if unequal else ""), "same" if samples else "DIFFERENT"]
    return cells + [f"{error:.0e}" for error in errors], passed


def _same(got: Continued, saved: State, name: str) -> bool:
    mine, theirs = got.state.tensors.get(name), saved.tensors.get(name)
    return mine is not None and theirs is not None and mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit 1 if any pair fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few pairs only")
    parser.add_argument("--only", default="", help="pairs whose row contains this")
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    options = parser.parse_args(argv)
    table = QUICK if options.quick else PAIRS
    pairs = [(optimizer, source, target) for optimizer, some in table.items() for source, target in some]
    pairs = [pair for pair in pairs if options.only in " ".join(pair)]
    header = (
        "| saved by | ranks | loaded by | ranks | optimizer | bit-equal tensors | samples | loss | norm | gradient |"
    )
    lines = [f"{header} weights | seconds |", "|---" * 12 + "|"]
    print("\n".join(lines), flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        matrix = Matrix(Path(name))
        for optimizer, source, target in pairs:
            start = time.monotonic()
            try:
                cells, passed = matrix.pair(optimizer, source, target)
            except RankFailure as error:
                print(error, file=sys.stderr)
                cells, passed = ["", "", "", "", "", ""], False
            failed += not passed
            shown = [source + ("" if passed else " FAILED"), LAYOUTS[source][0], target, LAYOUTS[target][0], optimizer]
            cells = [*map(str, shown), *cells, f"{time.monotonic() - start:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    closing = f"{len(pairs) - failed} of {len(pairs)} pairs continue exactly"
    print(closing)
    if options.write:
        versions = f"torch {torch.__version__}, Python {platform.python_version()}"
        where = f"{versions}, {platform.machine()}, gloo ranks on the CPU"
        title = ["# Any layout continues what any other saved", "", *(__doc__ or "").splitlines()[2:], ""]
        options.write.write_text("\n".join([*title, where, "", *lines, "", closing, ""]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
