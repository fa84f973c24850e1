"""Weights & Biases. Without a key the run is kept offline, under the run directory, for `wandb sync`."""

from __future__ import annotations

import logging
import netrc
import os
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

logger = logging.getLogger("moetrain.observe")

MODES = ("auto", "online", "offline", "disabled")


class WandbTracker:
    """mode: online | offline | disabled | auto (WANDB_MODE when set; else online when a key is at hand, or offline).

    The run's id is kept in RUN/wandb_id, so a resumed run continues the same one; rows past the restored step appear
    twice there, plotted over the metric `step`. A server that does not answer at the start makes it an offline run.
    finish_timeout: seconds to wait for uploads at the end; what is not uploaded by then stays on disk.
    """

    def __init__(
        self,
        project: str = "moetrain",
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        mode: str = "auto",
        finish_timeout: float = 15.0,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"tracker.wandb.mode is {mode!r}; it can be {', '.join(MODES)}")
        self._options: dict[str, Any] = {"project": project, "entity": entity, "group": group}
        self._options["tags"] = list(tags or ())
        self._mode = mode
        self._finish_timeout = finish_timeout
        self._run: Any = None

    def start(self, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        from wandb.errors import CommError

        mode, run_id = resolve_mode(self._mode), _run_id(run_dir)
        shared = {"dir": str(run_dir), "name": name, "config": config}
        try:
            self._run = self._init(mode=mode, id=run_id, **shared)
        except CommError as error:
            if mode != "online":
                raise
            why = str(error).splitlines()[0]
            logger.warning("tracker wandb: the server does not answer (%s); keeping this run offline", why)
            # The id of the failed attempt cannot be used again in this process.
            self._run = self._init(mode="offline", id=f"{run_id}-{uuid.uuid4().hex[:4]}", **shared)
        self._run.define_metric("*", step_metric="step")

    def _init(self, mode: str, **options: Any) -> Any:
        import wandb

        # Captured output would fight with the live console; an unanswered server must not hold the process.
        settings: dict[str, Any] = {"console": "off", "quiet": True, "init_timeout": 30}
        if "finish_timeout" in wandb.Settings.model_fields:  # newer than our lower bound
            settings["finish_timeout"] = self._finish_timeout
        options["resume"] = None if mode == "offline" else "allow"  # offline segments merge by id when they are synced
        return wandb.init(settings=wandb.Settings(**settings), **self._options, **{**options, "mode": mode})

    def log(self, row: dict[str, Any], step: int) -> None:
        self._run.log({**{key: value for key, value in row.items() if value is not None}, "step": step})

    def finish(self) -> None:
        self._run.finish()


def resolve_mode(mode: str) -> str:
    """`auto` becomes what the environment allows: nothing here ever asks for a key."""
    if mode != "auto":
        return mode
    chosen = os.environ.get("WANDB_MODE")
    if chosen in ("online", "offline", "disabled"):
        return chosen
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(run_dir: Path) -> str:
    file = run_dir / "wandb_id"
    if not file.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex[:12])
    return file.read_text().strip()
