"""Scale up, then scale out: the dense model grows, then its experts are made ("AquilaMoE: Efficient Training for MoE
Models with Scale-Up and Scale-Out Strategies")."""

from __future__ import annotations

from dataclasses import dataclass

from moetrain.upcycle.base import Model
from moetrain.upcycle.growth import deepen, widen
from moetrain.upcycle.virtual_group import VirtualGroup

DEPTH_BY, WIDTH_BY = ("identity", "interpolate", "stack"), ("fpi", "aki")


@dataclass(frozen=True)
class EfficientScale(VirtualGroup):
    """As virtual_group, of the model grown to `width` times its width and to `layers` layers (0: as many as it has).

    width_by: fpi keeps the function, aki fills new neurons from the next layer. depth_by: identity keeps the function,
    interpolate and stack repeat layers. Exact with fpi, identity, and normalized gates; else not.
    """

    width: int = 2
    layers: int = 0
    width_by: str = "fpi"
    depth_by: str = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise ValueError(f"upcycle.width={self.width}; nearest legal value: 1")
        for key, value, legal in (("width_by", self.width_by, WIDTH_BY), ("depth_by", self.depth_by, DEPTH_BY)):
            if value not in legal:
                raise ValueError(
                    f"upcycle.{key}={value!r}; nearest legal value: {legal[0]} (or {', '.join(legal[1:])})"
                )

    def prepare(self, sources: list[Model]) -> Model:
        dense = super().prepare(sources)
        have = dense.config.model.n_layers
        if self.layers and self.layers < have:
            raise ValueError(f"upcycle.layers={self.layers} is fewer than the model's; nearest legal value: {have}")
        wide = widen(dense, self.width, advanced=self.width_by == "aki")
        return deepen(wide, self.layers, self.depth_by) if self.layers > have else wide
