"""`moetrain checkpoint ...`: what it says, what it deletes, and its exit codes."""

from __future__ import annotations

import os
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moetrain.checkpoint import manifest, tools
from moetrain.checkpoint.hf.files import INDEX, Source
from moetrain.checkpoint.lock import RunLock
from moetrain.checkpoint.store import CheckpointStore
from moetrain.cli import main
from moetrain.optim import adamw

pytestmark = pytest.mark.unit
LOSSES = {10: 3.0, 20: 1.0, 30: 2.0, 40: None}


def _save(run, step, seed=0, change=0.0, state=None, config=None):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4)).double()
    optimizer = adamw.build(model.named_parameters(), lr=0.1)
    with torch.no_grad():
        model[1].weight[2, 1] += change
    state = state or {"step": step, "val_loss": LOSSES.get(step), "data": {"samples": 8}}
    config = config or {"checkpoint": {"keep": 1, "keep_best": 1}}
    return CheckpointStore(run).save(step, model, optimizer, state, {"world": 4, "ep": 4, "tp": 1}, config), model


def _run_of(tmp_path):
    for step in LOSSES:
        _save(tmp_path, step)
    return tmp_path


def _tool(*words):
    said = []
    code = tools.run([str(word) for word in words], said.append)
    return code, "\n".join(said)


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_ls_shows_each_step_and_its_state(tmp_path):
    run = _run_of(tmp_path)
    CheckpointStore(run).set_aside_newer(30)
    code, text = _tool("ls", run)
    assert code == 0
    lines = text.splitlines()
    assert len(lines) == 5
    assert re.match(r"step_00000020  \d{4}-\d\d-\d\d \d\d:\d\d  [\d.]+ kB +1.0000 +4 ranks ep=4  complete", lines[2])
    assert "step_00000040.superseded-" in lines[4]
    (run / "checkpoints" / "step_00000010" / "trainer.json").unlink()
    code, text = _tool("ls", run)
    assert code == 1
    assert "trainer.json is missing" in text.splitlines()[1]


def test_verify_hashes_all_and_reads_the_indices(tmp_path):
    run = _run_of(tmp_path)
    assert _tool("verify", run)[0] == 0
    step = run / "checkpoints" / "step_00000020"
    _flip(step / "optim" / "__0_0.distcp")
    code, text = _tool("verify", run)
    assert code == 1
    assert text.count("intact") == 3
    assert f"- {step}/optim/__0_0.distcp is damaged" in text
    assert _tool("verify", step)[0] == 1
    assert _tool("verify", step.with_name("step_00000010"))[0] == 0
    forged = step.with_name("step_00000030")
    (forged / "model" / ".metadata").write_bytes(b"cos\nsystem\n(S'touch sprung'\ntR.")
    held = {k: v for k, v in manifest.read(forged).items() if k != "sha256"}
    held["files"]["model/.metadata"] = manifest.digest(forged / "model" / ".metadata")
    manifest.write_json(forged / "manifest.json", {**held, "sha256": manifest._self_digest(held)})
    code, text = _tool("verify", forged)
    assert code == 1
    assert "it would load os.system" in text


def test_diff_names_what_differs_and_by_how_much(tmp_path):
    a, _ = _save(tmp_path / "a", 10)
    same, _ = _save(tmp_path / "same", 10)
    assert _tool("diff", a, same) == (0, "equal: 12 tensors, trainer.json")
    b, model = _save(tmp_path / "b", 10, change=0.25, state={"step": 10, "val_loss": 3.0, "data": {"samples": 9}})
    code, text = _tool("diff", tmp_path / "a", b)
    assert code == 1
    lines = text.splitlines()
    value = float(model[1].weight[2, 1].detach().abs())
    relative = 0.25 / max(value, abs(float(model[1].weight[2, 1].detach()) - 0.25))
    assert lines[0] == f"model/1.weight: 1 of 12 elements, max abs 0.25, max rel {relative:.3g}"
    assert lines[1] == "trainer.json data.samples: 8 in the first, 9 in the second"
    assert lines[2].startswith("2 differences between")


def test_diff_of_other_names_shapes_dtypes_and_nan(tmp_path):
    def save(run, model):
        optimizer = torch.optim.SGD(model.parameters())
        return CheckpointStore(run).save(1, model, optimizer, {}, {})

    one = nn.ParameterDict({n: nn.Parameter(torch.ones(3)) for n in ("a", "b", "c", "nan", "same_nan")})
    two = nn.ParameterDict({n: nn.Parameter(torch.ones(3)) for n in ("a", "b", "d", "nan", "same_nan")})
    with torch.no_grad():
        two["nan"][0] = one["same_nan"][1] = two["same_nan"][1] = torch.nan
    two["a"] = nn.Parameter(torch.ones(2))
    two["b"] = nn.Parameter(torch.ones(3).double())
    code, text = _tool("diff", save(tmp_path / "one", one), save(tmp_path / "two", two))
    assert code == 1
    assert text.splitlines()[:-1] == [
        "model/a: shape (3,) in the first, (2,) in the second",
        "model/b: torch.float32 in the first, torch.float64 in the second",
        "model/c: only in the first",
        "model/d: only in the second",
        "model/nan: 1 of 3 elements, max abs inf, max rel inf",
    ]


