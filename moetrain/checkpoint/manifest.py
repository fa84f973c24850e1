"""What a step directory holds, and whether it still does.

`manifest.json` lists every other file with its size and SHA-256, so damage is found and named before a byte of it is
used. It holds a digest of itself as well. Only files found by walking the directory are ever opened; links, pipes, and
devices are problems, not files, and so is a manifest that lists `../elsewhere`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import torch

import moetrain
from moetrain.checkpoint.formats import FORMAT, check_format, migrate_trainer_state

NAME = "manifest.json"
STEP_NAME = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    """`step_00000100` for 100."""
    return f"step_{step:08d}"


def published(folder: Path) -> list[Path]:
    """What has a step's name in a checkpoints folder, oldest first; the content is not looked at."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if STEP_NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """100 for `.../step_00000100`."""
    return int(path.name.removeprefix("step_"))


def digest(path: Path) -> dict[str, Any]:
    """{"size": bytes, "sha256": hex} of a file."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": os.fstat(file.fileno()).st_size, "sha256": sha256}


def write(directory: Path, step: int, layout: dict, config: dict, files: dict[str, dict[str, Any]]) -> None:
    """Write and fsync the manifest. files: relative POSIX path -> `digest`. layout, config: JSON."""
    manifest = {
        "format": FORMAT,
        "step": step,
        "layout": layout,
        "config": config,
        "versions": {
            "moetrain": moetrain.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "files": dict(sorted(files.items())),
    }
    manifest = json.loads(json.dumps(manifest, allow_nan=False))  # as it will be read: tuples become lists
    write_json(directory / NAME, {**manifest, "sha256": _self_digest(manifest)})


def read(directory: Path) -> dict[str, Any]:
    """The manifest of a step directory, `format` as it was written.

    Raises ValueError if it is missing or damaged, FormatError if this moetrain does not know its format.
    """
    path = directory / NAME
    try:
        if not stat.S_ISDIR(os.lstat(directory).st_mode):
            raise ValueError(f"{directory} is not a folder: not a checkpoint")
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ValueError(f"{path} is not a regular file")
        manifest = json.loads(path.read_text())
        if manifest["sha256"] != _self_digest({k: v for k, v in manifest.items() if k != "sha256"}):
            raise ValueError(f"{path} is damaged: its content does not match its own sha256")
        check_format(path, manifest["format"])
        _check_entries(path, manifest)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: not a complete checkpoint") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    return manifest


def trainer_state(directory: Path) -> dict[str, Any]:
    """What trainer.json of an intact step directory says, in today's terms."""
    state = json.loads((directory / "trainer.json").read_text())
    if not isinstance(state, dict):
        raise ValueError(f"{directory / 'trainer.json'} is refused: it is a {type(state).__name__}")
    return migrate_trainer_state(state, read(directory)["format"])


def _check_entries(path: Path, manifest: dict[str, Any]) -> None:
    """A digest can be made by anyone: what is used later has to have the right types and to stay inside."""
    for key, kind in (("step", int), ("layout", dict), ("config", dict), ("files", dict)):
        if not isinstance(manifest[key], kind):
            raise ValueError(f"{path} is refused: {key} is a {type(manifest[key]).__name__}")
    for name, entry in manifest["files"].items():
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or inside.as_posix() != name:
            raise ValueError(f"{path} is refused: it lists {name!r}, which is outside the checkpoint")
        if not isinstance(entry["size"], int) or not isinstance(entry["sha256"], str):
            raise ValueError(f"{path} is refused: {name!r} has no size and sha256")


def problems(directory: Path, hashed: Iterable[str] | None = ()) -> list[str]:
    """What is wrong with a step directory, a line per file; empty means intact.

    hashed: relative paths whose SHA-256 is compared too, None for all of them; names, kinds, and sizes always are.
    """
    try:
        manifest = read(directory)
    except ValueError as error:
        return [str(error)]
    named = STEP_NAME.fullmatch(directory.name)
    if named and int(named[1]) != manifest["step"]:
        return [f"{directory / NAME} is of step {manifest['step']}, not of {directory.name}"]
    found, wrong = _walk(directory)
    listed: dict[str, Any] = manifest["files"]
    wrong += [f"{directory / name} is missing" for name in listed if name not in found]
    wrong += [f"{directory / name} is foreign: the manifest does not list it" for name in found if name not in listed]
    hashed = listed.keys() if hashed is None else set(hashed)
    for name in sorted(found.keys() & listed.keys()):
        if found[name] != listed[name]["size"]:
            wrong.append(f"{directory / name} has {found[name]} bytes instead of {listed[name]['size']}")
        elif name in hashed and digest(directory / name)["sha256"] != listed[name]["sha256"]:
            wrong.append(f"{directory / name} is damaged: its sha256 is not the manifest's")
    return wrong


def write_json(path: Path, value: Any) -> None:
    """Write JSON and fsync the file."""
    with open(path, "w") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def _self_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _walk(directory: Path) -> tuple[dict[str, int], list[str]]:
    """Sizes of the regular files below but for the manifest, and a problem for what is neither file nor folder."""
    sizes: dict[str, int] = {}
    wrong: list[str] = []
    for folder, folders, files in os.walk(directory, followlinks=False):
        for name in folders + files:
            path = Path(folder, name)
            info = os.lstat(path)
            if stat.S_ISREG(info.st_mode):
                sizes[path.relative_to(directory).as_posix()] = info.st_size
            elif not stat.S_ISDIR(info.st_mode):
                wrong.append(f"{path} is neither a file nor a folder")
    sizes.pop(NAME, None)
    return sizes, wrong
