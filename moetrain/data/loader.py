"""Global samples to this rank's batches, the same samples under every layout.

Optimizer step s uses samples [s G, (s + 1) G), G = global_batch; after a roll-back those from a later sample on. Its
micro-step j covers micro_batch * dp of them from j micro_batch dp on, of which data-parallel rank r takes micro_batch
from r micro_batch on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.config.data import DataConfig, check_data
from moetrain.config.schema import Config
from moetrain.data.batch import PADDING, Batch, Row, make_batch
from moetrain.data.mixture import Mixture
from moetrain.data.sources import HeldOut, SourceOpener
from moetrain.data.tokenizer import check_vocabulary, load_tokenizer

_VERSION = 1
_OF_STREAMS = ("reading", "sampled", "revision")  # what a checkpoint says beside names and sizes (data/sources.py)


class Loader:
    """Reads one step ahead in one background thread. Every rank opens the same sources; the first tokenises them.

    global_batch: rows of a step over all ranks; micro_batch: rows of a micro-step on one rank. Raises ValueError,
    naming key, source, row and value, for an impossible configuration and for data that cannot be trained on: mapped
    data here, streamed data by the `next_step` that would have used it.
    """

    def __init__(
        self, config: DataConfig, *, seq_len: int, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int,
        seed: int, vocab_size: int,
    ) -> None:  # fmt: skip
        check_data(config)
        assert 0 <= dp_rank < dp_size
        block = micro_batch * dp_size
        if global_batch < 1 or block < 1 or global_batch % block:
            legal = max(block, round(global_batch / max(block, 1)) * block)
            raise ValueError(
                f"train.global_batch={global_batch} is not a multiple of train.micro_batch={micro_batch} x {dp_size} "
                f"data-parallel ranks; the nearest that is: {legal}"
            )
        if seq_len < 1:
            raise ValueError(f"train.seq_len={seq_len} must be at least 1")
        self.tokenizer = load_tokenizer(config.tokenizer, config.eos_token)
        check_vocabulary(self.tokenizer, vocab_size)
        opener = SourceOpener(config, self.tokenizer, seq_len, seed, _cache_dir(config))
        self._sources, held_out = opener.training()
        of_streams = {kind: getattr(opener, kind) for kind in _OF_STREAMS}
        self._of_streams = {kind: by_source for kind, by_source in of_streams.items() if by_source}
        self._held_out: dict[str, HeldOut] = opener.validation() or held_out
        self._mixture = Mixture(config, seed)
        self._seq_len, self._documents, self._seed = seq_len, config.documents, seed
        self._global_batch = global_batch
        # Slots of a global batch that are this rank's, a row per micro-step.
        slots = np.arange(global_batch).reshape(-1, dp_size, micro_batch)
        self._slots_JB = slots[:, dp_rank, :]
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: Future[tuple[list[Batch], dict[str, Any]]] | None = None
        self._step, self._samples = 0, 0
        self._counts = dict.fromkeys(self._sources, 0)
        self._beginnings = {name: source.state_dict() for name, source in self._sources.items()}
        self._state = self._snapshot()

    def next_step(self) -> list[Batch]:
        """All micro-batches of this rank for the next optimizer step."""
        ahead = self._ahead or self._pool.submit(self._produce)
        self._ahead = None
        batches, self._state = ahead.result()
        self._ahead = self._pool.submit(self._produce)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The cursor after the steps handed out; JSON-able, equal on every rank and under every layout."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the steps of `state`, on any layout.

        Sources may have been added since. Raises ValueError, naming both, where the data is otherwise not the same.
        """
        self._drain()
        self._check_same(state)
        self._step, self._samples = state["step"], state["samples"]
        for name, source in self._sources.items():
            known = state["sources"].get(name, {"count": 0, "reader": self._beginnings[name]})
            self._counts[name] = known["count"]
            source.load_state_dict(known["reader"])
        self._state = self._snapshot()

    def continue_at(self, step: int) -> None:
        """Hands out the samples behind the last ones, but as those of optimizer step `step` and its followers.

        A roll-back takes steps back and no samples; what was read ahead may be of another stage of the mixture.
        """
        self.load_state_dict(self._state | {"step": step})

    def identity(self) -> dict[str, Any]:
        """What `fingerprint` is made of: the same on all ranks, and where a run is resumed."""
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "seq_len": self._seq_len,
            "documents": self._documents,
            "seed": self._seed,
            "sources": {name: source.fingerprint for name, source in self._sources.items()},
            **self._of_streams,
        }

    def fingerprint(self) -> str:
        """64 hex digits that change when any training row could: tokenizer, content, seed, row length, documents."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def validation(self, n_batches: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each of the first global batches (at most `n_batches`) of held-out rows.

        The sources take turns; the rows are the same at every call. The last batch is filled with padding rows, so all
        ranks run equally many micro-steps. Raises ValueError when nothing is held out.
        """
        wanted = n_batches * self._global_batch
        rows = self._validation_rows(wanted)
        if wanted and not rows:
            raise ValueError(
                f"nothing is held out of {', '.join(self._sources)}: raise data.validation_percent, name sources under "
                "data.validation, or set train.eval_every=0"
            )
        for start in range(0, len(rows), self._global_batch):
            batches = []
            for slots_B in self._slots_JB + start:
                picked = [rows[i] if i < len(rows) else None for i in slots_B]
                batches.append(self._batch([self._held_out[p[0]].row(p[1]) if p else PADDING for p in picked]))
            yield batches

    def close(self) -> None:
        """Ends the background thread; the loader is of no use afterwards."""
        self._drain()
        self._pool.shutdown(wait=True)

    def _produce(self) -> tuple[list[Batch], dict[str, Any]]:
        """The step the cursor stands at, and the cursor behind it. One at a time: it moves the cursor."""
        drawn_N = self._mixture.draw(self._step, self._samples + np.arange(self._global_batch))
        mine_N = np.zeros(self._global_batch, dtype=bool)
        mine_N[self._slots_JB.reshape(-1)] = True
        rows: dict[int, Row] = {}
        for number, (name, source) in enumerate(self._sources.items()):
            slots = np.flatnonzero(drawn_N == number)
            if len(slots) == 0:
                continue
            read = source.read(self._counts[name], mine_N[slots])
            rows.update({int(slot): row for slot, row in zip(slots, read) if row is not None})
            self._counts[name] += len(slots)
        batches = [self._batch([rows[int(slot)] for slot in slots_B]) for slots_B in self._slots_JB]
        self._step += 1
        self._samples += self._global_batch
        return batches, self._snapshot()

    def _batch(self, rows: list[Row]) -> Batch:
        for row in rows:
            largest = int(row.tokens_L.max()) if len(row.tokens_L) else -1
            if largest >= self.tokenizer.vocab_size:  # a mapped file damaged after it was checked
                source, epoch, number = row.sample_id.rsplit(":", 2)
                raise ValueError(
                    f"data source {source}: row {number} of epoch {epoch} has the id {largest}, outside the vocabulary "
                    f"of data.tokenizer={self.tokenizer.name!r}, [0, {self.tokenizer.vocab_size})"
                )
        return make_batch(rows, self._seq_len, self._documents)

    def _validation_rows(self, limit: int) -> list[tuple[str, int]]:
        counts = {name: held.count(limit) for name, held in self._held_out.items()}
        turns = range(max(counts.values(), default=0))
        return [(name, turn) for turn in turns for name in counts if turn < counts[name]][:limit]

    def _snapshot(self) -> dict[str, Any]:
        sources = {name: {"count": self._counts[name], "reader": s.state_dict()} for name, s in self._sources.items()}
        return {
            "version": _VERSION,
            "step": self._step,
            "samples": self._samples,
            "sources": sources,
            "data": self.identity(),
            "fingerprint": self.fingerprint(),
        }

    def _check_same(self, state: dict[str, Any]) -> None:
        if state.get("version") != _VERSION:
            raise ValueError(
                f"the checkpoint's data cursor has version {state.get('version')}, this one reads {_VERSION}"
            )
        saved, own = state["data"], self.identity()
        plain = [k for k in own if k not in ("sources", *_OF_STREAMS)]
        differing = [f"{k}: {saved[k]} there, {own[k]} here" for k in plain if saved[k] != own[k]]
        for name, fingerprint in saved["sources"].items():
            here = own["sources"].get(name, "absent (give it weight 0 rather than remove it)")
            if here != fingerprint:
                differing.append(f"source {name}: {fingerprint} there, {here} here")
        for kind in _OF_STREAMS:  # not in the first checkpoints
            for name, there in saved.get(kind, {}).items():
                here = own.get(kind, {}).get(name, there)
                if here != there:
                    differing.append(f"source {name}: {there} there, {here} here")
        if differing:
            raise ValueError(
                f"the checkpoint was trained on other data: fingerprint {state['fingerprint']} there, "
                f"{self.fingerprint()} here; {'; '.join(differing)}"
            )

    def _drain(self) -> None:
        """Waits for the step being read ahead and drops it, error or not."""
        if self._ahead is not None and not self._ahead.cancel():
            self._ahead.exception()
        self._ahead = None


def build_loader(config: Config, dp_rank: int, dp_size: int) -> Loader:
    """The loader of a run, for one of its data-parallel ranks."""
    return Loader(
        config.data,
        seq_len=config.train.seq_len,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch or config.train.global_batch // dp_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        seed=config.run.seed,
        vocab_size=config.model.vocab_size,
    )


def _cache_dir(config: DataConfig) -> Path:
    chosen = config.cache_dir or os.environ.get("MOETRAIN_CACHE") or "~/.cache/moetrain"
    return Path(chosen).expanduser()
