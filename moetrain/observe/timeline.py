"""Where a step's time went, from a trace of torch.profiler: every instant belongs to exactly one part of the step.

A device kernel belongs to the part whose code launched it: the innermost labelled range around the launch (`LABEL`
prefix, see observe/annotate.py) or one of `KNOWN`. Work of the backward pass belongs where its forward operator did,
which autograd's sequence numbers tell. Where kernels overlap, computation is charged before communication: what is left
for communication is what it did not hide ("exposed"). Without a device the host's own time is divided instead.

Trace events are in the Chrome trace format (https://github.com/pytorch/kineto): microseconds, `cat`, `args`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

LABEL = "moetrain::"
WINDOW = LABEL + "steps"  # the range around all measured steps
IDLE, OTHER = "device idle", "other"
KNOWN = {
    "_ChunkedCrossEntropy": "head and loss",
    "Optimizer.step": "optimizer",
    "Optimizer.zero_grad": "optimizer",
    "FSDP::": "parameters (FSDP)",
}
HOST = ("cpu_op", "user_annotation")
LAUNCH = ("cuda_runtime", "cuda_driver")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
BACKWARD = "autograd::engine::evaluate_function: "


@dataclass(frozen=True)
class Shares:
    """Microseconds of each part inside the window, which add up to `total`; communication hidden under computation."""

    total: float
    parts: dict[str, float]
    hidden: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Span:
    start: float
    end: float
    part: str
    communication: bool = False


def shares(events: Iterable[dict[str, Any]]) -> Shares:
    """Divide the window between the parts. Raises ValueError if the trace has no window."""
    complete = [e for e in events if e.get("ph") == "X"]
    windows = [e for e in complete if e["name"] == WINDOW and e["cat"] == "user_annotation"]
    if not windows:
        raise ValueError(f"the trace has no range named {WINDOW}")
    start, end = windows[0]["ts"], windows[0]["ts"] + windows[0]["dur"]
    host = _host_parts([e for e in complete if e["cat"] in (*HOST, *LAUNCH)])
    device = [e for e in complete if e["cat"] in DEVICE]
    if not device:
        return _host_shares(host, windows[0]["tid"], start, end)
    part_of = {e["args"]["correlation"]: part for e, part in host if "correlation" in e.get("args", {})}
    spans = [
        _Span(max(e["ts"], start), min(e["ts"] + e["dur"], end), part, _communicates(e, part))
        for e in device
        for part in [part_of.get(e["args"].get("correlation"), OTHER)]
        if e["ts"] < end and e["ts"] + e["dur"] > start
    ]
    return _device_shares(spans, start, end)


def _communicates(event: dict[str, Any], part: str) -> bool:
    """NCCL's kernels, and the copy engines' transfers between ranks."""
    return "nccl" in event["name"].lower() or (event["cat"] == "gpu_memcpy" and part == "dispatch")


def _host_parts(events: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """Each host event with its part: its own label, else its forward operator's, else the enclosing event's."""
    forward: dict[int, str] = {}  # sequence number -> part of the last operator that carried it
    stacks: dict[Any, list[tuple[float, str]]] = defaultdict(list)  # of each thread: (end, part), outermost first
    result = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        stack, number = stacks[event["tid"]], event.get("args", {}).get("Sequence number", -1)
        while stack and stack[-1][0] <= event["ts"]:
            stack.pop()
        part = _own_label(event["name"]) or (stack[-1][1] if stack else OTHER)
        if event["name"].startswith(BACKWARD):
            part = _own_label(event["name"].removeprefix(BACKWARD)) or forward.get(number, part)
        elif number >= 0 and not event["name"].startswith("autograd::"):
            forward[number] = part
        stack.append((event["ts"] + event["dur"], part))
        result.append((event, part))
    return result


def _own_label(name: str) -> str | None:
    if name.startswith(LABEL) and name != WINDOW:
        return name.removeprefix(LABEL)
    return next((part for prefix, part in KNOWN.items() if name.startswith(prefix)), None)


def _host_shares(host: list[tuple[dict[str, Any], str]], thread: Any, start: float, end: float) -> Shares:
    """The thread of the window: each instant belongs to the innermost event around it."""
    spans = [(e["ts"], e["ts"] + e["dur"], part) for e, part in host if e["tid"] == thread]
    parts: dict[str, float] = defaultdict(float)
    stack: list[tuple[float, str]] = []
    now = start

    def charge(until: float) -> None:
        nonlocal now
        if until > now:
            parts[stack[-1][1] if stack else OTHER] += until - now
            now = until

    for begin, finish, part in spans:
        if finish <= start or begin >= end:
            continue
        while stack and stack[-1][0] <= begin:
            charge(min(stack[-1][0], end))
            stack.pop()
        charge(max(begin, start))
        stack.append((finish, part))
    while stack:
        charge(min(stack[-1][0], end))
        stack.pop()
    charge(end)
    return Shares(end - start, dict(parts))


def _device_shares(spans: list[_Span], start: float, end: float) -> Shares:
    """Sweep over the device's timeline: computation first, then communication, then idle."""
    edges = sorted({start, end, *(s.start for s in spans), *(s.end for s in spans)})
    ordered = sorted(spans, key=lambda s: s.start)
    parts: dict[str, float] = defaultdict(float)
    hidden: dict[str, float] = defaultdict(float)
    active: list[_Span] = []
    following = 0
    for begin, finish in pairwise(edges):
        active = [s for s in active if s.end > begin]
        while following < len(ordered) and ordered[following].start <= begin:
            if ordered[following].end > begin:
                active.append(ordered[following])
            following += 1
        computing = [s for s in active if not s.communication]
        for part in {s.part for s in active if s.communication} if computing else ():
            hidden[part] += finish - begin
        charged = computing or active
        parts[charged[0].part if charged else IDLE] += finish - begin
    return Shares(end - start, dict(parts), dict(hidden))


def format_shares(measured: Shares, steps: int) -> str:
    """A table in milliseconds per step, the largest part first."""
    rows = sorted(measured.parts.items(), key=lambda item: -item[1])
    lines = [f"{'part of a step':<28} {'ms':>10} {'share':>7}"]
    for part, time in rows:
        name = f"{part} (exposed)" if part in measured.hidden or part == "dispatch" else part
        lines.append(f"{name:<28} {time / steps / 1e3:>10.3f} {time / measured.total:>7.1%}")
    lines.append(f"{'step':<28} {measured.total / steps / 1e3:>10.3f} {1:>7.1%}")
    for part, time in sorted(measured.hidden.items()):
        lines.append(f"hidden under computation: {part}, {time / steps / 1e3:.3f} ms of communication")
    return "\n".join(lines)
