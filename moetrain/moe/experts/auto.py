"""Choose an expert backend by measuring the candidates once, for the run's shapes on the run's device.

A candidate must first agree with fp64 on a small sample; of those that do, the fastest is taken. What was measured is
kept on disk (remember.py), so the next run of the same shapes starts at once and chooses the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.comm.code import digest_of
from moetrain.moe.experts import measure, reference
from moetrain.moe.experts.base import ExpertBackend, Pieces, Wanted, Workload
from moetrain.moe.experts.pieces import divide
from moetrain.moe.experts.remember import recall, remember

CANDIDATES = ("triton", "grouped_mm", "reference")  # also the order in which an untimed choice prefers them


class AutoExperts:
    """Computes with one of `candidates`: until `decide` and `use`, with the last, which is the reference."""

    def __init__(self, candidates: Mapping[str, ExpertBackend]) -> None:
        self.candidates, self.name = dict(candidates), list(candidates)[-1]

    def __call__(
        self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, w_gate_up_E2FD: Tensor, w_down_EDF: Tensor
    ) -> Tensor:
        return self.candidates[self.name](x_TD, expert_TK, gate_TK, w_gate_up_E2FD, w_down_EDF)

    def divide(self, weights: tuple[Tensor, Tensor], wanted: Wanted | None) -> Pieces:
        """As the chosen one does."""
        return divide(self.candidates[self.name], weights, wanted)

    def use(self, name: str) -> None:
        """Compute with this candidate from now on."""
        self.name = name

    def decide(self, load: Workload, device: torch.device, timed: bool = True) -> tuple[str, str]:
        """The fastest candidate that passes its check, and a line about it.

        timed=False takes the first that passes: a clock may decide differently another time. Raises RuntimeError if
        none passes.
        """
        limit = measure.error_limit(load)
        key = {"load": asdict(load), "timed": timed, "candidates": list(self.candidates), **_versions(device)}
        results, source = recall(key), "measured before"
        if not isinstance(results, dict) or not self._readable(results):
            results, source = self._measure(load, device, timed, limit), "measured"
        right = {name: r["ms"] for name, r in results.items() if r["error"] <= limit}  # false for NaN
        if not right:  # not kept: it may be for want of memory that another process has given back by the next run
            raise RuntimeError(f"experts=auto: no backend agrees with fp64 within {limit:.1e}: {results}")
        if source == "measured":
            remember(key, results)
        name = min(right, key=right.__getitem__)  # the first among equals: where nothing was timed, the first
        shown = (_describe(n, r, limit) for n, r in results.items())
        return name, f"{name} ({source if timed else 'first that is correct'}: {', '.join(shown)})"

    def _readable(self, results: dict[str, Any]) -> bool:
        if list(results) != list(self.candidates) or not all(isinstance(r, dict) for r in results.values()):
            return False
        return all(isinstance(r.get(field), float) for r in results.values() for field in ("ms", "error"))

    def _measure(self, load: Workload, device: torch.device, timed: bool, limit: float) -> dict[str, Any]:
        results: dict[str, Any] = {}
        inputs = measure.workload_inputs(load, device)
        for name, backend in self.candidates.items():
            error, why = _attempt(measure.check, backend, inputs)
            ms = math.inf
            if timed and error <= limit:
                ms, why = _attempt(measure.median_ms, backend, inputs)
            results[name] = {"ms": ms, "error": error, "why": why}
        del inputs
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return results


def _attempt(fn: Callable[..., float], *args: Any) -> tuple[float, str]:
    """A candidate that cannot run these shapes here (out of memory, no such kernel) is out of the race, no more."""
    try:
        return fn(*args), ""
    except Exception as problem:
        return math.inf, (str(problem).splitlines() or [type(problem).__name__])[0][:100]


def _describe(name: str, result: dict[str, Any], limit: float) -> str:
    why = result.get("why") or f"error {result['error']:.1e}"
    if not result["error"] <= limit:
        return f"{name} refused, {why}"
    return f"{name} {result['ms']:.2f} ms" if result["ms"] < math.inf else f"{name} not timed, {why}"


def _versions(device: torch.device) -> dict[str, str]:
    """What else a measurement depends on: the device and the code that ran."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {"device": name, "torch": torch.__version__, "backends": digest_of(Path(__file__).parent)}
    try:
        kernels = import_module("moetrain_kernels")
        versions |= {"kernels": digest_of(Path(str(kernels.__file__)).parent), "triton": metadata.version("triton")}
    except (ImportError, metadata.PackageNotFoundError):
        pass
    return versions


def build(precision: str, device_type: str, d_model: int, d_expert: int) -> ExpertBackend:
    """The reference on the CPU and for fp64, without measuring; on a GPU a choice among what can run there."""
    shapes = {"precision": precision, "device_type": device_type, "d_model": d_model, "d_expert": d_expert}
    if device_type != "cuda" or precision == "fp64":
        return reference.build(precision, device_type, d_model, d_expert)
    candidates: dict[str, ExpertBackend] = {}
    for name in CANDIDATES:
        try:
            candidates[name] = import_module(f"moetrain.moe.experts.{name}").build(**shapes)
        except (ImportError, ValueError):
            continue  # not for this precision, width, or machine
    return AutoExperts(candidates)
