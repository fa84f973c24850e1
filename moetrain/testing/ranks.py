"""Run a function on several ranks of one machine: the harness of this project's tests, shipped so plugins can use it.

Ranks are forked, not launched: they start in about 0.1 s and need no importable function, so a closure will do. Forking
is only safe while this process has started neither CUDA nor an OpenMP thread pool; `tests/conftest.py` pins both. With
backend "nccl" ranks are spawned instead, and the function must be importable.
"""

from __future__ import annotations

import faulthandler
import io
import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


class RankFailure(RuntimeError):
    """A rank raised, died, or did not finish; the message holds its rank and traceback."""


def run_ranks(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    backend: str = "gloo",
    timeout_s: float = 180.0,
    first_device: int = 0,
    **kwargs: Any,
) -> list[Any]:
    """Call `fn(*args, **kwargs)` on `world` ranks with torch.distributed initialised; return the results by rank.

    Results travel through torch.save, so tensors are fine. Raises RankFailure for the first rank that fails (not for a
    peer that fails because the first one is gone); the others are killed, so a collective that waits for the failed one
    does not hang the test. With nccl, rank 0 has the GPU `first_device`, and the next ranks the next ones.
    """
    context: Any = mp.get_context("fork" if backend == "gloo" else "spawn")
    with tempfile.TemporaryDirectory() as directory:
        store = os.path.join(directory, "store")
        ranks, pipes = [], {}
        for rank in range(world):
            receive, send = context.Pipe(duplex=False)
            where = (rank, world, backend, store, timeout_s, first_device + rank)
            process = context.Process(target=_rank_main, args=(send, where, fn, args, kwargs), daemon=True)
            process.start()
            send.close()
            ranks.append(process)
            pipes[receive] = rank
        try:
            return _collect(pipes, world, timeout_s)
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()


def _collect(pipes: dict[Any, int], world: int, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s + 10  # each rank first dumps its own stacks at timeout_s
    while pipes:
        ready: list[Any] = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailure(f"ranks {sorted(pipes.values())} of {world} did not finish in {timeout_s} s")
        # On a busy machine we may wake up late, when a peer has failed in its turn. The first one ended before that, so
        # a second look has its word too; who died without one, or failed earliest, is to blame.
        failures: list[tuple[float, str]] = []
        for pipe in [*ready, *(pipe for pipe in wait(list(pipes), timeout=0) if pipe not in ready)]:
            rank = pipes.pop(pipe)
            try:
                failed_at, payload = pipe.recv()
            except EOFError:
                failures.append((0.0, f"rank {rank} of {world} died without a word"))
                continue
            if failed_at is not None:
                failures.append((failed_at, f"rank {rank} of {world} failed:\n{payload}"))
                continue
            results[rank] = torch.load(io.BytesIO(payload), weights_only=False)  # written by our own child
        if failures:
            raise RankFailure(min(failures)[1])
    return [results[rank] for rank in range(world)]


def _rank_main(
    send: Connection, where: tuple[int, int, str, str, float, int], fn: Callable, args: tuple, kwargs: dict
) -> None:
    rank, world, backend, store, timeout_s, device = where
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=sys.__stderr__ or sys.stderr)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        if backend == "nccl":
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
        )
        result = fn(*args, **kwargs)
        buffer = io.BytesIO()
        torch.save(result, buffer)
        dist.barrier()  # nobody leaves while a peer may still need its connections
        send.send((None, buffer.getvalue()))
    except BaseException:
        send.send((time.monotonic(), traceback.format_exc()))  # one clock for all processes of a machine
    finally:
        send.close()
        os._exit(0)  # no atexit handlers of the parent, no NCCL teardown to wait for
