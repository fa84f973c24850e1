"""`metrics.jsonl` and `samples.jsonl`: one JSON object a line, exact after a kill and after a resume.

docs/metrics.md lists the keys. Only rank 0 writes; the other ranks hold a `NullLog`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# What a clock and the machine's memory decide. "Equal metrics" are equal in every other key (docs/metrics.md).
MEASURED = ("tokens_per_s", "tokens_per_s_per_gpu", "mfu", "peak_memory_gb", "checkpoint_time_s")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class JsonLines:
    """An append-only file of JSON objects whose rows carry `step`.

    Each append reaches the operating system before it returns, so a killed process loses at most the line it was
    writing; that half line is cut off when the file is opened again. On a full disk rows wait in memory for room, in
    order and whole: a run need not end for want of a line.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        _mend_tail(path)
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def append_row(self, row: Mapping[str, Any]) -> None:
        first = not self._waiting
        self._waiting += _encode(row).encode()
        error = self._write_waiting()
        if error and first:
            print(f"{self.path} cannot grow ({error}); its rows wait in memory", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Empty the file: the run starts at step 0, whatever an earlier attempt left here."""
        self._rewrite([])

    def close(self) -> None:
        if not self._file.closed and (error := self._write_waiting()):
            print(f"{self.path} lacks its last rows: {error}", file=sys.stderr, flush=True)
        self._file.close()

    def _write_waiting(self) -> OSError | None:
        """Append all that waits, or nothing of it where there is no room."""
        size, done = os.fstat(self._file.fileno()).st_size, 0
        try:
            while done < len(self._waiting):
                done += os.write(self._file.fileno(), self._waiting[done:])
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            os.ftruncate(self._file.fileno(), size)
            return error
        self._waiting = b""
        return None

    def _keep(self, wanted: Callable[[Row], bool], then: Iterable[Row] = ()) -> None:
        self._rewrite([row for row in read_rows(self.path) if wanted(row)] + list(then))

    def _rewrite(self, rows: list[Row]) -> None:
        """Replace the file by one rename: a reader or a crash sees the old rows or the new ones, nothing between."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(map(_encode, rows))
            file.flush()
            os.fsync(file.fileno())
        self._file.close()
        os.replace(temporary, self.path)
        self._file = self.path.open("ab", buffering=0)


class MetricsLog(JsonLines):
    """`metrics.jsonl` of a run directory: one object per step, floats unrounded.

    JSON has no NaN or infinity: such a value is written as null and named in the row's `nonfinite`, for example
    {"loss": null, "nonfinite": {"loss": "nan"}}. Whether to stop on one is the trainer's decision, not the log's.
    """

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__(Path(run_dir) / "metrics.jsonl")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one step. row must have an integer `step`; values are numbers (0-d tensors too), strings or None."""
        assert isinstance(row.get("step"), int), f"a metrics row needs an integer step, got {row.get('step')!r}"
        self.append_row(row)

    def event(self, name: str, step: int, **details: Any) -> None:
        """Write something that happened after `step` updates."""
        self.append_row({"event": name, "step": step, **details})

    def resume(self, step: int) -> None:
        """Drop what lies past the restored step, older resume events too, and record the resume."""
        self._keep(lambda row: row["step"] <= step, then=[{"event": "resume", "step": step}])

    def roll_back(self, step: int, why: Mapping[str, Any]) -> None:
        """Drop what lies past `step`, which the run went back to, and record it with what `why` says."""
        self._keep(lambda row: row["step"] <= step, then=[{"event": "rollback", "step": step, **why}])


class SampleLog(JsonLines):
    """`samples.jsonl`: {"step", "dp", "ids"}, which samples each data-parallel rank took in each step."""

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__(Path(run_dir) / "samples.jsonl")

    def append(self, step: int, dp: int, ids: Iterable[int | str]) -> None:
        self.append_row({"step": step, "dp": dp, "ids": list(ids)})

    def resume(self, step: int) -> None:
        """Drop what lies past the restored step. No event is written, so every line keeps the one shape."""
        self._keep(lambda row: row["step"] <= step)

    def roll_back(self, step: int, why: Mapping[str, Any]) -> None:
        """As `resume`: the lines are those whose samples the weights have seen."""
        self.resume(step)


class NullLog:
    """Stands in for either log on ranks that do not write."""

    def append(self, *args: Any, **kwargs: Any) -> None: ...

    def resume(self, step: int) -> None: ...

    def roll_back(self, step: int, why: Mapping[str, Any]) -> None: ...

    def clear(self) -> None: ...

    def close(self) -> None: ...


def read_rows(path: str | Path) -> list[Row]:
    """Every complete row of a JSON-lines log, events included; a half-written last line is left out.

    Raises ValueError naming file and line where a complete line is not a JSON object with a step.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if not line.endswith("\n"):
                break
            raise ValueError(f"{path}:{number} is not JSON ({error.msg}): {line.strip()[:80]!r}") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}:{number} is not an object with an integer step: {line.strip()[:80]!r}")
        rows.append(row)
    return rows


def _mend_tail(path: Path) -> None:
    """End the file with a newline: complete a last line that only lacks it, cut one that is not whole."""
    if not path.exists():
        return
    content = path.read_bytes()
    if not content or content.endswith(b"\n"):
        return
    start = content.rfind(b"\n") + 1
    try:
        json.loads(content[start:])
    except ValueError:
        os.truncate(path, start)
    else:
        with path.open("ab") as file:
            file.write(b"\n")


def _encode(row: Mapping[str, Any]) -> str:
    plain = {key: _plain(value) for key, value in row.items()}
    odd = {key: str(value) for key, value in plain.items() if isinstance(value, float) and not math.isfinite(value)}
    if odd:
        plain.update(dict.fromkeys(odd), nonfinite=odd)
    return json.dumps(plain, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """A 0-d tensor or numpy scalar as a Python number; its float keeps every bit."""
    return value.item() if hasattr(value, "item") else value
