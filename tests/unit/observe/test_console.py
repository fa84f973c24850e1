"""The console in both of its forms, on streams the test reads."""

import io

import pytest
from rich.console import Console as RichConsole

from moetrain.observe.console import (
    LiveConsole,
    NullConsole,
    PlainConsole,
    closing_summary,
    format_load,
    format_row,
    make_console,
)

pytestmark = pytest.mark.unit

ROW = {
    "step": 20,
    "loss": 2.34567,
    "grad_norm": 0.5,
    "lr": 3e-4,
    "tokens_per_s": 12345.6,
    "mfu": None,
    "peak_memory_gb": 0.81,
    "moe/1/load_max_over_mean": 1.0,
    "moe/3/load_max_over_mean": 3.0,
    "moe/1/dead_experts": 1,
    "moe/3/dead_experts": 2,
    "moe/1/dropped_share": 0.0,
    "moe/3/dropped_share": 0.125,
}
CLOSING = closing_summary("runs/a", "scripts/train.sh run.dir=runs/a tracker=[wandb]", {**ROW, "val_loss": 2.25})


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_closing_summary_says_where_how_to_resume_and_how_to_look():
    assert CLOSING["done"] == "step 20, loss 2.3457, val_loss 2.2500"
    assert CLOSING["run"] == "runs/a"
    assert CLOSING["look"] == "python -m moetrain report runs/a"
    assert closing_summary("runs/a", "again", {})["done"] == "step 0"


def test_plain_lines_for_a_file():
    stream = io.StringIO()
    console = make_console(steps=25, log_every=10, stream=stream)
    assert isinstance(console, PlainConsole)
    console.start({"model": "tiny", "data": "stdlib"})
    console.step({"step": 0, "val_loss": 5.5})
    for step in range(1, 26):
        console.step({"step": step, "loss": 5.0, **({"val_loss": 3.0} if step == 13 else {})})
    console.note("checkpoint step_00000025")
    console.finish(CLOSING)
    console.close()
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["model  tiny", "data   stdlib", "step 0/25  val 5.5000"]
    assert [line.split("/")[0] for line in lines if line.startswith("step ")] == [
        f"step {step}" for step in (0, 1, 10, 13, 20, 25)
    ]
    assert "resume  scripts/train.sh run.dir=runs/a tracker=[wandb]" in lines
    assert "\x1b" not in stream.getvalue()


def test_one_row_on_one_line():
    assert format_row(ROW) == ("loss 2.3457  grad 0.5  lr 0.0003  12,346 tok/s  mem 0.8 GB  load 3.00x in layer 3")
    loads = {"moe/1/load_max_over_mean": 2.0, "rank_load_max_over_mean": 1.5}
    assert format_row(loads) == "load 2.00x in layer 1  ranks 1.50x"
    assert format_row({"step": 3, "loss": None}) == ""  # a loss that was not finite


def test_load_sparkline_runs_from_balance_to_the_worst_layer():
    assert format_load(ROW) == "experts' load by layer ▁█ 1.00x-3.00x  dead 3  dropped 12.5%"
    calm = {"moe/0/load_max_over_mean": 1.05, "moe/1/load_max_over_mean": 1.1}
    assert "▁▂" in format_load(calm)  # small differences stay small
    assert format_load({"step": 1}) == ""


def test_live_view_on_a_terminal_ends_cleanly():
    stream = Terminal()
    console = make_console(steps=20, stream=stream)
    assert isinstance(console, LiveConsole)
    console.start({"model": "tiny [dense]"})
    console.step({"step": 0, "val_loss": 5.5})
    console.step(ROW)
    console.note("checkpoint [step_00000020]")
    console.finish(CLOSING)
    console.close()
    text = stream.getvalue()
    for shown in (
        "tiny [dense]",
        "loss 2.3457",
        "20/20",
        "▁█",
        "checkpoint [step_00000020]",
        "tracker=[wandb]",
        "val 5.5",
    ):
        assert shown in text, shown
    assert text.count("\x1b[?25h") >= 1  # the cursor is back


def test_close_gives_the_terminal_back_after_an_error():
    stream = Terminal()
    console = LiveConsole(RichConsole(file=stream, force_terminal=True), steps=5)
    console.close()  # an error before start
    console.start({})
    console.close()
    console.close()
    assert stream.getvalue().endswith("\x1b[?25h")


def test_null_console_takes_every_call():
    console = NullConsole()
    console.start({})
    console.step({"step": 1})
    console.note("x")
    console.finish({})
    console.close()
