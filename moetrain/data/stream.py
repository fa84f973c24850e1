"""Rows of a source that is read while training. Every rank reads and packs the whole stream and keeps its own rows.

The state is where the next row begins: (epoch, shard in that epoch's order, row of the shard, token in that document).
No tokens are stored; a resume reads that document again. So the state belongs to the stream, not to a rank or a layout.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from moetrain.data.batch import Row
from moetrain.data.documents import Document, DocumentReader
from moetrain.data.permute import Permutation
from moetrain.data.readers import Shard, Source

Place = tuple[int, int, int]  # epoch, shard in the epoch's order, row


class Packer:
    """Cuts a sequence of documents into rows of S + 1 tokens that overlap by one."""

    def __init__(self, documents: Iterator[tuple[Place, Document]], seq_len: int, skip: int = 0) -> None:
        """skip: tokens of the first document that rows before have used."""
        self._documents = documents
        self._seq_len = seq_len
        self._pending: deque[tuple[Place, Document]] = deque()
        self._offset = skip
        self._have = -skip

    def head(self) -> tuple[Place, int] | None:
        """Where the next row begins: its document's place and the token in it; None before the first row."""
        return (self._pending[0][0], self._offset) if self._pending else None

    def next_row(self, name: str, number: int) -> Row | None:
        """The next row; a shorter one at the end of the documents, then None."""
        while self._have < self._seq_len + 1:
            item = next(self._documents, None)
            if item is None:
                break
            self._pending.append(item)
            self._have += len(item[1].ids_N)
        length = min(self._have, self._seq_len + 1)
        if length < 2:
            return None
        row = self._cut(length, name, number)
        self._advance(length - 1)
        return row

    def _cut(self, length: int, name: str, number: int) -> Row:
        epoch = self._pending[0][0][0]
        ids, masks, begins = [], [], []
        at = -self._offset
        for _, document in self._pending:
            if at >= 0:
                begins.append(at)
            ids.append(document.ids_N)
            if document.mask_N is not None:
                masks.append(document.mask_N)
            at += len(document.ids_N)
            if at >= length:
                break
        window = slice(self._offset, self._offset + length)
        mask_L = np.concatenate(masks)[window] if masks else None
        return Row(f"{name}:{epoch}:{number}", np.concatenate(ids)[window], np.asarray(begins, dtype=np.int64), mask_L)

    def _advance(self, tokens: int) -> None:
        self._have -= tokens
        self._offset += tokens
        while self._offset >= len(self._pending[0][1].ids_N):
            self._offset -= len(self._pending.popleft()[1].ids_N)


class StreamRows:
    """A `RowSource` over shards that are opened one after the other, in a seeded order of their own each epoch."""

    def __init__(
        self, name: str, reader: DocumentReader, source: Source, keep: Callable[[str], bool], seq_len: int, seed: int
    ) -> None:  # fmt: skip
        self.fingerprint = hashlib.sha256(
            json.dumps([[s.name for s in source.shards], source.identity]).encode()
        ).hexdigest()
        self._name = name
        self._reader = reader
        self._shards = source.shards
        self._keep = keep
        self._seq_len = seq_len
        self._seed = seed
        self.load_state_dict({"epoch": 0, "shard": 0, "row": 0, "token": 0})

    def read(self, first: int, wanted_N: np.ndarray) -> list[Row | None]:
        rows: list[Row | None] = []
        for i, wanted in enumerate(wanted_N):
            row = self._packer.next_row(self._name, first + i)
            assert row is not None  # the stream is endless
            rows.append(row if wanted else None)
        return rows

    def state_dict(self) -> dict[str, Any]:
        (epoch, shard, row), token = self._packer.head() or self._start
        return {"epoch": epoch, "shard": shard, "row": row, "token": token}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        place = (state["epoch"], state["shard"], state["row"])
        self._start = (place, state["token"])
        self._packer = Packer(self._endless(*place), self._seq_len, skip=state["token"])

    def _endless(self, epoch: int, first_shard: int, first_row: int) -> Iterator[tuple[Place, Document]]:
        while True:
            found = (first_shard, first_row) != (0, 0)  # of a part of an epoch, nothing can be said
            order = Permutation(len(self._shards), self._seed, self._name, epoch)(np.arange(len(self._shards)))
            for position in range(first_shard, len(self._shards)):
                shard = self._shards[int(order[position])]
                for document in self._reader.read(shard, first_row, self._keep):
                    found = True
                    yield (epoch, position, document.row), document
                first_row = 0
            if not found:
                raise ValueError(
                    f"{self._reader.where} is empty: its {len(self._shards)} files hold no document to train on"
                )
            epoch, first_shard = epoch + 1, 0


def first_rows(
    name: str, reader: DocumentReader, shards: list[Shard], keep: Callable[[str], bool], seq_len: int, limit: int
) -> list[Row]:  # fmt: skip
    """The first rows of a stream's kept documents, at most `limit`, in the order of the shards; for validation."""

    def documents() -> Iterator[tuple[Place, Document]]:
        for position, shard in enumerate(shards):
            for document in reader.read(shard, keep=keep):
                yield (0, position, document.row), document

    packer = Packer(documents(), seq_len)
    rows: list[Row] = []
    while len(rows) < limit and (row := packer.next_row(name, len(rows))) is not None:
        rows.append(row)
    return rows
