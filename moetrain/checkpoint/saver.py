"""When and by whom a checkpoint is written: now, or by a thread beside the run.

A save that fails for want of space, or any other trouble with files, is told and does not end the run: the next one is
due anyway, and the published steps are untouched. Whether a save succeeded is the same on every rank.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.checkpoint.agree import rank_and_world
from moetrain.checkpoint.snapshot import Snapshot
from moetrain.checkpoint.store import CheckpointStore
from moetrain.checkpoint.tensors import model_tensors, optimizer_tensors
from moetrain.config.schema import CheckpointConfig


@dataclass(frozen=True)
class Outcome:
    """What came of the save of `step`: published in `path` after `seconds`, or `error` says why not."""

    step: int
    path: Path | None
    error: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.path is not None:
            took = f" ({self.seconds:.0f} s)" if self.seconds >= 1 else ""
            return f"checkpoint of step {self.step} in {self.path.parent}{took}"
        return f"checkpoint of step {self.step} was NOT saved: {self.error}"


class Saver:
    """Publishes checkpoints through `store`, as `options` (asynchronous, when_busy) say. Collective, on every rank.

    newest: the last step that this saver published, -1 before. With asynchronous saves it owns a gloo group over all
    ranks, because the writer's collectives must not mix with the run's.
    """

    def __init__(self, store: CheckpointStore, options: CheckpointConfig, device: torch.device) -> None:
        self.store, self.options, self.device = store, options, device
        self.newest = -1
        self._outcomes: list[Outcome] = []
        self._exposed_s = 0.0
        self._thread: threading.Thread | None = None
        self._group: dist.ProcessGroup | None = None
        self._snapshot: Snapshot | None = None
        if options.asynchronous:
            self._group = dist.new_group(backend="gloo") if rank_and_world()[1] > 1 else None
            self._snapshot = Snapshot(device)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take host memory now rather than in the first save."""
        if self._snapshot and self.options.every:
            self._snapshot.prepare(_tensors(model, optimizer))

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        trainer_state: dict[str, Any],
        layout: dict[str, Any],
        config: dict[str, Any],
    ) -> None:
        """Save as `CheckpointStore.save` does, or begin to. `finished` says what came of it.

        Raises ValueError on every rank for state that a checkpoint cannot hold.
        """
        begin = time.perf_counter()
        records = (trainer_state, layout, config)
        if self._snapshot is None:
            self._attempt(step, lambda: self.store.save(step, model, optimizer, *records))
        elif self.options.when_busy == "skip" and self._busy_anywhere():
            self._outcomes.append(Outcome(step, None, "the save before it is not finished (checkpoint.when_busy=skip)"))
        else:
            self._join()
            self._snapshot.take(_tensors(model, optimizer))
            copies = copy.deepcopy(records)  # as the tensors: what changes later must not be in it
            self._thread = threading.Thread(target=self._write, args=(step, *copies), name="checkpoint", daemon=True)
            self._thread.start()
        self._exposed_s += time.perf_counter() - begin

    def before_update(self) -> None:
        """Call before anything of the model or the optimizer changes: nothing later may leak into a snapshot."""
        if self._snapshot:
            self._snapshot.hold_updates()

    def finished(self) -> list[Outcome]:
        """What came of saves since the last call. Ranks may see it at different steps."""
        found, self._outcomes = self._outcomes, []
        return found

    def exposed_s(self) -> float:
        """Seconds in which the run waited for checkpoints since the last call, on this rank's clock and device."""
        stall = self._snapshot.stall_s() if self._snapshot else 0.0
        seconds, self._exposed_s = self._exposed_s + stall, 0.0
        return seconds

    def wait(self) -> int:
        """Wait for the save in flight, if any; returns `newest`."""
        begin = time.perf_counter()
        self._join()
        self._exposed_s += time.perf_counter() - begin
        return self.newest

    def close(self, timeout_s: float = 60.0) -> None:
        """Wait for the save in flight, but not for ever: after a failure other ranks may be gone."""
        if self._thread:
            self._thread.join(timeout_s)
        if self._snapshot and not (self._thread and self._thread.is_alive()):
            self._snapshot.close()

    def _join(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None

    def _busy_anywhere(self) -> bool:
        """Ranks finish at different moments, and all must skip or none."""
        busy = torch.tensor(int(self._thread is not None and self._thread.is_alive()))
        if rank_and_world()[1] > 1:
            dist.all_reduce(busy, op=dist.ReduceOp.MAX)
        return bool(busy)

    def _write(self, step: int, trainer_state: dict, layout: dict, config: dict) -> None:
        assert self._snapshot is not None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a thread starts with device 0
        snapshot = self._snapshot

        def publish() -> Path:
            snapshot.wait()
            return self.store.save_snapshot(step, snapshot, trainer_state, layout, config, self._group)

        self._attempt(step, publish)

    def _attempt(self, step: int, publish: Callable[[], Path]) -> None:
        begin = time.perf_counter()
        try:
            path = publish()
        except Exception as error:
            if isinstance(error, ValueError) and self._snapshot is None:
                raise
            outcome = Outcome(step, None, f"{type(error).__name__}: {error}")
        else:
            self.newest = step
            outcome = Outcome(step, path, seconds=time.perf_counter() - begin)
        self._outcomes.append(outcome)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    return {"model": model_tensors(model), "optim": optimizer_tensors(model, optimizer)}
