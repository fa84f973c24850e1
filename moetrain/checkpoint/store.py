"""The checkpoints of one run directory: written beside, published by one rename, verified before use.

    <run>/checkpoints/step_00000100/   model/  optim/  trainer.json  manifest.json

A directory with such a name is complete. Whatever is not published has a name that starts with a dot, and `clean`
removes it at the next start. All ranks call `save`, `load`, `load_weights`, and `newest_intact` together and see the
same directory (a shared file system); the others are for rank 0 or for tools.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from moetrain.checkpoint import manifest
from moetrain.checkpoint.agree import gather, on_rank0, rank_and_world
from moetrain.checkpoint.lazy import LazyTensor, write_lazy
from moetrain.checkpoint.retention import Retention
from moetrain.checkpoint.snapshot import Snapshot
from moetrain.checkpoint.tensors import model_tensors, optimizer_tensors, read_tensors, write_tensors
from moetrain.checkpoint.verify import (
    Note,
    compare_together,
    problems_together,
    raise_format_error,
    refuse,
    silent,
    tell,
)

FOLDER = "checkpoints"
_HIDDEN = re.compile(r"\.(step_\d{8,})\.(tmp|old)-[0-9a-f]+")


class CheckpointStore:
    """Saves, finds, and retires the checkpoints of `run_dir`. keep, keep_every, keep_best: see `Retention`."""

    def __init__(self, run_dir: str | os.PathLike, keep: int = 0, keep_every: int = 0, keep_best: int = 0) -> None:
        self.root = Path(run_dir) / FOLDER
        self.retention = Retention(keep, keep_every, keep_best)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        trainer_state: dict[str, Any],
        layout: dict[str, Any],
        config: dict[str, Any] | None = None,
    ) -> Path:
        """Publish the state after `step` updates and return its directory; an earlier one of this step is replaced.

        trainer_state: whatever else a resume needs, as JSON (string keys, lists instead of tuples, no NaN); rank 0's is
        kept. layout, config: JSON too, for readers and tools; mask secrets first. Raises on every rank, leaving what
        was published before as it was, if any rank could not write: ValueError for state that JSON would change.
        """

        def write(stage: Path) -> None:
            write_tensors(stage / "model", model_tensors(model))
            write_tensors(stage / "optim", optimizer_tensors(model, optimizer))

        return self._save(step, trainer_state, layout, config or {}, write)

    def save_snapshot(
        self,
        step: int,
        snapshot: Snapshot,
        trainer_state: dict[str, Any],
        layout: dict[str, Any],
        config: dict[str, Any],
        group: ProcessGroup | None,
    ) -> Path:
        """Publish what `snapshot` holds (model and optim), from a thread, as `save` does. group: as in `gather`."""

        def write(stage: Path) -> dict[str, dict]:
            known = {part: snapshot.write(stage / part, part, group) for part in snapshot.live}
            return {f"{part}/{name}": entry for part, of_part in known.items() for name, entry in of_part.items()}

        return self._save(step, trainer_state, layout, config, write, group)

    def save_weights(self, step: int, tensors: Mapping[str, LazyTensor], config: dict[str, Any]) -> Path:
        """Publish a checkpoint of weights alone, made one at a time and shared out among the ranks; else as `save`.

        `load_weights` reads it; `load` refuses it, because it lacks the optimizer's state.
        """

        def write(stage: Path) -> None:
            write_lazy(stage / "model", tensors)
            write_lazy(stage / "optim", {})

        return self._save(step, {"step": step}, {}, config, write)

    def _save(
        self,
        step: int,
        trainer_state: dict,
        layout: dict,
        config: dict,
        write: Callable[[Path], dict[str, dict] | None],
        group: ProcessGroup | None = None,
    ) -> Path:
        stage = on_rank0(lambda: self._stage(step, trainer_state), group)
        try:
            known = write(stage) or {}
            digests = gather(lambda: _own_digests(stage, known), group)
            files = {name: entry for of_rank in digests for name, entry in of_rank.items()}
            return on_rank0(lambda: self._publish(stage, step, layout, config, files), group)
        except BaseException:
            if rank_and_world()[0] == 0:
                shutil.rmtree(stage, ignore_errors=True)
            raise

    def load(
        self,
        path: str | os.PathLike,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        allow: Sequence[str] = (),
        checked: bool = False,
        note: Note = silent,
    ) -> dict[str, Any]:
        """Restore model and optimizer in place from a step directory of any layout; return its trainer_state.

        Everything is checked before anything is changed. allow: patterns (`*.bias_E`) of names that may be missing in
        the checkpoint, where the value here stays, or unexpected in it, where it is not read; note is told which.
        checked: `newest_intact` found the path, so its files need not be hashed again. Raises ValueError that names
        each damaged file (and the newest intact step beside it), each other missing or unexpected key, and each shape
        or dtype that differs.
        """
        path = Path(path)
        if not checked:
            refuse(path, problems_together(path))
        state = {"model": model_tensors(model), "optim": optimizer_tensors(model, optimizer)}
        lines, excepted = compare_together(path, state, same_dtype=True, allow=allow)
        refuse(path, lines)
        tell(excepted, note)
        for part, tensors in state.items():
            read_tensors(path / part, tensors, allow=allow)
        return manifest.trainer_state(path)

    def newest_intact(self) -> tuple[Path | None, dict[str, list[str]]]:
        """The newest step whose every byte is as it was written, and what is wrong with each newer one, by name.

        None without any step. Raises ValueError if there are steps and all are damaged, because a fresh start would
        hide that, and FormatError if the newest that can be read is of a format that this moetrain does not know.
        """
        skipped: dict[str, list[str]] = {}
        for path in reversed(on_rank0(self.steps)):
            lines = problems_together(path)
            if not lines:
                return path, skipped
            skipped[path.name] = lines
        if skipped:
            damaged = "\n".join(f"- {line}" for lines in skipped.values() for line in lines)
            raise ValueError(f"{self.root} has no intact step; run.resume=never starts at step 0:\n{damaged}")
        return None, {}

    def steps(self) -> list[Path]:
        """Published step directories, oldest first; their content is not looked at."""
        return manifest.published(self.root)

    def latest(self, deep: bool = False) -> Path | None:
        """The newest intact step directory, None if there is none. deep: compare every SHA-256, not only the sizes.

        Raises FormatError if that could be one of a format that this moetrain does not know.
        """
        hashed = None if deep else ()
        for path in reversed(self.steps()):
            if not manifest.problems(path, hashed):
                return path
            raise_format_error(path)
        return None

    def clean(self) -> list[str]:
        """Remove what a killed save left behind; return the names. Only for the holder of the run's lock, on rank 0."""
        removed = []
        for path in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            hidden = _HIDDEN.fullmatch(path.name)
            if hidden is None:
                continue
            published = self.root / hidden[1]
            if hidden[2] == "old" and not published.exists():
                os.rename(path, published)  # killed between the two renames of a replacement
            else:
                shutil.rmtree(path)
                removed.append(path.name)
        return removed

    def set_aside_newer(self, step: int) -> list[str]:
        """Rename steps after `step`, which a resume from it supersedes, so that `latest` never returns to them.

        Returns the new names, `step_00000200.superseded-<token>`; nothing deletes them. Rank 0, under the run's lock.
        """
        moved = []
        for path in self.steps():
            if manifest.step_of(path) > step:
                aside = path.with_name(f"{path.name}.superseded-{secrets.token_hex(4)}")
                os.rename(path, aside)
                moved.append(aside.name)
        return moved

    def _hidden(self, name: str, kind: str) -> Path:
        return self.root / f".{name}.{kind}-{secrets.token_hex(4)}"

    def _stage(self, step: int, trainer_state: dict[str, Any]) -> Path:
        text = json.dumps(trainer_state, allow_nan=False) if _is_json(trainer_state) else ""
        if not text or json.loads(text) != trainer_state:
            raise ValueError("trainer_state does not survive JSON: use string keys, lists, and finite numbers only")
        stage = self._hidden(manifest.step_name(step), "tmp")
        for part in ("model", "optim"):
            (stage / part).mkdir(parents=True)
        manifest.write_json(stage / "trainer.json", trainer_state)
        return stage

    def _publish(self, stage: Path, step: int, layout: dict, config: dict, files: dict[str, dict]) -> Path:
        manifest.write(stage, step, layout, config, files)
        wrong = manifest.problems(stage)
        if wrong:  # for one, a rank whose "shared" file system is its own
            raise RuntimeError("the checkpoint is not complete on rank 0: " + "; ".join(wrong))
        for folder in (stage / "model", stage / "optim", stage):
            _fsync_folder(folder)
        final = self.root / manifest.step_name(step)
        old = self._hidden(final.name, "old")
        replaces = final.exists()
        if replaces:
            os.rename(final, old)
        os.rename(stage, final)
        _fsync_folder(self.root)
        if replaces:
            shutil.rmtree(old, ignore_errors=True)
        self._retire()
        return final

    def _retire(self) -> None:
        for path in self.retention.expendable(self.steps()):
            self.remove(path)

    def remove(self, path: Path) -> None:
        """Delete a step directory. A kill leaves it whole or hidden, never half of it under a published name."""
        gone = self._hidden(path.name, "tmp")
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _own_digests(stage: Path, known: dict[str, dict]) -> dict[str, dict]:
    """Digests of the files that this rank wrote: its shards, and on rank 0 the indices and trainer.json.

    known: those worked out already.
    """
    rank, _ = rank_and_world()
    paths = [path for part in ("model", "optim") for path in (stage / part).glob(f"__{rank}_*")]
    if rank == 0:
        paths += [stage / "model" / ".metadata", stage / "optim" / ".metadata", stage / "trainer.json"]
    names = {path.relative_to(stage).as_posix(): path for path in paths}
    return {name: known.get(name) or manifest.digest(path) for name, path in names.items()}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
