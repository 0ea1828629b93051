"""The wandb copy of a run's metrics, kept by the launcher (ranks know nothing of wandb).

It is a copy: metrics.jsonl has everything, so wandb failing is reported once and never ends a run. All of
wandb, its import included, happens in one thread of its own; `log` only hands lines over.
"""

import json
import netrc
import queue
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from dist_lm import durable
from dist_lm.config import TrackingConfig
from dist_lm.errors import ConfigError
from dist_lm.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.redact import redact, redact_command

IDENTITY = "identity.json"  # in the run's wandb folder: {id, logged_step}
SAVE_EVERY_S = 2.0  # how often the last logged step is noted
_Line = tuple[int, dict[str, float]]


def wandb_mode(tracking: TrackingConfig, environ: Mapping[str, str]) -> str:
    """`online`, `offline` or `disabled`: what tracking.mode and the login on this machine come to.

    `auto` follows WANDB_MODE if that is offline or disabled; else it is online with WANDB_API_KEY or a netrc
    entry for wandb's host, and offline without.

    Raises:
        ConfigError: tracking.mode=online without a login (wandb would ask for a key and wait).
    """
    if tracking.mode == "offline":
        return "offline"
    login = bool(environ.get("WANDB_API_KEY")) or _netrc_login(environ)
    if tracking.mode == "online":
        if not login:
            raise ConfigError(
                "tracking.mode=online: no wandb login here: set WANDB_API_KEY, run `wandb login`, "
                "or use tracking.mode=auto"
            )
        return "online"
    asked = environ.get("WANDB_MODE")
    if asked in ("offline", "disabled"):
        return asked
    return "online" if login else "offline"


def _netrc_login(environ: Mapping[str, str]) -> bool:
    file = Path(environ.get("NETRC") or Path(environ.get("HOME") or Path.home()) / ".netrc")
    if not file.is_file():
        return False
    host = urlparse(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except netrc.NetrcParseError:
        return False  # wandb could not read it either


class WandbRun:
    """One wandb run that grows with a run directory, over all its attempts."""

    def __init__(self, run: RunDirectory, console: Console, init: dict[str, Any]) -> None:
        """Take up the run's wandb identity and start the thread; see `start`."""
        self._identity = run.wandb / IDENTITY
        self._console = console
        run.wandb.mkdir(parents=True, exist_ok=True)
        known = json.loads(self._identity.read_text()) if self._identity.exists() else {}
        self.id: str = known.get("id") or secrets.token_hex(4)
        self._seen = int(known.get("logged_step", -1))
        self._resumed_at = self._seen
        self._save()
        self._lines: queue.SimpleQueue[_Line | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._work, args=(init | {"id": self.id, "dir": str(run.path)},), name="wandb", daemon=True
        )
        self._thread.start()

    @classmethod
    def start(
        cls,
        config: Mapping[str, Any],
        run: RunDirectory,
        tracking: TrackingConfig,
        *,
        job_type: str,
        group: str,
        git_commit: str | None,
        command: list[str],
        environ: Mapping[str, str],
        console: Console,
    ) -> "WandbRun | None":
        """Start or take up the wandb run of a run directory; returns at once.

        Args:
            config: recorded without its secrets.
            job_type: the stage.
            group: the run_id, shared by the stages of one model.
            command: the command line, recorded without its secrets.
            environ: where a key and wandb's own settings are looked up.
            console: where a failure of wandb is reported.

        Returns:
            None if tracking is `none`, or disabled through WANDB_MODE.

        Raises:
            ConfigError: tracking.mode=online without a login.
        """
        mode = "disabled" if tracking.name == "none" else wandb_mode(tracking, environ)
        if mode == "disabled":
            return None
        recorded = redact(config) | {"git_commit": git_commit, "command": redact_command(command)}
        init = {
            "project": tracking.project,
            "entity": tracking.entity,
            "tags": list(tracking.tags),
            "name": f"{job_type}-{group}",
            "job_type": job_type,
            "group": group,
            "config": recorded,
            "mode": mode,
        }
        return cls(run, console, init)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hand over the metrics of a step; steps that were logged before are skipped.

        `step`, `time` and values that are None (not finite) may be among `metrics` and are left out.
        """
        if step < self._seen or step <= self._resumed_at:
            return
        self._seen = step
        values = {name: value for name, value in metrics.items() if name not in ("step", "time")}
        self._lines.put((step, {name: value for name, value in values.items() if value is not None}))

    def finish(self, timeout_s: float = 60.0) -> None:
        """Let wandb write what it has; if that does not end in time it is left behind, with a warning."""
        self._lines.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._console.warning(
                f"wandb is still busy after {timeout_s:.0f} s and is left behind; metrics.jsonl has every "
                f"metric, and `wandb sync` sends what is in {self._identity.parent}"
            )

    def _work(self, init: dict[str, Any]) -> None:
        logged, saved_at = self._resumed_at, time.monotonic()
        try:
            import wandb  # a second of start-up that nobody waits for

            # of machine and command wandb would record more than our redacted copy: the whole argument list
            settings = wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_stats=True,
            )
            resume = "allow" if init["mode"] == "online" else None  # offline parts are joined by `wandb sync`
            run = wandb.init(settings=settings, resume=resume, **init)
            while (line := self._lines.get()) is not None:
                logged, metrics = line
                run.log(metrics, step=logged)
                if time.monotonic() - saved_at > SAVE_EVERY_S:
                    self._save(logged)
                    saved_at = time.monotonic()
            run.finish()
            self._save(logged)
        except Exception as error:  # whatever it is, the run goes on without its copy
            self._console.warning(
                f"wandb stopped ({type(error).__name__}: {error}); the run goes on, and metrics.jsonl has every metric"
            )

    def _save(self, logged_step: int | None = None) -> None:
        step = self._resumed_at if logged_step is None else logged_step
        durable.write_json(self._identity, {"id": self.id, "logged_step": step})
