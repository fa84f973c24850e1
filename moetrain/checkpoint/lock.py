"""One writer per run directory.

`run.lock` names the process that holds the directory. On its own host the kernel knows whether that process lives; from
another host all one can see is whether its heartbeat, the file's modification time, goes on. Rank 0 takes the lock and
the caller tells the other ranks.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

NAME = "run.lock"


class RunLock:
    """Context manager that holds `run_dir` for this process.

    expiry_s: a holder on another host (or in another container) counts as dead this many seconds after its last
    heartbeat; it beats four times as often. Entering raises ValueError naming host and pid of a living holder.
    """

    def __init__(self, run_dir: str | os.PathLike, expiry_s: float = 60.0) -> None:
        self.path = Path(run_dir) / NAME
        self.expiry_s = expiry_s
        self._text = ""
        self._stop = threading.Event()

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._text = json.dumps({**_whoami(), "token": secrets.token_hex(8)})
        with _one_at_a_time(self.path.parent):
            while not self._create():
                self._evict_or_refuse()
        self._stop.clear()
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()
        atexit.register(self.release)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def held(self) -> bool:
        """Whether the file still is this lock's; false once another host found it expired and took over."""
        return bool(self._text) and _read(self.path) == self._text

    def release(self) -> None:
        """Give the directory back; harmless when repeated, and in a forked child, which holds nothing."""
        self._stop.set()
        atexit.unregister(self.release)
        if self.held() and json.loads(self._text)["pid"] == os.getpid():
            self.path.unlink(missing_ok=True)
        self._text = ""

    def _create(self) -> bool:
        """Create the file with its content in one step: a link appears only once the content is there."""
        draft = self.path.with_name(f".{NAME}.{secrets.token_hex(4)}")
        draft.write_text(self._text)
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _evict_or_refuse(self) -> None:
        text = _read(self.path)
        if text is None:
            return  # released just now
        holder = _parse(text)
        if self._lives(holder):
            raise ValueError(
                f"{self.path.parent} is in use by pid {holder['pid']} on host {holder['host']}; stop that run, choose "
                f"another run.dir, or, if it is dead, wait {self.expiry_s:.0f} s or delete {self.path}"
            )
        # Processes of two hosts may find the same dead holder. Only one rename of its file succeeds; one that is so
        # late that it moved the winner's new lock puts it back.
        aside = self.path.with_name(f".{NAME}.{secrets.token_hex(4)}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if _read(aside) != text:
            os.rename(aside, self.path)
            return
        aside.unlink()

    def _lives(self, holder: dict[str, Any]) -> bool:
        me = _whoami()
        if all(holder[key] == me[key] for key in ("host", "boot", "pids")):
            try:
                process = psutil.Process(holder["pid"])
                if process.status() == psutil.STATUS_ZOMBIE:
                    return False  # killed, but its parent has not asked for its exit status
                return abs(process.create_time() - holder["created"]) < 1.0  # else its pid was given out again
            except psutil.NoSuchProcess:
                return False
        try:
            return self._now() - self.path.stat().st_mtime < self.expiry_s
        except FileNotFoundError:
            return False

    def _now(self) -> float:
        """The file server's time: clocks of two hosts differ."""
        probe = self.path.with_name(f".{NAME}.{secrets.token_hex(4)}")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now

    def _beat(self) -> None:
        while not self._stop.wait(self.expiry_s / 4):
            if not self.held():
                return
            try:
                os.utime(self.path)
            except FileNotFoundError:
                return


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Processes of this host take turns at looking and evicting; a file system without locks goes without."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _whoami() -> dict[str, Any]:
    """Who holds the lock; equal host, boot, and process-id namespace mean that pids can be compared."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "created": psutil.Process().create_time(),
        "boot": _first_line("/proc/sys/kernel/random/boot_id"),
        "pids": os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else "",
    }


def _first_line(path: str) -> str:
    return Path(path).read_text().strip() if os.path.exists(path) else ""


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _parse(text: str) -> dict[str, Any]:
    """A holder; one that cannot be read is on no host, so only its heartbeat counts."""
    try:
        holder = json.loads(text)
    except json.JSONDecodeError:
        holder = None
    unknown = {"host": "unknown", "pid": 0, "created": 0.0, "boot": None, "pids": None}
    return {**unknown, **holder} if isinstance(holder, dict) else unknown
