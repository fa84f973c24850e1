"""One writer per run directory.

`run.lock` names the process that holds the directory. On its own host the kernel knows whether that process lives; from
another host all one can see is whether its heartbeat, the file's modification time, goes on. Rank 0 takes the lock and
the caller tells the other ranks. docs/decisions/031-one-writer.md says why it is built like this, and what NFS changes.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

NAME = "run.lock"
TURN = f".{NAME}.turn"  # locked while somebody looks and evicts; never removed: two could lock two files of that name
TURN_S = 10.0
SETTLE_S = 0.5


class RunLock:
    """Context manager that holds `run_dir` for this process.

    expiry_s: a holder on another host (or in another container) counts as dead this many seconds after its last
    heartbeat; it beats four times as often. wait_s: how long to wait for a living holder to go, which a restarted run
    does. on_lost: called from the heartbeat's thread if another host found the heartbeat silent and took over.
    Entering raises ValueError naming host and pid of a living holder.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        expiry_s: float = 60.0,
        wait_s: float = 0.0,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self.path = Path(run_dir) / NAME
        self.expiry_s, self.wait_s, self.on_lost = expiry_s, wait_s, on_lost
        self._text = ""
        self._stop = threading.Event()

    def __enter__(self) -> RunLock:
        self._text = json.dumps({**_whoami(), "token": secrets.token_hex(8)})
        deadline = time.monotonic() + self.wait_s
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            taken = self._try()
        except OSError as error:
            raise ValueError(f"{self.path.parent} cannot be written to ({error}); choose another directory") from None
        while not taken:
            if time.monotonic() >= deadline:
                self._refuse()
            time.sleep(min(0.2, self.wait_s))
            taken = self._try()
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

    def _try(self) -> bool:
        """Create the lock, evicting a dead holder's. False: somebody living holds it."""
        with _turn(self.path.parent) as alone:
            while not self._create():
                if not self._evict():
                    return False
            self._sweep()
        if not alone:  # without turns, a late evictor may just have moved our file away: see `_evict`
            time.sleep(SETTLE_S)
        return self.held()

    def _create(self) -> bool:
        """Create the file with its content in one step: a link appears only once the content is there."""
        draft = self.path.with_name(f".{NAME}.{secrets.token_hex(4)}")
        draft.write_text(self._text)
        try:
            self._link(draft)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _link(self, draft: Path) -> None:
        try:
            os.link(draft, self.path)
        except FileExistsError:
            raise
        except OSError:  # no hard links, as on mounted buckets: who reads it before it is written sees a living holder
            with open(self.path, "x") as file:
                file.write(draft.read_text())

    def _evict(self) -> bool:
        """Remove a dead holder's file; false if the holder lives."""
        text = _read(self.path)
        if text is None:
            return True  # released just now
        if self._lives(_parse(text)):
            return False
        # Where turns do not work, several may find the same dead holder. Only one rename of its file succeeds; one that
        # is so late that it moved the winner's new lock links it back, never over a third one's.
        aside = self.path.with_name(f".{NAME}.{secrets.token_hex(4)}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return True
        try:
            if _read(aside) not in (text, None):  # None: the winner has swept it
                self._link(aside)
        except FileExistsError:
            pass
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _refuse(self) -> None:
        holder = _parse(_read(self.path) or "")
        raise ValueError(
            f"{self.path.parent} is in use by pid {holder['pid']} on host {holder['host']}; stop that run, choose "
            f"another run.dir, or, if it is dead, wait {self.expiry_s:.0f} s or delete {self.path}"
        )

    def _sweep(self) -> None:
        """Remove drafts of processes that were killed while they took the lock."""
        old = self._now() - self.expiry_s
        for path in self.path.parent.glob(f".{NAME}.*"):
            with suppress(FileNotFoundError):
                if path.name != TURN and path.stat().st_mtime < old:
                    path.unlink()

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

    def _touch(self) -> bool:
        """One beat. False: the file is another's; one that took its place since we looked is not kept alive either."""
        with open(self.path) as file:
            if file.read() != self._text:
                return False
            os.utime(file.fileno())
        return True

    def _beat(self) -> None:
        while not self._stop.wait(self.expiry_s / 4):
            try:
                if self._touch():
                    continue
            except FileNotFoundError:
                pass  # lost since we looked
            except OSError:
                continue  # the file server is away; the next beat may reach it
            if self.on_lost is not None and not self._stop.is_set():
                self.on_lost()
            return


def run_lock(run_dir: str | os.PathLike) -> RunLock:
    """The lock of a training run: it waits after a restart by torchrun, and ends the process when it is lost."""
    lock = RunLock(run_dir)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        lock.wait_s = 1.5 * lock.expiry_s  # the ranks may have moved: our predecessor's heartbeat is all we see

    def lost() -> None:
        holder = _parse(_read(lock.path) or "")
        text = f"{lock.path}: pid {holder['pid']} on host {holder['host']} took over, because our heartbeat was silent"
        print(f"{text} for {lock.expiry_s:.0f} s; this process ends before it writes more", file=sys.stderr, flush=True)
        os._exit(1)

    lock.on_lost = lost
    return lock


@contextmanager
def _turn(directory: Path) -> Iterator[bool]:
    """Processes take turns at looking and evicting. False where the file system cannot lock, or a turn never ends.

    flock needs a file opened for writing on NFS, which turns it into a lock on the server, for all hosts.
    """
    handle = os.open(directory / TURN, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _locked(handle)
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    deadline = time.monotonic() + TURN_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            return False
    return False


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
