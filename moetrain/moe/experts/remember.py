"""Measurements of expert backends on disk: one small JSON file for each machine, version, and shape.

    $MOETRAIN_CACHE/experts/<digest>.json    {"key": {...}, "results": {...}}

(or $XDG_CACHE_HOME/moetrain, or ~/.cache/moetrain). A file that cannot be read, or whose key is another, is as good as
none; a cache directory that cannot be written to is no reason to stop a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Where measurements are kept."""
    base = os.environ.get("MOETRAIN_CACHE")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "moetrain")
    return Path(base).expanduser() / "experts"


def recall(key: dict[str, Any]) -> dict[str, Any] | None:
    """What `remember` stored for an equal key, if it is there and intact."""
    try:
        stored = json.loads(_path(key).read_text())
        return stored["results"] if stored["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(key: dict[str, Any], results: dict[str, Any]) -> None:
    """Store by one rename, so that a reader never sees half a file."""
    path = _path(key)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as file:
            json.dump({"key": key, "results": results}, file, indent=1)
        os.replace(file.name, path)


def _path(key: dict[str, Any]) -> Path:
    text = json.dumps(key, sort_keys=True)
    return cache_dir() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
