"""Training throughput of whole models beside transformers and Megatron-Core, in one run: scripts/bench_train.sh.

    python -m moetrain.testing.bench_train [--dry-run] [--gpus N] [--steps 12] [--natural-steps 500] [--only WORDS]

Shapes: configs/experiment/bench_*.yaml, 4 sequences of 4096 tokens a GPU. Routing: forced balanced, forced by Zipf's
law (exponent 0.6), and natural, which is measured after --natural-steps of training with the model's own balance loss.
A row's speed is the median of the last half of its steps. TFLOP/s counts active parameters (plan/params.py); `matmul`
is what an 8192^3 bf16 product reaches on this machine in the same run. A peer that is not installed is absent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from moetrain.config.compose import load_config
from moetrain.plan.params import flops_per_token

SHAPES = ("bench_qwen3_12l", "bench_mixtral_4l")
ROUTINGS = ("balanced", "zipf", "natural")
MEGATRON = "Megatron-Core 0.16.1"  # the version that peer_megatron is written for
STACKS = {  # what trains each, after torchrun's options
    "moetrain": "moetrain.testing.bench_ours",
    "transformers + FSDP2": "moetrain.testing.peer_transformers",
    MEGATRON: "moetrain.testing.peer_megatron",
}
SEQUENCES = 4  # a GPU and step
EVEN_FIT = {"bench_qwen3_12l": 4, "bench_mixtral_4l": 2}  # layers whose optimizer state one GPU of 140 GB holds

BALANCE = {"bench_qwen3_12l": "qwen3_30b_a3b", "bench_mixtral_4l": "mixtral_8x7b"}  # published with the model


@dataclass(frozen=True)
class Case:
    """One row of the table. steps are all that it trains, of which the last half is timed."""

    shape: str
    routing: str
    stack: str
    gpus: int
    steps: int

    @property
    def overrides(self) -> list[str]:
        layers = [f"model.n_layers={EVEN_FIT[self.shape]}"] if self.gpus == 1 else []
        return [f"experiment={self.shape}", f"train.global_batch={SEQUENCES * self.gpus}", *layers]

    def command(self, out: Path) -> list[str]:
        """The torchrun command that leaves rows like those of metrics.jsonl in `out`/metrics.jsonl."""
        run = ["torchrun", "--standalone", f"--nproc-per-node={self.gpus}", "-m"]
        to = [str(out / "metrics.jsonl"), str(self.steps)]
        program = [*run, STACKS[self.stack], *to]
        balance = [f"balance={BALANCE[self.shape]}"] if self.routing == "natural" else []
        if self.stack == "moetrain":
            routed = balance or ["router=forced", f"router.distribution={self.routing}"]
            return [*program, *self.overrides, f"parallel.ep={self.gpus}", *routed]
        # Without expert parallelism an uneven load costs little, so transformers needs no balance loss.
        return [*program, self.routing, *self.overrides, *(balance if self.stack == MEGATRON else [])]

    @property
    def absent(self) -> str:
        """Why this row cannot be had here; empty if it can."""
        if self.stack != MEGATRON:
            return ""
        wanted = MEGATRON.split()[1]
        try:
            found = metadata.version("megatron-core")
        except metadata.PackageNotFoundError:
            return f"megatron-core {wanted} is not installed"
        return "" if found == wanted else f"megatron-core {found} is installed, not {wanted}"


def cases(gpus: int, steps: int, natural_steps: int) -> list[Case]:
    """Every row that `gpus` GPUs allow."""
    return [
        Case(shape, routing, stack, gpus, natural_steps + steps if routing == "natural" else steps)
        for shape in SHAPES
        for routing in ROUTINGS
        for stack in STACKS
    ]


def main(argv: list[str] | None = None) -> int:
    """Print the plan or the table; exit 1 if a row failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print what would run; needs no GPU")
    parser.add_argument("--gpus", type=int, default=0, help="all that there are by default")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--natural-steps", type=int, default=500)
    parser.add_argument("--only", default="", help="rows whose words contain this")
    options = parser.parse_args(argv)
    gpus = options.gpus or torch.cuda.device_count() or (2 if options.dry_run else 0)
    every = cases(gpus, options.steps, options.natural_steps)
    rows = [case for case in every if options.only in f"{case.shape} {case.routing} {case.stack}"]
    if options.dry_run:
        for case in rows:
            print(*case.command(Path("OUT")), *([f"# absent: {case.absent}"] if case.absent else []))
        return 0
    if not torch.cuda.device_count():
        print("bench_train: no GPU here; --dry-run prints the plan", file=sys.stderr)
        return 2
    rate = matmul_rate()
    print(
        f"{gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}; 8192^3 matmul {rate / 1e12:.0f} TFLOP/s"
    )
    print("| model | layers | routing | stack | tokens/s/GPU | TFLOP/s | % of matmul | peak GB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    return max([measure(case, rate) for case in rows], default=0)


def measure(case: Case, rate: float) -> int:
    """Run one row and print it and, of ours, where the step's time goes; 1 if it failed."""
    config = load_config(case.overrides)
    model, seq_len = config.model, config.train.seq_len
    label = f"| {model.name} | {model.n_layers} | {case.routing} | {case.stack}"
    if case.absent:
        print(f"{label} | absent: {case.absent} ||||", flush=True)
        return 0
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        environment = {**os.environ, "OMP_NUM_THREADS": "4"}
        done = subprocess.run(case.command(out), stderr=subprocess.PIPE, stdout=sys.stderr, text=True, env=environment)
        if done.returncode:
            print(f"{label} | FAILED ||||", flush=True)
            print(done.stderr[-3000:], file=sys.stderr)
            return 1
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        shares = out / "shares_rank0.txt"
        share_table = shares.read_text() if shares.exists() else ""
    timed = rows[-max(1, min(case.steps // 2, 20)) :]
    speed = statistics.median(row["tokens_per_s_per_gpu"] for row in timed)
    flops = speed * flops_per_token(model, seq_len)
    peak = max(row["peak_memory_gb"] for row in timed)
    print(f"{label} | {speed:,.0f} | {flops / 1e12:.0f} | {flops / rate:.0%} | {peak:.0f} |", flush=True)
    print(share_table, file=sys.stderr)
    return 0


def matmul_rate(size: int = 8192, repeats: int = 30) -> float:
    """FLOP/s of a bf16 product of two size x size matrices."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
