"""`moetrain checkpoint ls|verify|diff|prune|safetensors`: look at checkpoints without a GPU or a run.

Exit codes: 0 all is well, 1 damage or differences were found, 2 the request makes no sense (ValueError).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from moetrain.checkpoint import manifest
from moetrain.checkpoint.diff import count, differences
from moetrain.checkpoint.hf.files import SHARD_BYTES, write_shards
from moetrain.checkpoint.lazy import stored
from moetrain.checkpoint.lock import RunLock
from moetrain.checkpoint.retention import Retention, val_loss
from moetrain.checkpoint.store import FOLDER, CheckpointStore
from moetrain.checkpoint.tensors import read_metadata
from moetrain.checkpoint.use import resolve

USAGE = {
    "ls": "ls RUN",
    "verify": "verify RUN_OR_STEP",
    "diff": "diff CKPT CKPT",
    "prune": "prune RUN [keep=N] [keep_every=N] [keep_best=N] [superseded=true] [dry_run=true]",
    "safetensors": "safetensors CKPT OUT",
}


def run(arguments: list[str], say: Callable[[str], None] = print) -> int:
    """Do what the words ask, tell `say`, return the exit code. Raises ValueError with the usage for other words."""
    verb, words = (arguments[0], arguments[1:]) if arguments else ("", [])
    usage = "; ".join(f"moetrain checkpoint {line}" for line in USAGE.values())
    if verb not in USAGE:
        raise ValueError(f"no such tool {verb!r}: {usage}" if verb else f"usage: {usage}")
    named = [word for word in words if re.match(r"\w+=", word)]  # a path may hold a = as well
    paths = [Path(word) for word in words if word not in named]
    options = dict(word.split("=", 1) for word in named)
    if len(paths) != (2 if verb in ("diff", "safetensors") else 1) or (options and verb != "prune"):
        raise ValueError(f"usage: moetrain checkpoint {USAGE[verb]}")
    if verb == "ls":
        return _list(paths[0], say)
    if verb == "verify":
        return _verify(paths[0], say)
    if verb == "diff":
        return _diff(paths[0], paths[1], say)
    if verb == "prune":
        return _prune(paths[0], options, say)
    return _safetensors(paths[0], paths[1], say)


def _list(path: Path, say: Callable[[str], None]) -> int:
    """A line per step of a run; 1 if one is damaged by its sizes, or in trainer.json."""
    rows: list[tuple[str, ...]] = [("step", "written", "size", "val_loss", "layout", "state")]
    healthy = True
    for step in _steps(path):
        lines = manifest.problems(step, ("trainer.json",))  # which is read below
        healthy = healthy and not lines
        rows.append(_row(step, lines))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        say("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())
    hidden = [entry.name for entry in sorted((path / FOLDER).glob("*.superseded-*"))] if path.is_dir() else []
    if hidden:
        say(f"given up by a resume from an older step: {', '.join(hidden)} (prune superseded=true deletes them)")
    return 0 if healthy else 1


def _row(step: Path, lines: list[str]) -> tuple[str, ...]:
    written = f"{datetime.fromtimestamp(step.lstat().st_mtime):%Y-%m-%d %H:%M}"
    if lines:
        return step.name, written, "", "", "", lines[0]
    held = manifest.read(step)
    size = sum(entry["size"] for entry in held["files"].values())
    loss = val_loss(step)
    degrees = {axis: n for axis, n in held["layout"].items() if axis != "world" and n != 1}
    world = held["layout"].get("world", 1)
    layout = " ".join([f"{world} rank{'s' * (world != 1)}", *(f"{axis}={n}" for axis, n in degrees.items())])
    return step.name, written, _bytes(size), "" if loss is None else f"{loss:.4f}", layout, "complete"


def _verify(path: Path, say: Callable[[str], None]) -> int:
    """Hash every file and read every index; 1 if anything is not as it was written."""
    damaged = False
    for step in _steps(path):
        lines = manifest.problems(step, None) or _index_problems(step)
        damaged = damaged or bool(lines)
        if lines:
            say(f"{step}: damaged")
            for line in lines:
                say(f"- {line}")
        else:
            size = sum(entry["size"] for entry in manifest.read(step)["files"].values())
            say(f"{step}: intact, {count(step)} tensors, {_bytes(size)}")
    return 1 if damaged else 0


def _index_problems(step: Path) -> list[str]:
    """What the hashes of a forged manifest would not show."""
    for part in ("model", "optim"):
        try:
            read_metadata(step / part)
        except ValueError as error:
            return [str(error)]
    return []


def _diff(a: Path, b: Path, say: Callable[[str], None]) -> int:
    first, second = resolve(a), resolve(b)
    lines = list(differences(first, second))
    for line in lines:
        say(line)
    equal = f"equal: {count(first)} tensors, trainer.json"
    say(f"{len(lines)} differences between {first} and {second}" if lines else equal)
    return 1 if lines else 0


def _prune(path: Path, options: dict[str, str], say: Callable[[str], None]) -> int:
    """Delete what retention does not keep: the run's own policy, but for the options. The run must not be running."""
    store = CheckpointStore(path)
    if not store.root.is_dir():
        raise ValueError(f"{path} is not a run directory (no {FOLDER}/)")
    dry, superseded = (_flag(options, key) for key in ("dry_run", "superseded"))
    with RunLock(path):
        newest = store.latest(deep=True)
        if newest is None:
            raise ValueError(f"{path} has no intact checkpoint: nothing is deleted")
        policy = _policy(manifest.read(newest)["config"], options)
        gone = _expendable(policy, store.steps(), newest)
        if not dry:
            store.clean()
        if superseded:
            gone += sorted(store.root.glob("step_*.superseded-*"))
        for step in gone:
            say(f"{'would delete' if dry else 'deleted'} {step}")
            if not dry and manifest.STEP_NAME.fullmatch(step.name):
                store.remove(step)
            elif not dry:
                shutil.rmtree(step)
        kept = [step.name for step in store.steps() if step not in gone]
        say(f"kept {', '.join(kept)} (keep={policy.keep} keep_every={policy.keep_every} keep_best={policy.keep_best})")
    return 0


