"""The training run: what is built in which order, and the step loop. Reads top to bottom."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from torch import Tensor

from moetrain.checkpoint.agree import gather, on_rank0
from moetrain.checkpoint.alike import check_alike, check_same
from moetrain.checkpoint.lock import run_lock
from moetrain.checkpoint.resume import begin
from moetrain.checkpoint.saver import Saver
from moetrain.checkpoint.store import CheckpointStore
from moetrain.comm.collectives import sum_over
from moetrain.comm.seeds import seed_step
from moetrain.comm.stop import StopRequest
from moetrain.comm.watchdog import Watchdog
from moetrain.config.inherit import flat
from moetrain.config.schema import Config
from moetrain.data.batch import Batch, global_totals
from moetrain.data.loader import build_loader
from moetrain.loss import chunked_cross_entropy
from moetrain.mesh.build import build_meshes
from moetrain.mesh.layout import Layout
from moetrain.moe.layer import MoELayer
from moetrain.moe.types import TokenContext, Totals
from moetrain.observe.describe import describe
from moetrain.observe.load import load_metrics
from moetrain.observe.reduce import Told, read_step, reduce_step
from moetrain.observe.run_log import RunLog
from moetrain.observe.tape import RoutingTape
from moetrain.observe.throughput import Throughput
from moetrain.optim.adamw import fill_missing_gradients
from moetrain.optim.build import build_optimizer
from moetrain.optim.clip import clip_for, grad_norm
from moetrain.optim.guard import BadStepGuard
from moetrain.optim.schedule import set_lr
from moetrain.parallel.apply import build_parallel_model
from moetrain.parallel.cp import held_places
from moetrain.parallel.placement import ExpertPlacement
from moetrain.parallel.pp import Work
from moetrain.parallel.tp import sum_replicated_gradients
from moetrain.plan.params import flops_per_token

LOSS_CHUNK = 4096  # tokens whose logits exist at one time


class Trainer:
    """One run on this rank. Collective: every rank builds one with the same configuration."""

    def __init__(self, config: Config, layout: Layout, device: torch.device) -> None:
        self.config, self.layout, self.device = config, layout, device
        self.run_dir = Path(config.run.dir)
        self.rank0 = torch.distributed.get_rank() == 0

        self.lock = run_lock(self.run_dir)
        on_rank0(lambda: bool(self.lock.__enter__()))
        check_alike(config)
        self.watchdog = Watchdog(self.run_dir / "hangs" / on_rank0(lambda: token_hex(4)), config.run.hang_timeout_s)
        self.guard = BadStepGuard(config)
        kept = config.checkpoint
        self.store = CheckpointStore(self.run_dir, kept.keep, kept.keep_every, kept.keep_best)
        self.saver = Saver(self.store, config.checkpoint, device)
        self.meshes = build_meshes(layout, device.type)
        self.loader = build_loader(config, self.meshes.dp_rank, layout.dp)
        check_same(flat(self.loader.identity(), "data as read: "))
        self.place_S = held_places(config.train.seq_len, layout.cp, self.meshes.cp.get_local_rank())
        self.place_here_S = self.place_S.to(device)
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
        self.tape = RoutingTape(record, replay, self.moe_layers, config.model.moe, torch.distributed.get_rank(), device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer, self.schedule = build_optimizer(config.optim, list(self.model.named_parameters()))
        self.beginning = begin(config.run.resume, config.init, self.store, self.model, self.optimizer)
        self.step = self.beginning.step
        self.placement = ExpertPlacement(config, self.meshes, self.moe_layers, self.optimizer)
        if self.beginning.state:
            self.placement.load_state_dict(self.beginning.state)
            self.loader.load_state_dict(self.beginning.state["data"] | {"step": self.step})
            self.guard.bad = self.beginning.state.get("bad_steps", 0)
        on_rank0(lambda: self.store.set_aside_newer(self.beginning.keeps))
        if self.pipeline:
            self.pipeline.after_update()
        on_rank0(lambda: self.tape.start(self.step))
        self.log = RunLog(config, self.run_dir, self.rank0)
        self.throughput = Throughput(layout.world, device, partial(flops_per_token, config.model, config.train.seq_len))

    def fit(self) -> None:
        """Train from the current step to `train.steps`, or until a signal asks to stop; ends with a checkpoint."""
        train, every, first = self.config.train, self.config.checkpoint.every, self.step
        self.log.start(first, describe(self.config, self.layout, self.device.type, first, self.experts_choice))
        self.log.began(self.beginning.notes, self.beginning.skipped)
        if first < train.steps and first == 0 and train.eval_every:
            self.log.row({"step": 0, "val_loss": self.evaluate()})
        self.saver.prepare(self.model, self.optimizer)
        self.throughput.start()
        self.saver.newest = first if self.store.steps() else -1
        grace_s = self.config.checkpoint.grace_s
        row: dict[str, Any] = {}
        with self.watchdog, StopRequest(lambda name: self.watchdog.end_within(grace_s, name)) as stop:
            while self.step < train.steps:
                self.watchdog.beat(f"step {self.step + 1}")
                row, stopping = self.train_step(bool(stop))
                if not row:  # rolled back
                    continue
                last = stopping or self.step == train.steps
                with self.throughput.excluded():
                    # A stopped run evaluates only where one that goes on would: its metrics stay the same.
                    if train.eval_every and (self.step == train.steps or self.step % train.eval_every == 0):
                        self.watchdog.beat(f"validation after step {self.step}")
                        row["val_loss"] = self.evaluate()
                    self.log.row(row)
                    if last or (every and self.step % every == 0):
                        self.save(row.get("val_loss"))
                    self._tell_saves()
                if stopping:
                    self.log.note(f"stopped after step {self.step}: {stop.signal or 'asked by another rank'}")
                    break
            self._finish_saves(row)
        self.log.finish()

    def train_step(self, stop: bool = False) -> tuple[dict[str, Any], bool]:
        """One optimizer step. Returns its metrics row (empty: rolled back) and whether any rank was asked to stop."""
        seed_step(self.config.run.seed, self.step)
        batches = [self._mine(batch) for batch in self.loader.next_step()]
        totals = global_totals(batches, self.layout.dp, self.meshes.data)
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
        told = read_step(sums, norm, totals, self.guard.flag(sums.ce_loss, sums.loss, norm))
        sample_ids = [sample for batch in batches for sample in batch.sample_ids]
        multiplier = self.schedule(self.step, self.config.train.steps)
        wrong = self.guard.judge(told.wrong, told.values["ce_loss"], told.values["loss"], told.values["grad_norm"])
        if wrong:
            if self._bad_step(wrong, sample_ids) == "rollback":
                return {}, False
        else:
            clip_for(self.optimizer, self.parameters, self.config.train.max_grad_norm, norm)
            self.saver.before_update()
            for layer, count_E in zip(layers, sums.count_LE):
                for plugin in layer.plugins().values() if layer else ():
                    plugin.before_step(count_E)
            set_lr(self.optimizer, multiplier)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.pipeline:
            self.pipeline.after_update()
        self.step += 1
        self.log.samples(self.step, self.meshes.dp_rank, sample_ids)
        row = self._row(told, multiplier)
        if wrong:
            row["skipped"] = 1
        elif moved := self.placement.after_step(self.step, told.count_LE):
            row["experts_moved"] = moved
        if self.tape.replay is not None:
            row["routing_flips"] = int(sum_over(self.step_groups, flips))
        return row, told.stop

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss in nats per token over the first held-out rows; the same rows every time."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batches in self.loader.validation(self.config.train.eval_batches):
            for batch in map(self._mine, batches):
                work = replace(self._work(batch, global_totals([batch], self.layout.dp, self.meshes.data)), share=1.0)
                sums[0] += self.pipeline.evaluate(work) if self.pipeline else self._loss(work).double()
                if self.pipeline is None or self.pipeline.is_last:
                    sums[1] += batch.loss_mask_BS.sum()
        loss, tokens = sum_over(self.sum_groups, sums).tolist()
        if not tokens:
            raise ValueError("the held-out rows have no target that counts; set train.eval_every=0 or mask less")
        return loss / tokens

    def save(self, val_loss: float | None = None) -> None:
        """Publish a checkpoint of the current step, or begin to. val_loss: if it was evaluated at this step."""
        self.watchdog.beat(f"checkpoint of step {self.step}")
        self.guard.check_weights(self.parameters, self.step)
        known = val_loss if val_loss is not None and math.isfinite(val_loss) else None
        state = {"step": self.step, "data": self.loader.state_dict(), "val_loss": known, "bad_steps": self.guard.bad}
        state |= self.placement.state_dict()
        layout = {**self.layout.attention, **self.layout.expert, "world": self.layout.world}
        with self.placement.logical(self.saver.before_update):
            self.saver.save(self.step, self.model, self.optimizer, state, layout, self.log.config)

    def _tell_saves(self) -> None:
        for outcome in self.saver.finished():
            self.log.note(str(outcome))

    def _finish_saves(self, row: dict[str, Any]) -> None:
        """A run ends with a checkpoint of its last step; a save that failed is tried once more."""
        self.watchdog.beat("the last checkpoint")
        if self.saver.wait() != self.step:
            self._tell_saves()
            self.save(row.get("val_loss"))
            self.saver.wait()
        self._tell_saves()
        if self.saver.newest != self.step:
            raise RuntimeError(f"the run ends at step {self.step} and its last checkpoint is of {self.saver.newest}")

    def _bad_step(self, wrong: str, sample_ids: list[str]) -> str:
        """Skip or roll back, as `train.on_bad_step` says; raises RuntimeError to stop. Collective."""
        action, text = self.guard.verdict(self.step + 1, wrong, gather(lambda: (self.meshes.dp_rank, sample_ids)))
        self.log.note(text)
        for plugin in [plugin for layer in self.moe_layers.values() for plugin in layer.plugins().values()]:
            plugin.no_step()
        if action == "rollback":
            self._roll_back(text)
        return action

    def _roll_back(self, why: str) -> None:
        """To the newest intact checkpoint, but for the samples: those behind the bad batch follow."""
        self.saver.wait()
        path, damaged = self.store.newest_intact()
        if path is None:
            raise RuntimeError(f"{why}; no checkpoint to roll back to")
        self.log.began([], damaged)
        state = self.store.load(path, self.model, self.optimizer, checked=True)
        self.placement.load_state_dict(state)
        bad, self.step = self.step + 1, int(state["step"])
        self.loader.continue_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        if self.pipeline:
            self.pipeline.after_update()
        on_rank0(lambda: self.tape.start(self.step))
        self.log.roll_back(self.step, {"bad_step": bad, "why": why})

    def close(self) -> None:
        """Give back the threads, the logs, and the run directory."""
        self.saver.close()
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
        return row_B1 * self.config.train.seq_len + self.place_here_S

    def _grad_norm(self) -> Tensor:
        if self.pipeline is None:
            return grad_norm(self.parameters)
        return grad_norm(self.pipeline.counted(self.parameters), self.pipeline.group)

    def _row(self, told: Told, multiplier: float) -> dict[str, Any]:
        tokens, attended = told.values.pop("tokens"), told.values.pop("attended")
        row: dict[str, Any] = {"step": self.step, **told.values}
        row |= {"lr": self.config.optim["lr"] * multiplier, "tokens": int(tokens)}
        row |= self.throughput.step(int(tokens), attended / tokens)
        if exposed_s := self.saver.exposed_s():
            row["checkpoint_time_s"] = exposed_s
        if self.moe_numbers:
            counted = (told.count_LE, told.entropy_L, told.dropped_L)
            row |= load_metrics(self.moe_numbers, *counted, tokens, self.placement.rank_LE)
        return row
