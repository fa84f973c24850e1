"""The JSON-lines logs: exact floats, kills, resumes."""

import errno
import json
import math
import os

import numpy as np
import pytest
import torch

from moetrain.observe.metrics import MetricsLog, NullLog, SampleLog, read_rows

pytestmark = pytest.mark.unit


def test_floats_come_back_to_the_bit(tmp_path):
    values = [0.1 + 0.2, 1e-300, math.pi, 1 / 3]
    log = MetricsLog(tmp_path)
    for step, value in enumerate(values):
        log.append({"step": step, "loss": value})
    # Read while the log is still open: each row was flushed.
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == values


def test_tensor_and_numpy_scalars_are_numbers(tmp_path):
    single = torch.tensor(0.1, dtype=torch.float32)
    MetricsLog(tmp_path).append({"step": 1, "loss": single, "grad_norm": np.float32(0.1), "dead": torch.tensor(3)})
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row == {"step": 1, "loss": single.item(), "grad_norm": single.item(), "dead": 3}


def test_non_finite_values_are_null_and_named(tmp_path):
    MetricsLog(tmp_path).append({"step": 1, "loss": float("nan"), "grad_norm": float("-inf"), "lr": 0.5, "mfu": None})
    text = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 0.5,
        "mfu": None,
        "nonfinite": {"loss": "nan", "grad_norm": "-inf"},
    }


def test_resume_drops_later_rows_and_later_events_and_appends(tmp_path):
    log = MetricsLog(tmp_path)
    log.append({"step": 0, "val_loss": 5.5})
    for step in range(1, 7):
        log.append({"step": step, "loss": float(step)})
    log.resume(5)
    log.append({"step": 6, "loss": 60.0})
    log.close()
    again = MetricsLog(tmp_path)
    again.resume(3)
    again.append({"step": 4, "loss": 40.0})
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 0, "val_loss": 5.5},
        *({"step": step, "loss": float(step)} for step in (1, 2, 3)),
        {"event": "resume", "step": 3},
        {"step": 4, "loss": 40.0},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_half_written_last_line_is_cut_and_a_whole_one_kept(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_rows(file) == [{"step": 1, "loss": 2.0}]
    log = MetricsLog(tmp_path)
    log.append({"step": 2, "loss": 1.0})
    log.close()
    assert read_rows(file) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    file.write_text('{"step": 1, "loss": 2.0}')
    MetricsLog(tmp_path).append({"step": 2, "loss": 1.0})
    assert [row["step"] for row in read_rows(file)] == [1, 2]


def test_damage_inside_the_file_is_refused_by_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not JSON"):
        read_rows(file)
    file.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not an object"):
        read_rows(file)


def test_clear_forgets_an_earlier_attempt(tmp_path):
    log = MetricsLog(tmp_path)
    log.append({"step": 9, "loss": 1.0})
    log.clear()
    log.append({"step": 0, "val_loss": 5.0})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 0, "val_loss": 5.0}]


def test_sample_log_keeps_one_shape_through_a_resume(tmp_path):
    log = SampleLog(tmp_path)
    for step in (1, 2, 3):
        for dp in (0, 1):
            log.append(step, dp, torch.tensor([10 * step + dp]).tolist())
    log.resume(2)
    log.append(3, 0, [7])
    rows = read_rows(tmp_path / "samples.jsonl")
    assert [(row["step"], row["dp"]) for row in rows] == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    assert rows[-1] == {"step": 3, "dp": 0, "ids": [7]}


def test_null_log_takes_every_call():
    log = NullLog()
    log.append({"step": 1})
    log.append(1, 0, [2])
    log.resume(1)
    log.clear()
    log.close()


def test_a_row_needs_a_step(tmp_path):
    with pytest.raises(AssertionError, match="integer step"):
        MetricsLog(tmp_path).append({"loss": 1.0})


def test_rows_wait_for_room_on_a_full_disk_whole_and_in_order(tmp_path, monkeypatch, capsys):
    log = MetricsLog(tmp_path)
    log.append({"step": 1})
    real, room = os.write, [5, 0, 0]  # a few bytes fit, then none, then the disk is as it was

    def full(handle, data):
        if handle != log._file.fileno() or not room:
            return real(handle, data)
        fits = room.pop(0)
        if not fits:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[:fits])

    monkeypatch.setattr(os, "write", full)
    log.append({"step": 2})
    assert [row["step"] for row in read_rows(log.path)] == [1]
    assert log.path.read_text().endswith("}\n")
    log.append({"step": 3})
    log.append({"step": 4})
    assert [row["step"] for row in read_rows(log.path)] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("No space left") == 1
    log.close()
