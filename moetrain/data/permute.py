"""A seeded permutation of [0, n) without a table: a Feistel network on the next power of four, walked until inside.

Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), the cycle-walking construction. Its domain is
under 4n, so a lookup takes at most four walks on average.
Six rounds of a good mixing function are ample for shuffling (not for secrecy).
"""

from __future__ import annotations

import numpy as np

from moetrain.data.hashing import key, mix

_ROUNDS = 6


class Permutation:
    """Calling it maps positions [N] (int64, each in [0, size)) to distinct places [N] (int64) in [0, size)."""

    def __init__(self, size: int, *seed: object) -> None:
        assert size > 0
        self.size = size
        half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half = np.uint64(half)
        self._low = np.uint64((1 << half) - 1)
        self._keys = [key("feistel", i, *seed) for i in range(_ROUNDS)]

    def __call__(self, position_N: np.ndarray) -> np.ndarray:
        place_N = self._walk(np.asarray(position_N).astype(np.uint64))
        outside_N = place_N >= self.size
        while outside_N.any():
            place_N[outside_N] = self._walk(place_N[outside_N])
            outside_N = place_N >= self.size
        return place_N.astype(np.int64)

    def _walk(self, x_N: np.ndarray) -> np.ndarray:
        left_N, right_N = x_N >> self._half, x_N & self._low
        for round_key in self._keys:
            left_N, right_N = right_N, left_N ^ (mix(right_N ^ round_key) & self._low)
        return (left_N << self._half) | right_N
