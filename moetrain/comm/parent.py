"""Ranks end with the launcher that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_launcher() -> None:
    """Under torchrun, have the kernel kill this process when its parent ends, however that ends.

    torchrun gives its workers sessions of their own, so nothing else ends them: they would go on and keep writing while
    the run is started again elsewhere. SIGKILL, because whatever a rank does after that is too late; what was published
    is whole. Linux only, a no-op elsewhere and without torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended just before
        os.kill(os.getpid(), signal.SIGKILL)
