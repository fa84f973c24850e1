"""Which source each global sample comes from: a pure function of (seed, sample index, stage in force at its step)."""

from __future__ import annotations

import numpy as np

from moetrain.config.data import DataConfig
from moetrain.data.hashing import key, uniform


class Mixture:
    """Sources are numbered in the order of `config.sources`."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        names = list(config.sources)
        stages = {0: {name: source.weight for name, source in config.sources.items()}}
        stages |= {stage.from_step: dict(stage.weights) for stage in config.mixture}
        self._seed_key = key("mixture", seed)
        self._starts = sorted(stages)
        self._cumulative = {start: _cumulative([stages[start].get(name, 0.0) for name in names]) for start in stages}

    def draw(self, step: int, sample_N: np.ndarray) -> np.ndarray:
        """Source number [N] of the global sample indices [N], all of optimizer step `step`."""
        start = max(s for s in self._starts if s <= step)
        return np.searchsorted(self._cumulative[start], uniform(self._seed_key, sample_N), side="right")


def _cumulative(weights: list[float]) -> np.ndarray:
    total_X = np.cumsum(np.asarray(weights, dtype=np.float64))
    # The last entry is exactly 1, above every draw; weight 0 is an empty interval. (All zero: a stage never in force.)
    return total_X / (total_X[-1] or 1.0)
