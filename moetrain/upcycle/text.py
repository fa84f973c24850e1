"""A few real sequences to measure a model on."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.config.schema import Config
from moetrain.data.stdlib import stdlib_rows
from moetrain.data.tokenizer import load_tokenizer

SEQUENCES, LENGTH = 4, 128


def real_tokens(config: Config, sequences: int = SEQUENCES, length: int = LENGTH) -> Tensor:
    """Ids [B, S] of the standard library's sources in the model's own tokenizer."""
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eos_token)
    rows: list[Tensor] = []
    for text in stdlib_rows()["text"]:
        ids = torch.from_numpy(tokenizer.encode([text[: 20 * length]])[0])
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == sequences:
            break
    return torch.stack(rows)
