"""The training run: what is built in which order, and the step loop. Reads top to bottom."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.checkpoint.agree import on_rank0
from moetrain.checkpoint.lock import RunLock
from moetrain.checkpoint.store import CheckpointStore, load_weights, resolve
from moetrain.comm.collectives import all_reduce_sum
from moetrain.comm.stop import StopRequest
from moetrain.config.schema import Config
from moetrain.data.batch import Batch
from moetrain.data.loader import Loader
from moetrain.loss import chunked_cross_entropy
from moetrain.mesh.build import build_meshes
from moetrain.mesh.layout import Layout
from moetrain.moe.layer import MoELayer
from moetrain.moe.types import TokenContext, Totals
from moetrain.observe.load import load_metrics
from moetrain.observe.reduce import StepSums, reduce_step
from moetrain.observe.run_log import RunLog
from moetrain.observe.tape import RoutingTape
from moetrain.observe.throughput import Throughput
from moetrain.optim.adamw import fill_missing_gradients
from moetrain.optim.build import build_optimizer
from moetrain.optim.clip import check_finite, clip_, grad_norm
from moetrain.optim.schedule import set_lr
from moetrain.parallel.apply import build_parallel_model
from moetrain.parallel.cp import held_places
from moetrain.parallel.pp import Work
from moetrain.parallel.tp import sum_replicated_gradients
from moetrain.plan.params import count, flops_per_token

LOSS_CHUNK = 2048  # tokens whose logits exist at one time


class Trainer:
    """One run on this rank. Collective: every rank builds one with the same configuration."""

    def __init__(self, config: Config, layout: Layout, device: torch.device) -> None:
        self.config, self.layout, self.device = config, layout, device
        self.run_dir = Path(config.run.dir)
        self.rank0 = torch.distributed.get_rank() == 0

        self.lock = RunLock(self.run_dir)
        on_rank0(lambda: bool(self.lock.__enter__()))
        self.store = CheckpointStore(self.run_dir, keep=config.checkpoint.keep)
        self.meshes = build_meshes(layout, device.type)
        self.loader = self._build_loader()
        self.place_S = held_places(config.train.seq_len, layout.cp, self.meshes.cp.get_local_rank())
        built = build_parallel_model(config, self.meshes, device)
        self.model, self.pipeline, self.loss_names = built.model, built.pipeline, built.loss_names
        self.experts_choice = built.experts
        self.moe_layers = {
            int(name.split(".")[1]): module
            for name, module in self.model.named_modules()
            if isinstance(module, MoELayer)
        }
        self.moe_numbers = [layer for layer in range(config.model.n_layers) if config.model.is_moe(layer)]
        stages = [self.pipeline.group] if self.pipeline else []
        self.sum_groups = [self.meshes.data, *stages]  # ranks whose losses add up
        self.step_groups = [self.meshes.tokens, *stages]  # ranks whose routing adds up
        record, replay = config.router.get("record", ""), config.router.get("replay", "")
        self.tape = RoutingTape(record, replay, self.moe_layers, torch.distributed.get_rank(), device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer, self.schedule = build_optimizer(config.optim, list(self.model.named_parameters()))
        self.step = self._restore()
        if self.pipeline:
            self.pipeline.after_update()
        on_rank0(lambda: self.tape.start(self.step))
        self.log = RunLog(config, self.run_dir, self.rank0)
        flops = flops_per_token(config.model, config.train.seq_len)
        self.throughput = Throughput(layout.world, device, flops)

    def fit(self) -> None:
        """Train from the current step to `train.steps`, or until a signal asks to stop; ends with a checkpoint."""
        train, every = self.config.train, self.config.checkpoint.every
        first = self.step
        self.log.start(first, self._describe())
        if first < train.steps and first == 0 and train.eval_every:
            self.log.row({"step": 0, "val_loss": self.evaluate()})
        self.throughput.start()
        saved = first if self.store.steps() else -1
        with StopRequest() as stop:
            while self.step < train.steps:
                row, stopping = self.train_step(bool(stop))
                last = stopping or self.step == train.steps
                with self.throughput.excluded():
                    if train.eval_every and (last or self.step % train.eval_every == 0):
                        row["val_loss"] = self.evaluate()
                    self.log.row(row)
                    if last or (every and self.step % every == 0):
                        self.save()
                        saved = self.step
                if stopping:
                    self.log.note(f"stopped after step {self.step}: {stop.signal or 'asked by another rank'}")
                    break
        if saved != self.step:
            self.save()
        self.log.finish()

    def train_step(self, stop: bool = False) -> tuple[dict[str, Any], bool]:
        """One optimizer step. Returns its metrics row and whether any rank was asked to stop."""
        batches = [self._mine(batch) for batch in self.loader.next_step()]
        totals = self._totals(batches)
        self.tape.begin(self.step + 1, self.config.train.global_batch * self.config.train.seq_len)
        work = [self._work(batch, totals, number) for number, batch in enumerate(batches)]
        ce_loss = self.pipeline.train(work) if self.pipeline else self._accumulate(work)
        layers = [self.moe_layers.get(number) for number in self.moe_numbers]
        ce_loss = ce_loss if self.meshes.tp_rank == 0 else torch.zeros_like(ce_loss)  # tp ranks hold the same loss
        sums = reduce_step(ce_loss, stop, layers, self.loss_names, self.config.model.moe.n_experts, self.step_groups)
        flips = self.tape.finish(self.step + 1)
        fill_missing_gradients(self.parameters)
        sum_replicated_gradients(self.parameters, self.meshes)
        norm = self._grad_norm()
        sample_ids = [sample for batch in batches for sample in batch.sample_ids]
        check_finite(norm, self.step + 1, sample_ids)
        clip_(self.parameters, self.config.train.max_grad_norm, norm)
        for layer, count_E in zip(layers, sums.count_LE):
            for plugin in layer.plugins().values() if layer else ():
                plugin.before_step(count_E)
        multiplier = self.schedule(self.step, self.config.train.steps)
        set_lr(self.optimizer, multiplier)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.pipeline:
            self.pipeline.after_update()
        self.step += 1
        self.log.samples(self.step, self.meshes.dp_rank, sample_ids)
        row = self._row(sums, norm, totals, multiplier)
        if self.tape.replay is not None:
            row["routing_flips"] = int(_sum_over(self.step_groups, flips))
        return row, sums.stop.item() > 0

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss in nats per token over the first held-out rows; the same rows every time."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batches in self.loader.validation(self.config.train.eval_batches):
            for batch in map(self._mine, batches):
                work = replace(self._work(batch, self._totals([batch])), share=1.0)
                sums[0] += self.pipeline.evaluate(work) if self.pipeline else self._loss(work).double()
                if self.pipeline is None or self.pipeline.is_last:
                    sums[1] += batch.loss_mask_BS.sum()
        loss, tokens = _sum_over(self.sum_groups, sums).tolist()
        if not tokens:
            raise ValueError("the held-out rows have no target that counts; set train.eval_every=0 or mask less")
        return loss / tokens

    def save(self) -> None:
        """Publish a checkpoint of the current step."""
        state = {"step": self.step, "data": self.loader.state_dict()}
        layout = {**self.layout.attention, **self.layout.expert, "world": self.layout.world}
        self.store.save(self.step, self.model, self.optimizer, state, layout, self.log.config)
        self.log.note(f"checkpoint of step {self.step} in {self.store.root}")

    def close(self) -> None:
        """Give back the data thread, the logs, and the run directory."""
        self.loader.close()
        self.log.close()
        if self.rank0:
            self.lock.release()

    def _mine(self, batch: Batch) -> Batch:
        """The positions that this rank keeps of the rows that its cp group shares."""
        return batch.take(self.place_S).to(self.device)

    def _accumulate(self, work: list[Work]) -> Tensor:
        ce_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro in work:
            loss = self._loss(micro)
            loss.backward()  # a sum over micro-batches and ranks: N is the whole global batch's
            ce_loss += loss.detach()
        return ce_loss

    def _loss(self, work: Work) -> Tensor:
        return self.model(work.token_BS, work.context, work.criterion) / work.share

    def _work(self, batch: Batch, totals: Totals, number: int = 0) -> Work:
        where_BS = self._index(batch, number)
        context = TokenContext(batch.token_BS, batch.position_BS, batch.document_BS, totals, self.step, where_BS)
        targets = {"target_T": batch.target_BS.flatten(), "mask_T": batch.loss_mask_BS.flatten()}
        criterion = partial(chunked_cross_entropy, **targets, chunk=LOSS_CHUNK, group=self.meshes.vocabulary)
        return Work(batch.token_BS, context, criterion, totals.loss_tokens)

    def _index(self, batch: Batch, number: int) -> Tensor:
        """Where each token of micro-step `number` stands in the global batch: the order of data/loader.py."""
        rows = batch.token_BS.shape[0]
        first = (number * self.layout.dp + self.meshes.dp_rank) * rows
        row_B1 = torch.arange(first, first + rows, device=self.device)[:, None]
        return row_B1 * self.config.train.seq_len + self.place_S.to(self.device)

    def _grad_norm(self) -> Tensor:
        if self.pipeline is None:
            return grad_norm(self.parameters)
        return grad_norm(self.pipeline.counted(self.parameters), self.pipeline.group)

    def _totals(self, batches: list[Batch]) -> Totals:
        local = torch.stack(
            [
                torch.stack([b.loss_mask_BS.sum() for b in batches]).sum(),
                torch.stack([(b.document_BS >= 0).sum() for b in batches]).sum(),
            ]
        ).double()
        loss_tokens, tokens = all_reduce_sum(local, self.meshes.data).clamp(min=1)
        rows = sum(len(b.sample_ids) for b in batches) * self.layout.dp
        return Totals(loss_tokens, tokens, rows, len(batches))

    def _row(self, sums: StepSums, norm: Tensor, totals: Totals, multiplier: float) -> dict[str, Any]:
        terms = {"loss": sums.loss, "ce_loss": sums.ce_loss, **sums.losses}
        values = torch.stack([*terms.values(), norm.double(), totals.tokens]).tolist()
        row: dict[str, Any] = {"step": self.step, **dict(zip(terms, values)), "grad_norm": values[-2]}
        row |= {"lr": self.config.optim["lr"] * multiplier, "tokens": int(values[-1])}
        row |= self.throughput.step(int(values[-1]))
        if self.moe_numbers:
            dropless = torch.zeros_like(sums.entropy_L)
            row |= load_metrics(self.moe_numbers, sums.count_LE, sums.entropy_L, dropless, values[-1])
        return row

    def _restore(self) -> int:
        """Load what `run.resume` or `init.from` names; returns the steps already done."""
        resume, start_from = self.config.run.resume, self.config.init.get("from", "")
        if self.rank0:
            self.store.clean()
        path = on_rank0(lambda: self._resume_path(resume))
        if path is None:
            if start_from:
                load_weights(on_rank0(lambda: resolve(start_from)), self.model)
            on_rank0(lambda: self.store.set_aside_newer(-1))  # a fresh start supersedes what an older run left here
            return 0
        state = self.store.load(path, self.model, self.optimizer)
        self.loader.load_state_dict(state["data"])
        on_rank0(lambda: self.store.set_aside_newer(state["step"]))
        return int(state["step"])

    def _resume_path(self, resume: str) -> Path | None:
        if resume == "never":
            return None
        return self.store.latest() if resume == "auto" else resolve(resume)

    def _build_loader(self) -> Loader:
        config = self.config
        return Loader(
            config.data,
            seq_len=config.train.seq_len,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch or config.train.global_batch // self.layout.dp,
            dp_rank=self.meshes.dp_rank,
            dp_size=self.layout.dp,
            seed=config.run.seed,
            vocab_size=config.model.vocab_size,
        )

    def _describe(self) -> dict[str, Any]:
        parameters = count(self.config.model)
        degrees = {**self.layout.attention, **self.layout.expert}
        chosen = {"experts": self.experts_choice} if self.experts_choice else {}
        return {
            "model": f"{self.config.model.name}: {parameters.total:,} parameters, {parameters.active:,} active",
            "ranks": f"{self.layout.world} on {self.device.type}",
            "layout": " ".join(f"{axis}={size}" for axis, size in degrees.items() if size > 1) or "one rank",
            **chosen,
            "run": str(self.run_dir),
            "from": f"step {self.step}",
            "train": " ".join(f"{k}={v}" for k, v in asdict(self.config.train).items()),
        }


def _sum_over(groups: list[ProcessGroup], x: Tensor) -> Tensor:
    for group in groups:
        x = all_reduce_sum(x, group)
    return x
