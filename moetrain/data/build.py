"""Tokenises a source once into token stores: `train/` and `validation/` under one directory, in the cache or elsewhere.

Memory is bounded by a batch of documents a process. Input files are taken in groups of about a gigabyte, each written
as shards of its own by any process; their grouping does not depend on the number of processes, nor does the result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from moetrain.config.data import SourceConfig
from moetrain.data.content import sampled_hash
from moetrain.data.documents import DocumentReader
from moetrain.data.hashing import place
from moetrain.data.readers import Source, open_source
from moetrain.data.store import FORMAT, META, StoreWriter, merge_stores
from moetrain.data.tokenizer import Tokenizer

SPLITS = ("train", "validation")
# Keys of a source that do not change its tokens, beyond its files.
_LEFT_ALONE = ("path", "revision", "streaming", "weight")


Group = tuple[int, int]  # from and to (exclusive), of a source's shards


@dataclasses.dataclass(frozen=True)
class StorePlan:
    """percent: share of documents held out for `validation`; more than 0 means at least one, if there are two.

    splits: which stores to write. shard_tokens: a shard ends with the document that reaches it. group_bytes: input
    files that are read in a row. workers: processes that each read a group; 0 is this process.
    """

    percent: float
    splits: tuple[str, ...] = SPLITS
    shard_tokens: int = 1 << 28
    group_bytes: int = 1 << 30
    workers: int = 0


def write_stores(reader: DocumentReader, source: Source, directory: Path, plan: StorePlan) -> dict[str, dict[str, Any]]:
    """Writes a store for each split of the plan under `directory` (new or empty) and returns their metas.

    Raises ValueError naming the source when it has no document at all, and whatever `DocumentReader.read` raises.
    """
    groups = _groups(source, plan.group_bytes)
    counts, lowest = _write_groups(reader, source, directory, plan, groups, plan.percent / 100)
    if plan.percent > 0 and counts[0] > 1 and counts[1] == 0:  # a few documents, all of them above the share
        shutil.rmtree(directory)
        counts, _ = _write_groups(reader, source, directory, plan, groups, math.nextafter(lowest, 1.0))
    if not sum(counts):
        raise ValueError(f"{reader.where} is empty: its {len(source.shards)} files hold no document with a token")
    metas = {}
    for split in plan.splits:
        parts = [directory / f"part{i}" / split for i in range(len(groups))]
        metas[split] = merge_stores(parts, directory / split)
    for i in range(len(groups)):
        shutil.rmtree(directory / f"part{i}")
    return metas


def _groups(source: Source, group_bytes: int) -> list[Group]:
    """Ranges of shards of about `group_bytes` each; a single one where the shards' sizes are not known."""
    if len(source.identity) != len(source.shards):
        return [(0, len(source.shards))]
    groups, start, size = [], 0, 0
    for i, (_, file_bytes) in enumerate(source.identity):
        size += file_bytes
        if size >= group_bytes or i == len(source.identity) - 1:
            groups.append((start, i + 1))
            start, size = i + 1, 0
    return groups


def _write_groups(
    reader: DocumentReader, source: Source, directory: Path, plan: StorePlan, groups: list[Group], share: float
) -> tuple[list[int], float]:  # fmt: skip
    """Documents of each side, and the lowest place of any."""
    tasks = [(directory / f"part{i}", group) for i, group in enumerate(groups)]
    if plan.workers > 1 and len(tasks) > 1:
        # Spawned, not forked: the tokenizer's and the readers' threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(plan.workers, context, initializer=_start_worker) as pool:
            results = list(pool.map(partial(_write_group, reader, plan, share, None), tasks))
    else:
        results = [_write_group(reader, plan, share, source, task) for task in tasks]
    counts = [sum(result[0][side] for result in results) for side in range(2)]
    return counts, min(result[1] for result in results)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _write_group(
    reader: DocumentReader, plan: StorePlan, share: float, source: Source | None, task: tuple[Path, Group]
) -> tuple[list[int], float]:  # fmt: skip
    directory, (start, stop) = task
    source = source or open_source(reader.where, reader.config)
    has_mask = bool(reader.config.mask_column)
    writers = {s: StoreWriter(directory / s, reader.tokenizer, has_mask, plan.shard_tokens) for s in plan.splits}
    counts, lowest = [0, 0], 1.0
    for shard in source.shards[start:stop]:
        for document in reader.read(shard):
            side = int(place(document.name) < share)
            if SPLITS[side] in writers:
                writers[SPLITS[side]].add(document.ids_N, document.mask_N)
            counts[side] += 1
            lowest = min(lowest, place(document.name))
    for writer in writers.values():
        writer.close()
    return counts, lowest


def cached_stores(where: str, config: SourceConfig, tokenizer: Tokenizer, percent: float, cache_dir: Path) -> Path:
    """The directory of the source's stores in the cache, written first when it is not there.

    Any number of processes and hosts may ask at once: one writes under a lock and the others wait for it.
    """
    source = open_source(where, config)
    keys = {k: v for k, v in dataclasses.asdict(config).items() if k not in _LEFT_ALONE}
    sampled = sampled_hash(where, source.files)  # names, sizes, and times of an unpacked archive are often another's
    identity = [FORMAT, keys, tokenizer.fingerprint, percent, source.identity, source.times, sampled]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    target = cache_dir / f"{config.kind}-{digest}"
    if target.is_dir():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={cache_dir} cannot be made ({error}); name another directory, here or in $MOETRAIN_CACHE"
        ) from error
    with _one_writer(cache_dir / f"{target.name}.lock"):
        if not target.is_dir():
            reader = DocumentReader(where, config, tokenizer)
            with fresh_directory(target) as fresh:
                write_stores(reader, source, fresh, StorePlan(percent))
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


class fresh_directory:
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


def store_directory(where: str, config: SourceConfig, split: str) -> Path | None:
    """The store of a `shards` source for `split`: path/split, or path itself as training data; None when none."""
    root = Path(config.path).expanduser()
    if (root / split / META).is_file():
        return root / split
    if not root.is_dir():
        raise ValueError(f"{where}.path={config.path!r} is not a directory")
    return root if split == "train" and not (root / "validation").is_dir() else None
