"""The arithmetic of the folded meshes. Integers only: no torch, no ranks, testable anywhere.

The same `world` ranks are numbered twice, row-major, rightmost axis fastest:

    attention mesh  [pp, dp_replicate, dp_shard, cp, tp]      world = pp * dp  * cp * tp
    expert mesh     [pp, edp_replicate, edp_shard, ep, etp]   world = pp * edp * ep * etp

with dp = dp_replicate * dp_shard and edp = edp_replicate * edp_shard. The pipeline axis is the same in both; inside a
stage the two are independent, so ep may run across tp, cp, and dp. The user sets pp, tp, cp, ep, etp, dp_replicate; the
rest follows, with edp_replicate = gcd(dp_replicate, edp). For these axes the groups equal those of Megatron-Core's
`tp-cp-ep-dp-pp` rank order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

USER_KEYS = ("pp", "tp", "cp", "ep", "etp", "dp_replicate")
ATTENTION_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT_AXES = ("pp", "edp_replicate", "edp_shard", "ep", "etp")
PURPOSE = {
    "pp": "pipeline stages: activations and their gradients travel between neighbours",
    "dp_replicate": "whole copies of the sharded parameters: gradients are summed",
    "dp_shard": "dense parameters sharded (FSDP): gathered to compute, gradients reduce-scattered",
    "cp": "one sequence cut along its length: keys and values are exchanged",
    "tp": "one layer's dense weights cut: activations are gathered and reduce-scattered",
    "edp_replicate": "whole copies of the sharded experts: gradients are summed",
    "edp_shard": "expert parameters sharded (FSDP): gathered to compute, gradients reduce-scattered",
    "ep": "experts divided between ranks: tokens travel to their experts and back",
    "etp": "one expert's weights cut: tokens gathered before, partial sums reduce-scattered after",
}


def nearest_divisor(value: int, of: int) -> int:
    """The divisor of `of` closest to `value` (the smaller of two equally close)."""
    return min((d for d in range(1, of + 1) if of % d == 0), key=lambda d: (abs(d - value), d))


@dataclass(frozen=True)
class Layout:
    """Degrees of every axis. Build it with `make_layout`, which refuses the impossible."""

    world: int
    pp: int
    tp: int
    cp: int
    ep: int
    etp: int
    dp_replicate: int

    @property
    def dp(self) -> int:
        return self.world // (self.pp * self.cp * self.tp)

    @property
    def dp_shard(self) -> int:
        return self.dp // self.dp_replicate

    @property
    def edp(self) -> int:
        return self.world // (self.pp * self.ep * self.etp)

    @property
    def edp_replicate(self) -> int:
        return math.gcd(self.dp_replicate, self.edp)

    @property
    def edp_shard(self) -> int:
        return self.edp // self.edp_replicate

    @property
    def attention(self) -> dict[str, int]:
        """Axis -> degree, slowest first."""
        return {axis: getattr(self, axis) for axis in ATTENTION_AXES}

    @property
    def expert(self) -> dict[str, int]:
        """Axis -> degree, slowest first."""
        return {axis: getattr(self, axis) for axis in EXPERT_AXES}


def make_layout(world: int, **degrees: int) -> Layout:
    """Layout of `world` ranks; degrees not given are 1.

    Raises ValueError naming the first key that does not fit and the nearest value that would.
    """
    if not isinstance(world, int) or isinstance(world, bool) or world < 1:
        raise ValueError(f"world={world!r}: the number of ranks is a positive integer; nearest legal value: 1")
    unknown = set(degrees) - set(USER_KEYS)
    if unknown:
        raise ValueError(f"parallel.{sorted(unknown)[0]}: no such axis; the axes are {', '.join(USER_KEYS)}")
    d = {key: degrees.get(key, 1) for key in USER_KEYS}
    for key, value in d.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"parallel.{key}={value!r}: a degree is a positive integer; nearest legal value: 1")
    stage = _require_divides("pp", d["pp"], world, f"world={world}")
    rest = _require_divides("tp", d["tp"], stage, f"world/pp={stage}")
    dp = _require_divides("cp", d["cp"], rest, f"world/(pp*tp)={rest}")
    _require_divides("dp_replicate", d["dp_replicate"], dp, f"dp=world/(pp*tp*cp)={dp}")
    experts = _require_divides("etp", d["etp"], stage, f"world/pp={stage}")
    _require_divides("ep", d["ep"], experts, f"world/(pp*etp)={experts}")
    return Layout(world=world, **d)


def _require_divides(key: str, value: int, of: int, what: str) -> int:
    if of % value:
        nearest = nearest_divisor(value, of)
        raise ValueError(f"parallel.{key}={value} does not divide {what}; nearest legal value: {nearest}")
    return of // value


def axis_groups(degrees: dict[str, int], axis: str) -> list[list[int]]:
    """The groups of ranks that differ only along `axis`, in rank order.

    degrees: axis -> degree, slowest first (`Layout.attention` or `Layout.expert`).
    """
    names = list(degrees)
    stride = math.prod(degrees[name] for name in names[names.index(axis) + 1 :])
    size = degrees[axis]
    world = math.prod(degrees.values())
    firsts = [rank for rank in range(world) if (rank // stride) % size == 0]
    return [[first + i * stride for i in range(size)] for first in firsts]


def rank_tables(layout: Layout) -> dict[str, dict[str, list[list[int]]]]:
    """{"attention": {axis: groups}, "expert": {axis: groups}}: what `moetrain mesh format=json` prints."""
    meshes = {"attention": layout.attention, "expert": layout.expert}
    return {name: {axis: axis_groups(mesh, axis) for axis in mesh} for name, mesh in meshes.items()}


def format_tables(layout: Layout) -> str:
    """Both rank tables as text: each axis, its degree, what it is for, and its groups."""
    lines = [f"{layout.world} ranks, numbered twice (row-major, rightmost axis fastest)"]
    for name, mesh in (("attention", layout.attention), ("expert", layout.expert)):
        lines.append(f"\n{name} mesh [{', '.join(f'{axis}={size}' for axis, size in mesh.items())}]")
        for axis, size in mesh.items():
            groups = axis_groups(mesh, axis)
            shown = " ".join(_short(group) for group in groups[:8]) + (" ..." if len(groups) > 8 else "")
            lines.append(f"  {axis:<14}{size:>5}  {PURPOSE[axis]}")
            if size > 1:
                lines.append(f"  {'':<14}{'':>5}  {len(groups)} group{'s' * (len(groups) > 1)}: {shown}")
    return "\n".join(lines)


def _short(group: list[int]) -> str:
    if len(group) > 8:
        return f"[{group[0]} {group[1]} .. {group[-1]}]"
    return f"[{' '.join(map(str, group))}]"
