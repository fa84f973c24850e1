"""Everything a run writes for people: files, console, trackers. Ranks other than 0 write only their sample ids."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from moetrain.config.schema import Config
from moetrain.observe.console import Console, NullConsole, closing_summary, make_console
from moetrain.observe.metrics import MetricsLog, NullLog, Row, SampleLog
from moetrain.observe.secrets import mask_secrets
from moetrain.observe.trackers.build import Trackers, build_trackers


class RunLog:
    """config: the resolved configuration with secrets masked, as stored in config.yaml and sent to trackers."""

    def __init__(self, config: Config, run_dir: Path, writes: bool) -> None:
        self.run_dir, self.writes = run_dir, writes
        resolved = OmegaConf.to_container(OmegaConf.structured(config))
        assert isinstance(resolved, dict)
        self.config: dict[str, Any] = mask_secrets(resolved)  # type: ignore[arg-type]
        self.name = config.run.name
        self.wants_samples = config.run.log_samples
        self.metrics: MetricsLog | NullLog = NullLog()
        self.sample_log: SampleLog | NullLog = NullLog()
        self.console: Console = NullConsole()
        self.trackers = Trackers()
        self.last: Row = {"step": 0}
        if writes:
            self.metrics = MetricsLog(run_dir)
            self.sample_log = SampleLog(run_dir) if self.wants_samples else NullLog()
            self.console = make_console(config.train.steps, config.train.log_every)
            self.trackers = build_trackers(config.tracker)

    def start(self, step: int, summary: dict[str, Any]) -> None:
        """The run begins after `step`: drop rows past it, store the configuration, open the view."""
        self.last = {"step": step}
        for log in (self.metrics, self.sample_log):
            if step:
                log.resume(step)
            else:
                log.clear()
        if self.writes:
            (self.run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(self.config)))
        self.console.start(summary)
        self.trackers.start(self.run_dir, self.name, self.config)

    def row(self, row: Row) -> None:
        """One step's metrics."""
        self.last = {**self.last, **row}
        self.metrics.append(row)
        self.console.step(row)
        self.trackers.log(row, row["step"])

    def samples(self, step: int, dp: int, ids: list[str]) -> None:
        """Record every rank's sample ids of a step, if asked to. Collective then."""
        if not self.wants_samples:
            return
        gathered: list[Any] | None = [None] * dist.get_world_size() if self.writes else None
        dist.gather_object((dp, ids), gathered)
        for rank, rank_ids in sorted(dict(gathered or []).items()):  # ranks of one dp rank read the same
            self.sample_log.append(step, rank, rank_ids)

    def roll_back(self, step: int, why: dict[str, Any]) -> None:
        """The run went back to `step`."""
        for log in (self.metrics, self.sample_log):
            log.roll_back(step, why)

    def note(self, text: str) -> None:
        self.console.note(text)

    def began(self, notes: list[str], skipped: dict[str, list[str]]) -> None:
        """After `start`: say `notes`; say and record the damaged checkpoints that were passed over."""
        for text in notes:
            self.note(text)
        for name, problems in skipped.items():
            self.note(f"{name} is damaged and not used: " + "; ".join(problems))
            if isinstance(self.metrics, MetricsLog):
                self.metrics.event("skipped_checkpoint", self.last["step"], checkpoint=name, problems=problems)

    def finish(self) -> None:
        """The closing summary: where the run is, how to resume it, how to look at it."""
        self.console.finish(closing_summary(shlex.quote(str(self.run_dir)), _this_command(), self.last))

    def close(self) -> None:
        self.console.close()
        self.trackers.finish()
        self.metrics.close()
        self.sample_log.close()


def _this_command() -> str:
    """The command that started this process, as one would type it: running it again resumes the run."""
    ranks, here = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
    arguments = shlex.join(argument for argument in sys.argv[1:] if not argument.startswith("run.resume="))
    if ranks != here:
        return f"the same launch of {ranks} ranks, with {arguments}"
    launcher = f"torchrun --standalone --nproc-per-node {here}" if "LOCAL_RANK" in os.environ else "python"
    return f"{launcher} -m moetrain {arguments}"
