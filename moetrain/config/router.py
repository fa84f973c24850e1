"""Rules between a router's options and the rest of the configuration. No torch here."""

from __future__ import annotations

from moetrain.config.schema import Config


def check_router(config: Config) -> None:
    """Refuse what would train nothing or could not run: ValueError with the key and the nearest legal value."""
    router, moe, train = config.router, config.model.moe, config.train
    if moe.n_experts and (chosen := router.get("top_k", moe.top_k)) != moe.top_k:
        # Exchanges are sized and active parameters counted by the model's.
        raise ValueError(
            f"router.top_k={chosen} differs from model.moe.top_k={moe.top_k}, which it follows when it is not given; "
            f"nearest legal value: {moe.top_k}"
        )
    if router.get("kernels") == "triton" and train.precision == "fp64":
        raise ValueError("router.kernels=triton with train.precision=fp64; nearest legal value: torch")
    rounding = router.get("rounding") or {}
    tile = rounding.get("tile", 0) if isinstance(rounding, dict) else 0
    if not isinstance(tile, int) or tile <= 0 or not moe.n_experts:
        return
    if tile > train.seq_len:
        raise ValueError(
            f"router.rounding.tile={tile} is above train.seq_len={train.seq_len}, so no expert could get a token; "
            f"nearest legal value: {train.seq_len}"
        )
    mean = train.seq_len * moe.top_k / moe.n_experts  # tokens of a row for an expert when balanced
    least = {"nearest": tile / 2, "down": tile}.get(rounding.get("mode", "nearest"), 0)
    if mean < least:
        nearest = int(mean * tile / least)
        raise ValueError(
            f"router.rounding.tile={tile} with about {mean:g} tokens of a row for each expert would leave balanced "
            f"experts without tokens; nearest legal value: {nearest}"
        )
    for key in ("record", "replay"):
        if router.get(key):
            raise ValueError(
                f"router.{key} with router.rounding.tile={tile}: not supported; nearest legal value: tile=0"
            )
