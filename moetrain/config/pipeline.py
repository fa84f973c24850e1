"""Which layers a pipeline stage holds, which stages a rank holds, and what each schedule asks for. Integers only.

A schedule may give a rank several (virtual) stages. `loop`: rank r of P holds stages r, r + P, r + 2P, ...; `v`: r and
2P - 1 - r, so that the first and the last stage are on one rank.
"""

from __future__ import annotations

from importlib.metadata import version
from itertools import accumulate

from moetrain.config.schema import Config, ParallelConfig
from moetrain.mesh.layout import Layout

STAGES_PER_RANK = {"1f1b": 1, "interleaved": 2, "zbv": 2, "dualpipev": 2}
V_SCHEDULES = ("zbv", "dualpipev")  # these also split a backward pass into inputs' and weights' gradients
V_TORCH = (2, 13)  # before, torch's split backward pass summed the gradients of different outputs of one operator


def layer_counts(parallel: ParallelConfig, n_layers: int) -> list[int]:
    """Layers of each stage in order: `parallel.pp_layers`, or as even as can be, the first stages taking the rest."""
    if parallel.pp_layers is not None:
        return list(parallel.pp_layers)
    stages = parallel.pp * STAGES_PER_RANK[parallel.schedule]
    return [n_layers // stages + (stage < n_layers % stages) for stage in range(stages)]


def stage_layers(parallel: ParallelConfig, n_layers: int) -> list[range]:
    """The layers of each stage."""
    counts = layer_counts(parallel, n_layers)
    return [range(end - count, end) for end, count in zip(accumulate(counts), counts)]


def rank_of_stage(parallel: ParallelConfig, stage: int) -> int:
    """The rank along pp that holds `stage`."""
    turn, place = divmod(stage, parallel.pp)
    return parallel.pp - 1 - place if parallel.schedule in V_SCHEDULES and turn % 2 else place


def runs_here(schedule: str) -> bool:
    """Whether this version of torch can run the schedule."""
    return schedule not in V_SCHEDULES or tuple(map(int, version("torch").split(".")[:2])) >= V_TORCH


def micro_batches(config: Config, layout: Layout) -> int:
    """Micro-steps of one optimizer step."""
    per_rank = config.train.global_batch // layout.dp
    return per_rank // (config.train.micro_batch or per_rank)


def check_pipeline(config: Config, layout: Layout) -> None:
    """Raises ValueError naming the key, its value, and the nearest legal value."""
    parallel = config.parallel
    if parallel.pp == 1:
        if parallel.schedule != "1f1b":
            raise _refuse("parallel.schedule", parallel.schedule, "needs parallel.pp above 1", "1f1b")
        if parallel.pp_layers is not None:
            raise _refuse("parallel.pp_layers", parallel.pp_layers, "needs parallel.pp above 1", "null")
        return
    if parallel.reshard_after_forward:
        reason = "would gather every parameter again for each micro-batch of a pipeline"
        raise _refuse("parallel.reshard_after_forward", "true", reason, "false")
    if not runs_here(parallel.schedule):
        reason = f"needs torch 2.13 for its split backward pass; this is {version('torch')}"
        raise _refuse("parallel.schedule", parallel.schedule, reason, "interleaved")
    if parallel.recompute != "none" and parallel.schedule in V_SCHEDULES:
        # Their second half asks autograd once for each group of weights, and each time everything would run again.
        reason = f"with parallel.schedule={parallel.schedule} would recompute once for each group of weights"
        raise _refuse("parallel.recompute", parallel.recompute, reason, "none")
    _check_layers(parallel, config.model.n_layers, layout.world)
    _check_micro_batches(config, layout)


def _check_layers(parallel: ParallelConfig, n_layers: int, world: int) -> None:
    each, given = STAGES_PER_RANK[parallel.schedule], parallel.pp_layers
    if given is None:
        if n_layers < parallel.pp * each:
            legal = [pp for pp in range(1, parallel.pp) if world % pp == 0 and pp * each <= n_layers]
            reason = f"with parallel.schedule={parallel.schedule} has {parallel.pp * each} stages for {n_layers} layers"
            raise _refuse("parallel.pp", parallel.pp, reason, max(legal, default=1))
        return
    even = layer_counts(ParallelConfig(pp=parallel.pp, schedule=parallel.schedule), n_layers)
    several = parallel.schedule == "interleaved" and len(given) > parallel.pp and len(given) % parallel.pp == 0
    if not several and len(given) != parallel.pp * each:
        wanted = f"a multiple of {parallel.pp} above it" if parallel.schedule == "interleaved" else parallel.pp * each
        raise _refuse("parallel.pp_layers", given, f"has {len(given)} stages; {parallel.schedule} has {wanted}", even)
    if sum(given) != n_layers or min(given) < 1:
        raise _refuse("parallel.pp_layers", given, f"does not give {n_layers} layers to stages of at least 1", even)


def _check_micro_batches(config: Config, layout: Layout) -> None:
    now, per_rank = micro_batches(config, layout), config.train.global_batch // layout.dp
    why = _too_few(config.parallel, now)
    if not why:
        return
    sizes = [b for b in range(1, per_rank + 1) if per_rank % b == 0 and not _too_few(config.parallel, per_rank // b)]
    if sizes:
        nearest = min(sizes, key=lambda b: abs(b - (config.train.micro_batch or per_rank)))
        raise _refuse("train.micro_batch", config.train.micro_batch, why, nearest)
    least = next(n for n in range(per_rank + 1, 8 * (per_rank + layout.pp) + 1) if not _too_few(config.parallel, n))
    raise _refuse("train.global_batch", config.train.global_batch, why, least * layout.dp)


def _too_few(parallel: ParallelConfig, count: int) -> str:
    """Why `count` micro-batches are not enough for the schedule, or nothing."""
    least = {"1f1b": parallel.pp, "dualpipev": 2 * parallel.pp}.get(parallel.schedule, 1)
    what = f"makes {count} micro-batches; parallel.schedule={parallel.schedule} with parallel.pp={parallel.pp}"
    if count < least:
        return f"{what} needs at least {least}"
    rounds = max(1, count // parallel.pp)
    if parallel.schedule == "interleaved" and count % rounds:
        return f"{what} needs a multiple of its {rounds} rounds"
    return ""


def _refuse(key: str, value: object, reason: str, nearest: object) -> ValueError:
    return ValueError(f"{key}={value} {reason}; nearest legal value: {nearest}")
