"""Test helpers for moetrain itself and for users' plugins."""

from moetrain.testing.ranks import RankFailure, run_ranks

__all__ = ["RankFailure", "run_ranks"]
