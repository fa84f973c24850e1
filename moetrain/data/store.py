"""Tokens on disk: a directory that is written once and memory-mapped ever after, whatever its size.

meta.json       format, dtype, tokenizer, counts, the largest id, a hash of the content
00000.bin       tokens of the first shard, uint16 or uint32, little-endian; every document ends with the end token
00000.idx       int64 offsets of its documents in tokens: documents + 1 numbers, the first is 0
00000.mask      uint8 per token, only when the source has a loss mask: 0 means "no loss on this target"
00001.bin ...   a document never spans shards
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import IO, Any

import numpy as np

from moetrain.data.tokenizer import Tokenizer

FORMAT = 1
META = "meta.json"


class StoreWriter:
    """Writes documents into `directory`, which must be new. Memory: one document and one shard's offsets."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, has_mask: bool, shard_tokens: int) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self._tokenizer = tokenizer
        self._has_mask = has_mask
        self._shard_tokens = shard_tokens
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._content = hashlib.sha256()
        self._shards: list[dict[str, int]] = []
        self._files: dict[str, IO[bytes]] = {}
        self._offsets: list[int] = []
        self._max_id = -1

    def add(self, ids_N: np.ndarray, mask_N: np.ndarray | None) -> None:
        """Appends one document: ids (checked by the caller) and, where the source has one, its mask."""
        assert len(ids_N) > 0
        assert (mask_N is not None) == self._has_mask
        if not self._files:
            self._open_shard()
        tokens = ids_N.astype(self._dtype).tobytes()
        self._files["bin"].write(tokens)
        self._content.update(len(ids_N).to_bytes(8, "little"))
        self._content.update(tokens)
        if mask_N is not None:
            mask = mask_N.astype(np.uint8).tobytes()
            self._files["mask"].write(mask)
            self._content.update(mask)
        self._max_id = max(self._max_id, int(ids_N.max()))
        self._offsets.append(self._offsets[-1] + len(ids_N))
        if self._offsets[-1] >= self._shard_tokens:
            self._close_shard()

    def close(self) -> dict[str, Any]:
        """Ends the last shard and writes meta.json, which it returns."""
        if self._files:
            self._close_shard()
        meta = {
            "format": FORMAT,
            "dtype": self._dtype.name,
            "vocab_size": self._tokenizer.vocab_size,
            "tokenizer": self._tokenizer.name,
            "tokenizer_fingerprint": self._tokenizer.fingerprint,
            "has_mask": self._has_mask,
            "shards": self._shards,
            "tokens": sum(s["tokens"] for s in self._shards),
            "documents": sum(s["documents"] for s in self._shards),
            "max_id": self._max_id,
            "content": self._content.hexdigest(),
        }
        (self._directory / META).write_text(json.dumps(meta, indent=1) + "\n")
        return meta

    def _open_shard(self) -> None:
        stem = self._directory / f"{len(self._shards):05d}"
        kinds = ("bin", "mask") if self._has_mask else ("bin",)
        self._files = {kind: stem.with_suffix(f".{kind}").open("wb") for kind in kinds}
        self._offsets = [0]

    def _close_shard(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}
        np.asarray(self._offsets, dtype="<i8").tofile(self._directory / f"{len(self._shards):05d}.idx")
        self._shards.append({"tokens": self._offsets[-1], "documents": len(self._offsets) - 1})


def merge_stores(parts: list[Path], directory: Path) -> dict[str, Any]:
    """Moves the files of written stores, in order, into one new store and returns its meta; the parts are used up."""
    directory.mkdir(parents=True)
    metas = [json.loads((part / META).read_text()) for part in parts]
    number = 0
    for part, meta in zip(parts, metas):
        for i in range(len(meta["shards"])):
            for file in part.glob(f"{i:05d}.*"):
                file.rename(directory / f"{number:05d}{file.suffix}")
            number += 1
    merged = metas[0] | {
        "shards": [shard for meta in metas for shard in meta["shards"]],
        "tokens": sum(meta["tokens"] for meta in metas),
        "documents": sum(meta["documents"] for meta in metas),
        "max_id": max(meta["max_id"] for meta in metas),
        "content": hashlib.sha256("".join(meta["content"] for meta in metas).encode()).hexdigest(),
    }
    (directory / META).write_text(json.dumps(merged, indent=1) + "\n")
    return merged


class TokenStore:
    """The concatenation of a store's documents, memory-mapped. Safe to read from several threads.

    Raises ValueError naming `where` (the source's key) and the path when the directory is no store, is of another
    format, or has a file of the wrong size.
    """

    def __init__(self, directory: Path, where: str) -> None:
        self.directory = directory
        try:
            self.meta: dict[str, Any] = json.loads((directory / META).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{where}: {directory} is not a token store (written by `tokenize`): {error}") from error
        if self.meta.get("format") != FORMAT:
            raise ValueError(f"{where}: {directory} has format {self.meta.get('format')}, this version reads {FORMAT}")
        self.tokens: int = self.meta["tokens"]
        self.content: str = self.meta["content"]
        shards = self.meta["shards"]
        self._starts = np.concatenate([[0], np.cumsum([s["tokens"] for s in shards], dtype=np.int64)]).astype(np.int64)
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        self._bins = [self._map(i, "bin", dtype, s["tokens"], where) for i, s in enumerate(shards)]
        self._offsets = [self._map(i, "idx", np.dtype("<i8"), s["documents"] + 1, where) for i, s in enumerate(shards)]
        masks = shards if self.meta["has_mask"] else []
        self._masks = [self._map(i, "mask", np.dtype("u1"), s["tokens"], where) for i, s in enumerate(masks)]

    def _map(self, shard: int, kind: str, dtype: np.dtype, length: int, where: str) -> np.ndarray:
        path = self.directory / f"{shard:05d}.{kind}"
        size = path.stat().st_size if path.is_file() else -1
        if size != length * dtype.itemsize:
            raise ValueError(
                f"{where}: {path} has {size} bytes, its {META} says {length * dtype.itemsize}: damaged or cut off"
            )
        return np.memmap(path, dtype=dtype, mode="r")

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Tokens [N] (int64) of [start, stop), their mask [N] or None, and where in [0, N) documents begin."""
        parts, masks, begins = [], [], []
        for shard in range(int(np.searchsorted(self._starts, start, side="right")) - 1, len(self._bins)):
            base = int(self._starts[shard])
            if base >= stop:
                break
            low, high = max(start - base, 0), min(stop - base, len(self._bins[shard]))
            parts.append(self._bins[shard][low:high].astype(np.int64))
            if self._masks:
                masks.append(np.asarray(self._masks[shard][low:high]))
            offsets = self._offsets[shard]
            first, last = np.searchsorted(offsets[:-1], [low, high])
            begins.append(np.asarray(offsets[first:last]) + (base - start))
        mask_N = np.concatenate(masks) if self._masks else None
        return np.concatenate(parts), mask_N, np.concatenate(begins)

    def find_above(self, vocab_size: int) -> tuple[int, int]:
        """(document, id) of the first id that is not below `vocab_size`; (-1, -1) when there is none. Reads all."""
        block = 1 << 22
        documents = 0
        for bins, offsets in zip(self._bins, self._offsets):
            for start in range(0, len(bins), block):
                bad = np.flatnonzero(bins[start : start + block] >= vocab_size)
                if len(bad):
                    at = start + int(bad[0])
                    return documents + int(np.searchsorted(offsets, at, side="right")) - 1, int(bins[at])
            documents += len(offsets) - 1
        return -1, -1
