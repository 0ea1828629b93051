"""What a command ends with: every stage of its pipeline in a table, and what to do next."""

import importlib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dist_lm.launcher.pipeline import QueuedStage
from dist_lm.launcher.plan import RANKINGS, Plan, PlannedStage, run_of
from dist_lm.stages.registry import STAGES
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.metrics import last_metrics, read_metrics
from dist_lm.tracking.readable import percent, span, three_decimals


@dataclass(frozen=True)
class KeyFigure:
    """What a stage is judged by."""

    metric: str
    form: Callable[[float], str]
    words: str


# of a stage the first line of which it has any
KEY_FIGURES = (
    (KeyFigure("rlhf/win_rate", percent, "wins"), KeyFigure("rlhf/reward_mean", three_decimals, "reward")),
    (KeyFigure("reward/accuracy", percent, "pairs right"),),
    (KeyFigure("tools/call_exact", percent, "calls exact"),),
    (KeyFigure("val/bits_per_byte", three_decimals, "val bits/byte"),),
    (KeyFigure("val/loss", three_decimals, "val loss"),),
    (KeyFigure("train/loss", three_decimals, "loss"),),
)
BELOW = ("first -> last", "where")  # columns that a narrow terminal has below their row
WORDS = {"waiting": "not begun"}


def print_outcome(
    plan: Plan,
    stages: Sequence[QueuedStage],
    state: Literal["done", "failed", "stopped"],
    command: Sequence[str],
    console: Console,
) -> None:
    """Print the table and the commands; nothing where no stage was begun and it was not to end so.

    Args:
        stages: as they stand.
        command: that was given, with the name of its program.
    """
    if state != "done" and all(stage.seconds is None for stage in stages):
        return
    rows = [row(planned, queued) for planned, queued in zip(plan.stages, stages, strict=True)]
    columns = ("stage", "", "steps", "time", *BELOW)
    console.table(f"stages, in {plan.stages[-1].config.work_dir}", columns, rows, below=BELOW)
    entries = dict(next_commands(plan.stages[-1], state, command))
    if entries:
        console.summary("what next", entries)


def row(stage: PlannedStage, queued: QueuedStage) -> tuple[str, ...]:
    """Name, state, steps, time, figures, where."""
    begun = queued.state != "waiting"
    state = WORDS.get(queued.state, queued.state)
    if queued.state == "done" and queued.seconds is None:
        state = "there"
    if not stage.info.trains and not stage.info.generates:
        detail = queued.detail if queued.state == "done" else ""
        if detail and queued.seconds is not None:  # so far that is what was planned
            detail = importlib.import_module(f"dist_lm.stages.{stage.info.name}").inspect(stage.config).detail
        took = span(queued.seconds) if queued.seconds is not None else ""
        return (stage.info.name, state, "", took, detail, _where(stage) if begun else "")
    run = run_of(stage.config)
    result = json.loads(run.result.read_text(encoding="utf-8")) if run.result.exists() and begun else {}
    seconds = queued.seconds if queued.seconds is not None else result.get("seconds")
    took = span(seconds) if seconds is not None else ""
    if stage.info.generates:
        return (stage.info.name, state, "", took, _answers(result), _where(stage) if begun else "")
    step = result.get("steps", int(last_metrics(run.metrics).get("step", 0)) if begun else 0)
    steps = f"{step:,}" if result else f"{step:,}/{stage.config.stage.steps:,}"
    figures = "; ".join(key_figures(run, result)) if begun else ""
    return (stage.info.name, state, steps, took, figures, _where(stage) if begun else "")


def key_figures(run: RunDirectory, result: Mapping[str, Any]) -> list[str]:
    """`val bits/byte 3.412 -> 2.104`: where training began, or was first measured, and where it has come to.

    `wins 54% (step 0)`: a run that has not ended measured it then and not since.
    """
    last = result.get("metrics") or last_metrics(run.metrics)
    present = ([figure for figure in line if last.get(figure.metric) is not None] for line in KEY_FIGURES)
    shown = next(filter(None, present), [])
    before, steps = result.get("before") or {}, result.get("steps")
    measured = _first_two(run, {figure.metric for figure in shown})
    found = []
    for figure in shown:
        name = figure.metric
        began = {0: before[name]} if before.get(name) is not None else {}
        ended = {steps: last[name]} if result else {}
        (step, first), *others = (began | measured[name] | ended).items()
        was = f"{figure.form(first)} -> " if others else ""
        when = "" if others or result else f" (step {step:,})"
        found.append(f"{figure.words} {was}{figure.form(last[name])}{when}")
    return found


def next_commands(
    stage: PlannedStage, state: Literal["done", "failed", "stopped"], command: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """(what for, command) of what a person may want to do now."""
    config = stage.config
    work = str(config.work_dir)
    if state != "done":
        yield "go on", shlex.join(["python", "-m", "dist_lm.launch", *command[1:]])
        yield "what happened", shlex.join(["python", "-m", "dist_lm", "cluster", "status", work])
    run = run_of(config)
    path = str(run.path)
    if stage.info.trains and run.metrics.exists():
        if run.result.exists() and config.model.head != "scalar" and stage.info.name != "reward":
            yield "talk to it", shlex.join(["python", "-m", "dist_lm", "generate", path])
        yield "report", shlex.join(["python", "-m", "dist_lm", "report", path])
        if list(run.wandb.glob("offline-run-*")):
            yield "curves", shlex.join(["python", "-m", "dist_lm", "dashboard", "show", "--offline", path])
    follower = next((info.name for info in STAGES.values() if info.starts_from == stage.info.name), None)
    if state == "done" and follower and stage.info.trains:
        own = [word for word in command[1:] if word.startswith(("run_id=", "work_dir=", "model=", "corpus="))]
        yield "next stage", shlex.join(["python", "-m", "dist_lm.launch", f"stage={follower}", *own])


def _first_two(run: RunDirectory, names: set[str]) -> dict[str, dict[int, float]]:
    """Values by step, of each metric from the first two steps that measured it."""
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    for line in read_metrics(run.metrics) if run.metrics.exists() else ():
        for name, values in found.items():
            if line.get(name) is not None and len(values) < 2:
                values[line["step"]] = line[name]
        if all(len(values) == 2 for values in found.values()):
            break
    return found


def _where(stage: PlannedStage) -> str:
    """Its folder, from the work directory on."""
    work = WorkDirectory(Path(stage.config.work_dir))
    if stage.info.trains or stage.info.generates:
        place = run_of(stage.config).path
    elif stage.info.name == "tokenizer":
        place = work.tokenizer
    else:
        place = work.corpus(RANKINGS) if stage.info.name == RANKINGS else work.corpus("x").parent
    return str(place.relative_to(work.path))


def _answers(result: Mapping[str, Any]) -> str:
    return f"{result['answers']:,} answers, {result['tokens']:,} tokens" if result else ""
