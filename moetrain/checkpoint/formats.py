"""The format's version, and what turns an older checkpoint into today's when it is read. Files are never rewritten.

1  the first
2  trainer.json says `val_loss`, by which `checkpoint.keep_best` chooses; null where the step was not evaluated
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = 2


class FormatError(ValueError):
    """A checkpoint of a format that this moetrain does not read: not damage, so nothing may be chosen in its stead."""


def check_format(path: Path, version: Any) -> None:
    """Raise FormatError, naming the file and what to do, unless `version` can be read."""
    if version == FORMAT or version in _TRAINER_STATE:
        return
    known = f"this moetrain reads formats {min(_TRAINER_STATE)} to {FORMAT}"
    if isinstance(version, int) and version > FORMAT:
        raise FormatError(f"{path} has format {version}, of a newer moetrain; {known}: install a newer one")
    raise FormatError(f"{path} has format {version!r}; {known}")


def migrate_trainer_state(state: dict[str, Any], version: int) -> dict[str, Any]:
    """What `trainer.json` of format `version` says, in today's terms."""
    for older in range(version, FORMAT):
        state = _TRAINER_STATE[older](state)
    return state


def _from_1(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "val_loss": None}


# Format -> its trainer.json in terms of the next format.
_TRAINER_STATE: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}
