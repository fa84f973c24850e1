"""What this machine has, which backends can run on it, and what is missing for each: the verb `doctor`."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F

from moetrain.observe.trackers.wandb import resolve_mode

Lines = list[tuple[str, str]]


def diagnose() -> str:
    """A report of some thirty lines. It starts no ranks, writes nothing, and no probe that fails ends it."""
    sections: dict[str, Lines] = {
        "software": [
            ("python", f"{platform.python_version()} on {platform.platform()}"),
            ("torch", _try(lambda: f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")),
            ("nccl", _try(_nccl)),
            ("triton", _try(lambda: _version("triton"))),
            ("moetrain", _try(lambda: _version("moetrain"))),
            ("moetrain_kernels", _try(_kernels)),
            ("wandb runs", _try(lambda: resolve_mode("auto"))),
        ],
        "devices": _devices(),
        "host": [
            ("cores", _try(_cores)),
            ("memory", _try(_memory)),
            ("/dev/shm", _try(_shared_memory)),
            ("disk here", _try(lambda: _disk(Path.cwd()))),
            ("open files", _try(lambda: _limit(resource.RLIMIT_NOFILE))),
            ("locked memory", _try(lambda: _limit(resource.RLIMIT_MEMLOCK))),
        ],
        "backends": [(name, _try(partial(_verdict, check))) for name, check in _BACKENDS],
    }
    width = max(len(label) for lines in sections.values() for label, _ in lines)
    blocks = []
    for title, lines in sections.items():
        blocks.append("\n".join([title, *(f"  {label:<{width}}  {text}" for label, text in lines)]))
    return "\n\n".join(blocks)


def _try(probe: Callable[[], str]) -> str:
    try:
        return probe()
    except Exception as error:
        return f"could not tell ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _kernels() -> str:
    try:
        import_module("moetrain_kernels")
    except ImportError as error:
        return f"cannot be imported: {error}"
    return "importable"


def _nccl() -> str:
    if not dist.is_available() or not dist.is_nccl_available():
        return "not in this build of torch"
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _devices() -> Lines:
    if not torch.cuda.is_available():
        return [("GPU", _no_gpu())]
    lines = []
    for i in range(torch.cuda.device_count()):
        lines.append((f"GPU {i}", _try(partial(_gpu, i))))
    if torch.cuda.device_count() > 1:
        lines.append(("peer access", _try(lambda: _peers(peer_access()))))
    return lines


def _no_gpu() -> str:
    driver = shutil.which("nvidia-smi") is not None
    if torch.version.cuda is None and torch.version.hip is None:
        return "none usable: this torch is a CPU build" + (", yet nvidia-smi is here" if driver else "")
    if driver:
        return (
            "none usable, though nvidia-smi is here: check its CUDA version against torch's, and CUDA_VISIBLE_DEVICES"
        )
    return "none: no NVIDIA driver found"


def _gpu(index: int) -> str:
    device = torch.cuda.get_device_properties(index)
    return f"{device.name}, {device.total_memory / 1e9:.0f} GB, capability {device.major}.{device.minor}"


def peer_access() -> list[list[bool]]:
    """Whether GPU i (row) can read GPU j's (column) memory directly; a GPU can read its own."""
    count = range(torch.cuda.device_count())
    return [[i == j or torch.cuda.can_device_access_peer(i, j) for j in count] for i in count]


def _peers(matrix: list[list[bool]]) -> str:
    if all(map(all, matrix)):
        return "every pair"
    return "; ".join(f"{i}: " + "".join("+" if seen else "-" for seen in row) for i, row in enumerate(matrix))


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} usable of {os.cpu_count()}"


def _memory() -> str:
    memory = psutil.virtual_memory()
    return f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB"


def _disk(path: Path) -> str:
    if not path.exists():
        return "does not exist"
    usage = shutil.disk_usage(path)
    return f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f} GB"


