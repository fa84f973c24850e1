"""What a conversion did to the model: its size, and its outputs on a few real sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.checkpoint.lazy import LazyTensor
from moetrain.checkpoint.tensors import model_tensors
from moetrain.config.schema import Config
from moetrain.data.stdlib import stdlib_rows
from moetrain.data.tokenizer import load_tokenizer
from moetrain.model.build import build_model
from moetrain.model.generate import one_document
from moetrain.plan.params import count

SEQUENCES, LENGTH = 4, 128


@dataclass(frozen=True)
class Parity:
    """Losses in nats per token; the largest difference of a logit, and the largest dense logit to compare it with."""

    dense_loss: float
    moe_loss: float
    logit_difference: float
    largest_logit: float


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


@torch.no_grad()
def parity(
    before: tuple[Config, Mapping[str, LazyTensor]],
    after: tuple[Config, Mapping[str, LazyTensor]],
    token_BS: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Parity:
    """Run both models, one after the other, on the CPU in `dtype`. Each is held whole while it runs."""
    dense_BSV, moe_BSV = (_logits(config, weights, token_BS, dtype) for config, weights in (before, after))
    return Parity(
        dense_loss=_loss(dense_BSV, token_BS),
        moe_loss=_loss(moe_BSV, token_BS),
        logit_difference=float((dense_BSV - moe_BSV).abs().max()),
        largest_logit=float(dense_BSV.abs().max()),
    )


def format_report(dense: Config, moe: Config, measured: Parity | None) -> str:
    """What `python -m moetrain upcycle` prints."""
    before, after = count(dense.model), count(moe.model)
    lines = [
        f"parameters  {before.total:,} -> {after.total:,}",
        f"active      {before.active:,} -> {after.active:,}",
    ]
    if measured is None:
        return "\n".join([*lines, "parity      not checked"])
    relative = measured.logit_difference / measured.largest_logit
    return "\n".join(
        [
            *lines,
            f"loss        {measured.dense_loss:.7f} -> {measured.moe_loss:.7f} "
            f"({measured.moe_loss - measured.dense_loss:+.1e})",
            f"logits      largest difference {measured.logit_difference:.1e}, {relative:.1e} of the largest logit",
        ]
    )


def _logits(config: Config, weights: Mapping[str, LazyTensor], token_BS: Tensor, dtype: torch.dtype) -> Tensor:
    model = build_model(config, "cpu").to(dtype)
    own = model_tensors(model)
    for name, lazy in weights.items():
        own[name].copy_(lazy.make())
    return model(token_BS, one_document(token_BS))


def _loss(logit_BSV: Tensor, token_BS: Tensor) -> float:
    return float(F.cross_entropy(logit_BSV[:, :-1].flatten(0, 1).double(), token_BS[:, 1:].flatten()))
