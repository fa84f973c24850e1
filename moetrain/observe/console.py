"""What the user sees while a run goes on: a live view on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import IO, Any, Protocol

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]

_BARS = "▁▂▃▄▅▆▇█"


class Console(Protocol):
    """Rank 0's view of a run; `make_console` picks one, other ranks use `NullConsole`."""

    def start(self, summary: Mapping[str, Any]) -> None:
        """Show label -> value before the first step (model, layout, data, devices, ...)."""

    def step(self, row: Row) -> None:
        """Show one row of metrics.jsonl."""

    def note(self, text: str) -> None:
        """Say something that happened: a checkpoint, a stop request."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End the view and show label -> value: `closing_summary`."""

    def close(self) -> None:
        """Give the terminal back, also after an error; safe to call again."""


def make_console(steps: int, log_every: int = 10, stream: IO[str] | None = None) -> Console:
    """A live view when the stream (standard output by default) is a terminal, plain lines otherwise.

    steps: the run's last step. log_every: steps between plain lines.
    """
    rich = RichConsole(file=stream or sys.stdout, markup=False, highlight=False, emoji=False)
    return LiveConsole(rich, steps) if rich.is_terminal else PlainConsole(rich.file, steps, log_every)


def closing_summary(run_dir: str, resume_command: str, row: Row) -> dict[str, str]:
    """What `finish` shows: the last numbers, where the run is, how to resume it, how to look at it."""
    numbers = [f"{key} {row[key]:.4f}" for key in ("loss", "val_loss") if row.get(key) is not None]
    return {
        "done": f"step {row.get('step', 0)}" + "".join(f", {number}" for number in numbers),
        "run": run_dir,
        "resume": resume_command,
        "look": f"python -m moetrain report {run_dir}",
        "sample": f"python -m moetrain generate checkpoint={run_dir} prompt=...",
    }


class NullConsole:
    """Says nothing: ranks other than 0."""

    def start(self, summary: Mapping[str, Any]) -> None: ...

    def step(self, row: Row) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class PlainConsole:
    """One line per log_every steps, flushed, for log files and CI. Evaluations and the last step always get a line."""

    def __init__(self, stream: IO[str], steps: int, log_every: int) -> None:
        self._stream = stream
        self._steps = steps
        self._log_every = max(1, log_every)

    def start(self, summary: Mapping[str, Any]) -> None:
        self._print_table(summary)

    def step(self, row: Row) -> None:
        step = row["step"]
        if step == 1 or step % self._log_every == 0 or step == self._steps or row.get("val_loss") is not None:
            self.note(f"step {step}/{self._steps}  {format_row(row)}")

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._print_table(summary)

    def close(self) -> None: ...

    def _print_table(self, summary: Mapping[str, Any]) -> None:
        width = max(map(len, summary), default=0)
        for label, value in summary.items():
            self.note(f"{label:<{width}}  {value}")


class LiveConsole:
    """Progress, the newest numbers, and each layer's expert load, redrawn in place; evaluations scroll by above."""

    def __init__(self, rich: RichConsole, steps: int) -> None:
        self._rich = rich
        self._steps = steps
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("left"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=rich)
        self._task: TaskID | None = None
        self._live = Live(self._progress, console=rich, refresh_per_second=4)
        self._val_loss: float | None = None

    def start(self, summary: Mapping[str, Any]) -> None:
        self._print_table(summary)
        self._live.start()

    def step(self, row: Row) -> None:
        if self._task is None:  # here, so that a resumed run's estimate counts from where it resumed
            self._task = self._progress.add_task("step", total=self._steps, completed=row["step"])
        self._progress.update(self._task, completed=row["step"])
        if row.get("val_loss") is not None:
            self._val_loss = row["val_loss"]
            self.note(f"step {row['step']}  {format_row(row)}")
        shown = row if self._val_loss is None else {**row, "val_loss": self._val_loss}
        self._live.update(Group(self._progress, Text(format_row(shown)), Text(format_load(row))))

    def note(self, text: str) -> None:
        self._rich.print(Text(text))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.close()
        self._print_table(summary)

    def close(self) -> None:
        self._live.stop()

    def _print_table(self, summary: Mapping[str, Any]) -> None:
        table = Table.grid(padding=(0, 2))
        for label, value in summary.items():
            table.add_row(Text(label, style="bold"), Text(str(value)))
        self._rich.print(table)


def format_row(row: Row) -> str:
    """The row's main numbers on one line; missing ones are left out."""
    shown = (
        ("loss", "loss {:.4f}"),
        ("val_loss", "val {:.4f}"),
        ("grad_norm", "grad {:.3g}"),
        ("lr", "lr {:.3g}"),
        ("tokens_per_s", "{:,.0f} tok/s"),
        ("mfu", "mfu {:.1%}"),
        ("peak_memory_gb", "mem {:.1f} GB"),
    )
    parts = [form.format(row[key]) for key, form in shown if row.get(key) is not None]
    load = _layer_values(row, "load_max_over_mean")
    if load:
        layer = max(load, key=lambda name: load[name])
        parts.append(f"load {load[layer]:.2f}x in layer {layer}")
    if row.get("rank_load_max_over_mean") is not None:
        parts.append(f"ranks {row['rank_load_max_over_mean']:.2f}x")
    return "  ".join(parts)


def format_load(row: Row) -> str:
    """Each MoE layer's fullest expert over the mean, as a sparkline from 1x (balanced) to the worst layer."""
    load = _layer_values(row, "load_max_over_mean")
    if not load:
        return ""
    span = max(max(load.values()) - 1.0, 1.0)  # a scale of at least one mean, so that noise does not look like peaks
    bars = "".join(_BARS[round(min(max((value - 1.0) / span, 0.0), 1.0) * 7)] for value in load.values())
    dead = sum(_layer_values(row, "dead_experts").values())
    dropped = max(_layer_values(row, "dropped_share").values(), default=0.0)
    span_text = f"{min(load.values()):.2f}x-{max(load.values()):.2f}x"
    return f"experts' load by layer {bars} {span_text}  dead {dead:.0f}  dropped {dropped:.1%}"


def _layer_values(row: Row, name: str) -> dict[str, float]:
    """Layer -> value of `moe/{layer}/{name}`, in the row's order."""
    keys = [key for key in row if key.startswith("moe/") and key.endswith(f"/{name}") and row[key] is not None]
    return {key.split("/")[1]: row[key] for key in keys}
