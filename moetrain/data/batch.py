"""What one micro-step reads. Shapes: B rows of this rank, S tokens of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from moetrain.comm.collectives import all_reduce_sum
from moetrain.moe.types import Totals


@dataclass(frozen=True)
class Row:
    """Up to S + 1 consecutive tokens [L]; fewer only at the end of validation data, or none for padding.

    begins: places in [0, L) where a document begins. mask_L: uint8, 0 where a token is not to be learnt; None is all 1.
    sample_id: `source:epoch:row`, empty for padding.
    """

    sample_id: str
    tokens_L: np.ndarray
    begins: np.ndarray
    mask_L: np.ndarray | None = None


PADDING = Row("", np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class Batch:
    """token_BS, target_BS (the next token): int64. loss_mask_BS: bool, the targets that count.

    position_BS: int64, within the document. document_BS: int32, from 0 in each row, -1 for padding; attention must stay
    within equal numbers. sample_ids: one per row, `source:epoch:row`, empty for a padding row.
    """

    token_BS: torch.Tensor
    target_BS: torch.Tensor
    loss_mask_BS: torch.Tensor
    position_BS: torch.Tensor
    document_BS: torch.Tensor
    sample_ids: list[str]

    def take(self, place_S: torch.Tensor) -> Batch:
        """Only these places of each row, in this order; what is known of each token stays what it was in its row."""
        return Batch(
            self.token_BS[:, place_S],
            self.target_BS[:, place_S],
            self.loss_mask_BS[:, place_S],
            self.position_BS[:, place_S],
            self.document_BS[:, place_S],
            self.sample_ids,
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`. Through pinned memory: a copy from any other waits for all earlier work."""

        def move(t: torch.Tensor) -> torch.Tensor:
            return t.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else t.to(device)

        return replace(
            self,
            token_BS=move(self.token_BS),
            target_BS=move(self.target_BS),
            loss_mask_BS=move(self.loss_mask_BS),
            position_BS=move(self.position_BS),
            document_BS=move(self.document_BS),
        )


def make_batch(rows: list[Row], seq_len: int, documents: str) -> Batch:
    """Rows to tensors. documents=stop: positions and document numbers restart at each document, and the target that is
    another document's first token does not count; cross: one document a row."""
    shape = (len(rows), seq_len)
    token_BS, target_BS, position_BS = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    loss_mask_BS = np.zeros(shape, dtype=bool)
    document_BS = np.full(shape, -1, dtype=np.int32)
    for b, row in enumerate(rows):
        length = len(row.tokens_L) - 1
        if length < 1:
            continue
        token_BS[b, :length] = row.tokens_L[:-1]
        target_BS[b, :length] = row.tokens_L[1:]
        loss_mask_BS[b, :length] = True if row.mask_L is None else row.mask_L[1:] != 0
        begins = row.begins[row.begins > 0] if documents == "stop" else row.begins[:0]
        loss_mask_BS[b, begins - 1] = False
        inside = begins[begins < length]
        first_S = np.zeros(length, dtype=np.int64)
        first_S[inside] = inside
        position_BS[b, :length] = np.arange(length) - np.maximum.accumulate(first_S)
        document_BS[b, :length] = np.cumsum(first_S > 0)
    return Batch(
        torch.from_numpy(token_BS),
        torch.from_numpy(target_BS),
        torch.from_numpy(loss_mask_BS),
        torch.from_numpy(position_BS),
        torch.from_numpy(document_BS),
        [row.sample_id for row in rows],
    )


def global_totals(batches: Sequence[Batch], dp: int, group: dist.ProcessGroup) -> Totals:
    """Sizes of the global batch of which this rank has `batches`, one a micro-step. Collective over `group`.

    dp: data-parallel ranks. group: the ranks that read different tokens.
    """
    local = torch.stack(
        [
            torch.stack([b.loss_mask_BS.sum() for b in batches]).sum(),
            torch.stack([(b.document_BS >= 0).sum() for b in batches]).sum(),
            torch.stack([((b.position_BS + 1) * (b.document_BS >= 0)).sum() for b in batches]).sum(),
        ]
    ).double()
    loss_tokens, tokens, attended = all_reduce_sum(local, group).clamp(min=1)
    rows = sum(len(b.sample_ids) for b in batches) * dp
    return Totals(loss_tokens, tokens, rows, len(batches), attended)
