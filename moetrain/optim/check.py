"""One way to refuse a hyper-parameter."""

from __future__ import annotations


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError naming the key and the nearest legal value unless low <= value <= high (NaN never is)."""
    if not low <= value <= high:
        nearest = high if value > high else low
        raise ValueError(f"{name} is {value}, outside [{low}, {high}]; the nearest legal value is {nearest}")
