"""The verb `cluster status`: the newest command on a work directory, its stages, run, nodes and last error."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dist_lm.cluster.events import read_events
from dist_lm.cluster.heartbeat import share_in_words
from dist_lm.data.unfinished_builds import unfinished_builds
from dist_lm.errors import ArtefactError
from dist_lm.stages.registry import load_config, stage_named
from dist_lm.stages.stage import RunsIn
from dist_lm.storage import durable
from dist_lm.storage.lock import is_locked
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.metrics import last_metrics
from dist_lm.tracking.readable import counted, duration, four_digits, percent, three_decimals
from dist_lm.training import checkpoint_files

# (words, style) of each state of a command.
WORDS = {
    "running": ("running", "bold green"),
    "lost": ("its launcher is gone: the same command continues", "bold red"),
    "done": ("done", "green"),
    "failed": ("failed", "bold red"),
    "stopped": ("stopped: the same command continues", "yellow"),
}
LEFT = "generate/eta_s"  # says nothing once no launcher works on the run
PROGRESS = (  # (metric, words, format of the value)
    ("train/loss", "loss {}", three_decimals),
    ("val/bits_per_byte", "val {} bits/byte", three_decimals),
    ("perf/tokens_per_s", "{} tokens/s", four_digits),
    ("perf/mfu", "MFU {}", percent),
    ("generate/engines", "{} engines", four_digits),
    ("generate/tokens_per_s", "{} tokens/s", four_digits),
    (LEFT, "{} left", duration),
)
LIVE_KINDS: dict[str, durable.Kind] = {"time": (int, float), "ranks": list}
PULSE_KINDS: dict[str, Any] = {"rank": int, "step": int, "age_s": (int, float), "state": str, "phase": str}
EVENT_FIELDS = {  # fields of events that the status prints
    "started": ("nodes", "ranks_per_node", "device", "layout", "step"),
    "failed": ("error",),
}
COLOURS = {"waiting": "dim"} | {state: style for state, (_, style) in WORDS.items()}


@dataclass(frozen=True)
class RunStatus:
    """The status of one run of a stage."""

    path: str
    asks: bool  # whether its stage asks engines and trains nothing
    held: bool  # whether a launcher works on it
    step: int  # newest step in the metrics
    steps: int | None  # configured number of steps; None: the stage has none
    figures: str  # results of a finished run, in words
    metrics: dict[str, float]  # newest value of each metric
    attempt: dict[str, Any]  # the newest `started` event; empty without one
    restarts: int  # number of failures
    last_error: str
    last_error_at: float  # seconds since 1970
    ranks: list[dict[str, Any]]  # last heartbeat of each rank
    heard_at: float  # time of the heartbeats, seconds since 1970; 0: never
    links: dict[str, float]  # speed of the first all-reduce
    checkpoint: str  # name of the newest one; empty: none
    finished: bool


@dataclass(frozen=True)
class PipelineStatus:
    """The newest command on a work directory, and its current run."""

    name: str  # target stage and run_id
    state: str  # running | lost | done | failed | stopped; lost: its launcher was killed
    facts: dict[str, Any]  # the command's file in `pipelines`
    run: RunStatus | None
    others: list[str] = field(default_factory=list)  # other pipelines in the work directory: name and state
    builds: list[str] = field(default_factory=list)  # corpora that are built by tasks, in words


def read_status(work_dir: Path, run_id: str | None = None) -> PipelineStatus:
    """Returns the status of the newest command; `run` is that of its last stage with a `config.yaml`, None before the
    first. If the launcher was killed, stages that it ran have the state `lost`.

    Args:
        run_id: run_id of the command; None: any.

    Raises:
        ArtefactError: no such command was started on this work directory, or a file of it is damaged.
        ConfigError: this version does not accept the configuration of the run.
    """
    work = WorkDirectory(work_dir)

    commands = work.commands()
    matching = [(name, facts) for name, facts in commands.items() if run_id in (None, facts["run_id"])]
    if not matching:
        requested = f" with run_id={run_id}" if run_id else ""
        raise ArtefactError(f"{work_dir}: no command was started here{requested}; give the work_dir of a launch")

    name, facts = matching[-1]
    # A stage that waits has no run yet.
    begun_stages = [stage["name"] for stage in facts["stages"] if stage["state"] != "waiting"]
    directories = [work.run(stage_name, facts["run_id"]) for stage_name in begun_stages]
    present = [directory for directory in directories if directory.config.exists()]

    run = read_run(present[-1]) if present else None
    state = _state(work, name, facts)

    # Heartbeats of an earlier command say nothing about this one.
    if run and run.heard_at < facts["started"]:
        run = replace(run, ranks=[])

    # A killed launcher could not write that its stage ended.
    if state == "lost":
        for stage in facts["stages"]:
            if stage["state"] == "running":
                stage["state"] = "lost"
        if run:
            facts["updated"] = max(facts["updated"], run.heard_at)

    other_commands = [
        f"{another_name} ({_state(work, another_name, another_facts)})"
        for another_name, another_facts in commands.items()
        if another_name != name
    ]
    builds = [build.text() for build in unfinished_builds(work.path)]
    return PipelineStatus(name, state, facts, run, other_commands, builds)


def _state(work: WorkDirectory, name: str, facts: dict[str, Any]) -> str:
    if facts["state"] == "running" and not is_locked(work.pipeline_lock(name)):
        return "lost"
    return facts["state"]


def read_run(run: RunDirectory) -> RunStatus:
    """Returns the status of one run, which has a `config.yaml`; its other files may be missing.

    Raises:
        ArtefactError: a file of the run is damaged.
        ConfigError: this version does not accept the configuration.
    """
    # A run that never failed has an empty last error.
    attempt: dict[str, Any] = {}
    failures = [{"error": "", "time": 0.0}]
    for event in read_events(run.events):
        if lacking := [name for name in EVENT_FIELDS.get(event["event"], ()) if name not in event]:
            raise ArtefactError(
                f"{run.events}: an event `{event['event']}` lacks {', '.join(lacking)}; move the file away to continue "
                "without it"
            )
        if event["event"] == "started":
            attempt = event
        elif event["event"] == "failed":
            failures.append(event)

    live = durable.read_json(run.live, LIVE_KINDS)
    for rank in live.get("ranks", []):
        if not (isinstance(rank, dict) and all(isinstance(rank.get(key), kind) for key, kind in PULSE_KINDS.items())):
            raise durable.damaged(run.live, f"ranks: {rank}")
    metrics = last_metrics(run.metrics)
    latest = checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST)
    config = load_config(run.config)
    stage = stage_named(config.stage.name)

    return RunStatus(
        path=str(run.path),
        asks=stage.runs_in is RunsIn.POOL,
        held=is_locked(run.launch_lock),
        step=int(metrics.pop("step", 0)),
        steps=getattr(config.stage, "steps", None),
        figures=stage.figures(stage.read_result(run)),
        metrics=metrics,
        attempt=attempt,
        restarts=len(failures) - 1,
        last_error=failures[-1]["error"],
        last_error_at=failures[-1]["time"],
        ranks=live.get("ranks", []),
        heard_at=live.get("time", 0.0),
        links=durable.read_json(run.links),
        checkpoint=latest.name if latest else "",
        finished=run.result.exists(),
    )


def as_json(status: PipelineStatus) -> str:
    """Returns the status as JSON, for programs."""
    return json.dumps(asdict(status), indent=2, sort_keys=True)


def node_rows(run: RunStatus, now: float) -> list[tuple[str, ...]]:
    """Returns (node, host, address, ranks, step, state, age of the heartbeat) for each node of the newest attempt.

    Step, state and age are those of the rank with the oldest heartbeat; texts such as "0-3" and "1.5 s ago".

    Args:
        now: current time, in seconds since 1970.
    """
    per_node: int = run.attempt.get("ranks_per_node", 1)

    rows = []
    for node, facts in enumerate(run.attempt.get("nodes", [])):
        # torchrun numbers the ranks node by node.
        node_ranks = range(node * per_node, (node + 1) * per_node)
        heartbeats = [rank for rank in run.ranks if rank["rank"] in node_ranks]
        ranks_text = f"{node_ranks[0]}" if per_node == 1 else f"{node_ranks[0]}-{node_ranks[-1]}"
        rows.append((str(node), facts["host"], facts["address"], ranks_text, *_doing(heartbeats, run, now)))

    return rows


def _doing(ranks: Sequence[dict[str, Any]], run: RunStatus, now: float) -> tuple[str, str, str]:
    """Returns step, state and age of the oldest heartbeat of a node's ranks.

    The state is its phase; "ended" if no launcher holds the run, "starting" without a heartbeat: then step and age are
    empty.
    """
    if not run.held:
        return "", "ended", ""
    if not ranks:
        return "", "starting", ""

    # The rank with the oldest heartbeat shows first that a node hangs.
    slowest = max(ranks, key=lambda rank: rank["age_s"])
    stopped = " (stopped)" if slowest["state"] == "T" else ""
    age = slowest["age_s"] + max(0.0, now - run.heard_at)
    # Launchers of earlier releases wrote no share.
    share = slowest.get("done")
    words = slowest["phase"] + share_in_words(share if isinstance(share, float) else 0.0)
    return f"{slowest['step']:,}", words + stopped, f"{age:.1f} s ago"


def print_status(status: PipelineStatus, console: Console) -> None:
    """Prints the command with its stages and error, the run with nodes and last error, and other commands' names."""
    now = time.time()
    facts = status.facts
    words, style = WORDS[status.state]
    # A command that has ended stops counting its time.
    until = now if status.state == "running" else facts["updated"]
    job = f", job {facts['job']}" if facts.get("job") else ""

    console.print(Text.assemble((status.name, "bold"), ": ", (words, style)))
    console.print(
        Text(
            f"on {facts['host']} (process {facts['process']}{job}), "
            f"{duration(until - facts['started'])} since {_clock(facts['started'])}",
            style="dim",
        )
    )

    stages = Table("stage", "state", "", box=None, pad_edge=False)
    for stage in facts["stages"]:
        stages.add_row(stage["name"], Text(stage["state"], style=COLOURS[stage["state"]]), Text(stage["detail"]))
    console.print(stages)

    for build in status.builds:
        console.print(Text(build), soft_wrap=True)

    if facts["error"]:
        console.print(Text.assemble(("error: ", "bold red"), facts["error"]), soft_wrap=True)

    if status.run:
        console.print()
        _print_run(status.run, console, now)

    if status.others:
        console.print(Text(f"also here: {', '.join(status.others)}", style="dim"), soft_wrap=True)


