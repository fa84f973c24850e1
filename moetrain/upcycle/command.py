"""`python -m moetrain upcycle`: its options, the conversion, and the report."""

from __future__ import annotations

from pathlib import Path

from moetrain.checkpoint.agree import on_rank0
from moetrain.checkpoint.lazy import stored
from moetrain.upcycle.base import Model
from moetrain.upcycle.convert import Converted, build_initializer, convert
from moetrain.upcycle.report import Parity, format_report, parity
from moetrain.upcycle.text import real_tokens

REQUIRED = ("source", "upcycle", "experts", "top_k", "out")
DEFAULTS = {"granularity": "1", "seed": "0", "parity": "true"}


def upcycle(options: dict[str, str]) -> str:
    """Convert, and return the report. All ranks call it.

    options: REQUIRED, those of DEFAULTS, and `upcycle.<option>` for the initializer. source is a directory, or several
    for upcycle=merge. experts and top_k count experts
    before granularity cuts them. parity=false leaves out the comparison, for which rank 0 holds a model whole.
    Raises ValueError for an option that is unknown, missing, or of the wrong kind, and as `convert.convert` does.
    """
    own = {key: value for key, value in options.items() if not key.startswith("upcycle.")}
    for key in own:
        if key not in (*REQUIRED, *DEFAULTS):
            known = ", ".join((*REQUIRED, *DEFAULTS, "upcycle.*"))
            raise ValueError(f"{key}: no such key; upcycle takes {known}")
    for key in REQUIRED:
        if not own.get(key):
            raise ValueError(f"{key}= is missing; upcycle needs {', '.join(REQUIRED)}")
    if own.get("parity", "true") not in ("true", "false"):
        raise ValueError(f"parity={own['parity']!r}; nearest legal value: true (or false)")
    number = {key: _integer(key, own.get(key, DEFAULTS.get(key, ""))) for key in ("experts", "top_k", "granularity")}
    given = {key.removeprefix("upcycle."): value for key, value in options.items() if key.startswith("upcycle.")}
    initializer = build_initializer(own["upcycle"], given, **number)
    seed = _integer("seed", own.get("seed", DEFAULTS["seed"]))
    sources = _sources(own["source"])
    made = convert(sources, own["out"], initializer, seed)
    measured: list[Parity] = []
    if own.get("parity", "true") == "true":
        measured = on_rank0(lambda: _measure(made))
    return f"{', '.join(sources)} -> {made.path}\n{format_report(made.sources[0].config, made.config, measured)}"


def _sources(text: str) -> list[str]:
    """source=A, or several as source=A,B,C or source=[A,B,C]; a path that exists is one, whatever it contains."""
    if Path(text).exists():
        return [text]
    return [part.strip() for part in text.removeprefix("[").removesuffix("]").split(",") if part.strip()]


def _measure(made: Converted) -> list[Parity]:
    moe = Model(made.config, stored(made.path / "model"))
    return parity(made.sources, moe, real_tokens(made.config))


def _integer(key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{key}={value!r} is not an integer; nearest legal value: 1") from None
