"""What a user means by a checkpoint, and how to use one without its optimizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from moetrain.checkpoint import manifest
from moetrain.checkpoint.formats import FormatError
from moetrain.checkpoint.store import FOLDER, CheckpointStore
from moetrain.checkpoint.tensors import model_tensors, read_tensors
from moetrain.checkpoint.verify import Note, compare_together, problems_together, refuse, silent, tell


def load_weights(path: str | os.PathLike, model: nn.Module, allow: Sequence[str] = (), note: Note = silent) -> None:
    """Overwrite the model's weights from a step directory, casting to its dtypes; ValueError as in `load`.

    allow, note: as in `load`, but a pattern that excepts no name is refused: it is misspelt.
    """
    path = Path(path)
    refuse(path, problems_together(path, ("model/",)))
    tensors = model_tensors(model)
    lines, excepted = compare_together(path, {"model": tensors}, same_dtype=False, allow=allow)
    refuse(path, lines)
    for pattern in allow:
        if not any(fnmatchcase(name, pattern) for name in excepted):
            raise ValueError(f"init.allow: {pattern!r} matches no name that is missing in {path} or unexpected there")
    tell(excepted, note)
    read_tensors(path / "model", tensors, allow=allow)


def read_trainer_state(path: str | os.PathLike) -> dict[str, Any]:
    """`trainer_state` of an intact step directory, without its tensors. Raises ValueError if it is damaged."""
    path = Path(path)
    refuse(path, manifest.problems(path, ("trainer.json",)))
    return manifest.trainer_state(path)


def resolve(checkpoint: str | os.PathLike, key: str = "") -> Path:
    """The step directory that a user means: one itself, or a run directory for its newest intact step.

    Sizes are checked, hashes are not. Raises ValueError that names what is wrong and what could be used instead.
    key: where the user named it, for the message.
    """
    if key:
        try:
            return resolve(checkpoint)
        except FormatError:
            raise
        except ValueError as error:
            also = "; nearest legal values: auto, never" if key == "run.resume" else ""
            raise ValueError(f"{key}={checkpoint}: {error}{also}") from None
    path = Path(checkpoint)
    if path.is_symlink():
        path = path.resolve()  # a user's own link; inside a run directory they are refused
    if (path / FOLDER).is_dir():
        store = CheckpointStore(path)
        latest = store.latest()
        if latest is None:
            damaged = "; ".join(line for step in store.steps() for line in manifest.problems(step))
            raise ValueError(f"{path} has no intact checkpoint{': ' + damaged if damaged else ''}")
        return latest
    if not path.is_dir():
        near = path.parent.is_dir() and sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("."))
        raise ValueError(f"{path} is not a directory" + (f"; {path.parent} has {', '.join(near)}" if near else ""))
    if not (path / manifest.NAME).exists() and not manifest.STEP_NAME.fullmatch(path.name):
        raise ValueError(f"{path} is neither a step directory (no {manifest.NAME}) nor a run directory (no {FOLDER}/)")
    refuse(path, manifest.problems(path))
    return path
