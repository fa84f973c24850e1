"""Text to token ids: raw bytes, or any fast tokenizer of `tokenizers` and `transformers`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")


class Tokenizer(Protocol):
    """name: as configured. fingerprint: 16 hex digits that change when any text's ids could.

    encode: ids [N] (int64) for each text, without special tokens around it.
    spans: for each text its ids [N] and the characters [N, 2] each covers, from and to (exclusive).
    """

    name: str
    vocab_size: int
    eos_id: int
    fingerprint: str

    def encode(self, texts: list[str]) -> list[np.ndarray]: ...
    def spans(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes are ids 0 to 255; 256 ends a document and decodes to nothing."""

    name = "byte"
    vocab_size = 257
    eos_id = 256
    fingerprint = "byte-257"

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64) for text in texts]

    def spans(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(zip(self.encode(texts), map(_byte_spans, texts)))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")


def _byte_spans(text: str) -> np.ndarray:
    code_C = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    bytes_C = 1 + (code_C >= 0x80).astype(np.int64) + (code_C >= 0x800) + (code_C >= 0x10000)
    start_N = np.repeat(np.arange(len(code_C)), bytes_C)
    return np.stack([start_N, start_N + 1], axis=1)


class FastTokenizer:
    """A `tokenizers.Tokenizer`. Truncation and padding, which its file may ask for, are switched off."""

    def __init__(self, name: str, backend: Any, eos_id: int) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.name = name
        self.eos_id = eos_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = hashlib.sha256(f"{eos_id}\n{backend.to_str()}".encode()).hexdigest()[:16]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(e.ids, dtype=np.int64) for e in encodings]

    def spans(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        return [(np.asarray(e.ids, np.int64), np.asarray(e.offsets, np.int64).reshape(-1, 2)) for e in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids if int(i) != self.eos_id], skip_special_tokens=False)


def load_tokenizer(name: str, eos_token: str = "") -> Tokenizer:
    """`byte`; a `tokenizers` JSON file; a directory or hub name that `transformers` knows.

    eos_token: the token that ends a document; default the tokenizer's own. Raises ValueError naming `data.tokenizer`
    when it cannot be loaded, and `data.eos_token` when it has no such token.
    """
    if name == "byte":
        return ByteTokenizer()
    backend, own_eos = _load_backend(name)
    eos = eos_token or own_eos
    if not eos:
        eos = next((e for e in _EOS_NAMES if backend.token_to_id(e) is not None), "")
    eos_id = backend.token_to_id(eos) if eos else None
    if eos_id is None:
        special = sorted(t.content for t in backend.get_added_tokens_decoder().values())
        problem = f"{eos!r} is not one of its tokens" if eos else "it names no end-of-document token"
        raise ValueError(f"data.tokenizer={name!r}: {problem}; set data.eos_token, e.g. one of {special[:20]}")
    return FastTokenizer(name, backend, eos_id)


def _load_backend(name: str) -> tuple[Any, str]:
    """The `tokenizers.Tokenizer` and the name of its end token ("" when unknown)."""
    from tokenizers import Tokenizer as Backend

    path = Path(name).expanduser()
    if path.is_dir() and (path / "tokenizer.json").is_file() and not (path / "tokenizer_config.json").is_file():
        path = path / "tokenizer.json"
    if path.is_file():
        try:
            return Backend.from_file(str(path)), ""
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise ValueError(f"data.tokenizer={name!r} is not a tokenizers JSON file: {error}") from error
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
    except Exception as error:  # OSError, ValueError, KeyError, or a hub client's own, by kind of fault
        raise ValueError(
            f"data.tokenizer={name!r} cannot be loaded; it is neither `byte`, nor a tokenizer file or directory, "
            f"nor a reachable hub name: {error}"
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise ValueError(f"data.tokenizer={name!r} has no fast (tokenizers) form; convert it to a tokenizer.json first")
    return loaded.backend_tokenizer, loaded.eos_token or ""


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raises ValueError unless every id of the tokenizer has a row in the model's embedding."""
    if tokenizer.vocab_size > model_vocab_size:
        padded = -(-tokenizer.vocab_size // 8) * 8
        raise ValueError(
            f"model.vocab_size={model_vocab_size} is smaller than the {tokenizer.vocab_size} ids of "
            f"data.tokenizer={tokenizer.name!r}; set model.vocab_size={padded} or more"
        )
