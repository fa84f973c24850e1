"""A dataset on a hub that somebody changes while a run is streaming it: the hub is a server of this test's own."""

from __future__ import annotations

import json
import multiprocessing
import re
import threading
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

from moetrain.config.data import DataConfig, SourceConfig, check_data

pytestmark = pytest.mark.unit
OLD, NEW = "a" * 40, "b" * 40
TEXTS = [f"{i} " + "abcdefgh" * (i % 5 + 1) for i in range(40)]


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as `datasets` asks for: commits, their files, and byte ranges of these."""

    protocol_version = "HTTP/1.1"
    commits: dict[str, bytes] = {  # of one repository with one file
        OLD: "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode(),
        NEW: "".join(json.dumps({"text": text.swapcase()}) + "\n" for text in TEXTS).encode(),
    }
    newest = OLD

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/datasets/me/data(?:/(revision|tree)/(\w+))?", path)
        file = re.fullmatch(r"/datasets/me/data/resolve/(\w+)/rows\.jsonl", path)
        if api and self._commit(api[2]):
            commit = self._commit(api[2])
            entry = {"type": "file", "path": "rows.jsonl", "size": len(self.commits[commit]), "oid": commit}
            told = {"id": "me/data", "sha": commit, "siblings": [{"rfilename": "rows.jsonl"}]}
            self._answer(200, json.dumps([entry] if api[1] == "tree" else told).encode())
        elif file and self._commit(file[1]):
            data, wanted = self.commits[self._commit(file[1])], self.headers.get("Range", "bytes=0-")
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
            stop = min(int(last or len(data)) + 1, len(data))
            self._answer(206, data[int(first) : stop], f"bytes {first}-{stop - 1}/{len(data)}")
        else:
            self._answer(404, b"")

    do_HEAD = do_GET

    def _commit(self, name: str | None) -> str:
        commit = self.newest if name in (None, "main") else name
        return commit if commit in self.commits else ""

    def _answer(self, status: int, body: bytes, stretch: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body))} | ({"Content-Range": stretch} if stretch else {})
        for key, value in (headers | ({"X-Error-Code": "EntryNotFound"} if status == 404 else {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub():
    _Hub.newest = OLD
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def elsewhere(hub, tmp_path, monkeypatch):
    """elsewhere(fn, ...) -> fn(...) in a process that takes the server for the Hub; it is read at an import."""
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for direct in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(direct, "127.0.0.1")
    for offline in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(offline, "0")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda *call: pool.submit(*call).result()


def _stream(revision: str, state: dict | None) -> tuple[dict, str]:
    """The state of a loader that went on from `state`, and its first row as text, or why it refused."""
    from moetrain.data.loader import Loader

    source = SourceConfig(kind="hub", path="me/data", streaming=True, revision=revision)
    config = DataConfig(sources={"s": source}, validation_percent=0.0)
    loader = Loader(
        config, seq_len=32, global_batch=1, micro_batch=1, dp_rank=0, dp_size=1, seed=0, vocab_size=264
    )  # fmt: skip
    try:
        if state is not None:
            loader.load_state_dict(state)
        row = bytes(i for i in loader.next_step()[0].token_BS[0].tolist() if i < 256).decode()
        return loader.state_dict(), row
    except ValueError as error:
        return {}, str(error)
    finally:
        loader.close()


def test_a_stream_goes_on_with_the_commit_it_began_with_or_not_at_all(elsewhere):
    state, first = elsewhere(_stream, "", None)
    assert first.startswith(TEXTS[0][:20])
    straight = elsewhere(_stream, "", state)
    assert straight[0]["samples"] == 2
    _Hub.newest = NEW
    told = elsewhere(_stream, "", state)[1]
    assert f"source s: data.sources.s.revision={OLD} there, data.sources.s.revision={NEW} here" in told
    assert elsewhere(_stream, OLD, state) == straight
    assert elsewhere(_stream, "", None)[1].startswith(TEXTS[0][:20].swapcase())


def test_only_a_hub_has_revisions():
    config = DataConfig(sources={"s": SourceConfig(kind="jsonl", path="x", revision=OLD)})
    with pytest.raises(ValueError, match=r"data\.sources\.s\.revision='a+': kind jsonl has none"):
        check_data(config)
