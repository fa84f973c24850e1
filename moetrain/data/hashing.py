"""Stateless randomness: a seeded hash, not a generator, so that any sample's draw is found without those before it.

`mix` is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), on arrays of uint64 that wrap around.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def key(*parts: object) -> np.uint64:
    """64 bits that depend on every part (by its text), equal on all machines."""
    text = "\x1f".join(str(part) for part in parts)
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def mix(x_N: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose every output bit depends on every input bit; same shape out."""
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


def uniform(seed_key: np.uint64, index_N: np.ndarray) -> np.ndarray:
    """The index-th number of the key's stream, for each index: float64 in [0, 1), shape of `index_N`."""
    steps_N = (index_N.astype(np.uint64) + np.uint64(1)) * _GAMMA
    return (mix(steps_N + seed_key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def place(name: str) -> float:
    """A document's place in [0, 1): those below the held-out share are validation. No seed: its side never changes."""
    return float(int(key("held_out", name)) >> 11) * 2.0**-53
