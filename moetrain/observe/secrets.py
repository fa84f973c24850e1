"""Take secrets out of a configuration before it is stored or sent to a tracker."""

from __future__ import annotations

import re
from typing import Any

MASK = "***"

# A key's words, so that `hub_token`, `hubToken` and `hub.token` read alike while `tokenizer` and `tokens` do not match.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_SECRET_WORDS = {"token", "secret", "secrets", "password", "passwords", "passwd", "pwd", "passphrase", "apikey"}
_SECRET_WORDS |= {"credential", "credentials", "authorization", "bearer"}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("ssh", "key")}
# Tokenizers' own vocabulary: `pad_token: <pad>` is no secret.
_VOCABULARY = {"pad", "eos", "bos", "unk", "mask", "sep", "cls", "special", "image"}
# A git or hub revision has the shape of a wandb key, and a reader needs it to repeat the run.
_REVISION_WORDS = {"revision", "commit", "sha", "sha1", "hash", "fingerprint"}

_HEX_KEY = re.compile(r"\b[0-9a-fA-F]{40}\b")  # wandb's older keys
_SECRET_VALUES = (
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),  # Hugging Face
    re.compile(r"\bwandb_v\d+_[A-Za-z0-9_]{8,}"),  # Weights & Biases, newer keys
    re.compile(r"\b(?:gh[pousr]_|github_pat_|glpat-|xox[abprs]-|sk-)[A-Za-z0-9_-]{8,}"),
    re.compile(r"\bA(?:KIA|SIA)[A-Z0-9]{16}\b"),  # AWS access key ids
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*", re.DOTALL),
    re.compile(r"(?<=bearer )\S+", re.IGNORECASE),
)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+(?=@)")
# `tracker.wandb.api_key=...` among stored overrides, `?token=...` in a URL.
_ASSIGNMENT = re.compile(r"([\w.\-]+)=([^&\s,]+)")


def mask_secrets(config: Any) -> Any:
    """A copy of nested dicts and lists with each secret string replaced by `***`; numbers and booleans stay.

    A string is secret when its key says so (token, secret, password, api_key, ...; a list or dict below such a key
    too), and the secret part of any other string is masked where it looks like a known kind of key or stands in
    a URL before the `@`.
    """
    return _mask(config, secret=False, revision=False)


def _mask(value: Any, secret: bool, revision: bool) -> Any:
    if isinstance(value, dict):
        return {k: _mask(v, secret or _is_secret(str(k)), _is_revision(str(k))) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mask(item, secret, revision) for item in value)
    if not isinstance(value, str):
        return value
    if secret:
        return MASK if value else value
    return _mask_text(value, revision)


def _mask_text(text: str, revision: bool) -> str:
    for pattern in _SECRET_VALUES:
        text = pattern.sub(MASK, text)
    if not revision:
        text = _HEX_KEY.sub(MASK, text)
    text = _URL_CREDENTIALS.sub(MASK, text)
    return _ASSIGNMENT.sub(lambda m: f"{m[1]}={MASK}" if _is_secret(m[1]) else m[0], text)


def _words(key: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(key)]


def _is_secret(key: str) -> bool:
    words = _words(key)
    if not words or (words[-1] == "token" and len(words) > 1 and words[-2] in _VOCABULARY):
        return False
    return words[-1] in _SECRET_WORDS or tuple(words[-2:]) in _SECRET_PAIRS


def _is_revision(key: str) -> bool:
    words = _words(key)
    return bool(words) and words[-1] in _REVISION_WORDS
