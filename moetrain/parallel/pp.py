"""Pipeline parallelism: the decoder cut into stages, run by torch.distributed.pipelining's schedules.

Token ids, positions, and documents are read by every rank of a pipeline, so only hidden states (and a router's carry)
travel between stages. A micro-batch's loss is already its part of the global objective: gradients add up, and nothing
is scaled by the number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble
from torch.distributed.tensor import DTensor

from moetrain.comm.shards import local
from moetrain.config.pipeline import micro_batches, rank_of_stage, stage_layers
from moetrain.config.schema import Config
from moetrain.mesh.build import Meshes
from moetrain.mesh.layout import axis_groups
from moetrain.model.decoder import Criterion, Decoder
from moetrain.moe.layer import MoELayer
from moetrain.moe.types import TokenContext
from moetrain.parallel.ep import COMPUTE_DTYPE
from moetrain.parallel.tp import VocabEmbedding

SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


@dataclass(frozen=True)
class Work:
    """One micro-batch: what Decoder.forward takes on every stage. share: the loss counts 1/share of the objective."""

    token_BS: Tensor
    context: TokenContext
    criterion: Criterion
    share: Tensor | float = 1.0


class Stage(Decoder):
    """One stage: a part of `whole`, of which it shares the modules and all else that a forward pass needs.

    forward(hidden, carry?) of micro-batch number `micro` -> what the next stage receives, or the loss, fp64 0-d.
    """

    def __init__(self, whole: Decoder, index: int, last: bool, layers: range) -> None:
        nn.Module.__init__(self)
        parts: dict[str, nn.Module | None] = {"embed": whole.embed if index == 0 else None, "norm": None, "head": None}
        if last:
            parts |= {"norm": whole.norm, "head": whole.head}
            if whole.config.tie_embeddings:
                parts["embed"] = whole.embed
        shared = {name: value for name, value in vars(whole).items() if not name.startswith("_") and name not in parts}
        self.__dict__.update(shared)
        for name, part in parts.items():
            self.add_module(name, part)
        self.index, self.last = index, last
        self.work: Sequence[Work] = ()
        self.micro = 0
        self.layers = nn.ModuleDict({str(i): whole.layers[str(i)] for i in layers})

    def __call__(self, *received: Tensor | None) -> Any:
        # On a GPU, FSDP of torch 2.11 takes it that a module has an argument.
        return super().__call__(*(received or (None,)))

    def forward(self, *received: Tensor | None) -> Any:  # type: ignore[override]
        work = self.work[self.micro]
        tensors = tuple(tensor for tensor in received if tensor is not None)
        out = super().forward(work.token_BS, work.context, work.criterion, tensors)
        if not self.last:
            return out
        assert isinstance(out, Tensor)
        return out.double() / work.share


class _Runner(PipelineStage):
    """Tells the stage which micro-batch it is.

    Not as an argument: schedules pass tensors, a number in one would be waited for, and torch 2.11's V schedules ask
    every argument for its gradient.
    """

    def forward_one_chunk(self, fwd_chunk_id: int, *rest: Any, **more: Any) -> Any:
        stage: Any = self.submod
        stage.micro = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *rest, **more)


def keep_stages(model: Decoder, config: Config, meshes: Meshes) -> list[int]:
    """Drop from `model` what no stage of this rank needs; returns this rank's stages. Names stay the whole model's."""
    parallel, spans = config.parallel, stage_layers(config.parallel, config.model.n_layers)
    rank = meshes.attention.get_local_rank("pp")
    mine = [index for index in range(len(spans)) if rank_of_stage(parallel, index) == rank]
    needed = {str(layer) for index in mine for layer in spans[index]}
    for name in [name for name in model.layers if name not in needed]:
        del model.layers[name]
    first, last = 0 in mine, len(spans) - 1 in mine
    if not first and not (last and config.model.tie_embeddings):
        model.embed = None  # type: ignore[assignment]
    if not last:
        model.norm, model.head = None, None  # type: ignore[assignment]
    return mine


def cut(model: Decoder, config: Config, mine: list[int]) -> list[Stage]:
    """This rank's stages. Where the first and the last one share this rank and the embedding, the last has a copy."""
    spans = stage_layers(config.parallel, config.model.n_layers)
    stages = [Stage(model, index, index == len(spans) - 1, spans[index]) for index in mine]
    if config.model.tie_embeddings and len(stages) > 1 and stages[-1].last and stages[0].index == 0:
        first: Any = stages[0].embed
        with torch.device("meta"):  # FSDP gathers a parameter for one stage only
            copy = nn.Embedding(config.model.vocab_size, config.model.d_model)
        divided = isinstance(first, VocabEmbedding)
        stages[-1].embed = VocabEmbedding(copy, first.tp) if divided else copy  # type: ignore[assignment]
    return stages


