"""What a device did during a call, event by event: for schedules whose point is what runs beside what."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

LEAST = 3.0  # us; shorter events are added up


@dataclass(frozen=True)
class Event:
    """A kernel or copy. Times in us; stream: the device's number for it."""

    start: float
    duration: float
    stream: int
    name: str


def record(run: Callable[[], object], calls: int = 3) -> list[Event]:
    """Device events of the last of `calls` calls, from the first one's start; empty where there is no device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    found = [e for e in trace.profiler.kineto_results.events() if e.device_type() == torch.autograd.DeviceType.CUDA]
    events = [Event(e.start_ns() / 1e3, e.duration_ns() / 1e3, e.device_resource_id(), e.name()) for e in found]
    events.sort(key=lambda event: event.start)
    return events[len(events) * (calls - 1) // calls :]


def describe(events: Iterable[Event]) -> list[str]:
    """A line for each event of at least LEAST us, with what stood still on its stream before it; one for the others."""
    events = list(events)
    lines: list[str] = []
    small, ends = 0.0, dict[int, float]()
    for event in events:
        wait = event.start - ends.get(event.stream, event.start)
        ends[event.stream] = event.start + event.duration
        if event.duration < LEAST:
            small += event.duration
            continue
        at = event.start - events[0].start
        gap = f"(after {wait:.0f} idle)" if wait >= LEAST else ""
        lines.append(
            f"{at:9.0f} us + {event.duration:6.0f}  stream {event.stream:<3} {event.name[:48]:48} {gap}".rstrip()
        )
    return [*lines, f"shorter ones: {small:.0f} us together"]
