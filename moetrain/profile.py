"""Lifecycle of `moetrain profile`: a few training steps under torch.profiler, one trace and one table a rank."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from moetrain.observe.annotate import annotate
from moetrain.observe.timeline import WINDOW, format_shares, shares
from moetrain.train import run_config, running
from moetrain.trainer import Trainer

WARMUP, MEASURED = 5, 3  # steps


def profile(overrides: list[str], out: Path) -> str:
    """Train WARMUP + MEASURED steps, from scratch or `init.from`, and divide the measured ones between their parts.

    Writes `trace_rank<r>.json.gz` (for chrome://tracing or Perfetto) and `shares_rank<r>.txt` into `out`; returns this
    rank's table. The run's own directory is `out`/run and no checkpoint is written. Raises ValueError as `train`.
    """
    config = run_config([*overrides, f"run.dir={out / 'run'}", "run.resume=never"])
    config = replace(config, train=replace(config.train, steps=max(config.train.steps, WARMUP + MEASURED)))
    with running(config) as trainer:
        annotate(trainer.model)
        for _ in range(WARMUP):
            trainer.train_step()
        return measure(trainer, out)


def measure(trainer: Trainer, out: Path) -> str:
    """Trace MEASURED steps of a trainer whose model is annotated; every rank writes its files into `out`."""
    activities = [ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    _settle(trainer.device)
    with torch_profile(activities=activities) as profiler, record_function(WINDOW):
        for _ in range(MEASURED):
            trainer.train_step()
        _settle(trainer.device)
    rank = torch.distributed.get_rank()
    path = out / f"trace_rank{rank}.json.gz"
    profiler.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        table = format_shares(shares(json.load(file)["traceEvents"]), MEASURED)
    (out / f"shares_rank{rank}.txt").write_text(table + "\n")
    return f"{table}\ntrace of rank {rank}: {path}"


def _settle(device: torch.device) -> None:
    """The device has finished all that the host asked of it, so the window holds whole steps."""
    if device.type == "cuda":
        torch.cuda.synchronize()