def _shared_memory() -> str:
    path = Path("/dev/shm")
    small = path.exists() and shutil.disk_usage(path).total < 1e9
    return _disk(path) + (": too small for NCCL and loaders; start the container with --ipc=host" if small else "")


def _limit(kind: int) -> str:
    soft, hard = (
        "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}" for limit in resource.getrlimit(kind)
    )
    return f"{soft} (can be raised to {hard})" if soft != hard else soft


# Each check returns what is missing; an empty list is "ready".


def _verdict(check: Callable[[], list[str]]) -> str:
    missing = check()
    return "missing: " + "; ".join(missing) if missing else "ready"


def _module(name: str) -> list[str]:
    return [] if find_spec(name) is not None else [f"{name} (not in this version)"]


def _package(name: str, install: str) -> list[str]:
    return [] if find_spec(name) is not None else [f"package {name} ({install})"]


def _cuda(count: int = 1) -> list[str]:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [] if found >= count else [f"{count} CUDA GPU{'s' if count > 1 else ''} (found {found})"]


def _grouped_mm() -> list[str]:
    """One tiny call says more than a table of versions and capabilities."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not hasattr(F, "grouped_mm"):
        return [f"torch.nn.functional.grouped_mm (torch {torch.__version__} is too old)"]
    x_TD = torch.zeros(8, 16, dtype=torch.bfloat16, device=device)
    w_EDF = torch.zeros(2, 16, 16, dtype=torch.bfloat16, device=device)
    try:
        F.grouped_mm(x_TD, w_EDF, offs=torch.tensor([4, 8], dtype=torch.int32, device=device))
    except (RuntimeError, NotImplementedError) as error:
        return [f"grouped_mm on {device} ({str(error).splitlines()[0]})"]
    return _module("moetrain.moe.experts.grouped_mm")


def _collective() -> list[str]:
    if not dist.is_available():
        return ["torch.distributed (not in this build of torch)"]
    nccl = torch.cuda.is_available()
    ready = dist.is_nccl_available() if nccl else dist.is_gloo_available()
    return [] if ready else [f"{'NCCL' if nccl else 'gloo'} (not in this build of torch)"]


def _copy_engine() -> list[str]:
    missing = _module("moetrain.moe.dispatch.copy_engine") + _cuda(2)
    missing += _module("torch.distributed._symmetric_memory")
    if not _cuda(2) and not all(map(all, peer_access())):
        missing.append("peer access between every pair of GPUs")
    return missing


_KERNELS = "moetrain_kernels"
_BACKENDS: tuple[tuple[str, Callable[[], list[str]]], ...] = (
    ("attention sdpa", lambda: [] if hasattr(F, "scaled_dot_product_attention") else ["torch's SDPA"]),
    ("attention flex", lambda: _module("torch.nn.attention.flex_attention") + _cuda()),
    ("experts=reference", lambda: _module("moetrain.moe.experts.reference")),
    ("experts=grouped_mm", _grouped_mm),
    (
        "experts=triton",
        lambda: _module("moetrain.moe.experts.triton") + _module(_KERNELS) + _package("triton", "Linux only") + _cuda(),
    ),
    ("dispatch=local", lambda: _module("moetrain.moe.dispatch.local")),
    ("dispatch=collective", lambda: _module("moetrain.moe.dispatch.collective") + _collective()),
    ("dispatch=allgather", lambda: _module("moetrain.moe.dispatch.allgather") + _collective()),
    ("dispatch=copy_engine", _copy_engine),
    ("dispatch=two_level", lambda: _module("moetrain.moe.dispatch.two_level") + _collective()),
    (
        "dispatch=deepep",
        lambda: _module("moetrain.moe.dispatch.deepep") + _package("deep_ep", "built from DeepEP's source") + _cuda(2),
    ),
    ("tracker=wandb", lambda: _package("wandb", "pip install 'moetrain[wandb]'")),
    ("tracker=tensorboard", lambda: _package("tensorboard", "pip install 'moetrain[tensorboard]'")),
)
