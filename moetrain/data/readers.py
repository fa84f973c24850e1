"""Opens a source as a list of shards, each an `IterableDataset` of rows. The same shards feed the cache and streams.

A shard is one file, or one shard of a hub dataset. Lines of JSON are read as text and parsed one by one here: inferring
a schema over a file would turn dates into timestamps and mixed columns into strings, hiding a row that is not text.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moetrain.config.data import SourceConfig

_SUFFIXES = {
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "parquet": (".parquet",),
    "text": (".txt", ".text", ".md"),
    "arrow": (".arrow",),
}
_PACKED = dict.fromkeys(("jsonl", "text"), ("", ".gz", ".zst", ".bz2", ".xz"))


@dataclass(frozen=True)
class Shard:
    """name: says where rows come from in messages, and with the row's number names a document for the train/validation
    split. whole: each row's own `name` column names the document instead. json: column `text` holds a JSON object."""

    name: str
    open: Callable[[], Any]
    whole: bool = False
    json: bool = False


@dataclass(frozen=True)
class Source:
    """identity: what the rows are read from, as JSON (names and sizes of files), the same for a copy of the data.
    times: when each file was last changed, in nanoseconds. files: where they are; none behind what is not in files.
    revision: of files that are elsewhere, what tells them from those of another day."""

    shards: list[Shard]
    identity: list[Any]
    times: list[int]
    files: list[Path]
    revision: str = ""


def open_source(where: str, config: SourceConfig) -> Source:
    """Every kind but `shards`. `where` is the source's key. Raises ValueError when nothing is there to be read."""
    if config.kind == "stdlib":
        return _stdlib()
    if config.kind == "hub":
        return _hub(where, config)
    files = find_files(where, config)
    if config.kind == "arrow" and not files:
        return _saved(where, config)
    columns = _columns(config)
    openers: dict[str, Callable[[str], Any]] = {
        "jsonl": lambda path: partial(_load, "text", path, sample_by="line"),
        "text": lambda path: partial(_load_text_file, path),
        "parquet": lambda path: partial(_load_parquet, path, columns),
        "arrow": lambda path: partial(_load, "arrow", path),
    }
    make = openers[config.kind]
    shards = [
        Shard(name, make(str(path)), whole=config.kind == "text", json=config.kind == "jsonl") for name, path in files
    ]
    return _from_files(shards, files)


def _from_files(shards: list[Shard], files: list[tuple[str, Path]]) -> Source:
    stats = [(name, path.stat()) for name, path in files]
    identity, times = [[name, stat.st_size] for name, stat in stats], [stat.st_mtime_ns for _, stat in stats]
    return Source(shards, identity, times, [path for _, path in files])


def find_files(where: str, config: SourceConfig) -> list[tuple[str, Path]]:
    """(path relative to the directory or the glob's fixed part, path), sorted.

    None for a directory of `save_to_disk`. Raises ValueError where nothing is found.
    """
    pattern = str(Path(config.path).expanduser())
    path = Path(pattern)
    if path.is_dir():
        if config.kind == "arrow" and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            return []
        wanted = tuple(s + packed for s in _SUFFIXES[config.kind] for packed in _PACKED.get(config.kind, ("",)))
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(wanted))
        if not found:
            raise ValueError(f"{where}.path={config.path!r}: no file of it ends in {' '.join(_SUFFIXES[config.kind])}")
        return [(p.relative_to(path).as_posix(), p) for p in found]
    if path.is_file():
        return [(path.name, path)]
    found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
    if not found:
        raise ValueError(f"{where}.path={config.path!r} does not exist and no file matches it")
    root = Path(*_before_glob(path))
    return [(p.relative_to(root).as_posix(), p) for p in found]


def _before_glob(path: Path) -> list[str]:
    parts: list[str] = []
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def _columns(config: SourceConfig) -> tuple[str, ...]:
    return tuple(c for c in (config.ids_column or config.text_column, config.mask_column) if c)


def _load(builder: str, path: str, **options: Any) -> Any:
    import datasets

    return datasets.load_dataset(builder, data_files=[glob.escape(path)], split="train", streaming=True, **options)


def _load_text_file(path: str) -> Any:
    return _load("text", path, sample_by="document")


def _load_parquet(path: str, columns: tuple[str, ...]) -> Any:
    import pyarrow.parquet

    present = pyarrow.parquet.read_schema(path).names
    # Only the wanted columns are read; a missing one is reported with the rows, by name.
    return _load("parquet", path, columns=[c for c in columns if c in present] or None)


def _stdlib() -> Source:
    from moetrain.data.stdlib import stdlib_files, stdlib_rows

    def load() -> Any:
        import datasets

        return datasets.Dataset.from_dict(stdlib_rows()).to_iterable_dataset()

    return _from_files([Shard("the standard library", load, whole=True)], stdlib_files())


def _saved(where: str, config: SourceConfig) -> Source:
    """A directory of Dataset.save_to_disk or DatasetDict.save_to_disk."""
    import datasets

    loaded = datasets.load_from_disk(str(Path(config.path).expanduser()))
    if isinstance(loaded, datasets.DatasetDict):
        loaded = _split(where, config, loaded)
    return _mapped(config, loaded)


def _split(where: str, config: SourceConfig, loaded: Any) -> Any:
    if config.split not in loaded:
        raise ValueError(f"{where}.split={config.split!r} is not one of {sorted(loaded)} in {config.path!r}")
    return loaded[config.split]


def _hub(where: str, config: SourceConfig) -> Source:
    import datasets

    datasets.disable_progress_bars()
    what = {"path": str(Path(config.path).expanduser()), "name": config.subset or None}
    revision = config.revision or None
    try:
        if config.streaming:
            builder = datasets.load_dataset_builder(**what, revision=revision)
            return _streamed(config, builder, builder.as_streaming_dataset(split=config.split))
        loaded = datasets.load_dataset(**what, revision=revision, split=config.split)
    except Exception as error:  # the library raises many kinds: not found, no network, unknown subset or split
        raise ValueError(f"{where}: dataset {config.path!r} cannot be opened: {error}") from error
    return _mapped(config, loaded)


def _streamed(config: SourceConfig, builder: Any, loaded: Any) -> Source:
    """What lies on the hub is known by its commit, a directory in its place by its files."""
    n = loaded.num_shards
    shards = [
        Shard(f"{config.path}/{config.split}/{i}", partial(loaded.shard, num_shards=n, index=i)) for i in range(n)
    ]
    identity = [[f"{config.path}/{config.subset}/{config.split}/{n}", 0]]
    files = [Path(file) for of_split in (builder.config.data_files or {}).values() for file in of_split]
    if files and all(file.is_file() for file in files):
        return Source(shards, identity, [], sorted(files))
    return Source(shards, identity, [], [], builder.hash or "")


def _mapped(config: SourceConfig, dataset: Any) -> Source:
    """An Arrow-backed dataset is identified by the files behind it, one in memory by the library's own hash."""
    files = [(Path(file["filename"]).name, Path(file["filename"])) for file in dataset.cache_files]
    shard = Shard(f"{Path(config.path).name}/{config.split}", dataset.to_iterable_dataset)
    if not files:  # HF_DATASETS_IN_MEMORY_MAX_SIZE
        return Source([shard], [[dataset._fingerprint, 0]], [], [])
    return _from_files([shard], files)
