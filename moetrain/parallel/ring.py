"""Attention over a row whose keys and values travel around a ring of ranks ("Ring Attention", arXiv:2310.01889).

At step t a rank meets the keys and values of rank - t. Its softmax grows with each meeting (a running maximum and
sum), the next share arriving meanwhile. In the backward pass keys and values travel again, their gradients with them,
home after a whole turn; scores are recomputed from the saved log-sum-exp.

Chunks are laid out as in parallel/cp.py: of the four meetings of two ranks' chunks the two in a query's future are
skipped, so every rank does the same work at every step.
Shapes: B rows, H query heads, G key/value heads, L places here, C = L / 2 places of a chunk, S places of a row,
Q = H / G * C queries of one key head and chunk, d key width, e value width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def ring_attention(
    q_BHLd: Tensor,
    k_BGLd: Tensor,
    v_BGLe: Tensor,
    document_BS: Tensor | None,
    scale: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """softmax(scale * q k^T) v over whole rows -> [B, H, L, e], for the places here.

    document_BS: documents of the whole rows, which attention stays inside; None is causal only. Sums are at least fp32.
    Every rank of the group must call it.
    """
    return _Ring.apply(q_BHLd, k_BGLd, v_BGLe, document_BS, scale, group)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, document_BS: Tensor | None, scale: float, group: dist.ProcessGroup
    ) -> Tensor:
        heads = q.shape[1]
        ring = Ring(group)
        q_2 = _by_key_head(q, k.shape[1])
        softmax_2 = [_Softmax(q_BGQd, v.shape[-1]) for q_BGQd in q_2]
        for source, k_2, v_2 in ring.meetings(k, v):
            for mine, theirs in ring.pairs(source):
                score = _scores(q_2[mine], k_2[theirs], scale, ring.allowed(document_BS, mine, source, theirs, k))
                softmax_2[mine].add(score, v_2[theirs])
        out_2, lse_2 = zip(*(softmax.result() for softmax in softmax_2))
        out = _by_query_head(out_2, heads).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, document_BS, *lse_2)
        ctx.ring, ctx.scale = ring, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, document_BS, *lse_2 = ctx.saved_tensors
        ring, scale, heads, groups = ctx.ring, ctx.scale, q.shape[1], k.shape[1]
        q_2, grad_2 = _by_key_head(q, groups), _by_key_head(grad, groups)
        wide = _wide(q)
        delta_2 = _by_key_head((grad.to(wide) * out.to(wide)).sum(-1, keepdim=True), groups)
        dq_2 = [torch.zeros_like(q_BGQd, dtype=wide) for q_BGQd in q_2]
        dkv = torch.zeros(*k.shape[:3], k.shape[3] + v.shape[3], dtype=wide, device=k.device)
        for source, k_2, v_2 in ring.meetings(k, v):
            dkv = ring.pass_on(dkv) if source != ring.rank else dkv
            dk, dv = dkv.split([k.shape[3], v.shape[3]], dim=-1)
            dk_2, dv_2 = dk.chunk(2, dim=2), dv.chunk(2, dim=2)
            for mine, theirs in ring.pairs(source):
                score = _scores(q_2[mine], k_2[theirs], scale, ring.allowed(document_BS, mine, source, theirs, k))
                p_BGQC = (score - lse_2[mine]).exp_()
                dp_BGQC = _matmul(grad_2[mine], v_2[theirs].transpose(2, 3))
                ds_BGQC = (p_BGQC * (dp_BGQC - delta_2[mine])).mul_(scale).to(q.dtype)
                dv_2[theirs].add_(_matmul(p_BGQC.to(q.dtype).transpose(2, 3), grad_2[mine]))
                dk_2[theirs].add_(_matmul(ds_BGQC.transpose(2, 3), q_2[mine]))
                dq_2[mine].add_(_matmul(ds_BGQC, k_2[theirs]))
        dk, dv = ring.pass_on(dkv).split([k.shape[3], v.shape[3]], dim=-1)
        return _by_query_head(dq_2, heads).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


class _Softmax:
    """Softmax-weighted sum of values, of which scores and values arrive in parts.

    The first part must hold an allowed score for every query, which its own place is: else the maximum is -inf.
    """

    def __init__(self, q_BGQd: Tensor, width: int) -> None:
        wide, shape = _wide(q_BGQd), q_BGQd.shape[:3]
        self.dtype = q_BGQd.dtype
        self.highest = torch.full((*shape, 1), float("-inf"), dtype=wide, device=q_BGQd.device)
        self.total = torch.zeros_like(self.highest)
        self.weighted = torch.zeros(*shape, width, dtype=wide, device=q_BGQd.device)

    def add(self, score_BGQC: Tensor, v_BGCe: Tensor) -> None:
        highest = torch.maximum(self.highest, score_BGQC.amax(-1, keepdim=True))
        before = (self.highest - highest).exp_()
        p_BGQC = (score_BGQC - highest).exp_()
        self.total = self.total * before + p_BGQC.sum(-1, keepdim=True)
        self.weighted = self.weighted * before + _matmul(p_BGQC.to(self.dtype), v_BGCe)
        self.highest = highest

    def result(self) -> tuple[Tensor, Tensor]:
        """The weighted mean [B, G, Q, e] and the log-sum-exp [B, G, Q, 1]."""
        return self.weighted / self.total, self.highest + self.total.log()


@dataclass(frozen=True)
class _Travel:
    """One exchange under way; what was sent is kept until it has left."""

    works: list[dist.Work]
    sent: Tensor
    arriving: Tensor

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.arriving


class Ring:
    """Who meets whom, and the exchange with both neighbours."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def meetings(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """Yield (source rank, its two key chunks, its two value chunks), this rank's own first."""
        kv = torch.cat([k, v], dim=-1)
        for step in range(self.size):
            travel = self.start(kv) if step + 1 < self.size else None
            k_here, v_here = kv.split([k.shape[3], v.shape[3]], dim=-1)
            yield (self.rank - step) % self.size, k_here.chunk(2, dim=2), v_here.chunk(2, dim=2)
            kv = travel.wait() if travel else kv

    def pairs(self, source: int) -> list[tuple[int, int]]:
        """(which of my chunks, which of theirs) that meet: not those in the query's future; own places first."""
        late_sees_late = [(1, 1)] if source >= self.rank else []
        early_sees_early = [(0, 0)] if source <= self.rank else []
        return [*late_sees_late, *early_sees_early, (1, 0)]

    def allowed(self, document_BS: Tensor | None, mine: int, source: int, theirs: int, k: Tensor) -> Tensor | None:
        """bool [B or 1, C, C], true where a query of my chunk may look at a key of theirs; None is everywhere."""
        own, other = self.chunk(self.rank, mine), self.chunk(source, theirs)
        size = k.shape[2] // 2
        allowed = None
        if document_BS is not None:
            chunk_C = document_BS.split(size, dim=1)
            allowed = chunk_C[own][:, :, None] == chunk_C[other][:, None, :]
        if own != other:
            return allowed
        causal = torch.ones(1, size, size, dtype=torch.bool, device=k.device).tril()
        return causal if allowed is None else allowed & causal

    def chunk(self, rank: int, late: int) -> int:
        return 2 * self.size - 1 - rank if late else rank

    def start(self, x: Tensor) -> _Travel:
        """Begin sending `x` to the next rank and receiving as much from the one before."""
        x, arriving = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        after, before = (dist.get_global_rank(self.group, (self.rank + by) % self.size) for by in (1, -1))
        operations = [
            dist.P2POp(dist.isend, x, after, group=self.group),
            dist.P2POp(dist.irecv, arriving, before, group=self.group),
        ]
        return _Travel(dist.batch_isend_irecv(operations), x, arriving)

    def pass_on(self, x: Tensor) -> Tensor:
        """What the rank before holds, for what the next rank is to hold."""
        return self.start(x).wait()


