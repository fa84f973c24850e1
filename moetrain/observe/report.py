"""A run in a screenful of text: the verb `report RUN`."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf

from moetrain.observe.metrics import Row, read_rows


def report(run_dir: str | Path) -> str:
    """Summarise config.yaml and metrics.jsonl of a run directory; a missing piece is named, not an error.

    Raises ValueError when the directory does not exist or holds neither file, or where a log line is damaged.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a directory; `report` takes a run directory such as runs/quickstart")
    config_file, metrics_file = run_dir / "config.yaml", run_dir / "metrics.jsonl"
    if not config_file.exists() and not metrics_file.exists():
        below = sorted(path.parent.name for path in run_dir.glob("*/metrics.jsonl"))
        hint = f"; it holds the runs {', '.join(below)}" if below else ""
        raise ValueError(f"{run_dir} is not a run directory: neither config.yaml nor metrics.jsonl is in it{hint}")
    rows = read_rows(metrics_file) if metrics_file.exists() else []
    steps = [row for row in rows if "event" not in row]
    lines = [("run", str(run_dir)), *_config_lines(config_file)]
    lines += _step_lines(steps) if steps else [("metrics", "no step is recorded yet")]
    resumes = [str(row["step"]) for row in rows if row.get("event") == "resume"]
    lines.append(("resumes", f"{len(resumes)}, at step {', '.join(resumes)}" if resumes else "none"))
    lines += _checkpoint_lines(run_dir / "checkpoints")
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)


def _config_lines(file: Path) -> list[tuple[str, str]]:
    if not file.exists():
        return [("config", "config.yaml is missing")]
    config = OmegaConf.load(file)

    def get(key: str) -> Any:
        return OmegaConf.select(config, key, default="?")

    model = f"{get('model.name')}: {get('model.n_layers')} layers, d_model {get('model.d_model')}, "
    model += f"{get('model.moe.n_experts')} experts top-{get('model.moe.top_k')}"
    degrees = OmegaConf.select(config, "parallel", default={})
    degrees = [f"{key}={value}" for key, value in degrees.items() if isinstance(value, int) and value > 1]
    train = (
        f"batch {get('train.global_batch')} x {get('train.seq_len')}, {get('train.precision')}, seed {get('run.seed')}"
    )
    return [("model", model), ("layout", " ".join(degrees) or "data parallel only"), ("training", train)]


def _step_lines(rows: list[Row]) -> list[tuple[str, str]]:
    lines = [("steps", f"{rows[0]['step']} to {rows[-1]['step']}")]
    losses = _values(rows, "loss")
    if losses:
        best_step, best = min(losses, key=lambda pair: pair[1])
        lines.append(
            ("loss", f"first {losses[0][1]:.4f}, last {losses[-1][1]:.4f}, best {best:.4f} at step {best_step}")
        )
    curve = _values(rows, "val_loss")
    if curve:
        best_step, best = min(curve, key=lambda pair: pair[1])
        text = "  ".join(f"{step}: {value:.4f}" for step, value in _thin(curve))
        lines += [("val loss", text), ("best val", f"{best:.4f} at step {best_step}")]
    odd = [str(row["step"]) for row in rows if "nonfinite" in row]
    if odd:
        lines.append(("not finite", f"{len(odd)} steps, first {odd[0]}"))
    for key, label, form in (
        ("tokens_per_s", "tokens/s", "{:,.0f} (median)"),
        ("tokens_per_s_per_gpu", "per GPU", "{:,.0f} (median)"),
        ("mfu", "mfu", "{:.1%} (median)"),
    ):
        values = [value for _, value in _values(rows, key)]
        if values:
            lines.append((label, form.format(median(values))))
    memory = _values(rows, "peak_memory_gb")
    if memory:
        lines.append(("peak memory", f"{max(value for _, value in memory):.2f} GB"))
    return lines + _load_lines(rows)


def _load_lines(rows: list[Row]) -> list[tuple[str, str]]:
    """The layer whose fullest expert is furthest above the mean, by the median over the last tenth of the steps."""
    recent = rows[-max(1, len(rows) // 10) :]
    suffix = "/load_max_over_mean"
    layers = {key.split("/")[1]: None for row in recent for key in row if key.endswith(suffix)}
    load = {layer: _median(recent, f"moe/{layer}{suffix}") for layer in layers}
    load = {layer: value for layer, value in load.items() if value is not None}
    if not load:
        return []
    worst = max(load, key=lambda layer: load[layer] or 0.0)
    cv = _median(recent, f"moe/{worst}/load_cv") or 0.0
    dead = _median(recent, f"moe/{worst}/dead_experts") or 0.0
    dropped = _median(recent, f"moe/{worst}/dropped_share") or 0.0
    text = f"layer {worst}: max/mean {load[worst]:.2f}, cv {cv:.2f}, dead experts {dead:.0f}, dropped {dropped:.2%}"
    rank = _median(recent, "rank_load_max_over_mean")
    text += f", fullest rank {rank:.2f}" if rank else ""
    return [("worst load", f"{text} (median of the last {len(recent)} steps)")]


def _checkpoint_lines(directory: Path) -> list[tuple[str, str]]:
    names = [path.name for path in directory.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    newest = max(names, key=lambda name: int(name.removeprefix("step_")), default="")
    return [("checkpoints", f"{len(names)}, newest {newest}" if names else "none")]


def _values(rows: list[Row], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _median(rows: list[Row], key: str) -> float | None:
    values = [value for _, value in _values(rows, key)]
    return median(values) if values else None


def _thin(curve: list[tuple[int, float]], most: int = 8) -> list[tuple[int, float]]:
    """At most `most` points, evenly spread, first and last included."""
    if len(curve) <= most:
        return curve
    return [curve[round(i * (len(curve) - 1) / (most - 1))] for i in range(most)]
