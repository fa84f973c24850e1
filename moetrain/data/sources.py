"""From the configuration to opened sources: what to train on, and what is held out of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from moetrain.config.data import DataConfig, SourceConfig
from moetrain.data.batch import Row
from moetrain.data.build import cached_stores, store_directory
from moetrain.data.content import sampled_hash
from moetrain.data.documents import DocumentReader
from moetrain.data.hashing import place
from moetrain.data.readers import Source, open_source
from moetrain.data.rows import MappedRows, RowSource, read_row
from moetrain.data.store import TokenStore
from moetrain.data.stream import StreamRows, first_rows
from moetrain.data.tokenizer import Tokenizer


class HeldOut(Protocol):
    """Validation rows of one source, always the same ones. count: how many there are, at most `limit`."""

    def count(self, limit: int) -> int: ...
    def row(self, number: int) -> Row: ...


class MappedHeldOut:
    """Rows of a token store, in its order."""

    def __init__(self, name: str, store: TokenStore, seq_len: int) -> None:
        self._name = name
        self._store = store
        self._seq_len = seq_len

    def count(self, limit: int) -> int:
        # Unlike training, the short last row counts: small held-out sets would otherwise be none.
        return min(limit, -(-max(self._store.tokens - 1, 0) // self._seq_len))

    def row(self, number: int) -> Row:
        return read_row(self._store, number, self._seq_len, f"{self._name}:0:{number}")


class StreamHeldOut:
    """Reads the stream once, at the first validation, and keeps the rows in memory."""

    def __init__(
        self, name: str, reader: DocumentReader, source: Source, keep: Callable[[str], bool], seq_len: int
    ) -> None:  # fmt: skip
        self._read = partial(first_rows, name, reader, source.shards, keep, seq_len)
        self._rows: list[Row] = []
        self._limit = 0

    def count(self, limit: int) -> int:
        if limit > self._limit:
            self._rows = self._read(limit)
            self._limit = limit
        return min(limit, len(self._rows))

    def row(self, number: int) -> Row:
        return self._rows[number]


class SourceOpener:
    """Opens sources for one row length, tokenizer, and cache.

    reading: of each streamed training source, how its files become documents to train on; sampled: a hash of parts of
    its files, where it has files; revision: the commit of a hub's. (What a mapped source holds is hashed itself.)
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, seq_len: int, seed: int, cache_dir: Path) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._seed = seed
        self._cache_dir = cache_dir
        self.reading: dict[str, str] = {}
        self.sampled: dict[str, str] = {}
        self.revision: dict[str, str] = {}
        self._cached: dict[str, Path] = {}

    def training(self) -> tuple[dict[str, RowSource], dict[str, HeldOut]]:
        """The sources to train on and what the hash of names holds out of them. Raises ValueError, see `Loader`."""
        percent = 0.0 if self._config.validation else self._config.validation_percent
        rows: dict[str, RowSource] = {}
        held: dict[str, HeldOut] = {}
        for name, source in self._config.sources.items():
            where = f"data.sources.{name}"
            if source.streaming:
                opened, reader = open_source(where, source), DocumentReader(where, source, self._tokenizer)
                trained = partial(_kept, percent, False)
                column = f"ids {source.ids_column!r}" if source.ids_column else f"text {source.text_column!r}"
                masked = f", mask {source.mask_column!r}" if source.mask_column else ""
                self.reading[name] = f"{source.kind}, {column}{masked}, {percent}% held out"
                if opened.files:
                    self.sampled[name] = sampled_hash(where, opened.files)
                if opened.revision:
                    self.revision[name] = f"{where}.revision={opened.revision}"
                rows[name] = StreamRows(name, reader, opened, trained, self._seq_len, self._seed)
                if percent > 0:
                    held[name] = StreamHeldOut(name, reader, opened, partial(_kept, percent, True), self._seq_len)
                continue
            train, validation = (self._store(where, source, percent, split) for split in ("train", "validation"))
            if train is None:
                raise ValueError(
                    f"{where}.path={source.path!r} holds no training tokens: no train/ and no store of its own"
                )
            rows[name] = MappedRows(name, where, train, self._seq_len, self._seed)
            if validation is not None and not self._config.validation:
                held[name] = MappedHeldOut(name, validation, self._seq_len)
        return rows, held

    def validation(self) -> dict[str, HeldOut]:
        """The sources of `data.validation`, each used whole; of a `tokenize` directory its validation part if any."""
        held: dict[str, HeldOut] = {}
        for name, source in self._config.validation.items():
            where = f"data.validation.{name}"
            if source.streaming:
                reader = DocumentReader(where, source, self._tokenizer)
                everything = partial(_kept, 0.0, False)
                held[name] = StreamHeldOut(name, reader, open_source(where, source), everything, self._seq_len)
                continue
            store = self._store(where, source, 0.0, "validation") if source.kind == "shards" else None
            store = store or self._store(where, source, 0.0, "train")
            assert store is not None
            held[name] = MappedHeldOut(name, store, self._seq_len)
        return held

    def _store(self, where: str, source: SourceConfig, percent: float, split: str) -> TokenStore | None:
        if source.kind == "shards":
            directory = store_directory(where, source, split)
            if directory is None:
                return None
            store = TokenStore(directory, where)
            _check_tokens(where, store, self._tokenizer)
            return store
        if where not in self._cached:  # once for both splits: its key is read from every file
            self._cached[where] = cached_stores(where, source, self._tokenizer, percent, self._cache_dir)
        return TokenStore(self._cached[where] / split, where)


def _kept(percent: float, validation: bool, name: str) -> bool:
    return (place(name) < percent / 100) == validation


def _check_tokens(where: str, store: TokenStore, tokenizer: Tokenizer) -> None:
    meta = store.meta
    if meta["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise ValueError(
            f"{where}: {store.directory} was tokenised by {meta['tokenizer']!r} (fingerprint "
            f"{meta['tokenizer_fingerprint']}), data.tokenizer is {tokenizer.name!r} ({tokenizer.fingerprint})"
        )
    if meta["max_id"] >= tokenizer.vocab_size:
        document, value = store.find_above(tokenizer.vocab_size)
        raise ValueError(
            f"{where}: document {document} of {store.directory} has the id {value} (the largest is {meta['max_id']}), "
            f"outside the vocabulary of data.tokenizer={tokenizer.name!r}, [0, {tokenizer.vocab_size})"
        )
