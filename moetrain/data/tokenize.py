"""The verb `python -m moetrain tokenize`: any source into token stores where the user says."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from moetrain.config.data import SourceConfig, check_end, check_source, nearest
from moetrain.data.build import SPLITS, StorePlan, fresh_directory, write_stores
from moetrain.data.documents import DocumentReader
from moetrain.data.readers import open_source
from moetrain.data.tokenizer import load_tokenizer


@dataclasses.dataclass
class TokenizeConfig:
    """Keys of `python -m moetrain tokenize`.

    out: the new directory. split: all (out/train and out/validation) | train | validation (that one only).
    validation_percent: share of files (rows, where a file holds many) for validation. shard_tokens: size of a file.
    workers: processes that read groups of files; 0 and 1 are this one.
    """

    source: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    tokenizer: str = "byte"
    eos_token: str = ""
    out: str = ""
    split: str = "all"
    validation_percent: float = 5.0
    shard_tokens: int = StorePlan.shard_tokens
    workers: int = 0


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
    if config.workers < 0:
        raise ValueError(f"workers={config.workers} is negative; 0 reads in this process")
    if config.source.kind == "shards":
        raise ValueError("source.kind=shards is tokenised already; name the source it was made from")
    out = Path(config.out).expanduser().absolute()
    if out.exists():
        raise ValueError(f"out={config.out!r} exists already; nothing is overwritten, name a new directory")
    check_source("source", config.source)
    check_end("", config.tokenizer, config.eos_token)
    tokenizer = load_tokenizer(config.tokenizer, config.eos_token)
    source = open_source("source", config.source)
    out.parent.mkdir(parents=True, exist_ok=True)
    plan = StorePlan(config.validation_percent, splits, config.shard_tokens, workers=config.workers)
    with fresh_directory(out) as fresh:
        metas = write_stores(DocumentReader("source", config.source, tokenizer), source, fresh, plan)
    for split, meta in metas.items():
        print(f"{out / split}: {meta['tokens']} tokens, {meta['documents']} documents, {len(meta['shards'])} shards")
    end = f" data.eos_token={config.eos_token}" if config.eos_token else ""
    print(f"train on it: data=shards data.sources.shards.path={out} data.tokenizer={config.tokenizer}{end}")


def _typed(kind: type, values: dict[str, Any], prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    typed = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{prefix}{name} is not a key of tokenize{nearest(name, fields)}")
        if name == "source":
            value = _typed(SourceConfig, value, "source.")
        else:
            value = _converted(f"{prefix}{name}", value, type(fields[name].default))
        typed[name] = value
    return kind(**typed)


def _converted(key: str, value: Any, wanted: type) -> Any:
    """`value` as a `wanted`: the command line's are strings."""
    if wanted is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if wanted in (int, float, str) and not isinstance(value, (bool, dict, list)):
        with contextlib.suppress(ValueError, TypeError):
            return wanted(value)
    raise ValueError(f"{key}={value!r} is not of type {wanted.__name__}")
