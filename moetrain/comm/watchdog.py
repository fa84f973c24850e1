"""A run that stops moving says where, on every rank, and ends.

A thread on each rank watches for the main thread's beats. When they stop, it writes what this rank is doing, and its
stacks, to a file and to stderr; ranks that see another's file do the same at once, so that one look shows who waits in
which collective and who is elsewhere. Then the process exits with 1, which a launcher answers with a restart.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType, TracebackType
from typing import TextIO

import torch
import torch.distributed as dist

_WAIT_FOR_OTHERS_S = 15.0


class Watchdog:
    """Context manager around the work of one rank.

    folder: for the reports, one per launch, the same on every rank (a shared file system), made when needed.
    timeout_s: the longest time between two beats, 0 for no limit.
    """

    def __init__(self, folder: Path, timeout_s: float) -> None:
        self.folder, self.timeout_s = folder, timeout_s
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._doing, self._last = "starting", time.monotonic()
        self._end: tuple[float, str] | None = None
        self._stop = threading.Event()

    def __enter__(self) -> Watchdog:
        self.beat(self._doing)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._backstop():
            faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str) -> None:
        """The main thread moves on; `doing` is for the report: "step 12"."""
        self._doing, self._last = doing, time.monotonic()
        if self._backstop():  # for a thread that never lets go of the interpreter: this timer needs no Python
            faulthandler.dump_traceback_later(1.5 * self.timeout_s + _WAIT_FOR_OTHERS_S, exit=True, file=_stderr())

    def end_within(self, seconds: float, why: str) -> None:
        """The whole run must be over by then, for the reason given. Safe in a signal handler."""
        self._end = (time.monotonic() + seconds, f"not over {seconds:.0f} s after {why}")

    def _backstop(self) -> bool:
        """Only where we own the process: a test's harness has a timer of its own."""
        return self.timeout_s > 0 and "TORCHELASTIC_RUN_ID" in os.environ

    def _watch(self) -> None:
        period = min(30.0, max(0.2, self.timeout_s / 20)) if self.timeout_s else 5.0
        while not self._stop.wait(period):
            reason = self._overdue()
            if reason:
                self._report(reason)

    def _overdue(self) -> str:
        now = time.monotonic()
        if self._end and now > self._end[0]:
            return self._end[1]
        if self.timeout_s and now - self._last > self.timeout_s:
            return f"no progress for {now - self._last:.0f} s"
        try:
            others = self.folder.is_dir() and any(self.folder.glob("rank_*.txt"))
        except OSError:
            return ""
        return f"asked by another rank, {now - self._last:.0f} s after our own last progress" if others else ""

    def _report(self, reason: str) -> None:
        """Never returns."""
        faulthandler.dump_traceback_later(2 * _WAIT_FOR_OTHERS_S, exit=True, file=_stderr())
        doing = where(sys._current_frames())
        host = f"pid {os.getpid()} on {socket.gethostname()}"
        head = f"rank {self.rank} of {self.world} ({host}), {self._doing}: {reason}"
        text = f"{head}\n{doing}\n\n{stacks()}\n"
        print(text, file=sys.stderr, flush=True)
        self._write(f"rank_{self.rank:05d}.txt", text)
        active = nccl_collectives()
        if active:
            self._write(f"rank_{self.rank:05d}.nccl.txt", active)
            print(f"rank {self.rank}: NCCL collectives not finished:\n{active}", file=sys.stderr, flush=True)
        found = self._others()
        if found and min(found) == self.rank:
            summary = self._summary(found)
            print(summary, file=sys.stderr, flush=True)
            self._write("summary.txt", summary)  # last: once it is there the others exit, and we are ended with them
        self._wait_for_summary()
        os._exit(1)

    def _write(self, name: str, text: str) -> None:
        """Whole or not at all; a full disk leaves stderr."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = self.folder / f".{name}"
            draft.write_text(text)
            os.replace(draft, self.folder / name)
        except OSError as error:
            print(f"rank {self.rank}: {self.folder / name} was not written: {error}", file=sys.stderr, flush=True)

    def _others(self) -> dict[int, str]:
        """Rank -> report, once all are there or the time for that is over."""
        deadline = time.monotonic() + _WAIT_FOR_OTHERS_S
        found: dict[int, str] = {}
        while time.monotonic() < deadline and len(found) < self.world:
            try:
                paths = self.folder.glob("rank_?????.txt")
                found = {int(path.stem.removeprefix("rank_")): path.read_text() for path in paths}
            except OSError:
                break
            time.sleep(0.1)
        return found

    def _wait_for_summary(self) -> None:
        """A launcher ends all ranks when the first of them exits, so none does before the summary is written."""
        deadline = time.monotonic() + _WAIT_FOR_OTHERS_S / 3
        while time.monotonic() < deadline and not (self.folder / "summary.txt").exists():
            time.sleep(0.1)

    def _summary(self, found: dict[int, str]) -> str:
        lines: dict[str, list[int]] = {}
        for rank, text in sorted(found.items()):
            lines.setdefault((text + "\n\n").splitlines()[1], []).append(rank)
        silent = [rank for rank in range(self.world) if rank not in found]
        told = [f"ranks {', '.join(map(str, ranks))}: {line}" for line, ranks in lines.items()]
        if silent:
            told.append(f"ranks {', '.join(map(str, silent))}: no report (stopped, dead, or on a machine that is gone)")
        return f"the run hangs; stacks in {self.folder}\n" + "\n".join(told)


def where(frames: dict[int, FrameType]) -> str:
    """The collective that a thread of this process is in and who called it; else what the main thread is in."""
    main = threading.main_thread().ident or 0
    for thread in sorted(frames, key=lambda ident: ident != main):
        calls = traceback.extract_stack(frames[thread])
        inside = [
            i
            for i, call in enumerate(calls)
            if "/torch/distributed/" in call.filename and not call.name.startswith("_") and call.name != "wrapper"
        ]
        ours = [call for call in calls[: inside[-1]] if "/moetrain/" in call.filename] if inside else []
        if ours:
            return f"waits in {calls[inside[-1]].name}, called by {_place(ours[-1])}"
    calls = traceback.extract_stack(frames[main])
    ours = [call for call in calls if "/moetrain/" in call.filename]
    caller = f", called by {_place(ours[-1])}" if ours and ours[-1] is not calls[-1] else ""
    return f"is in no collective but in {_place(calls[-1])}{caller}"


def stacks() -> str:
    """The Python stack of every thread of this process, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            parts.append(f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame)))
    return "\n".join(parts)


def nccl_collectives() -> str:
    """What NCCL's flight recorder holds that is not finished, a line each; empty without NCCL or the recorder."""
    if not (dist.is_nccl_available() and torch.cuda.is_initialized()):
        return ""
    try:
        from torch._C._distributed_c10d import _dump_nccl_trace_json  # type: ignore[attr-defined]

        entries = json.loads(_dump_nccl_trace_json(includeCollectives=True, onlyActive=True)).get("entries", [])
    except Exception as error:  # a private interface, and the process is about to end anyway
        return f"the flight recorder cannot be read: {type(error).__name__}: {error}"
    return "\n".join(_entry(entry) for entry in entries[:20])


def _entry(entry: dict) -> str:
    name, number = entry.get("profiling_name", "?"), entry.get("collective_seq_id", "?")
    group = " ".join(map(str, entry.get("process_group", [])))
    return f"{name} number {number} of group {group}: {entry.get('state', '?')}, input {entry.get('input_sizes', '?')}"


def _stderr() -> TextIO:
    return sys.__stderr__ or sys.stderr


def _place(call: traceback.FrameSummary) -> str:
    path = Path(call.filename)
    return f"{call.name} ({'/'.join(path.parts[-3:])}:{call.lineno})"
