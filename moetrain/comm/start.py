"""Start torch.distributed from torchrun's environment, or as a world of one without it."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def start_distributed(timeout_s: float = 1800.0) -> torch.device:
    """Join the process group and return this rank's device: its own GPU where there is one, else the CPU.

    One process is a world of one, so the same program serves both. GPU worlds get gloo for CPU tensors too, which
    checkpoints use. Raises ValueError when a host has fewer GPUs than ranks.
    """
    # Hardware queues for more streams than CUDA's default of 8: in a shared one, a wait holds up what came after it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    device = _device()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that NCCL remembers, for a hang's report
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout, **_own_store(timeout))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def stop_distributed() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _own_store(timeout: timedelta) -> dict[str, Any]:
    """A store of this attempt's own, after a restart by a single torchrun that lends its agent's store.

    Otherwise ranks would find the addresses that the failed attempt left there (pytorch#135712). Agents of several
    nodes may count their restarts differently; launch/torchrun.sh keeps them from lending.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    lent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1"
    if not lent or attempt == "0":
        return {}
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return {"store": dist.PrefixStore(f"attempt_{attempt}", store), "rank": rank, "world_size": world}


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= here:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "?")
        raise ValueError(
            f"--nproc-per-node={ranks}: this host has {here} GPUs; nearest legal value: {here} "
            "(or CUDA_VISIBLE_DEVICES= to train on the CPU)"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device