class Pipeline:
    """Runs this rank's stages. Collective: all ranks of a pipeline call each method together.

    group: the pipeline's ranks, first stage first. is_last: the rank whose stage takes the loss.
    """

    def __init__(
        self, config: Config, meshes: Meshes, stages: list[Stage], carry_width: int, device: torch.device
    ) -> None:
        self.parallel, self.stages, self.device = config.parallel, stages, device
        self.group: dist.ProcessGroup = meshes.attention.get_group("pp")
        self.n_stages = len(stage_layers(config.parallel, config.model.n_layers))
        self.is_last = stages[-1].last
        self._shapes = _Shapes(config, meshes, carry_width)
        runners = [self._runner(stage) for stage in stages]
        schedule = SCHEDULES[config.parallel.schedule]
        self._schedule = schedule(
            runners[0] if schedule is Schedule1F1B else runners,
            n_microbatches=micro_batches(config, meshes.layout),
            loss_fn=lambda loss, _: loss,
            scale_grads=False,  # the loss is a sum's part, not a mean
        )
        self._tied = _TiedEmbedding(config, meshes, stages)

    def train(self, work: Sequence[Work]) -> Tensor:
        """Forward and backward of all micro-batches, to .grad. Returns the loss, 0 where it is not taken."""
        losses: list[Tensor] = []
        for stage in self.stages:
            stage.work = work
        target = torch.empty(len(work))  # the schedule wants one to split; the loss has its own targets
        self._schedule.step(target=target, losses=losses, return_outputs=False)
        for stage in self.stages:
            stage.work = ()
        self._tied.sum_gradients()
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        return sum((loss.detach().double().sum() for loss in losses), start=zero)

    @torch.no_grad()
    def evaluate(self, work: Work) -> Tensor:
        """The loss of one micro-batch, forward only; 0 where it is not taken."""
        local: tuple[Tensor, ...] = ()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for stage in self.stages:
            before = stage.index - 1
            if before >= 0 and not self._is_mine(before):
                local = tuple(self._shapes.buffer(stage.index, self.device))
                for tensor in local:
                    dist.recv(tensor, group=self.group, group_src=rank_of_stage(self.parallel, before))
            stage.work, stage.micro = [work], 0
            out = stage(*local)
            stage.work = ()
            local = out if isinstance(out, tuple) else (out,)
            if stage.last:
                loss += out.double().sum()
            elif not self._is_mine(stage.index + 1):
                for tensor in local:
                    after = rank_of_stage(self.parallel, stage.index + 1)
                    dist.send(tensor.contiguous(), group=self.group, group_dst=after)
        return loss

    def counted(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Those whose gradient this rank counts in the norm: a copy of the embedding is counted with the original."""
        return [p for p in parameters if p is not self._tied.uncounted]

    def after_update(self) -> None:
        """The optimizer has run."""
        self._tied.copy_weight()

    def _is_mine(self, index: int) -> bool:
        return any(stage.index == index for stage in self.stages)

    def _runner(self, stage: Stage) -> PipelineStage:
        # Without example tensors the schedule would run stages once on whatever memory holds, with our collectives.
        out = torch.empty((), dtype=torch.float64, device="meta", requires_grad=True)
        return _Runner(
            stage,
            stage.index,
            self.n_stages,
            self.device,
            input_args=tuple(self._shapes.example(stage.index)),
            output_args=(out,) if stage.last else tuple(self._shapes.example(stage.index + 1)),
            group=self.group,
        )


class _Shapes:
    """What travels into each stage: hidden states, and the carry once a MoE layer whose router has one came before."""

    def __init__(self, config: Config, meshes: Meshes, carry_width: int) -> None:
        layout, train = meshes.layout, config.train
        rows = train.micro_batch or train.global_batch // layout.dp
        stretch = train.seq_len // (layout.cp * layout.tp)  # of each row, where it is divided
        self.hidden = (rows, stretch, config.model.d_model)
        self.tokens = rows * stretch
        self.dtype = COMPUTE_DTYPE[train.precision]
        self.carry_dtype = torch.promote_types(self.dtype, torch.float32)
        self.spans, self.model = stage_layers(config.parallel, config.model.n_layers), config.model
        self.carry_width = carry_width

    def example(self, index: int) -> list[Tensor]:
        """On the meta device, of what stage `index` receives."""
        return self.buffer(index, torch.device("meta"), requires_grad=True)

    def buffer(self, index: int, device: torch.device, requires_grad: bool = False) -> list[Tensor]:
        if index == 0:
            return []
        options: dict[str, Any] = {"device": device, "requires_grad": requires_grad}
        tensors = [torch.empty(self.hidden, dtype=self.dtype, **options)]
        if self.carry_width and any(self.model.is_moe(layer) for layer in range(self.spans[index].start)):
            tensors.append(torch.empty(self.tokens, self.carry_width, dtype=self.carry_dtype, **options))
        return tensors


class _TiedEmbedding:
    """Keeps the embedding of the first stage and that of the last one, its output weight, one parameter.

    On two ranks both are whole parameters with the summed gradient, so both updates are the same. On one rank (V
    schedules) the last stage's is a copy without an optimizer.
    """

    def __init__(self, config: Config, meshes: Meshes, stages: list[Stage]) -> None:
        self.first: Tensor | None = None
        self.last: Tensor | None = None
        self.uncounted: Tensor | None = None
        self.pair: dist.ProcessGroup | None = None
        if not config.model.tie_embeddings:
            return
        last = len(stage_layers(config.parallel, config.model.n_layers)) - 1
        ends = rank_of_stage(config.parallel, 0), rank_of_stage(config.parallel, last)
        if ends[0] != ends[1]:
            for ranks in axis_groups(meshes.layout.attention, "pp"):
                group = dist.new_group([ranks[ends[0]], ranks[ends[1]]])
                if dist.get_rank() in (ranks[ends[0]], ranks[ends[1]]):
                    self.pair = group
        self.first = stages[0].embed.weight if stages[0].index == 0 else None
        self.last = stages[-1].embed.weight if stages[-1].last else None
        if self.pair is not None:
            self.uncounted = self.last

    @torch.no_grad()
    def sum_gradients(self) -> None:
        mine = self.first if self.first is not None else self.last
        if mine is None:
            return
        total = torch.zeros_like(local(mine)) if mine.grad is None else local(mine.grad)
        if self.pair is not None:
            dist.all_reduce(total, group=self.pair)
        elif self.last is not None and self.last.grad is not None:
            total += local(self.last.grad)
            self.last.grad = None
        mine.grad = _like(total, mine)

    @torch.no_grad()
    def copy_weight(self) -> None:
        if self.pair is None and self.first is not None and self.last is not None:
            local(self.last).copy_(local(self.first))


def _like(part: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return part
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    return DTensor.from_local(part, mesh, parameter.placements, run_check=False, shape=shape, stride=stride)


def carry_width(model: nn.Module) -> int:
    """Columns of the carry that routers hand on: their `carry_width`, 0 without one."""
    widths = [getattr(layer.router, "carry_width", 0) for layer in model.modules() if isinstance(layer, MoELayer)]
    return max(widths, default=0)
