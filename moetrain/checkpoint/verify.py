"""What all ranks check together before a checkpoint is used, and how one that cannot be used is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from moetrain.checkpoint import manifest
from moetrain.checkpoint.agree import gather, rank_and_world
from moetrain.checkpoint.formats import FormatError
from moetrain.checkpoint.tensors import mismatches

Note = Callable[[str], None]  # is told what a user should know


def problems_together(path: Path, prefixes: tuple[str, ...] = ("",)) -> list[str]:
    """What is wrong with a step directory, a line per file: sizes of all files, hashes of those under `prefixes`.

    Collective: the hashing is shared out among the ranks. Raises FormatError for a format that we do not read.
    """
    rank, world = rank_and_world()

    def check() -> list[str]:
        raise_format_error(path)
        try:
            names = sorted(name for name in manifest.read(path)["files"] if name.startswith(prefixes))
        except ValueError as error:
            return [str(error)]
        return manifest.problems(path, names[rank::world])

    return _distinct(gather(check))


def compare_together(
    path: Path, state: dict[str, dict[str, Tensor]], same_dtype: bool, allow: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """`mismatches` of every rank: each looks at what it holds, and what no rank holds is unexpected.

    state: folder of the checkpoint -> this rank's tensors by name. Collective.
    """
    held = gather(lambda: {part: list(tensors) for part, tensors in state.items()})
    everywhere = {part: {name for of_rank in held for name in of_rank[part]} for part in state}

    def check() -> list[tuple[list[str], list[str]]]:
        return [mismatches(path / part, state[part], same_dtype, everywhere[part], allow) for part in state]

    found = [result for of_rank in gather(check) for result in of_rank]
    return _distinct([lines for lines, _ in found]), _distinct([excepted for _, excepted in found])


def raise_format_error(path: Path) -> None:
    """A step of an unknown format is not a damaged one, to be passed over for an older step: raise FormatError."""
    try:
        manifest.read(path)
    except FormatError:
        raise
    except ValueError:
        pass


def refuse(path: Path, lines: list[str]) -> None:
    """Raise ValueError with the lines, and with the newest other step that could be used, if there are any."""
    if not lines:
        return
    # Not this one again: a flipped bit passes the size check.
    others = [p for p in manifest.published(path.parent) if p.absolute() != path.absolute()]
    intact = next((p for p in reversed(others) if not manifest.problems(p)), None)
    offer = f"\nnewest other intact step: {intact}" if intact else ""
    raise ValueError(f"{path} cannot be used:\n" + "\n".join(f"- {line}" for line in lines) + offer)


def silent(_: str) -> None:
    """A `Note` for nobody."""


def tell(excepted: Sequence[str], note: Note) -> None:
    """Say which names `allow` excepted."""
    if excepted:
        note(f"init.allow excepts {', '.join(excepted)}: not in both the checkpoint and the model")


def _distinct(lists: list[list[str]]) -> list[str]:
    return list(dict.fromkeys(line for lines in lists for line in lines))
