"""Run by test_triton_shards.py in a process that interprets Triton: training with experts=triton on divided weights."""

import sys
import tempfile
from pathlib import Path

from moetrain.testing import run_ranks
from moetrain.testing.small import SMALL_MODEL, write_documents
from moetrain.testing.trajectory import compare, record

STEPS, BAR = 1, 1e-5
TINY = ["model.n_layers=2", "train.seq_len=8", "train.global_batch=4", "train.precision=fp32", "train.micro_batch=1"]
LAYOUTS = {
    "ep2 etp2": (4, ["parallel.ep=2", "parallel.etp=2"]),
    "ep2 recomputed": (2, ["parallel.ep=2", "dispatch.chunks=2", "parallel.recompute=full", "router.kernels=triton"]),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        options = [*SMALL_MODEL, *write_documents(where, count=60), *TINY]
        first = [*options, f"run.dir={where / 'reference'}", "experts=reference", f"router.record={where / 'tape'}"]
        expected = run_ranks(record, 1, first, STEPS)[0][0]
        for layout, (world, more) in LAYOUTS.items():
            run_dir = f"run.dir={where / layout.replace(' ', '-')}"
            replay = ["experts=triton", f"router.replay={where / 'tape'}", run_dir, *more]
            run = run_ranks(record, world, [*options, *replay], STEPS, timeout_s=200)[0][0]
            difference = compare(run, expected)
            # Sums of at most 64 products in fp32.
            if max(difference.loss, difference.norm, difference.gradient) > BAR:
                sys.exit(f"{layout}: {difference}")
    print("equal")


if __name__ == "__main__":
    main()
