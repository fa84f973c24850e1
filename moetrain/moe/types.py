"""What travels between router, balance losses, dispatcher, and experts.

Shape suffixes used everywhere: B batch rows, S sequence, T tokens (= B*S on this rank), D model width,
F expert hidden width, E routed experts, K expert slots per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moetrain.moe.beside import Beside
from moetrain.moe.kept import Kept


@dataclass(frozen=True)
class Totals:
    """Sizes of the whole global batch: every data rank, every micro-batch. They make each loss term a plain sum.

    loss_tokens: 0-d float tensor, N of the cross-entropy mean: targets that count.
    tokens: 0-d float tensor, tokens that are routed (everything but padding).
    rows: packed rows, the unit of the `sequence` balance scope.
    micro_batches: micro-steps per optimizer step.
    attended: 0-d float tensor, positions that the routed tokens look at, all together; None where nobody reports work.
    """

    loss_tokens: Tensor
    tokens: Tensor
    rows: int
    micro_batches: int
    attended: Tensor | None = None


@dataclass(frozen=True)
class TokenContext:
    """What a layer may know of its tokens besides their hidden state.

    token_BS: int64 input ids. position_BS: int64, for rotary embeddings.
    document_BS: int32, equal inside a document of a row; -1 is padding. None of it carries gradient.
    index_BS: int64, row * S + offset of each token in the global batch; None where nobody numbered them.
    chosen_TK: experts a router must take instead of its own choice (`router.common.choose`); None leaves it free.
    counted_TK: what a balance loss must take as the top-k of the balance scores, likewise.
    """

    token_BS: Tensor
    position_BS: Tensor
    document_BS: Tensor
    totals: Totals
    step: int = 0
    index_BS: Tensor | None = None
    chosen_TK: Tensor | None = None
    counted_TK: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.token_BS.shape[0]

    @property
    def valid_T(self) -> Tensor:
        """bool [T]: tokens that are not padding."""
        return (self.document_BS >= 0).flatten()


@dataclass(frozen=True)
class Routing:
    """One layer's routing decision. Three scores are kept apart because they differ under bias, noise, and limits.

    expert_TK: int64 chosen experts, negative in a slot that is not used (dynamic k, padding token, dropped).
    gate_TK: differentiable weights of the chosen experts, 0 in unused slots.
    selection_TE: scores that chose (biased, noised); no gradient.
    balance_TE: differentiable scores that sum to one over E, for the balance losses.
    logit_TE: differentiable raw router outputs.
    count_E: int64, how often each expert was chosen by a valid token, before any token is dropped.
    context: the tokens it was made for. carry: what the next MoE layer's router may look at.
    top_k: how many experts a token chose; rounding may give it more slots or fewer experts (router/rounding.py).
    kept: where a dispatcher may leave what a recomputed pass need not work out again; None without recomputation.
    beside: what a dispatcher may do while rows travel, and add to what it returns; None, or done by whoever called it.
    bounded: a capacity keeps what goes from rank to rank below ExchangeShape.rows.
    most: tokens of which no rank of the dispatcher's group has more; None if it knows of no number but its shape's.
    """

    expert_TK: Tensor
    gate_TK: Tensor
    selection_TE: Tensor
    balance_TE: Tensor
    logit_TE: Tensor
    count_E: Tensor
    context: TokenContext
    carry: Tensor | None = None
    top_k: int = 0
    kept: Kept | None = None
    beside: Beside | None = None
    bounded: bool = False
    most: int | None = None
