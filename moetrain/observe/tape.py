"""Routing on disk: record every choice of a run, or make a run take the choices of another.

    DIR/step_00000001/rank_00000.safetensors
        "<layer>.index" int64 [N], "<layer>.experts" int16 [N, K], "<layer>.counted" int16 [N, K]

experts are the router's choices; counted are the top-k of the balance scores, which a Switch loss counts: with a bias
or a group limit another choice, that rounding may flip by itself. index is row * S + offset of a token in the step's
global batch, so a record says nothing of the layout that wrote it, and any layout replays it. A routing choice is
discrete: two correct runs in fp32 or bf16 differ by rounding, flip a choice, and drift apart. With one run's routing
replayed in the other, what remains is rounding.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moetrain.config.model import MoEConfig
from moetrain.moe.layer import MoELayer
from moetrain.moe.router.common import top_k
from moetrain.moe.types import Routing, TokenContext

KINDS = ("experts", "counted")
UNKNOWN = -2  # in a player's table: not in the record; -1 is padding


class LayerRecorder:
    """Collects one layer's choices of a step. Implements moe.tape.LayerTape."""

    def __init__(self) -> None:
        self.index: list[Tensor] = []
        self.experts: list[Tensor] = []
        self.counted: list[Tensor] = []

    def recall(self, context: TokenContext) -> TokenContext:
        return context

    def note(self, routing: Routing) -> None:
        index_BS = routing.context.index_BS
        assert index_BS is not None
        assert index_BS.numel() == routing.expert_TK.shape[0], "index_BS was not cut like the tokens"
        self.index.append(index_BS.flatten())
        self.experts.append(routing.expert_TK.to(torch.int16))
        counted_TK = routing.context.counted_TK
        if counted_TK is None:
            counted_TK = top_k(routing.balance_TE, routing.top_k)
        self.counted.append(torch.where(routing.context.valid_T[:, None], counted_TK, -1).to(torch.int16))

    def take(self) -> dict[str, Tensor]:
        """Everything since the last call, on the CPU: index [N], experts and counted [N, K]."""
        taken = {"index": self.index, "experts": self.experts, "counted": self.counted}
        self.index, self.experts, self.counted = [], [], []
        return {kind: torch.cat(parts).cpu() for kind, parts in taken.items()}


class LayerPlayer:
    """Prescribes one layer's recorded choices, and passes on to a recorder. Implements moe.tape.LayerTape.

    flips: int64, choices of valid tokens since the last `load` that the router would not have made itself.
    """

    def __init__(self, recorder: LayerRecorder | None) -> None:
        self.recorder = recorder
        self.expert_NK = self.counted_NK = torch.empty(0, 0, dtype=torch.int16)
        self.flips = torch.zeros((), dtype=torch.int64)

    def load(self, expert_NK: Tensor, counted_NK: Tensor) -> None:
        self.expert_NK, self.counted_NK = expert_NK, counted_NK
        self.flips = torch.zeros((), dtype=torch.int64, device=expert_NK.device)

    def recall(self, context: TokenContext) -> TokenContext:
        assert context.index_BS is not None
        index_T = context.index_BS.flatten()
        return replace(context, chosen_TK=self.expert_NK[index_T].long(), counted_TK=self.counted_NK[index_T].long())

    def note(self, routing: Routing) -> None:
        live_TK = top_k(routing.selection_TE, routing.expert_TK.shape[1])
        same_TK = (routing.expert_TK[:, :, None] == live_TK[:, None, :]).any(-1)
        self.flips = self.flips + ((routing.expert_TK >= 0) & ~same_TK).sum()
        if self.recorder is not None:
            self.recorder.note(routing)


