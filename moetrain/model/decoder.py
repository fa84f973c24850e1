"""The whole model: embed -> layers -> norm -> head."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.comm.shards import local
from moetrain.config.model import ModelConfig, check_model
from moetrain.model.block import Block, BuildMoE
from moetrain.model.core import WHOLE_ROWS, Gather, RowAttention, share, whole
from moetrain.model.norm import RMSNorm
from moetrain.moe.types import TokenContext

Criterion = Callable[[Tensor, Tensor], Tensor]


class Head(nn.Linear):
    """The output embedding; a module that is called, so that FSDP gathers it when it is needed and not before."""

    def forward(self, h_BSD: Tensor, criterion: Criterion | None = None) -> Tensor:  # type: ignore[override]
        return project(h_BSD, self.weight, criterion)


def project(h_BSD: Tensor, weight_VD: Tensor, criterion: Criterion | None) -> Tensor:
    """Logits [B, S, V], or what the criterion makes of hidden states and weight."""
    weight_VD = local(weight_VD)
    return F.linear(h_BSD, weight_VD) if criterion is None else criterion(h_BSD.flatten(0, 1), weight_VD)


class Decoder(nn.Module):
    """A decoder-only transformer.

    build_moe(layer) makes a MoE layer with `moe(x_BSD, context, carry) -> (y_BSD, carry)`.
    documents: attention ends with each document of a packed row (data.documents=stop); otherwise a row is one text.
    gather: as in attention.GQA; with a divided vocabulary (parallel/tp.py) the head's weight and the logits are parts.
    Parameters: embed.weight, layers.{i}.*, norm.weight, and, unless tied, head.weight. ValueError for illegal shapes.
    """

    def __init__(self, config: ModelConfig, build_moe: BuildMoE, documents: bool = True) -> None:
        super().__init__()
        check_model(config)
        self.config, self.documents = config, documents
        self.gather: Gather = whole
        self.row_attention: RowAttention = WHOLE_ROWS  # parallel/cp.py replaces it where rows are cut between ranks
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        # A dict keeps a layer's number, and so its parameters' names, in a pipeline stage that holds only some of them.
        self.layers = nn.ModuleDict({str(i): Block(config, i, build_moe) for i in range(config.n_layers)})
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else Head(config.d_model, config.vocab_size, bias=False)

    def forward(
        self,
        token_BS: Tensor,
        context: TokenContext,
        criterion: Criterion | None = None,
        received: tuple[Tensor, ...] = (),
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits [B, S, V], or criterion(h_TD, head_weight_VD), which need not hold all logits at once.

        A part of the layers takes what the part before it returned, (x_BSD,) or (x_BSD, carry), as `received` in place
        of the embedding; without the last norm it returns the same for the part after it.
        """
        x_BSD = received[0] if received else self.embed(token_BS)
        shared = share(context, self.config.attention, x_BSD.dtype, self.documents, self.row_attention)
        carry = received[1] if len(received) > 1 else None
        for block in self.layers.values():
            x_BSD, carry = block(x_BSD, shared, carry)
        if self.norm is None:
            return (x_BSD,) if carry is None else (x_BSD, carry)
        h_BSD = self.gather(self.norm(x_BSD))
        if self.head is None:
            return project(h_BSD, self.embed.weight, criterion)
        return self.head(h_BSD, criterion)
