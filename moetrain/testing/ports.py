"""A port to meet at, for processes that are told of it before any of them listens."""

from __future__ import annotations

import random
import socket
from pathlib import Path

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """Free on the loopback, and below the ports that the system gives to whoever asks for any: one of those, free now,
    may be a stranger's by the time that it is used."""
    first = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32768
    below = range(max(1024, first // 2), max(1024, first))
    for port in [*random.SystemRandom().sample(below, len(below)), 0]:  # 0: whatever there is
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise RuntimeError("no port is free")
