"""What a table of measurements has to say about where it was made."""

from __future__ import annotations

import os
import platform

import torch


def describe_machine() -> str:
    """CPU, GPUs, and versions in one line."""
    parts = [f"{os.cpu_count()} cores ({_cpu()})"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
        parts.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    return ", ".join([*parts, f"Python {platform.python_version()}", f"torch {torch.__version__}"])


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.machine()
