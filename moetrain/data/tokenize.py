"""Tokenises a source once into token stores: `train/` and `validation/` under one directory.

The loader does it into the cache; `python -m moetrain tokenize` does it where the user says. Memory is bounded by a
batch of documents; a fast tokenizer spreads a batch over its own threads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from moetrain.config.data import SourceConfig, check_source, nearest
from moetrain.data.documents import DocumentReader
from moetrain.data.hashing import place
from moetrain.data.readers import Source, open_source
from moetrain.data.store import FORMAT, META, StoreWriter
from moetrain.data.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "validation")
_SHARD_TOKENS = 1 << 28
_LEFT_ALONE = ("path", "streaming", "weight")  # keys of a source that do not change its tokens, beyond its files


def write_stores(
    reader: DocumentReader, source: Source, directory: Path, tokenizer: Tokenizer, *,
    has_mask: bool, percent: float, splits: tuple[str, ...] = SPLITS, shard_tokens: int = _SHARD_TOKENS,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Writes a store for each of `splits` under `directory` (new or empty) and returns their metas.

    percent: share of documents held out for `validation`; more than 0 means at least one, if there are two. Raises
    ValueError naming the source when it has no document at all, and whatever `DocumentReader.read` raises.
    """

    def write(share: float) -> tuple[dict[str, StoreWriter], list[int], float]:
        writers = {split: StoreWriter(directory / split, tokenizer, has_mask, shard_tokens) for split in splits}
        counts, lowest = [0, 0], 1.0
        for shard in source.shards:
            for document in reader.read(shard):
                side = int(place(document.name) < share)
                if SPLITS[side] in writers:
                    writers[SPLITS[side]].add(document.ids_N, document.mask_N)
                counts[side] += 1
                lowest = min(lowest, place(document.name))
        return writers, counts, lowest

    writers, counts, lowest = write(percent / 100)
    if percent > 0 and counts[0] > 1 and counts[1] == 0:  # a few documents, all of them above the share
        for split, writer in writers.items():
            writer.close()
            shutil.rmtree(directory / split)
        writers, counts, _ = write(math.nextafter(lowest, 1.0))
    if not sum(counts):
        raise ValueError(f"{reader.where} is empty: its {len(source.shards)} files hold no document with a token")
    return {split: writer.close() for split, writer in writers.items()}


def cached_stores(where: str, config: SourceConfig, tokenizer: Tokenizer, percent: float, cache_dir: Path) -> Path:
    """The directory of the source's stores in the cache, written first when it is not there.

    Any number of processes and hosts may ask at once: one writes under a lock and the others wait for it.
    """
    source = open_source(where, config)
    keys = {k: v for k, v in dataclasses.asdict(config).items() if k not in _LEFT_ALONE}
    identity = [FORMAT, keys, tokenizer.fingerprint, percent, source.identity, source.times]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    target = cache_dir / f"{config.kind}-{digest}"
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _one_writer(cache_dir / f"{target.name}.lock"):
        if not target.is_dir():
            reader = DocumentReader(where, config, tokenizer)
            with _fresh_directory(target) as fresh:
                write_stores(reader, source, fresh, tokenizer, has_mask=bool(config.mask_column), percent=percent)
    return target


@contextmanager
def _one_writer(path: Path) -> Iterator[None]:
    """Holds a lock, or nothing where the file system has none: then the first rename wins, equal work is dropped."""
    lock = FileLock(path)
    with suppress(OSError, NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _fresh_directory:
    """A new directory beside `target` that becomes it on success, by one rename, and vanishes on failure."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> Path:
        self._fresh = Path(tempfile.mkdtemp(prefix=f".{self._target.name}.", dir=self._target.parent))
        # mkdtemp's mode is 0700; the store is as readable as anything else its owner makes.
        umask = os.umask(0)
        os.umask(umask)
        self._fresh.chmod(0o777 & ~umask)
        return self._fresh

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            try:
                self._fresh.rename(self._target)
                return
            except OSError:
                if not self._target.is_dir():  # not a lost race but a real fault
                    raise
        shutil.rmtree(self._fresh, ignore_errors=True)


@dataclasses.dataclass
class TokenizeConfig:
    """Keys of `python -m moetrain tokenize`.

    out: the new directory. split: all (out/train and out/validation) | train | validation (that one only).
    validation_percent: share of files (rows, where a file holds many) for validation. shard_tokens: size of a file.
    """

    source: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    tokenizer: str = "byte"
    eos_token: str = ""
    out: str = ""
    split: str = "all"
    validation_percent: float = 5.0
    shard_tokens: int = _SHARD_TOKENS


def run(overrides: dict[str, Any]) -> None:
    """The `tokenize` verb; `overrides` is TokenizeConfig's keys, nested. Raises ValueError for a bad one."""
    config = _typed(TokenizeConfig, overrides, "")
    splits = SPLITS if config.split == "all" else (config.split,)
    if config.split not in ("all", *SPLITS):
        raise ValueError(f"split={config.split!r} is unknown{nearest(config.split, ('all', *SPLITS))}")
    if not config.out:
        raise ValueError("out is empty: name a directory that does not exist yet")
    if not 0 <= config.validation_percent < 100:
        raise ValueError(f"validation_percent={config.validation_percent} is outside [0, 100)")
    if config.shard_tokens < 1:
        raise ValueError(f"shard_tokens={config.shard_tokens} must be at least 1")
    if config.source.kind == "shards":
        raise ValueError("source.kind=shards is tokenised already; name the source it was made from")
    out = Path(config.out).expanduser().absolute()
    if out.exists():
        raise ValueError(f"out={config.out!r} exists already; nothing is overwritten, name a new directory")
    check_source("source", config.source)
    tokenizer = load_tokenizer(config.tokenizer, config.eos_token)
    source = open_source("source", config.source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _fresh_directory(out) as fresh:
        metas = write_stores(
            DocumentReader("source", config.source, tokenizer), source, fresh, tokenizer,
            has_mask=bool(config.source.mask_column), percent=config.validation_percent,
            splits=splits, shard_tokens=config.shard_tokens,
        )  # fmt: skip
    for split, meta in metas.items():
        print(f"{out / split}: {meta['tokens']} tokens, {meta['documents']} documents, {len(meta['shards'])} shards")
    print(f"train on it: data=shards data.sources.shards.path={out} data.tokenizer={config.tokenizer}")


def _typed(kind: type, values: dict[str, Any], prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    typed = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{prefix}{name} is not a key of tokenize{nearest(name, fields)}")
        if name == "source":
            value = _typed(SourceConfig, value, "source.")
        else:
            wanted = type(fields[name].default)
            if not isinstance(value, wanted) and not (wanted is float and isinstance(value, int)):
                raise ValueError(f"{prefix}{name}={value!r} is not of type {wanted.__name__}")
        typed[name] = value
    return kind(**typed)


def store_directory(where: str, config: SourceConfig, split: str) -> Path | None:
    """The store of a `shards` source for `split`: path/split, or path itself as training data; None when none."""
    root = Path(config.path).expanduser()
    if (root / split / META).is_file():
        return root / split
    if not root.is_dir():
        raise ValueError(f"{where}.path={config.path!r} is not a directory")
    return root if split == "train" and not (root / "validation").is_dir() else None
