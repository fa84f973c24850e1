"""Rows of a shard to checked documents of token ids. Every complaint about a row is made here: its place, its value."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moetrain.config.data import SourceConfig, nearest
from moetrain.data.readers import Shard
from moetrain.data.tokenizer import Tokenizer

_BATCH_ROWS = 64


@dataclass(frozen=True)
class Document:
    """name: decides train or validation. row: its number in the shard. ids [N] with the end token; mask [N] or None."""

    name: str
    row: int
    ids_N: np.ndarray
    mask_N: np.ndarray | None


class DocumentReader:
    """Reads documents of one source. where: its key (`data.sources.NAME`), with which every error begins."""

    def __init__(self, where: str, config: SourceConfig, tokenizer: Tokenizer) -> None:
        self.where = where
        self.config = config
        self.tokenizer = tokenizer
        self._column = config.ids_column or config.text_column
        self._is_ids = bool(config.ids_column)
        self._mask_column = config.mask_column

    def read(self, shard: Shard, first_row: int = 0, keep: Callable[[str], bool] | None = None) -> Iterator[Document]:
        """Documents of the shard in order, from row `first_row`; `keep` sees a document's name before it is tokenised.

        Empty texts are passed over. Raises ValueError naming source, file, row and value for a row that is not text, an
        id outside the vocabulary, a mask that does not fit, a column that is not there, a file that cannot be read.
        """
        for start, rows in self._batches(shard, first_row):
            named = [(self._name(shard, start + i, row), start + i, row) for i, row in enumerate(rows)]
            yield from self._documents(shard, [n for n in named if keep is None or keep(n[0])])

    def _batches(self, shard: Shard, first_row: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        batches = None
        start = first_row
        while True:
            try:
                if batches is None:
                    dataset = shard.open()
                    batches = (dataset.skip(first_row) if first_row else dataset).iter(batch_size=_BATCH_ROWS)
                columns = next(batches, None)
            except StopIteration:  # how the library reports a file without a row
                return
            except Exception as error:  # each format's reader has exceptions of its own
                place = f"{self.where}: {shard.name}, after row {start}"
                raise ValueError(f"{place}: cannot be read: {type(error).__name__}: {error}") from error
            if columns is None:
                return
            rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
            yield start, [self._parse(shard, start + i, row) for i, row in enumerate(rows)] if shard.json else rows
            start += len(rows)

    def _parse(self, shard: Shard, number: int, row: dict[str, Any]) -> dict[str, Any]:
        line = row["text"].removeprefix("\ufeff")
        if not line.strip():
            return {self._column: [] if self._is_ids else "", self._mask_column: []}
        try:
            parsed = json.loads(line)
        except json.JSONDecodeError as error:
            raise self._error(shard, number, line, f"is not JSON ({error})") from error
        if not isinstance(parsed, dict):
            raise self._error(shard, number, parsed, "is not a JSON object")
        return parsed

    def _name(self, shard: Shard, number: int, row: dict[str, Any]) -> str:
        if not shard.whole:
            return f"{shard.name}:{number}"
        return row.get("name", shard.name)

    def _documents(self, shard: Shard, named: list[tuple[str, int, dict[str, Any]]]) -> Iterator[Document]:
        values = [self._value(shard, number, row, self._column) for _, number, row in named]
        if self._is_ids:
            encoded = [self._ids(shard, number, value) for (_, number, _), value in zip(named, values)]
            masks = [self._mask(shard, number, row, len(i)) for (_, number, row), i in zip(named, encoded)]
        else:
            for (_, number, _), value in zip(named, values):
                if not isinstance(value, str):
                    raise self._error(shard, number, value, f"in column {self._column!r} is not text")
            encoded, masks = self._encode(shard, named, values)
        for (name, number, _), ids_N, mask_N in zip(named, encoded, masks):
            if len(ids_N):
                yield self._end(Document(name, number, ids_N, mask_N))

    def _encode(
        self, shard: Shard, named: list[tuple[str, int, dict[str, Any]]], texts: list[str]
    ) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
        if not self._mask_column:
            return self.tokenizer.encode(texts), [None] * len(texts)
        encoded, masks = [], []
        for (_, number, row), text, (ids_N, span_N2) in zip(named, texts, self.tokenizer.spans(texts)):
            mask_C = self._mask(shard, number, row, len(text))
            assert mask_C is not None
            # A token is learnt only when all of its characters are: nothing masked leaks in through a straddling token.
            total = np.concatenate([[0], np.cumsum(mask_C, dtype=np.int64)])
            masks.append(
                (total[span_N2[:, 1]] - total[span_N2[:, 0]] == span_N2[:, 1] - span_N2[:, 0]).astype(np.uint8)
            )
            encoded.append(ids_N)
        return encoded, masks

    def _ids(self, shard: Shard, number: int, value: Any) -> np.ndarray:
        if not isinstance(value, (list, np.ndarray)):
            raise self._error(shard, number, value, f"in column {self._column!r} is not a list of token ids")
        ids_N = _integers(value)
        size = self.tokenizer.vocab_size
        if ids_N is not None and (len(ids_N) == 0 or (ids_N.min() >= 0 and ids_N.max() < size)):
            return ids_N
        for i in value:  # something is wrong with one of them: which
            if isinstance(i, bool) or not isinstance(i, (int, np.integer)):
                raise self._error(shard, number, i, f"in column {self._column!r} is not a token id")
            if not 0 <= i < size:
                problem = f"is outside the vocabulary of data.tokenizer={self.tokenizer.name!r}, [0, {size})"
                raise self._error(shard, number, i, f"in column {self._column!r} {problem}")
        raise AssertionError("a list of good ids was refused")

    def _mask(self, shard: Shard, number: int, row: dict[str, Any], length: int) -> np.ndarray | None:
        if not self._mask_column:
            return None
        value = self._value(shard, number, row, self._mask_column)
        unit = "id" if self._is_ids else "character"
        mask = _integers(value) if isinstance(value, (list, np.ndarray)) else None
        if mask is None or not np.isin(mask, (0, 1)).all():
            raise self._error(shard, number, value, f"in column {self._mask_column!r} is not a list of 0 and 1")
        if len(mask) != length:
            problem = f"in column {self._mask_column!r} has {len(mask)} entries for {length} {unit}s"
            raise self._error(shard, number, value, problem)
        return mask.astype(np.uint8)

    def _end(self, document: Document) -> Document:
        """The end token after the last one; it is learnt where the last token is."""
        if document.ids_N[-1] == self.tokenizer.eos_id:
            return document
        ids_N = np.append(document.ids_N, self.tokenizer.eos_id)
        mask_N = document.mask_N
        if mask_N is not None:
            mask_N = np.append(mask_N, mask_N[-1])
        return Document(document.name, document.row, ids_N, mask_N)

    def _value(self, shard: Shard, number: int, row: dict[str, Any], column: str) -> Any:
        # A text file's row has one column, whatever text_column says.
        column = "text" if shard.whole else column
        if column not in row:
            raise ValueError(
                f"{self.where}: row {number} of {shard.name} has no column {column!r}{nearest(column, map(str, row))}"
            )
        return row[column]

    def _error(self, shard: Shard, number: int, value: Any, problem: str) -> ValueError:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return ValueError(f"{self.where}: row {number} of {shard.name}: {shown} ({type(value).__name__}) {problem}")


def _integers(value: Any) -> np.ndarray | None:
    """int64 [N] of a flat list of integers (or booleans), None for anything else."""
    if len(value) == 0:
        return np.zeros(0, dtype=np.int64)
    try:
        array = np.asarray(value)
    except ValueError:  # ragged
        return None
    return array.astype(np.int64) if array.ndim == 1 and array.dtype.kind in "iub" else None
