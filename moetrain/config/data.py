"""Where tokens come from, and the rules its keys must keep. No torch here."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

KINDS = ("stdlib", "hub", "jsonl", "parquet", "text", "arrow", "shards")
DOCUMENTS = ("stop", "cross")


@dataclass
class SourceConfig:
    """One stream of documents.

    kind: stdlib (the running Python's own standard library) | hub | jsonl | parquet | text | arrow | shards.
    path: a dataset name (or directory) for hub, a file, directory or glob otherwise, a directory made by `tokenize` for
    shards, unused for stdlib. subset, split: for hub and for saved dataset dictionaries. revision: of a hub dataset, a
    branch, tag, or commit; "" for what the hub has now.
    text_column: a string per row; or ids_column: a list of token ids per row. mask_column: optional list of 0/1, one
    per character of the text or per id; 0 means "no loss on this target". A text file is one document, without columns.
    streaming: read while training instead of tokenising into the cache first; not for stdlib and shards.
    weight: share of the samples, relative to the other sources'; a mixture stage overrides it.
    """

    kind: str = "stdlib"
    path: str = ""
    subset: str = ""
    split: str = "train"
    revision: str = ""
    text_column: str = "text"
    ids_column: str = ""
    mask_column: str = ""
    streaming: bool = False
    weight: float = 1.0


@dataclass
class MixtureStage:
    """From optimizer step `from_step` on, sources are drawn with these weights (source name -> weight; absent is 0)."""

    from_step: int = 0
    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class DataConfig:
    """tokenizer: `byte`, or the path or name of a tokenizers/transformers tokenizer; eos_token: its end-of-document
    token, needed only where the tokenizer does not name one; `byte` has its own.

    mixture: stages that replace the sources' own weights from their step on.
    documents: stop (attention and positions end with each document, and no target crosses documents) | cross.
    validation_percent: share of files (rows, where a file holds many documents) held out, by a hash of their name;
    of a mapped source with two or more documents at least one.
    validation: sources to validate on instead; with any of these, the training sources are used whole.
    cache_dir: where tokenised sources are kept; empty means $MOETRAIN_CACHE, or ~/.cache/moetrain.
    """

    tokenizer: str = "byte"
    eos_token: str = ""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    mixture: list[MixtureStage] = field(default_factory=list)
    documents: str = "stop"
    validation_percent: float = 5.0
    cache_dir: str = ""


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean X? (one of A, B)` for an unknown `word`."""
    known = sorted(words)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (one of: {', '.join(known) or 'none'})"


def check_data(config: DataConfig) -> None:
    """Raises ValueError for the first key that breaks a rule, naming it; reads no file."""
    if not config.sources:
        raise ValueError("data.sources is empty: name at least one source, e.g. data=stdlib")
    if config.documents not in DOCUMENTS:
        raise ValueError(f"data.documents={config.documents!r} is unknown{nearest(config.documents, DOCUMENTS)}")
    if not 0 <= config.validation_percent < 100:
        raise ValueError(f"data.validation_percent={config.validation_percent} is outside [0, 100)")
    check_end("data.", config.tokenizer, config.eos_token)
    for name, source in config.sources.items():
        check_source(f"data.sources.{name}", source)
    for name, source in config.validation.items():
        check_source(f"data.validation.{name}", source)
    _check_weights(
        "data.sources.*.weight", {n: s.weight for n, s in config.sources.items()}, config, needed=_starts(config)
    )
    _check_mixture(config)


def check_end(prefix: str, tokenizer: str, eos_token: str) -> None:
    """Raises ValueError for an end token where it would be ignored; `prefix` is what precedes the keys."""
    if tokenizer == "byte" and eos_token:
        raise ValueError(
            f"{prefix}eos_token={eos_token!r} with {prefix}tokenizer=byte, whose documents end with its own id; "
            'nearest legal value: ""'
        )


def check_source(where: str, source: SourceConfig) -> None:
    """Raises ValueError when the keys of one source contradict each other; `where` is its key, for the message."""
    if source.kind not in KINDS:
        raise ValueError(f"{where}.kind={source.kind!r} is unknown{nearest(source.kind, KINDS)}")
    if source.kind != "stdlib" and not source.path:
        wanted = {"hub": "a dataset's name", "shards": "a directory made by `tokenize`"}
        raise ValueError(
            f"{where}.path is empty: kind {source.kind} needs {wanted.get(source.kind, 'a file, directory or glob')}"
        )
    of_kinds = (("subset", "", ("hub",)), ("revision", "", ("hub",)), ("split", "train", ("hub", "arrow")))
    for key, unset, kinds in of_kinds:
        if getattr(source, key) != unset and source.kind not in kinds:
            raise ValueError(
                f"{where}.{key}={getattr(source, key)!r}: kind {source.kind} has none and would be read whole; leave "
                f"it at {unset!r} and name the files in path"
            )
    if source.kind == "stdlib" and source.path:
        raise ValueError(
            f"{where}.path={source.path!r}: kind stdlib reads this Python's own library, whatever the path; leave it "
            "empty, or set data=text, jsonl, parquet, arrow, or shards and that source's path"
        )
    if source.streaming and source.kind in ("stdlib", "shards"):
        raise ValueError(f"{where}.streaming=true: kind {source.kind} is read mapped; set streaming=false")
    if source.kind in ("stdlib", "text", "shards"):
        for key in ("ids_column", "mask_column"):
            if getattr(source, key):
                raise ValueError(
                    f"{where}.{key}={getattr(source, key)!r}: kind {source.kind} has no columns; leave it empty"
                )
    if not source.text_column and not source.ids_column:
        raise ValueError(f"{where}: name a text_column or an ids_column")


def _starts(config: DataConfig) -> bool:
    """Whether the sources' own weights are ever in force."""
    return all(stage.from_step > 0 for stage in config.mixture)


def _check_mixture(config: DataConfig) -> None:
    seen: set[int] = set()
    for i, stage in enumerate(config.mixture):
        where = f"data.mixture[{i}]"
        if stage.from_step < 0:
            raise ValueError(f"{where}.from_step={stage.from_step} is negative; the first step is 0")
        if stage.from_step in seen:
            raise ValueError(f"{where}.from_step={stage.from_step} is already another stage's first step")
        seen.add(stage.from_step)
        _check_weights(f"{where}.weights", stage.weights, config, needed=True)


def _check_weights(where: str, weights: dict[str, float], config: DataConfig, needed: bool) -> None:
    for name, weight in weights.items():
        if name not in config.sources:
            raise ValueError(f"{where} names the unknown source {name!r}{nearest(name, config.sources)}")
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"{where}: source {name!r} has weight {weight}; it must be finite and at least 0")
    if needed and sum(weights.values()) <= 0:
        raise ValueError(f"{where} sum to zero ({dict(weights)}): no source would be drawn; give one a positive weight")
