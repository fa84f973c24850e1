"""Where tokens come from. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SourceConfig:
    """One stream of documents.

    kind: stdlib (the running Python's own standard library) | hub | jsonl | parquet | text | arrow | shards.
    path: a dataset name for hub, a file, directory or glob otherwise, a directory made by `tokenize` for shards.
    text_column: a string per row; or ids_column: a list of token ids per row. mask_column: optional list of 0/1, one per
    character of the text or per id; 0 means "no loss on this target".
    """

    kind: str = "stdlib"
    path: str = ""
    subset: str = ""
    split: str = "train"
    text_column: str = "text"
    ids_column: str = ""
    mask_column: str = ""
    streaming: bool = False
    weight: float = 1.0


@dataclass
class MixtureStage:
    """From optimizer step `from_step` on, sources are drawn with these weights (source name -> weight)."""

    from_step: int = 0
    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class DataConfig:
    """tokenizer: `byte`, or the path or name of a tokenizers/transformers tokenizer.

    documents: stop (attention and positions end with each document, and no target crosses documents) | cross.
    validation_percent: share of files (documents where a source has no files) held out, by a hash of their name.
    validation_path: per-source override lives in `sources`; empty sources for validation use the hash split.
    workers: loader processes; 0 reads in the training process.
    """

    tokenizer: str = "byte"
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    mixture: list[MixtureStage] = field(default_factory=list)
    documents: str = "stop"
    validation_percent: float = 5.0
    cache_dir: str = ""
    workers: int = 0
