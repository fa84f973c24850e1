"""What must be as the checkpoint has it when a run is resumed, and what has changed since. Reads manifests only."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moetrain.checkpoint import manifest
from moetrain.checkpoint.store import CheckpointStore
from moetrain.checkpoint.use import resolve
from moetrain.config.inherit import flat
from moetrain.config.schema import Config

_FREE = ("model.name", "model.init_std")  # change no function
_GROUPS = ("train", "router", "balance", "optim", "data")  # of which a change is told: the others change no number
_QUIET = ("train.micro_batch", "train.log_every", "data.cache_dir", "router.record", "router.replay", "router.kernels")


def resumed_step(config: Config) -> Path | None:
    """The step directory that `run.resume` means, by its sizes; None where a run begins anew.

    Raises ValueError, naming the key, for a path that cannot be used.
    """
    resume = config.run.resume
    if resume in ("auto", "never"):
        return CheckpointStore(config.run.dir).latest() if resume == "auto" else None
    return resolve(resume, "run.resume")


def check_resumed(config: Config, path: Path) -> None:
    """Refuse a resume from `path` with another model, optimizer, or `init.from`: ValueError with the nearest value.

    Shapes would show some of that, after minutes and as a line per tensor; n_heads, rope, norm_eps never.
    """
    held = manifest.read(path)
    stored = held["config"]
    if not held["layout"]:
        raise ValueError(
            f"{path} holds weights alone, as import and upcycle make them: nothing to resume; "
            f"start from them with init.from={path.parent.parent} and another run.dir"
        )
    here, there = flat(_plain(config)), flat(stored)
    for key, value in here.items():
        if key.startswith("model.") and key not in _FREE and there.get(key, value) != value:
            raise ValueError(
                f"{key}={value} differs from the model of {path}, which run.resume={config.run.resume} goes on with; "
                f"nearest legal value: {there[key]} (or another run.dir)"
            )
    key = "optim._target_"
    if not config.init.get("allow") and there.get(key, here.get(key)) != here.get(key):
        raise ValueError(
            f"optim: {path} holds the state of {there[key]}, not of {here[key]}; resume with the optimizer it has, or "
            f"take its weights alone: init.from={path} and another run.dir"
        )
    source, before = config.init.get("from", ""), there.get("init.from", "")
    if stored and source and config.run.resume == "auto" and not _same_path(source, before):
        raise ValueError(
            f"init.from={source} would be ignored: run.dir={config.run.dir} has {path.name} of a run that began "
            f"{f'with {before}' if before else 'without init.from'}; choose another run.dir, or run.resume=never"
        )


def changes(config: Config, path: Path) -> list[str]:
    """A line that says which keys of what decides the numbers differ from those that `path` was saved with."""
    here, there = flat(_plain(config)), flat(manifest.read(path)["config"])
    changed = [
        f"{key} {value} -> {here.get(key, 'absent')}"
        for key, value in there.items()  # one that it does not know is of a later version
        if key.split(".")[0] in _GROUPS and key not in _QUIET
        if (key not in here or here[key] != value) and "***" not in str(value)
    ]
    return [f"changed since {path.name}: {', '.join(changed)}"] if changed else []


def _plain(config: Config) -> dict[str, Any]:
    """As a manifest has it: tuples are lists."""
    return json.loads(json.dumps(asdict(config)))


def _same_path(a: str, b: str) -> bool:
    return bool(b) and Path(a).expanduser().resolve() == Path(b).expanduser().resolve()
