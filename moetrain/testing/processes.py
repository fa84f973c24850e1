"""Processes of one start of a run, to be killed together."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field

import psutil


@dataclass
class Launch:
    """Processes of one start of the run. pids: all that were seen; the launcher's first, if there is one."""

    pids: list[int]
    agent: subprocess.Popen | None = None
    codes: dict[int, int] = field(default_factory=dict)

    def alive(self) -> bool:
        if self.agent is not None:
            return self.agent.poll() is None
        for pid in set(self.pids) - self.codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def failed(self) -> bool:
        """Whether it ended, and not well."""
        if self.alive():
            return False
        return any(self.codes.values()) if self.agent is None else self.agent.returncode != 0

    def kill(self) -> int:
        """SIGKILL to every process; returns how many there were. Workers of torchrun survive their agent otherwise."""
        if self.agent is not None and self.agent.poll() is None:
            self.agent.send_signal(signal.SIGSTOP)  # so that it starts nobody while we look
            self.pids += [child.pid for child in psutil.Process(self.agent.pid).children(recursive=True)]
        victims = [pid for pid in self.pids if pid not in self.codes]
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        if self.agent is not None:
            self.agent.wait()
        while (self.agent is None and self.alive()) or any(map(_lives, victims)):
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {victims} survive SIGKILL")
            time.sleep(0.005)
        return len(victims)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
