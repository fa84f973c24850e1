"""A Hugging Face directory becomes a run directory whose only checkpoint holds its weights.

OUT/checkpoints/step_00000000/    an ordinary step directory, without optimizer state
OUT/config.yaml                   the configuration, of which `train init.from=OUT` takes the model
OUT/hf/                           config.json, and the tokenizer where the source has one: data.tokenizer names it
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from moetrain.checkpoint.agree import on_rank0, rank_and_world
from moetrain.checkpoint.hf.files import FOLDER, Source, copy_side_files, read_config
from moetrain.checkpoint.hf.match import left_out, match
from moetrain.checkpoint.hf.rules import Form, rules
from moetrain.checkpoint.hf.translate import family_of, from_hf
from moetrain.checkpoint.lazy import LazyTensor
from moetrain.checkpoint.lock import RunLock
from moetrain.checkpoint.store import CheckpointStore
from moetrain.checkpoint.tensors import model_tensors
from moetrain.config.compose import to_yaml
from moetrain.config.schema import Config
from moetrain.model.build import build_model


def import_hf(source: str | Path, out: str | Path) -> Path:
    """Write `source` as a checkpoint of the run directory `out`; return the step directory. All ranks call it.

    Weights keep their dtype. One tensor is in memory at a time; the largest is one layer's experts. Raises ValueError
    for an unsupported model, for tensors that match on one side only, and when `out` already holds something.
    """
    source, out = Path(source), Path(out)
    config, tensors = open_hf(source)
    return write_run(out, config, tensors, source)


def write_run(out: Path, config: Config, tensors: Mapping[str, LazyTensor], folder: Path | None) -> Path:
    """Make the run directory `out` of weights alone, and of what `folder` has besides; return the step directory.

    All ranks call it. What an interrupted attempt left is removed. Raises ValueError when `out` holds checkpoints or is
    being written.
    """
    lock = RunLock(out)
    on_rank0(lambda: bool(lock.__enter__()))
    try:
        prepare_run(out, config, folder)
        return CheckpointStore(out).save_weights(0, tensors, asdict(config))
    finally:
        if rank_and_world()[0] == 0:
            lock.release()


def open_hf(source: Path) -> tuple[Config, dict[str, LazyTensor]]:
    """The configuration and the weights, by our names, of a Hugging Face directory. Raises ValueError as import_hf."""
    theirs = read_config(source)
    family, config, files = family_of(theirs), from_hf(theirs), Source(source)
    wanted = expected(config)
    extra = int(theirs.get("num_nextn_predict_layers") or 0)
    ignored = left_out(files.names(), config.model.n_layers, extra, config.model.tie_embeddings)
    table = rules(family.name, config.model)
    found = match(table, {name: t.shape for name, t in wanted.items()}, set(files.names()) - set(ignored))
    return config, {name: _lazy(files, form, names, name, wanted) for name, (form, names) in found.items()}


def expected(config: Config) -> dict[str, Tensor]:
    """Every tensor of the configured model, without storage."""
    with torch.device("meta"):
        return model_tensors(build_model(config, "cpu"))


def _lazy(files: Source, form: Form, names: list[str], ours: str, wanted: Mapping[str, Tensor]) -> LazyTensor:
    empty = wanted[ours]
    parts = [files.get(name) for name in names]
    for name, part, whole in zip(names, parts, form.transform.split(empty, len(names))):
        if part.shape != whole.shape:
            raise ValueError(
                f"{name} has shape {tuple(part.shape)} in the source, but its config.json makes it {tuple(whole.shape)}"
            )
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1:
        raise ValueError(f"{ours} is made of tensors of several dtypes: {', '.join(sorted(map(str, dtypes)))}")

    def make() -> Tensor:
        return form.transform.join([files.get(name) for name in names], empty.shape)

    return LazyTensor(empty.shape, dtypes.pop(), make)


def prepare_run(out: Path, config: Config, folder: Path | None) -> None:
    """Make the run directory `out`: what `folder` has besides weights, and config.yaml. All ranks call it.

    Points config.data.tokenizer at the copy. Raises ValueError when `out` already holds checkpoints.
    """
    if folder is not None and any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        config.data.tokenizer = str((out / FOLDER).resolve())
    on_rank0(lambda: _fill(out, config, folder))


def _fill(out: Path, config: Config, folder: Path | None) -> None:
    store = CheckpointStore(out)
    store.clean()
    if store.root.exists() and any(store.root.iterdir()):
        raise ValueError(f"out={out} already holds checkpoints; name a directory that does not exist")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(to_yaml(config))
    if folder is not None:
        (out / FOLDER).mkdir(exist_ok=True)
        if (folder / "config.json").is_file():
            shutil.copyfile(folder / "config.json", out / FOLDER / "config.json")
        copy_side_files(folder, out / FOLDER)