def _by_key_head(x_BHLd: Tensor, groups: int) -> list[Tensor]:
    """[B, H, L, d] -> each chunk's [B, G, Q, d]: the queries that share a key head in one matrix."""
    return [chunk.unflatten(1, (groups, -1)).flatten(2, 3) for chunk in x_BHLd.chunk(2, dim=2)]


def _by_query_head(x_2: Sequence[Tensor], heads: int) -> Tensor:
    """The inverse of `_by_key_head`."""
    return torch.cat([x.unflatten(2, (heads // x.shape[1], -1)).flatten(1, 2) for x in x_2], dim=2)


def _scores(q_BGQd: Tensor, k_BGCd: Tensor, scale: float, allowed_BCC: Tensor | None) -> Tensor:
    """[B, G, Q, C], at least fp32, -inf where a query may not look."""
    score_BGQC = _matmul(q_BGQd, k_BGCd.transpose(2, 3)).mul_(scale)
    if allowed_BCC is None:
        return score_BGQC
    score_BGRCC = score_BGQC.unflatten(2, (-1, allowed_BCC.shape[1]))
    return score_BGRCC.masked_fill_(~allowed_BCC[:, None, None], float("-inf")).flatten(2, 3)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _matmul(a_BGNK: Tensor, b_BGKM: Tensor) -> Tensor:
    """a @ b, at least fp32; on CUDA half-precision operands keep their tensor cores."""
    wide = _wide(b_BGKM)
    if not a_BGNK.is_cuda or b_BGKM.dtype == wide:
        return a_BGNK.to(wide) @ b_BGKM.to(wide)
    a, b = a_BGNK.to(b_BGKM.dtype).flatten(0, 1), b_BGKM.flatten(0, 1)
    return torch.bmm(a, b, out_dtype=wide).unflatten(0, a_BGNK.shape[:2])
