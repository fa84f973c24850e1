"""Rows of a memory-mapped source, in an order that is computed and never stored."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from moetrain.data.batch import Row
from moetrain.data.permute import Permutation
from moetrain.data.store import TokenStore


class RowSource(Protocol):
    """One source of training rows, endless: epoch follows epoch.

    read: rows `first` to `first + len(wanted_N)` of the source, counted over all epochs; None where not wanted.
    state_dict: what is needed besides that count to go on; JSON-able and the same on every rank.
    """

    fingerprint: str

    def read(self, first: int, wanted_N: np.ndarray) -> list[Row | None]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class MappedRows:
    """Row r of a store is tokens [r S, r S + S], so each token but the first is the target of exactly one row.

    Each epoch is its own permutation of the rows; the remainder shorter than a row is dropped.
    """

    def __init__(self, name: str, where: str, store: TokenStore, seq_len: int, seed: int) -> None:
        self.fingerprint = store.content
        self._name = name
        self._store = store
        self._seq_len = seq_len
        self._seed = seed
        self._n_rows = (store.tokens - 1) // seq_len
        if self._n_rows < 1:
            raise ValueError(
                f"{where} holds {store.tokens} training tokens, fewer than train.seq_len + 1 = {seq_len + 1}; "
                "lower train.seq_len or data.validation_percent, or add data"
            )

    def read(self, first: int, wanted_N: np.ndarray) -> list[Row | None]:
        index_N = first + np.arange(len(wanted_N))
        epoch_N = index_N // self._n_rows
        rows: list[Row | None] = [None] * len(wanted_N)
        for epoch in np.unique(epoch_N[wanted_N]):
            places = np.flatnonzero((epoch_N == epoch) & wanted_N)
            order = Permutation(self._n_rows, self._seed, self._name, int(epoch))
            for place, row in zip(places, order(index_N[places] % self._n_rows)):
                rows[place] = read_row(self._store, int(row), self._seq_len, f"{self._name}:{epoch}:{row}")
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def read_row(store: TokenStore, row: int, seq_len: int, sample_id: str) -> Row:
    """Row `row` of the store; the last may be short (validation only)."""
    start = row * seq_len
    tokens_L, mask_L, begins = store.read(start, min(start + seq_len + 1, store.tokens))
    return Row(sample_id, tokens_L, begins, mask_L)
