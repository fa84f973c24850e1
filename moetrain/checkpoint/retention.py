"""Which checkpoints stay."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moetrain.checkpoint import manifest


@dataclass(frozen=True)
class Retention:
    """A step stays for any of three reasons; the newest intact one always does.

    keep: it is one of this many newest, 0 for all. keep_every: its number divides by this, 0 for none. keep_best: it is
    one of this many with the lowest val_loss, 0 for none; steps that were not evaluated take no part. Raises ValueError
    for a negative value.
    """

    keep: int = 0
    keep_every: int = 0
    keep_best: int = 0

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if value < 0:
                what = "keep all" if key == "keep" else "none"
                raise ValueError(f"checkpoint.{key} is {value}; the nearest legal value is 0 ({what})")

    def expendable(self, steps: list[Path]) -> list[Path]:
        """Of published step directories, oldest first, those that need not stay.

        Only intact ones count and go (by their sizes, and by trainer.json's hash where that is read): a damaged one
        is left for a human to look at.
        """
        if not self.keep:
            return []
        read = ("trainer.json",) if self.keep_best else ()
        intact = [path for path in steps if not manifest.problems(path, read)]
        losses = {path: val_loss(path) for path in reversed(intact)} if self.keep_best else {}
        evaluated = {path: loss for path, loss in losses.items() if loss is not None}
        best = sorted(evaluated, key=lambda path: evaluated[path])[: self.keep_best]  # of equals the newest
        kept = {*intact[-self.keep :], *best}
        if self.keep_every:
            kept |= {path for path in intact if manifest.step_of(path) % self.keep_every == 0}
        return [path for path in intact if path not in kept]


def val_loss(path: Path) -> float | None:
    """The loss on held-out data at an intact step, None if it was not evaluated there."""
    return manifest.trainer_state(path).get("val_loss")