def test_prune_keeps_what_retention_keeps(tmp_path):
    run = _run_of(tmp_path)
    folder = run / "checkpoints"
    before = sorted(p.name for p in folder.iterdir())
    code, text = _tool("prune", run, "dry_run=true")
    assert code == 0
    assert text.count("would delete") == 2
    assert sorted(p.name for p in folder.iterdir()) == before
    assert _tool("prune", run)[0] == 0  # the run's own policy: the newest and the best
    assert [p.name for p in CheckpointStore(run).steps()] == ["step_00000020", "step_00000040"]
    (moved,) = CheckpointStore(run).set_aside_newer(20)
    (folder / ".step_00000050.tmp-0a").mkdir()
    assert _tool("prune", run, "keep=1", "keep_best=0", "superseded=true")[0] == 0
    assert [p.name for p in folder.iterdir()] == ["step_00000020"]
    assert moved
    assert not (run / "run.lock").exists()


def test_prune_never_deletes_the_newest_intact_step(tmp_path):
    run = _run_of(tmp_path)
    folder = run / "checkpoints"
    for step in (30, 40):  # both by bits that only hashes show
        _flip(folder / f"step_{step:08d}" / "model" / "__0_0.distcp")
    _tool("prune", run, "keep=1", "keep_best=0")
    left = [p.name for p in CheckpointStore(run).steps()]
    assert left == ["step_00000020", "step_00000030", "step_00000040"]  # damaged ones stay, for a human
    os.truncate(folder / "step_00000020" / "trainer.json", 1)
    with pytest.raises(ValueError, match="no intact checkpoint: nothing is deleted"):
        _tool("prune", run, "keep=1")


def test_prune_waits_for_no_living_run(tmp_path):
    run = _run_of(tmp_path)
    with RunLock(run), pytest.raises(ValueError, match=f"in use by pid {os.getpid()}"):
        _tool("prune", run)


def test_safetensors_are_the_weights_and_nothing_else(tmp_path, monkeypatch):
    _, model = _save(tmp_path / "run", 10)
    assert _tool("safetensors", tmp_path / "run", tmp_path / "out")[0] == 0
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert read.keys() == model.state_dict().keys()
    assert all(torch.equal(read[name], value) for name, value in model.state_dict().items())
    monkeypatch.setattr(tools, "SHARD_BYTES", 150)
    _tool("safetensors", tmp_path / "run", tmp_path / "shards")
    assert (tmp_path / "shards" / INDEX).exists()
    source = Source(tmp_path / "shards")
    assert all(torch.equal(source.get(name), value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="already exists"):
        _tool("safetensors", tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: moetrain checkpoint ls RUN; moetrain checkpoint verify"),
        (["list", "x"], "no such tool 'list'"),
        (["ls"], "usage: moetrain checkpoint ls RUN"),
        (["diff", "x"], "usage: moetrain checkpoint diff CKPT CKPT"),
        (["ls", "."], "neither a run directory"),
        (["verify", "nowhere"], "neither a run directory"),
        (["diff", "nowhere", "nowhere"], "nowhere is not a directory"),
        (["prune", "."], "is not a run directory"),
    ],
)
def test_misuse_is_exit_code_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["checkpoint", *words]) == 2
    assert message in capsys.readouterr().err


def test_prune_refuses_options_it_does_not_know(tmp_path):
    run = _run_of(tmp_path)
    for option, message in [
        ("kep=1", "kep: no such key"),
        ("keep=-1", "keep='-1' is not"),
        ("dry_run=1", "dry_run='1'"),
    ]:
        with pytest.raises(ValueError, match=message):
            _tool("prune", run, option)
    assert len(CheckpointStore(run).steps()) == 4


def test_exit_codes_reach_the_shell(tmp_path, capsys):
    path, _ = _save(tmp_path, 10)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    _flip(path / "model" / ".metadata")
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert "model/.metadata is damaged" in capsys.readouterr().out


def test_ls_tells_a_damaged_trainer_json_and_goes_on(tmp_path):
    run = _run_of(tmp_path)
    damaged = run / "checkpoints" / "step_00000020" / "trainer.json"
    damaged.write_text("?" * damaged.stat().st_size)
    code, text = _tool("ls", run)
    assert code == 1
    assert "trainer.json is damaged" in text
    assert "step_00000040" in text


def test_a_path_may_hold_an_equals_sign(tmp_path):
    _save(tmp_path / "lr=3", 10)
    assert _tool("ls", tmp_path / "lr=3")[0] == 0
