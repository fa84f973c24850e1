"""Safetensors directories as transformers lays them out: one file, or shards and their index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moetrain.checkpoint.agree import gather, rank_and_world

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FOLDER = "hf"  # of a run directory: what came with an imported model besides its weights
SHARD_BYTES = 5 * 10**9
# What makes a tokenizer or a text generator of a directory; copied as they are.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class Source:
    """The tensors of a directory, each read when asked for; files stay memory-mapped."""

    def __init__(self, directory: Path) -> None:
        """Raises ValueError when there are no safetensors, and naming each shard that is missing or damaged."""
        self._files: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        for path in _shards(directory):
            try:
                opened = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from None
            self._files[path] = opened
            self._where |= dict.fromkeys(opened.keys(), path)

    def names(self) -> list[str]:
        return sorted(self._where)

    def get(self, name: str) -> Tensor:
        """Mapped from the file: memory is used when values are touched."""
        return self._files[self._where[name]].get_tensor(name)


def _shards(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is damaged: {type(error).__name__}: {error}") from None
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{index} names a file outside its directory: {outside[0]}")
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ValueError(f"{directory} lacks {', '.join(missing)}, which {INDEX} lists")
        return [directory / name for name in names]
    if not (directory / SINGLE).is_file():
        raise ValueError(f"source={directory} has neither {SINGLE} nor {INDEX}")
    return [directory / SINGLE]


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. Raises ValueError when it is missing or not JSON."""
    path = directory / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{directory} has no config.json: give a directory that transformers' save_pretrained wrote"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def write_shards(
    directory: Path,
    sizes: dict[str, int],
    produce: Callable[[list[str]], Iterable[tuple[str, Tensor]]],
    limit: int = SHARD_BYTES,
) -> None:
    """Write tensors into shards; ranks share the shards out, each holding one at a time. All ranks call it.

    sizes: bytes of every tensor by name, in the order of the shards. produce: the tensors of these names.
    """
    plan = _plan(sizes, limit)
    names = {
        i: SINGLE if len(plan) == 1 else f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors" for i in range(len(plan))
    }
    rank, world = rank_and_world()

    def write() -> None:
        for i in range(rank, len(plan), world):
            held = {name: tensor.contiguous() for name, tensor in produce(plan[i])}
            assert held.keys() == set(plan[i]), "other tensors came than planned"
            save_file(held, directory / names[i], metadata={"format": "pt"})

    gather(write)
    if len(plan) > 1 and rank == 0:
        weight_map = {name: names[i] for i, part in enumerate(plan) for name in part}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _plan(sizes: dict[str, int], limit: int) -> list[list[str]]:
    plan: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if plan[-1] and filled + size > limit:
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += size
    return plan


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's and generator's files that there are; return their names."""
    there = [name for name in SIDE_FILES if (source / name).is_file()]
    for name in there:
        shutil.copyfile(source / name, target / name)
    return there
