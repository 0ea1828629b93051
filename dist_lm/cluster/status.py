"""How the commands and runs of a work directory stand, from the files they keep: while they run and afterwards."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dist_lm.cluster.journal import read_events
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from dist_lm.storage.lock import is_locked
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.metrics import last_metrics
from dist_lm.training import checkpoint_files


@dataclass(frozen=True)
class RunStatus:
    """One run of a training stage."""

    path: str
    held: bool  # a launcher has it in hand
    step: int
    steps: int | None  # that it will have
    metrics: dict[str, float]  # the newest of each
    attempt: dict[str, Any]  # the newest `started` event
    restarts: int
    last_error: str
    last_error_at: float  # seconds since 1970
    ranks: list[dict[str, Any]]  # what they were last heard doing
    heard_at: float  # seconds since 1970; 0: never
    links: dict[str, float]
    checkpoint: str
    finished: bool


@dataclass(frozen=True)
class PipelineStatus:
    """The newest command on a work directory, and the run it is at."""

    name: str  # target stage and run_id
    state: str  # running | lost | done | failed | stopped; lost: it should run, and does not
    facts: dict[str, Any]
    run: RunStatus | None
    others: list[str] = field(default_factory=list)  # other pipelines in the work directory: name and state


def read_status(work_dir: Path, run_id: str | None = None) -> PipelineStatus:
    """The status of the command that was started last.

    Args:
        run_id: of the command; None: any.

    Raises:
        ArtefactError: no command was started on this work directory.
    """
    work = WorkDirectory(work_dir)
    found = [(path.stem, durable.read_json(path)) for path in work.pipelines()]
    chosen = [(name, facts) for name, facts in found if run_id in (None, facts["run_id"])]
    if not chosen:
        wanted = f" with run_id={run_id}" if run_id else ""
        raise ArtefactError(f"{work_dir}: no command was started here{wanted}; give the work_dir of a launch")
    name, facts = chosen[-1]
    at = [stage for stage in facts["stages"] if stage["state"] != "waiting"]
    directories = [work.run(stage["name"], facts["run_id"]) for stage in at]
    present = [directory for directory in directories if directory.config.exists()]
    run = read_run(present[-1]) if present else None
    state = _state(work, name, facts)
    if run and run.heard_at < facts["started"]:  # what ranks of an earlier command did last
        run = replace(run, ranks=[])
    if state == "lost":
        facts["stages"] = [{**one, "state": "lost"} if one["state"] == "running" else one for one in facts["stages"]]
        facts["updated"] = max(facts["updated"], run.heard_at if run else 0.0)
    others = [f"{other} ({_state(work, other, values)})" for other, values in found if other != name]
    return PipelineStatus(name, state, facts, run, others)


def _state(work: WorkDirectory, name: str, facts: dict[str, Any]) -> str:
    lost = facts["state"] == "running" and not is_locked(work.pipeline_lock(name))
    return "lost" if lost else facts["state"]


def read_run(run: RunDirectory) -> RunStatus:
    """The status of one run."""
    events = list(read_events(run.events))
    started = [event for event in events if event["event"] == "started"]
    failed = [event for event in events if event["event"] == "failed"]
    live = durable.read_json(run.live)
    metrics = last_metrics(run.metrics)
    latest = checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST)
    return RunStatus(
        path=str(run.path),
        held=is_locked(run.launch_lock),
        step=int(metrics.pop("step", 0)),
        steps=_steps_of(run),
        metrics=metrics,
        attempt=started[-1] if started else {},
        restarts=len(failed),
        last_error=failed[-1]["error"] if failed else "",
        last_error_at=failed[-1]["time"] if failed else 0.0,
        ranks=live.get("ranks", []),
        heard_at=live.get("time", 0.0),
        links=durable.read_json(run.links),
        checkpoint=latest.name if latest else "",
        finished=run.result.exists(),
    )


def as_json(status: PipelineStatus) -> str:
    """All of it, for programs."""
    return json.dumps(asdict(status), indent=2, sort_keys=True)


def node_rows(run: RunStatus, now: float) -> list[tuple[str, ...]]:
    """A row for each node of the newest attempt: node, host, address, ranks, step, doing, heard.

    Args:
        now: seconds since 1970.
    """
    per_node: int = run.attempt.get("ranks_per_node", 1)
    rows = []
    for node, place in enumerate(run.attempt.get("nodes", [])):
        numbers = range(node * per_node, (node + 1) * per_node)
        ranks = [rank for rank in run.ranks if rank["rank"] in numbers]
        shown = f"{numbers[0]}" if per_node == 1 else f"{numbers[0]}-{numbers[-1]}"
        rows.append((str(node), place["host"], place["address"], shown, *_doing(ranks, run, now)))
    return rows


def _doing(ranks: Sequence[dict[str, Any]], run: RunStatus, now: float) -> tuple[str, str, str]:
    """Step, what the slowest rank of a node does, and how long ago it said so."""
    if not run.held or not ranks:
        return "", "ended" if not run.held else "starting", ""
    slowest = max(ranks, key=lambda rank: rank["age_s"])
    stopped = " (stopped)" if slowest["state"] == "T" else ""
    age = slowest["age_s"] + max(0.0, now - run.heard_at)
    return f"{slowest['step']:,}", slowest["phase"] + stopped, f"{age:.1f} s ago"


def _steps_of(run: RunDirectory) -> int | None:
    from dist_lm.config.file import load_config

    return getattr(load_config(run.config).stage, "steps", None) if run.config.exists() else None