def _expendable(policy: Retention, steps: list[Path], newest: Path) -> list[Path]:
    """As a save would choose, but no damaged step takes the place of an intact one: what is to stay is hashed."""
    sound: set[Path] = {newest}
    while True:
        gone = policy.expendable(steps)
        damaged = {step for step in steps if step not in gone and step not in sound and manifest.problems(step, None)}
        if not damaged:
            return [step for step in gone if step != newest]
        sound |= {step for step in steps if step not in gone and step not in damaged}
        steps = [step for step in steps if step not in damaged]


def _policy(config: dict[str, Any], options: dict[str, str]) -> Retention:
    own = config.get("checkpoint", {})
    values = {key: own.get(key, 0) for key in ("keep", "keep_every", "keep_best")}
    for key, text in options.items():
        if key not in values:
            raise ValueError(f"{key}: no such key; prune takes {', '.join(values)}, superseded, dry_run")
        if not text.isdecimal():
            raise ValueError(f"{key}={text!r} is not a whole number; nearest legal value: 0")
        values[key] = int(text)
    return Retention(**values)


def _flag(options: dict[str, str], key: str) -> bool:
    text = options.pop(key, "false")
    if text not in ("true", "false"):
        raise ValueError(f"{key}={text!r}; nearest legal value: true (or false)")
    return text == "true"


def _safetensors(checkpoint: Path, out: Path, say: Callable[[str], None]) -> int:
    """The model's tensors under our names, in files of at most SHARD_BYTES; one of them is in memory at a time."""
    step = resolve(checkpoint)
    if out.exists():
        raise ValueError(f"{out} already exists; name a directory that does not")
    tensors = stored(step / "model")
    sizes = {name: tensor.shape.numel() * tensor.dtype.itemsize for name, tensor in tensors.items()}
    out.mkdir(parents=True)
    write_shards(out, sizes, lambda shard: ((name, tensors[name].make()) for name in shard), SHARD_BYTES)
    say(f"{step} -> {out}: {len(tensors)} tensors, {_bytes(sum(sizes.values()))}")
    return 0


def _steps(path: Path) -> list[Path]:
    """The steps of a run directory, or the one step that `path` is. Raises ValueError for anything else."""
    if (path / FOLDER).is_dir():
        return manifest.published(path / FOLDER)
    if manifest.STEP_NAME.fullmatch(path.name) or (path / manifest.NAME).exists():
        return [path]
    raise ValueError(f"{path} is neither a run directory (no {FOLDER}/) nor a step directory (no {manifest.NAME})")


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
