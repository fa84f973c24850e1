"""The embedded corpus: the source files of the running Python's standard library. Nothing is downloaded."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def stdlib_files() -> list[tuple[str, Path]]:
    """(relative path with forward slashes, path) of each file, sorted; tests and installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED]
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                files.append((path.relative_to(root).as_posix(), path))
    return sorted(files)


def stdlib_rows() -> dict[str, list[str]]:
    """Columns `name` and `text`, a row per file; files that are not UTF-8 or are empty are left out."""
    rows: dict[str, list[str]] = {"name": [], "text": []}
    for name, path in stdlib_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            rows["name"].append(name)
            rows["text"].append(text)
    return rows
