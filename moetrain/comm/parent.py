"""Processes that end with the one that started them, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent`, its parent's pid, ends. Linux only, a no-op elsewhere."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_launcher() -> None:
    """`die_with_parent` under torchrun, nothing otherwise.

    torchrun gives its workers sessions of their own, so nothing else ends them when it is killed: they would go on and
    keep writing while the run is started again elsewhere. What was published is whole, so SIGKILL loses no more than
    any crash.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())
