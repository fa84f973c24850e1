import json
import os

import pytest

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
