"""`report RUN` on complete, partial, and wrong directories."""

import json

import pytest

from moetrain.observe.report import report

pytestmark = pytest.mark.unit

CONFIG = """
run: {name: a, seed: 7}
train: {global_batch: 16, seq_len: 256, precision: bf16}
parallel: {pp: 1, tp: 1, ep: 4, recompute: none}
model: {name: tiny, n_layers: 4, d_model: 128, moe: {n_experts: 8, top_k: 2}}
hub: {token: "${oc.env:NOT_SET}"}
"""


def write_rows(run_dir, rows):
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_complete_run(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    rows = [{"step": 0, "val_loss": 5.5}]
    for step in range(1, 41):
        load = {"moe/0/load_max_over_mean": 1.5, "moe/2/load_max_over_mean": 9.0 if step < 30 else 2.0}
        load |= {
            "moe/2/load_cv": 0.25,
            "moe/2/dead_experts": 1,
            "moe/2/dropped_share": 0.05,
            "rank_load_max_over_mean": 1.25,
        }
        rows.append({"step": step, "loss": abs(30 - step) + 1.0, "tokens_per_s": 100.0 * step, "mfu": None, **load})
    rows.insert(21, {"event": "resume", "step": 20})
    rows[-1]["val_loss"] = 2.25
    write_rows(tmp_path, rows)
    for name in ("step_99999980", "step_100000040", "step_00000060.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    lines = dict(line.split("  ", 1) for line in report(tmp_path).splitlines())
    lines = {label.strip(): text.strip() for label, text in lines.items()}
    assert lines["model"] == "tiny: 4 layers, d_model 128, 8 experts top-2"
    assert lines["layout"] == "ep=4"
    assert lines["training"] == "batch 16 x 256, bf16, seed 7"
    assert lines["steps"] == "0 to 40"
    assert lines["loss"] == "first 30.0000, last 11.0000, best 1.0000 at step 30"
    assert lines["val loss"] == "0: 5.5000  40: 2.2500"
    assert lines["best val"] == "2.2500 at step 40"
    assert lines["tokens/s"] == "2,050 (median)"
    assert "mfu" not in lines
    assert lines["worst load"] == (
        "layer 2: max/mean 2.00, cv 0.25, dead experts 1, dropped 5.00%, fullest rank 1.25 (median of the last 4 steps)"
    )
    assert lines["resumes"] == "1, at step 20"
    assert lines["checkpoints"] == "2, newest step_100000040"


def test_missing_pieces_are_named(tmp_path):
    write_rows(tmp_path, [{"step": 1, "loss": None, "nonfinite": {"loss": "nan"}}])
    text = report(tmp_path)
    assert "config.yaml is missing" in text
    assert "1 steps, first 1" in text
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "config.yaml").write_text("run: {name: a}")
    assert "no step is recorded yet" in report(tmp_path)


def test_a_long_validation_curve_is_thinned(tmp_path):
    write_rows(tmp_path, [{"step": step, "val_loss": 1.0 + step} for step in range(0, 1001, 10)])
    line = next(line for line in report(tmp_path).splitlines() if line.startswith("val loss"))
    assert line.count(":") == 8
    assert " 0: 1.0000" in line
    assert line.endswith("1000: 1001.0000")


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a directory"):
        report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"neither config\.yaml nor metrics\.jsonl"):
        report(tmp_path)
    (tmp_path / "quickstart").mkdir()
    write_rows(tmp_path / "quickstart", [{"step": 1}])
    with pytest.raises(ValueError, match="it holds the runs quickstart"):
        report(tmp_path)
