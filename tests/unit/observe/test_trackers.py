"""Trackers: safe whatever they do, and the two real ones read back from disk."""

import json
import logging
import struct
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from moetrain.config.compose import load_config
from moetrain.observe.secrets import MASK
from moetrain.observe.trackers.build import Trackers, build_trackers
from moetrain.observe.trackers.safe import SafeTracker
from moetrain.observe.trackers.wandb import WandbTracker, resolve_mode

pytestmark = pytest.mark.unit

CONFIGS = Path(__file__).parents[3] / "configs" / "tracker"


class Recorder:
    """A tracker that writes down its calls; `fail` names the method that raises."""

    def __init__(self, fail=""):
        self.calls = []
        self._fail = fail

    def _record(self, name, *args):
        self.calls.append((name, *args))
        if name == self._fail:
            raise SystemExit(f"{name} broke")

    def start(self, run_dir, name, config):
        self._record("start", run_dir, name, config)

    def log(self, row, step):
        self._record("log", row, step)

    def finish(self):
        self._record("finish")


class Hanging(Recorder):
    def __init__(self):
        super().__init__()
        self.release = threading.Event()

    def log(self, row, step):
        super().log(row, step)
        self.release.wait()


def test_calls_arrive_in_order_and_without_secrets(tmp_path):
    inner = Recorder()
    safe = SafeTracker(inner, "recorder")
    safe.start(tmp_path, "run", {"hub": {"token": "abc"}, "steps": 3})
    row = {"step": 1, "loss": 2.0}
    safe.log(row, 1)
    row["loss"] = 99.0  # the trainer may reuse its dict
    safe.finish()
    assert inner.calls == [
        ("start", tmp_path, "run", {"hub": {"token": MASK}, "steps": 3}),
        ("log", {"step": 1, "loss": 2.0}, 1),
        ("finish",),
    ]


@pytest.mark.parametrize(
    ("fail", "calls"),
    [("start", ["start"]), ("log", ["start", "log", "log", "finish"]), ("finish", ["start", "log", "log", "finish"])],
)
def test_a_raising_tracker_is_reported_once_and_the_run_goes_on(tmp_path, caplog, fail, calls):
    inner = Recorder(fail)
    safe = SafeTracker(inner, "broken")
    with caplog.at_level(logging.WARNING, logger="moetrain.observe"):
        safe.start(tmp_path, "run", {})
        safe.log({"step": 1}, 1)
        safe.log({"step": 2}, 2)
        safe.finish()
    assert [call[0] for call in inner.calls] == calls
    assert [record.getMessage() for record in caplog.records] == [
        f"tracker broken failed (SystemExit: {fail} broke); the run goes on"
    ]


def test_a_hanging_tracker_neither_blocks_nor_grows(tmp_path, caplog):
    inner = Hanging()
    safe = SafeTracker(inner, "stuck", capacity=4, finish_timeout=0.2)
    safe.start(tmp_path, "run", {})
    safe.log({"step": 0}, 0)
    while len(inner.calls) < 2:  # until the thread hangs inside log
        time.sleep(0.005)
    for step in range(1, 101):
        safe.log({"step": step}, step)
    assert not inner.release.is_set()
    assert len(inner.calls) == 2  # `log` of the tracker is in there still, and this is behind us
    assert safe.dropped == 96  # 4 fit the queue
    with caplog.at_level(logging.WARNING, logger="moetrain.observe"):
        safe.finish()
    assert len(inner.calls) == 2  # nor did that wait for it
    messages = " ".join(record.getMessage() for record in caplog.records)
    assert "stuck did not finish in 0.2 s" in messages
    assert "96 rows were not sent" in messages
    inner.release.set()


def test_no_tracker_and_an_unstarted_one_do_nothing(tmp_path):
    SafeTracker(Recorder(), "unstarted").finish()
    nothing = build_trackers(OmegaConf.to_container(OmegaConf.load(CONFIGS / "none.yaml")))
    assert isinstance(nothing, Trackers)
    nothing.start(tmp_path, "run", {})
    nothing.log({"step": 1}, 1)
    nothing.finish()


def test_a_wrong_option_or_target_is_refused_by_name():
    with pytest.raises(ValueError, match=r"(?s)tracker\.wandb cannot be built.*projct"):
        build_trackers({"wandb": {"_target_": "moetrain.observe.trackers.wandb.WandbTracker", "projct": "x"}})
    with pytest.raises(ValueError, match=r"tracker\.x cannot be built"):
        build_trackers({"x": {"_target_": "moetrain.observe.trackers.nothing.Here"}})
    with pytest.raises(ValueError, match="mode is 'offlin'; it can be auto, online"):
        WandbTracker(mode="offlin")


