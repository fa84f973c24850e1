"""Which code runs: what a measurement depends on, and what all ranks must have."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest_of(package: Path) -> str:
    """16 hex digits that change when any Python file in a directory or below it does."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
