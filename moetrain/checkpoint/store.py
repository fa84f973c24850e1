"""The checkpoints of one run directory: written beside, published by one rename, verified before use.

    <run>/checkpoints/step_00000100/   model/  optim/  trainer.json  manifest.json

A directory with such a name is complete. Whatever is not published has a name that starts with a dot, and `clean`
removes it at the next start. All ranks call `save`, `load`, and `load_weights` together and see the same directory
(a shared file system); the others are for rank 0 or for tools.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.checkpoint import manifest
from moetrain.checkpoint.agree import gather, on_rank0, rank_and_world
from moetrain.checkpoint.lazy import LazyTensor, write_lazy
from moetrain.checkpoint.tensors import (
    mismatches,
    model_tensors,
    optimizer_tensors,
    read_metadata,
    read_tensors,
    write_tensors,
)

FOLDER = "checkpoints"
_HIDDEN = re.compile(r"\.(step_\d{8,})\.(tmp|old)-[0-9a-f]+")


class CheckpointStore:
    """Saves, finds, and retires the checkpoints of `run_dir`. keep: newest ones kept after a save, 0 for all."""

    def __init__(self, run_dir: str | os.PathLike, keep: int = 0) -> None:
        if keep < 0:
            raise ValueError(f"checkpoint.keep is {keep}; the nearest legal value is 0 (keep all)")
        self.root = Path(run_dir) / FOLDER
        self.keep = keep

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

    def save_weights(self, step: int, tensors: Mapping[str, LazyTensor], config: dict[str, Any]) -> Path:
        """Publish a checkpoint of weights alone, made one at a time and shared out among the ranks; else as `save`.

        `load_weights` reads it; `load` refuses it, because it lacks the optimizer's state.
        """

        def write(stage: Path) -> None:
            write_lazy(stage / "model", tensors)
            write_lazy(stage / "optim", {})

        return self._save(step, {"step": step}, {}, config, write)

    def _save(self, step: int, trainer_state: dict, layout: dict, config: dict, write: Callable[[Path], None]) -> Path:
        stage = on_rank0(lambda: self._stage(step, trainer_state))
        try:
            write(stage)
            digests = gather(lambda: _own_digests(stage))
            files = {name: entry for of_rank in digests for name, entry in of_rank.items()}
            return on_rank0(lambda: self._publish(stage, step, layout, config, files))
        except BaseException:
            if rank_and_world()[0] == 0:
                shutil.rmtree(stage, ignore_errors=True)
            raise

    def load(self, path: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Restore model and optimizer in place from a step directory of any layout; return its trainer_state.

        Everything is checked before anything is changed. Raises ValueError that names each damaged file (and the
        newest intact step beside it), each missing or unexpected key, and each shape or dtype that differs.
        """
        path = Path(path)
        _verify_together(path, ("",))
        state = {"model": model_tensors(model), "optim": optimizer_tensors(model, optimizer)}
        _refuse(path, _mismatches_anywhere(path, state, same_dtype=True))
        for part, tensors in state.items():
            read_tensors(path / part, tensors)
        return json.loads((path / "trainer.json").read_text())

    def steps(self) -> list[Path]:
        """Published step directories, oldest first; their content is not looked at."""
        if not self.root.is_dir():
            return []
        found = [path for path in self.root.iterdir() if manifest.STEP_NAME.fullmatch(path.name)]
        return sorted(found, key=_step_of)

    def latest(self, deep: bool = False) -> Path | None:
        """The newest intact step directory, None if there is none. deep: compare every SHA-256, not only the sizes."""
        hashed = None if deep else ()
        return next((path for path in reversed(self.steps()) if not manifest.problems(path, hashed)), None)

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
            if _step_of(path) > step:
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
        if not self.keep:
            return
        intact = [path for path in self.steps() if not manifest.problems(path)]
        for path in intact[: -self.keep]:
            gone = self._hidden(path.name, "tmp")
            os.rename(path, gone)  # first, so that a half-deleted directory never has a published name
            shutil.rmtree(gone, ignore_errors=True)


def load_weights(path: str | os.PathLike, model: nn.Module) -> None:
    """Overwrite the model's weights from a step directory, casting to its dtypes; ValueError as in `load`.

    The state of balance plugins that the checkpoint lacks keeps its first values: a run may add one.
    """
    path = Path(path)
    _verify_together(path, ("model/",))
    known = read_metadata(path / "model").state_dict_metadata
    tensors = {name: t for name, t in model_tensors(model).items() if name in known or ".balance." not in name}
    _refuse(path, _mismatches_anywhere(path, {"model": tensors}, same_dtype=False))
    read_tensors(path / "model", tensors)


def read_trainer_state(path: str | os.PathLike) -> dict[str, Any]:
    """`trainer_state` of an intact step directory, without its tensors. Raises ValueError if it is damaged."""
    path = Path(path)
    _refuse(path, manifest.problems(path, ("trainer.json",)))
    return json.loads((path / "trainer.json").read_text())


def resolve(checkpoint: str | os.PathLike) -> Path:
    """The step directory that a user means: one itself, or a run directory for its newest intact step.

    Sizes are checked, hashes are not. Raises ValueError that names what is wrong and what could be used instead.
    """
    path = Path(checkpoint)
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
    _refuse(path, manifest.problems(path))
    return path


def _verify_together(path: Path, prefixes: tuple[str, ...]) -> None:
    """Compare sizes of all files and hashes of those under `prefixes`, the hashing shared out among the ranks."""
    rank, world = rank_and_world()

    def check() -> list[str]:
        try:
            names = sorted(name for name in manifest.read(path)["files"] if name.startswith(prefixes))
        except ValueError as error:
            return [str(error)]
        return manifest.problems(path, names[rank::world])

    lines = [line for of_rank in gather(check) for line in of_rank]
    _refuse(path, list(dict.fromkeys(lines)))


def _mismatches_anywhere(path: Path, state: dict[str, dict[str, Tensor]], same_dtype: bool) -> list[str]:
    """What any rank finds wrong: each looks at what it holds, and what no rank holds is unexpected."""
    held = gather(lambda: {part: list(tensors) for part, tensors in state.items()})
    everywhere = {part: {name for of_rank in held for name in of_rank[part]} for part in state}
    found = gather(
        lambda: [
            line
            for part, tensors in state.items()
            for line in mismatches(path / part, tensors, same_dtype, everywhere[part])
        ]
    )
    return list(dict.fromkeys(line for of_rank in found for line in of_rank))


def _refuse(path: Path, lines: list[str]) -> None:
    if not lines:
        return
    # Not this one again: a flipped bit passes the size check that `latest` makes.
    others = [p for p in CheckpointStore(path.parent.parent).steps() if p.absolute() != path.absolute()]
    intact = next((p for p in reversed(others) if not manifest.problems(p)), None)
    offer = f"\nnewest other intact step: {intact}" if intact else ""
    raise ValueError(f"{path} cannot be used:\n" + "\n".join(f"- {line}" for line in lines) + offer)


def _own_digests(stage: Path) -> dict[str, dict]:
    """Digests of the files that this rank wrote: its shards, and on rank 0 the indices and trainer.json."""
    rank, _ = rank_and_world()
    paths = [path for part in ("model", "optim") for path in (stage / part).glob(f"__{rank}_*")]
    if rank == 0:
        paths += [stage / "model" / ".metadata", stage / "optim" / ".metadata", stage / "trainer.json"]
    return {path.relative_to(stage).as_posix(): manifest.digest(path) for path in paths}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
