"""A plain sampler, to see what a checkpoint has learnt. Not a server: every token runs the whole text again."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.model.decoder import Decoder
from moetrain.moe.types import TokenContext, Totals


@torch.no_grad()
def generate(
    model: Decoder, token_S: list[int], n: int, temperature: float = 1.0, top_k: int = 0, seed: int = 0
) -> list[int]:
    """The n tokens that follow token_S. temperature 0 takes the most likely; top_k 0 draws from all.

    Raises ValueError for an empty text (there is nothing to continue) and a negative temperature or top_k.
    """
    if not token_S:
        raise ValueError("prompt= is empty: give at least one token to continue")
    if temperature < 0 or top_k < 0:
        raise ValueError(f"temperature={temperature} and top_k={top_k} must be at least 0")
    device = next(model.parameters()).device
    random = torch.Generator(device).manual_seed(seed)
    text = list(token_S)
    for _ in range(n):
        token_BS = torch.tensor([text], device=device)
        logit_V = model(token_BS, one_document(token_BS))[0, -1].double()
        text.append(_draw(logit_V, temperature, top_k, random))
    return text[len(token_S) :]


def one_document(token_BS: Tensor) -> TokenContext:
    """The context of rows that hold one document each, without padding."""
    rows, length = token_BS.shape
    position_BS = torch.arange(length, device=token_BS.device).expand(rows, length)
    tokens = torch.tensor(float(rows * length), device=token_BS.device)
    totals = Totals(loss_tokens=tokens, tokens=tokens, rows=rows, micro_batches=1)
    return TokenContext(token_BS, position_BS, torch.zeros_like(token_BS, dtype=torch.int32), totals)


def _draw(logit_V: Tensor, temperature: float, top_k: int, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logit_V.argmax())
    if 0 < top_k < logit_V.numel():
        least = logit_V.topk(top_k).values[-1]
        logit_V = logit_V.masked_fill(logit_V < least, float("-inf"))
    return int(torch.multinomial((logit_V / temperature).softmax(-1), 1, generator=random))