def _print_run(run: RunStatus, console: Console, now: float) -> None:
    """Prints path and progress of a run, and if it was started the nodes of the newest attempt, and its last error."""
    console.print(Text(run.path, style="bold"), soft_wrap=True)
    console.print(Text(_progress(run)), soft_wrap=True)

    if run.attempt:
        nodes = counted(len(run.attempt["nodes"]), "node")
        per_node = run.attempt["ranks_per_node"]

        speed = ""
        if run.links.get("bus_gb_per_s"):
            speed = f", first all-reduce {run.links['bus_gb_per_s']:.2f} GB/s"
        if slowest := run.attempt.get("slowest_link_mb_per_s"):
            speed += f", slowest link {slowest:,} MB/s"

        console.print(
            Text(
                f"{nodes} x {per_node} ranks on {run.attempt['device']}, {run.attempt['layout']}, "
                f"from step {run.attempt['step']:,}; restarts after failures: {run.restarts}{speed}"
            ),
            soft_wrap=True,
        )

        table = Table("node", "host", "address", "ranks", "step", "state", "heard", box=None, pad_edge=False)
        for row in node_rows(run, now):
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)

    if run.last_error:
        when = f"last error, {duration(now - run.last_error_at)} ago: "
        console.print(Text.assemble((when, "yellow"), run.last_error), soft_wrap=True)


def _progress(run: RunStatus) -> str:
    """Returns one line: step or answered prompts, newest metrics, results and newest checkpoint.

    The time left is shown only while a launcher works on the run.
    """
    facts = [f"step {run.step:,}"]
    if run.asks:
        facts = [f"{counted(run.step, 'prompt')} answered"]
    elif run.steps:
        facts = [f"step {run.step:,}/{run.steps:,}"]

    # The time left says nothing once no launcher works on the run.
    for name, words, form in PROGRESS:
        if name in run.metrics and (name != LEFT or run.held):
            facts.append(words.format(form(run.metrics[name])))

    if run.figures:
        facts.append(run.figures)

    # A run of engines writes no checkpoints.
    if not run.asks:
        facts.append(f"newest checkpoint {run.checkpoint or 'none yet'}")

    return "  ".join(facts)


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
