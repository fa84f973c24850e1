"""What checkpoints cost: python -m moetrain.testing.checkpoint_speed RUN_DIR OUT.json [options] [overrides], under
torchrun. scripts/checkpoint_gpu.sh runs it.

Blocks of steps with one background save and blocks without take turns in one process, so that what else changes on
the machine changes for both. What a save costs is the difference; it is told as a share of 50 steps. Bytes are what a
rank writes; times are wall clock on rank 0 between barriers. Reading follows writing, so files may come from the page
cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from moetrain.checkpoint.agree import gather
from moetrain.comm.start import start_distributed, stop_distributed
from moetrain.config.compose import load_config
from moetrain.config.validate import validate
from moetrain.trainer import Trainer

EVERY = 50  # steps between saves that the share is told for
WARM_UP = 10
AFTER = 3  # steps after the last checkpoint, whose losses a resumed run must repeat


def main() -> None:
    """Measure; rank 0 writes the figures as JSON and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir")
    parser.add_argument("out")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no pair of blocks after this long")
    parser.add_argument("--block", type=int, default=EVERY, help="steps of a block; a save should end inside one")
    parser.add_argument("--only-blocks", action="store_true", help="no save in the loop and no load")
    arguments, overrides = parser.parse_known_args()
    begin = time.perf_counter()
    keys = [f"run.dir={arguments.run_dir}", "run.resume=never", "checkpoint.asynchronous=true", "checkpoint.every=1"]
    config = load_config(["experiment=first_gpu_run", "train.steps=100000", *overrides, *keys])
    device = start_distributed()
    trainer = Trainer(config, validate(config, dist.get_world_size()), device)
    for _ in range(WARM_UP):
        trainer.train_step()
    found: dict[str, Any] = {"ranks": trainer.layout.world, "layout": trainer.layout.expert, "block": arguments.block}
    if not arguments.only_blocks:
        found |= _speeds(trainer)
    found["prepare_s"] = _timed(trainer, lambda: trainer.saver.prepare(trainer.model, trainer.optimizer))
    trainer.save()  # the writer's own start is not what a save costs
    trainer.saver.wait()
    trainer.saver.finished()
    found |= _blocks(trainer, arguments.block, begin + arguments.seconds)
    trainer.save()
    trainer.saver.wait()
    rows = [trainer.train_step()[0] for _ in range(AFTER)]
    found["after"] = [{key: row[key] for key in ("step", "loss", "grad_norm")} for row in rows]
    if trainer.rank0:
        Path(arguments.out).write_text(json.dumps(found))
        print(_table(found), flush=True)
    trainer.close()
    stop_distributed()


def _speeds(trainer: Trainer) -> dict[str, Any]:
    """Seconds and bytes of one save in the loop and one load."""
    records: tuple[dict, dict, dict] = ({"step": trainer.step, "data": trainer.loader.state_dict()}, {}, {})
    pair = (trainer.model, trainer.optimizer)
    save_s = _timed(trainer, lambda: trainer.store.save(trainer.step, *pair, *records))
    path = trainer.store.latest()
    assert path is not None
    mine = sum(
        file.stat().st_size for part in ("model", "optim") for file in (path / part).glob(f"__{dist.get_rank()}_*")
    )
    load_s = _timed(trainer, lambda: trainer.store.load(path, *pair))
    of_rank = gather(lambda: mine)
    return {"bytes_per_rank": max(of_rank), "save_s": save_s, "load_s": load_s}


def _blocks(trainer: Trainer, steps: int, until: float) -> dict[str, Any]:
    seconds: dict[bool, list[float]] = {True: [], False: []}
    exposed, written = [], []
    go_on = True
    while go_on and len(seconds[True]) < 4:
        for saves in (False, True):
            trainer.saver.exposed_s()
            rows: list[Any] = []

            def block(saves: bool = saves, rows: list[Any] = rows) -> None:
                if saves:
                    trainer.save()
                rows += [trainer.train_step()[0] for _ in range(steps)]

            seconds[saves].append(_timed(trainer, block))
            if saves:
                exposed.append(sum(row.get("checkpoint_time_s", 0.0) for row in rows))
                trainer.saver.wait()
                written += [outcome.seconds if outcome.path else float("nan") for outcome in trainer.saver.finished()]
        if trainer.rank0:
            print(f"{steps} steps: {seconds[False][-1]:.2f} s, with a save {seconds[True][-1]:.2f} s", flush=True)
        go_on = gather(lambda: time.perf_counter() < until)[0]
    tokens = trainer.config.train.global_batch * trainer.config.train.seq_len
    # A save's cost is taken within pairs: the first blocks of a process are slower, with a save or without.
    plain_s = median(seconds[False]) / steps * EVERY
    cost_s = median(with_save - without for with_save, without in zip(seconds[True], seconds[False]))
    return {
        "tokens_per_s_without": EVERY * tokens / plain_s,
        "tokens_per_s_with": EVERY * tokens / (plain_s + cost_s),
        "exposed_s": exposed,
        "written_s": written,
        "block_without_s": seconds[False],
        "block_with_s": seconds[True],
    }


def _timed(trainer: Trainer, work: Callable[[], object]) -> float:
    def meet() -> float:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        gather(lambda: None)
        return time.perf_counter()

    begin = meet()
    work()
    return meet() - begin


def _table(found: dict[str, Any]) -> str:
    share = found["tokens_per_s_with"] / found["tokens_per_s_without"]
    lines: dict[str, Any] = {"ranks": found["ranks"]}
    if "save_s" in found:
        size = found["bytes_per_rank"] / 1e9
        lines |= {
            "checkpoint": f"{size:.2f} GB per rank",
            "save in the loop": f"{found['save_s']:.2f} s, {size / found['save_s']:.2f} GB/s per rank",
            "load, verified": f"{found['load_s']:.2f} s, {size / found['load_s']:.2f} GB/s per rank",
        }
    lines |= {
        "host memory taken once": f"{found['prepare_s']:.2f} s",
        "background save: exposed": ", ".join(f"{s:.3f}" for s in found["exposed_s"]) + " s",
        "background save: written in": ", ".join(f"{s:.1f}" for s in found["written_s"]) + " s",
        f"blocks of {found['block']} steps without": ", ".join(f"{s:.2f}" for s in found["block_without_s"]) + " s",
        f"blocks of {found['block']} steps with a save": ", ".join(f"{s:.2f}" for s in found["block_with_s"]) + " s",
        "tokens/s without saves": f"{found['tokens_per_s_without']:,.0f}",
        f"tokens/s with a save every {EVERY}": f"{found['tokens_per_s_with']:,.0f}, {share:.2%} of without",
    }
    return "\n".join(f"{key:<30} {value}" for key, value in lines.items())


if __name__ == "__main__":
    main()
