import json
import os

import pytest

from moetrain.config.data import DataConfig, MixtureStage, SourceConfig
from moetrain.data.loader import Loader

# Read when datasets is first imported: a test must never wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def texts():
    """60 distinct texts of 5 to 150 characters, some of them not ASCII."""
    return [
        f"document {i}: " + "".join(chr(97 + (i * 7 + j) % 26) for j in range(i * 2)) + "é€😀"[: i % 4]
        for i in range(60)
    ]


@pytest.fixture
def write_jsonl(tmp_path):
    """write_jsonl(rows, "a.jsonl") -> path; rows are objects or raw lines."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def config(write_jsonl, texts, tmp_path):
    """A mapped and a streamed source whose mixture changes at step 5."""
    mapped = write_jsonl([{"text": t} for t in texts], "mapped.jsonl")
    for i in range(3):
        write_jsonl([{"text": f"{t} streamed {i}"} for t in texts[i::3]], f"streamed/{i}.jsonl")
    return DataConfig(
        sources={
            "mapped": SourceConfig(kind="jsonl", path=mapped),
            "streamed": SourceConfig(kind="jsonl", path=str(tmp_path / "streamed"), streaming=True, weight=0.5),
        },
        mixture=[MixtureStage(5, {"mapped": 0.1, "streamed": 0.9})],
        validation_percent=10.0,
        cache_dir=str(tmp_path / "cache"),
    )


@pytest.fixture
def load():
    """load(config, ...) -> Loader of rows of 32 tokens, 8 a step; closed afterwards."""
    opened = []

    def make(config, dp_rank=0, dp_size=1, micro_batch=2, **changes):
        options = {"seq_len": 32, "global_batch": 8, "seed": 0, "vocab_size": 264} | changes
        opened.append(Loader(config, dp_rank=dp_rank, dp_size=dp_size, micro_batch=micro_batch, **options))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()
