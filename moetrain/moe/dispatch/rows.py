"""Which rows an all-to-all moves, in which order and parts, and where each token finds its rows again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.moe.dispatch.base import Slots


@dataclass(frozen=True)
class Part:
    """Rows that travel together. token_N: the tokens of this rank's rows, rank by rank, less T where a row is empty;
    counts: rows to and from each rank, or None where they stay."""

    token_N: Tensor
    counts: tuple[list[int], list[int]] | None


def labels(slots: Slots) -> Tensor:
    """[T, 2K]: slots as one tensor that travels beside rows, experts as numbers of the gates' dtype."""
    return torch.cat([slots[0].to(slots[1].dtype), slots[1]], dim=1)


def slots_of(label_ML: Tensor) -> Slots:
    """What `labels` was given."""
    expert_MK, gate_MK = label_ML.chunk(2, dim=1)
    return expert_MK, gate_MK


def wanted_by_rank(expert_TK: Tensor, local_experts: int, ranks: int) -> Tensor:
    """bool [R, T]: whether a rank holds any expert of a token."""
    owner_TK = torch.where(expert_TK >= 0, expert_TK // local_experts, -1)
    rank_R11 = torch.arange(ranks, device=expert_TK.device)[:, None, None]
    return (owner_TK.T[None] == rank_R11).any(dim=1)


def cut(token_N: Tensor, send: list[int], receive: list[int], rank: int, chunks: int) -> list[Part]:
    """The parts in the order in which the experts take them; the same number and kinds on every rank."""
    if chunks == 1:
        return [Part(token_N, (send, receive))]
    of_rank = token_N.split(send)
    others = max(chunks - 2, 1)
    away = []
    for i in range(others):
        out, back = [_share(n, i, others) for n in send], [_share(n, i, others) for n in receive]
        out[rank] = back[rank] = range(0)
        tokens = torch.cat([t[r.start : r.stop] for t, r in zip(of_rank, out)])
        away.append(Part(tokens, ([len(r) for r in out], [len(r) for r in back])))
    if chunks == 2:
        return [Part(of_rank[rank], None), *away]
    first, second = of_rank[rank].tensor_split(2)
    return [Part(first, None), *away, Part(second, None)]


def rows_of_parts(receive: list[int], rank: int, chunks: int) -> list[int]:
    """How many rows arrive with each part of `cut`."""
    if chunks == 1:
        return [sum(receive)]
    others, own = max(chunks - 2, 1), receive[rank]
    coming = [n for peer, n in enumerate(receive) if peer != rank]
    away = [sum(len(_share(n, i, others)) for n in coming) for i in range(others)]
    return [own, *away] if chunks == 2 else [own - own // 2, *away, own // 2]


def _share(n: int, i: int, parts: int) -> range:
    return range(n * i // parts, n * (i + 1) // parts)


def places(wanted_RT: Tensor) -> Tensor:
    """[R, T]: the place of each wanted (rank, token) among all of them, rank by rank; -1 for the others."""
    return torch.where(wanted_RT, (wanted_RT.flatten().cumsum(0) - 1).view_as(wanted_RT), -1)


def tokens_at(place_RT: Tensor) -> Tensor:
    """[R T]: the token at each place, as far as there are places; behind them anything. The host need not know."""
    ranks, tokens = place_RT.shape
    token_RT = torch.arange(tokens, device=place_RT.device).expand(ranks, tokens)
    last = ranks * tokens  # takes those without a place
    token_S = place_RT.new_zeros(last + 1)
    return token_S.scatter_(0, torch.where(place_RT < 0, last, place_RT).flatten(), token_RT.flatten())[:-1]


def rows_of_tokens(place_RT: Tensor) -> Tensor:
    """[T, R]: where each token's rows come home to, -1 for none."""
    return place_RT.T.to(torch.int32).contiguous()


def moved(row_TR: Tensor, parts: list[Part]) -> Tensor:
    """`rows_of_tokens` when rows lie part by part. parts: `cut`'s, of the places instead of the tokens."""
    place_N = torch.cat([part.token_N for part in parts])
    new_N = torch.empty_like(place_N).scatter_(0, place_N, torch.arange(len(place_N), device=place_N.device))
    new_N = torch.cat([new_N, new_N.new_full((1,), -1)])  # the last one is that of -1
    return new_N[row_TR].to(torch.int32)


def padded(wanted_RT: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """`places` with `rows` for each rank, and [R * rows]: for each rank the tokens it is sent, then empty rows: t - T
    for some token t, all different ones. Fails, on the device, if a rank is wanted by more."""
    ranks, tokens = wanted_RT.shape
    torch._assert_async(
        (wanted_RT.sum(1) <= rows).all(), "more rows for a rank than dispatch.capacity.pad has room for"
    )
    place_RT = wanted_RT.cumsum(1) - 1
    first_R1 = torch.arange(ranks, device=wanted_RT.device)[:, None] * rows
    place_RT = torch.where(wanted_RT, first_R1 + place_RT, -1)
    token_N = torch.arange(ranks * rows + 1, device=wanted_RT.device) % tokens - tokens
    token_RT = torch.arange(tokens, device=wanted_RT.device).expand(ranks, tokens)
    target_RT = torch.where(place_RT < 0, ranks * rows, place_RT)
    return place_RT, token_N.scatter_(0, target_RT.flatten(), token_RT.flatten())[:-1]
