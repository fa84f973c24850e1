"""What a conversion did to the model: its size, and its outputs on a few real sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.checkpoint.tensors import model_tensors
from moetrain.config.schema import Config
from moetrain.model.build import build_model
from moetrain.model.generate import one_document
from moetrain.plan.params import count
from moetrain.upcycle.base import Model


@dataclass(frozen=True)
class Parity:
    """Losses in nats per token; the largest difference of a logit, and the largest dense logit to compare it with."""

    dense_loss: float
    moe_loss: float
    logit_difference: float
    largest_logit: float


@torch.no_grad()
def parity(before: list[Model], after: Model, token_BS: Tensor, dtype: torch.dtype = torch.float32) -> list[Parity]:
    """Compare a MoE with each model it was made from, on the CPU in `dtype`. One model is held whole at a time."""
    moe_BSV = logits(after, token_BS, dtype)
    compared = []
    for dense in before:
        dense_BSV = logits(dense, token_BS, dtype)
        compared.append(
            Parity(
                dense_loss=loss(dense_BSV, token_BS),
                moe_loss=loss(moe_BSV, token_BS),
                logit_difference=float((dense_BSV - moe_BSV).abs().max()),
                largest_logit=float(dense_BSV.abs().max()),
            )
        )
    return compared


def format_report(dense: Config, moe: Config, measured: list[Parity]) -> str:
    """What `python -m moetrain upcycle` prints. measured: one for each source, none if it was not asked for."""
    before, after = count(dense.model), count(moe.model)
    lines = [
        f"parameters  {before.total:,} -> {after.total:,}",
        f"active      {before.active:,} -> {after.active:,}",
    ]
    for number, one in enumerate(measured, start=1):
        source = f"of source {number}: " if len(measured) > 1 else ""
        relative = one.logit_difference / one.largest_logit
        lines += [
            f"loss        {source}{one.dense_loss:.7f} -> {one.moe_loss:.7f} ({one.moe_loss - one.dense_loss:+.1e})",
            f"logits      {source}largest difference {one.logit_difference:.1e}, {relative:.1e} of the largest logit",
        ]
    return "\n".join(lines if measured else [*lines, "parity      not checked"])


@torch.no_grad()
def logits(model: Model, token_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, S, V] of whole documents, on the CPU."""
    built = build_model(model.config, "cpu").to(dtype)
    own = model_tensors(built)
    for name, lazy in model.weights.items():
        own[name].copy_(lazy.make())
    return built(token_BS, one_document(token_BS))


def loss(logit_BSV: Tensor, token_BS: Tensor) -> float:
    """Mean cross-entropy of each token given those before it, in nats."""
    return float(F.cross_entropy(logit_BSV[:, :-1].flatten(0, 1).double(), token_BS[:, 1:].flatten()))
