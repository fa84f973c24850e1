"""python -m moetrain VERB [overrides]. Exit codes: 0 done, 1 failure, 2 refused configuration."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable

from moetrain.comm.env import is_rank0

# Seconds that another rank's refusal waits for rank 0's: the first rank to end makes torchrun end the others, before
# they have spoken. What only another rank has to say is said after them.
PATIENCE_S = 5.0


def main(argv: list[str] | None = None) -> int:
    """Run one verb. A user's mistake is one line on stderr, from one rank; a failure is a traceback."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        print(f"moetrain: no verb {verb!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    if any(argument in ("-h", "--help") for argument in rest):
        print((VERBS[verb].__doc__ or "").strip())
        return 0
    try:
        return VERBS[verb](rest) or 0
    except ValueError as error:
        if not is_rank0():
            time.sleep(PATIENCE_S)
        print(f"moetrain {verb}: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 1
    except Exception:
        traceback.print_exc()
        return 1


def train(overrides: list[str]) -> None:
    """train a model: moetrain train experiment=quickstart train.steps=300"""
    from moetrain.train import train

    train(overrides)


def profile(overrides: list[str]) -> None:
    """trace a few training steps and say where the time goes: moetrain profile experiment=quickstart [out=profile]"""
    from pathlib import Path

    from moetrain.profile import profile

    out = next((o.removeprefix("out=") for o in overrides if o.startswith("out=")), "profile")
    table = profile([o for o in overrides if not o.startswith("out=")], Path(out))
    if is_rank0():
        print(table)


def mesh(overrides: list[str]) -> None:
    """print both rank tables of a layout: moetrain mesh world=16 parallel.tp=2 parallel.ep=8 [format=json]"""
    from moetrain.mesh.layout import format_tables, make_layout, rank_tables

    options = _options(overrides)
    world, style = _integer("world", options.pop("world", "1")), options.pop("format", "text")
    if style not in ("text", "json"):
        raise ValueError(f"format={style!r}; nearest legal value: text (or json)")
    wrong = [key for key in options if not key.startswith("parallel.")]
    if wrong:
        raise ValueError(f"{wrong[0]}: no such key; mesh takes world=, format=, and parallel.*")
    degrees = {key.removeprefix("parallel."): _integer(key, value) for key, value in options.items()}
    layout = make_layout(world, **degrees)
    print(json.dumps(rank_tables(layout)) if style == "json" else format_tables(layout))


def params(overrides: list[str]) -> None:
    """print total and active parameters: moetrain params model=mixtral_8x7b"""
    from moetrain.config.compose import load_config
    from moetrain.plan.params import format_table

    print(format_table(load_config(overrides).model))


def doctor(overrides: list[str]) -> None:
    """say what this machine has, which backends can run, and what is missing for each"""
    from moetrain.plan.doctor import diagnose

    print(diagnose())


def methods(overrides: list[str]) -> None:
    """list every choice of every configuration group, with what it is"""
    from moetrain.config.compose import describe_groups

    print(describe_groups())


def report(arguments: list[str]) -> None:
    """summarise a run: moetrain report runs/quickstart"""
    from moetrain.observe.report import report

    if len(arguments) != 1:
        raise ValueError("report takes one run directory: moetrain report runs/quickstart")
    print(report(arguments[0]))


def tokenize(overrides: list[str]) -> None:
    """write memory-mapped token shards: moetrain tokenize source.kind=jsonl source.path=FILE tokenizer=byte out=DIR"""
    from moetrain.data.tokenize import run

    options: dict = {}
    for key, value in _options(overrides).items():
        node = options
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    run(options)


def generate(overrides: list[str]) -> None:
    """continue a prompt, as a sanity check: moetrain generate checkpoint=runs/quickstart prompt="def " """
    from moetrain.generate import generate_text

    options = _options(overrides)
    print(generate_text(options))


def import_(overrides: list[str]) -> None:
    """make a checkpoint of a Hugging Face directory: moetrain import source=HF_DIR out=CKPT"""
    from moetrain.checkpoint.hf.load import import_hf
    from moetrain.comm.start import start_distributed, stop_distributed

    options = _options(overrides)
    _require(options, "import", ("source", "out"))
    start_distributed()
    try:
        path = import_hf(options["source"], options["out"])
        if is_rank0():
            print(f"{options['source']} -> {path}")
    finally:
        stop_distributed()


def export(overrides: list[str]) -> None:
    """make a Hugging Face directory of a checkpoint: moetrain export checkpoint=CKPT out=HF_DIR [experts=stacked]"""
    from moetrain.checkpoint.hf.save import export_hf
    from moetrain.comm.start import start_distributed, stop_distributed

    options = {"experts": "each", **_options(overrides)}
    if options["experts"] not in ("each", "stacked"):
        raise ValueError(f"experts={options['experts']!r}; nearest legal value: each (or stacked)")
    stacked = options.pop("experts") == "stacked"
    _require(options, "export", ("checkpoint", "out"))
    start_distributed()
    try:
        family = export_hf(options["checkpoint"], options["out"], stacked=stacked)
        if is_rank0():
            print(f"{options['checkpoint']} -> {options['out']} ({family.name})")
    finally:
        stop_distributed()


def upcycle(overrides: list[str]) -> None:
    """turn a dense model into a MoE: moetrain upcycle source=DIR upcycle=virtual_group experts=8 top_k=2 out=CKPT"""
    from moetrain.comm.start import start_distributed, stop_distributed
    from moetrain.upcycle.command import upcycle

    options = _options(overrides)
    start_distributed()
    try:
        text = upcycle(options)
        if is_rank0():
            print(text)
    finally:
        stop_distributed()


def checkpoint(arguments: list[str]) -> int:
    """look at checkpoints: moetrain checkpoint ls|verify|diff|prune|safetensors DIR (1: damage, or a difference)"""
    from moetrain.checkpoint.tools import run

    return run(arguments)


def _require(options: dict[str, str], verb: str, keys: tuple[str, ...]) -> None:
    """For a verb that needs all of these keys and takes no other."""
    for key in options:
        if key not in keys:
            raise ValueError(f"{key}: no such key; {verb} takes {', '.join(keys)}")
    for key in keys:
        if not options.get(key):
            raise ValueError(f"{key}= is missing; {verb} takes {', '.join(keys)}")


def _options(overrides: list[str]) -> dict[str, str]:
    """key=value arguments of the verbs that need no composed configuration."""
    wrong = [override for override in overrides if "=" not in override]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not of the form key=value")
    return dict(override.split("=", 1) for override in overrides)


def _integer(key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{key}={value!r} is not an integer; nearest legal value: 1") from None


VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "train": train,
    "profile": profile,
    "mesh": mesh,
    "params": params,
    "doctor": doctor,
    "methods": methods,
    "report": report,
    "tokenize": tokenize,
    "generate": generate,
    "import": import_,
    "export": export,
    "upcycle": upcycle,
    "checkpoint": checkpoint,
}


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {(verb.__doc__ or '').strip()}" for name, verb in VERBS.items()]
    return "python -m moetrain VERB [overrides]\n\n" + "\n".join(lines)