def test_trackers_can_be_chosen_as_a_list():
    both = load_config(["tracker=[wandb,tensorboard]", "tracker.wandb.project=mine"]).tracker
    assert list(both) == ["wandb", "tensorboard"]
    assert both["wandb"]["project"] == "mine"
    build_trackers(both)
    assert load_config(["tracker=none"]).tracker == {}


def test_tensorboard_events_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = OmegaConf.to_container(OmegaConf.load(CONFIGS / "tensorboard.yaml"))
    rows = [
        {"step": step, "loss": 5.0 - step, "mfu": None, "moe/0/load_cv": 0.5, "odd": {"loss": "nan"}}
        for step in (1, 2, 3)
    ]
    for taken in (rows, [{"step": 3, "loss": 7.0}]):  # interrupted, then resumed from step 2
        trackers = build_trackers(options)
        trackers.start(tmp_path, "run", {"token": "abc", "steps": 3})
        for row in taken:
            trackers.log(row, row["step"])
        trackers.finish()
        time.sleep(0.01)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "moe/0/load_cv"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 4.0), (2, 3.0), (3, 7.0)]
    text = events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert '"steps": 3' in text
    assert "abc" not in text


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "x" * 40}, "", "online"),
        ({"WANDB_API_KEY": "x" * 40, "WANDB_MODE": "offline"}, "", "offline"),
        ({}, "machine api.wandb.ai login user password key", "online"),
        ({}, "machine elsewhere.example login user password key", "offline"),
        ({"WANDB_BASE_URL": "https://wandb.example"}, "machine wandb.example login user password key", "online"),
        ({}, "not a netrc file {", "offline"),
    ],
)
def test_wandb_is_online_only_with_a_key(tmp_path, monkeypatch, environment, netrc, mode):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text(netrc)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resolve_mode("auto") == mode
    assert resolve_mode("disabled") == "disabled"


def test_wandb_offline_keeps_the_rows_under_the_run(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    options = OmegaConf.to_container(OmegaConf.load(CONFIGS / "wandb.yaml"))
    trackers = build_trackers(options)
    (safe,) = trackers._trackers
    safe._finish_timeout = 240  # on a busy machine wandb's own process takes its time to start, and to end
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "240")
    with caplog.at_level(logging.WARNING, logger="moetrain.observe"):
        trackers.start(tmp_path, "run", {"steps": 2})
        for step in (1, 2):
            trackers.log({"step": step, "loss": 5.0 - step, "mfu": None}, step)
        trackers.finish()
    assert not caplog.records
    run_id = (tmp_path / "wandb_id").read_text()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert run_id in file.name
    expected = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}]
    deadline = time.monotonic() + 120  # wandb's own process may write the last records after `finish` returned
    while _history(file) != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _history(file) == expected


def test_wandb_goes_offline_when_its_server_does_not_answer(tmp_path, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb")
    tried = []

    def init(mode, id, **options):
        tried.append((mode, id))
        if mode == "online":
            raise wandb.errors.CommError("connection refused\nmore")
        return SimpleNamespace(define_metric=lambda *args, **kwargs: None)

    monkeypatch.setattr(wandb, "init", init)
    tracker = WandbTracker(mode="online")
    with caplog.at_level(logging.WARNING, logger="moetrain.observe"):
        tracker.start(tmp_path, "run", {})
    assert [mode for mode, _ in tried] == ["online", "offline"]
    assert tried[0][1] != tried[1][1]  # wandb refuses an id twice in one process
    assert [record.getMessage() for record in caplog.records] == [
        "tracker wandb: the server does not answer (connection refused); keeping this run offline"
    ]


def _history(file):
    """The logged rows of an offline file: a 7-byte header, then LevelDB log records (crc32, length, type) of protobuf.

    Only whole records of the first 32 KiB block are read, which holds everything so short a run writes.
    """
    wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    content, offset, rows = file.read_bytes(), 7, []
    assert len(content) < 32768
    while offset + 7 <= len(content):
        _crc, length, kind = struct.unpack_from("<IHB", content, offset)
        if offset + 7 + length > len(content):
            break  # still being written
        assert kind == 1, "a split record"
        record = wandb_internal_pb2.Record.FromString(content[offset + 7 : offset + 7 + length])
        offset += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def test_what_a_tracker_refuses_is_one_line():
    options = {"_target_": "moetrain.observe.trackers.wandb.WandbTracker", "mode": "off"}
    with pytest.raises(
        ValueError, match=r"^tracker\.wandb cannot be built: tracker\.wandb\.mode is 'off'; it can be [a-z, ]*$"
    ):
        build_trackers({"wandb": options})