class RoutingTape:
    """This rank's part of `router.record` and `router.replay`; hands each layer its recorder or player.

    record, replay: directories, empty for neither. Only for training steps; evaluations route freely.
    sizes: of every layer.
    """

    def __init__(
        self, record: str, replay: str, layers: dict[int, MoELayer], sizes: MoEConfig, rank: int, device: torch.device
    ) -> None:
        self.record, self.replay = Path(record) if record else None, Path(replay) if replay else None
        self.sizes, self.rank, self.device = sizes, rank, device
        self.recorders = {number: LayerRecorder() for number in layers} if record else {}
        self.players = {number: LayerPlayer(self.recorders.get(number)) for number in layers} if replay else {}
        for number, layer in layers.items():
            layer.tape = self.players.get(number) or self.recorders.get(number)

    def __bool__(self) -> bool:
        return self.record is not None or self.replay is not None

    def start(self, step: int) -> None:
        """Forget what an earlier run recorded after `step`. On one rank, before the first step.

        Raises ValueError where nothing can be recorded.
        """
        try:
            if self.record is not None:
                self.record.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"router.record={self.record} cannot be made ({error}); name another directory") from error
        for path in self.record.iterdir() if self.record is not None and self.record.is_dir() else ():
            found = re.fullmatch(r"step_(\d{8,})", path.name)
            if found and int(found[1]) > step:
                shutil.rmtree(path)

    def begin(self, step: int, tokens: int) -> None:
        """Before the forward passes of `step` (from 1), whose global batch has `tokens` tokens, padding included.

        Raises ValueError when the replayed record does not have all of them, or is of a model with other experts.
        """
        if self.replay is None:
            return
        experts, counted = (_read(self.replay / _step(step), list(self.players), tokens, kind) for kind in KINDS)
        for number, player in self.players.items():
            self._check(number, experts[number])
            player.load(experts[number].to(self.device), counted[number].to(self.device))

    def _check(self, layer: int, expert_NK: Tensor) -> None:
        """One choice of a token would be taken for all of them; an expert that there is not might be left out."""
        for key, found, fits in (
            ("top_k", expert_NK.shape[1], expert_NK.shape[1] == self.sizes.top_k),
            ("n_experts", int(expert_NK.max()) + 1, int(expert_NK.max()) < self.sizes.n_experts),
        ):
            if not fits:
                own = getattr(self.sizes, key)
                raise ValueError(f"model.moe.{key}={own}: router.replay has {found} in layer {layer}; record anew")

    def finish(self, step: int) -> Tensor:
        """After the passes of `step`: write what was recorded; returns the flipped choices of this rank, int64 0-d."""
        if self.record is not None:
            tensors: dict[str, Tensor] = {}
            for number, recorder in self.recorders.items():
                tensors |= {f"{number}.{kind}": taken for kind, taken in recorder.take().items()}
            path = self.record / _step(step) / f"rank_{self.rank:05d}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            hidden = path.with_name(f".{path.name}")
            save_file(tensors, hidden)
            hidden.rename(path)
        flips = [player.flips for player in self.players.values()]
        return torch.stack(flips).sum() if flips else torch.zeros((), dtype=torch.int64, device=self.device)


def _step(step: int) -> str:
    return f"step_{step:08d}"


def _read(directory: Path, layers: list[int], tokens: int, kind: str) -> dict[int, Tensor]:
    """Layer -> experts or counted [tokens, K] of one step, from the files of whatever ranks wrote it."""
    tables: dict[int, Tensor] = {}
    for path in sorted(directory.glob("rank_*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for layer in layers:
                if f"{layer}.index" not in names:
                    continue
                index_N, expert_NK = file.get_tensor(f"{layer}.index"), file.get_tensor(f"{layer}.{kind}")
                if index_N.numel() and int(index_N.max()) >= tokens:
                    raise ValueError(
                        f"router.replay: {directory} was recorded with a larger batch than {tokens} tokens"
                    )
                new = torch.full((tokens, expert_NK.shape[1]), UNKNOWN, dtype=torch.int16)
                tables.setdefault(layer, new)[index_N] = expert_NK
    for layer in layers:
        missing = tokens if layer not in tables else int((tables[layer][:, 0] == UNKNOWN).sum())
        if missing:
            raise ValueError(f"router.replay: {directory} lacks layer {layer} for {missing} of {tokens} tokens")
    return tables
