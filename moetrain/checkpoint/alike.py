"""Nodes are started one by one, and nothing but this stops them from training two different runs as one.

Another learning rate, another copy of a file, or another torch on one node would give numbers that no one asked for.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch

from moetrain.checkpoint.agree import gather, on_rank0
from moetrain.comm.code import digest_of
from moetrain.config.inherit import flat
from moetrain.config.schema import Config
from moetrain.observe.secrets import mask_secrets

# Where a node has things; what it reads there is compared itself.
_OF_A_NODE = ("data.cache_dir", "data.tokenizer", "data.sources.*.path", "data.validation.*.path")
PATIENCE_S = 10.0  # with a file system that shows a new file late


def check_alike(config: Config) -> None:
    """Raises ValueError on every rank where their configurations, code, torch, or run.dir differ. Collective."""
    values = {k: v for k, v in flat(asdict(config)).items() if not any(fnmatchcase(k, kind) for kind in _OF_A_NODE)}
    check_same(values | _code() | {"torch.__version__": str(torch.__version__)})
    check_one_directory(Path(config.run.dir))


def _code() -> dict[str, str]:
    """Digests by package; "" of one that is not installed."""
    found = {package: find_spec(package) for package in ("moetrain", "moetrain_kernels")}
    return {
        f"code of {package}": digest_of(Path(str(spec.origin)).parent) if spec and spec.origin else ""
        for package, spec in found.items()
    }


def check_same(values: Mapping[str, Any]) -> None:
    """Raises ValueError on every rank, naming keys, values, and ranks, unless all have the same. Collective."""
    if len(set(gather(lambda: _digest(values)))) == 1:
        return
    shown = mask_secrets(dict(values))
    everyone = gather(lambda: {key: (_digest(value), shown[key]) for key, value in values.items()})
    differing = [_told(key, [own.get(key, ("", None)) for own in everyone]) for key in sorted(set().union(*everyone))]
    raise ValueError(f"ranks were started differently: {'; '.join(filter(None, differing))}; start all of them alike")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def check_one_directory(run_dir: Path) -> None:
    """Raises ValueError on every rank that does not find there what rank 0 just wrote, and on the others. Collective.

    Every rank writes its part of a checkpoint, so a directory of each node's own would hold none that is whole.
    """
    probe = run_dir / on_rank0(lambda: _touched(run_dir))
    blind = [rank for rank, seen in enumerate(gather(lambda: _appears(probe))) if not seen]
    on_rank0(probe.unlink)
    if blind:
        raise ValueError(
            f"run.dir={run_dir} is not rank 0's directory on {len(blind)} ranks (first: {blind[0]}); nearest legal "
            "value: a directory on a file system that all nodes share"
        )


def _touched(run_dir: Path) -> str:
    name = f".seen-{token_hex(8)}"
    (run_dir / name).touch()
    return name


def _appears(path: Path) -> bool:
    end = time.monotonic() + PATIENCE_S
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _told(key: str, of_rank: list[tuple[str, Any]]) -> str:
    """`key=A on 3 of 4 (rank 0), B on 1 of 4 (rank 2)`; "" where all are the same. of_rank: digest, what to show."""
    ranks: dict[str, list[int]] = {}
    for rank, (digest, _) in enumerate(of_rank):
        ranks.setdefault(digest, []).append(rank)
    if len(ranks) == 1:
        return ""
    told = [f"{of_rank[have[0]][1]} on {len(have)} of {len(of_rank)} (rank {have[0]})" for have in ranks.values()]
    return f"{key}={', '.join(told)}"
