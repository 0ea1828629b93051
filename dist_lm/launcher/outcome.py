"""The end of a command: a table of its stages, samples, and commands to go on with."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from dist_lm.errors import UserError
from dist_lm.launcher.pipeline import QueuedStage
from dist_lm.prepare.compose import own_groups
from dist_lm.prepare.conf_folders import with_config_dir
from dist_lm.prepare.plan import Plan, PlannedStage, plan_command
from dist_lm.stages.registry import all_stages, load_config
from dist_lm.stages.stage import KeyFigure, RunsIn, run_of, shown_path
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.live_drawing import glyphs_for, sparkline
from dist_lm.tracking.metrics import last_metrics, read_metrics
from dist_lm.tracking.readable import span

BELOW = ("first -> last", "curve", "where")  # a narrow terminal shows these columns below the row
CURVE_WIDTH = 24
WORDS = {"waiting": "not begun"}


def print_outcome(
    plan: Plan,
    stages: Sequence[QueuedStage],
    state: Literal["done", "failed", "stopped"],
    command: Sequence[str],
    console: Console,
    verb: Sequence[str] = (),
) -> None:
    """Prints the table and the next commands. Prints nothing if the command failed or stopped before its first stage
    began.

    Args:
        stages: the queue at the end of the command, one entry per stage of the plan.
        command: program and arguments.
        verb: as for `next_commands`.

    Raises:
        ArtefactError: metrics or result of a run are damaged, or what an artefact stage left.
        ConfigError: the stage of another package cannot be imported.
        UserError: as `row`.
    """
    if state != "done" and all(stage.seconds is None for stage in stages):
        return
    # A terminal without Unicode gets curves of ASCII characters.
    ramp = glyphs_for(sys.stdout.encoding).ramp
    rows = [row(planned, queued, ramp) for planned, queued in zip(plan.stages, stages, strict=True)]
    columns = ("stage", "", "steps", "time", *BELOW)
    console.table(f"stages, in {plan.stages[-1].config.work_dir}", columns, rows, below=BELOW)
    if entries := dict(next_commands(plan.stages[-1], state, command, verb)):
        console.summary("what next", entries)


def print_samples(plan: Plan, console: Console) -> None:
    """Prints samples of the earlier stages that this command trained."""
    # The target prints its own samples in its summary.
    for planned in plan.missing[:-1]:
        run = run_of(planned.config)
        if planned.stage.runs_in is RunsIn.RANKS and list(run.samples.glob("step_*.jsonl")):
            console.line(f"samples of stage {planned.name}, more in {run.samples}")
            planned.stage.print_samples(run, console)


def row(stage: PlannedStage, queued: QueuedStage, ramp: str) -> tuple[str, ...]:
    """Returns the cells of a stage in the final table: name, state, steps, time, figures, curve, where. Unknown ones
    are empty.

    Args:
        ramp: characters of the curve, lowest first.

    Raises:
        ArtefactError: `result.json` or the metrics file is damaged.
        ConfigError, UserError: as `look` of an artefact stage.
    """
    state = WORDS.get(queued.state, queued.state)
    if queued.state == "waiting":
        steps = ""
        if stage.stage.runs_in is RunsIn.RANKS:
            steps = f"0/{stage.config.stage.steps:,}" if stage.config.stage.steps else ""
        return (stage.name, state, steps, "", "", "", "")

    if queued.state == "done" and queued.seconds is None:
        state = "there"
    output_path = shown_path(stage.stage.output(stage.config), stage.config)
    if stage.stage.runs_in is RunsIn.LAUNCHER:
        detail = queued.detail if queued.state == "done" else ""
        # `detail` is still that of the plan.
        if detail and queued.seconds is not None:
            detail = stage.stage.look(stage.config, is_target=False, rebuilt=()).detail
        return (stage.name, state, "", _duration(queued.seconds), detail, "", output_path)

    run = run_of(stage.config)
    result = stage.stage.read_result(run)
    # A run that an earlier command has finished says itself how long it took.
    seconds = queued.seconds
    if seconds is None:
        seconds = result.get("seconds")
    duration = _duration(seconds)
    if stage.stage.runs_in is RunsIn.POOL:
        return (stage.name, state, "", duration, stage.stage.figures(result), "", output_path)

    if result:
        steps = f"{result['steps']:,}"
    else:
        # The plan does not know steps that follow from stage.epochs if the corpus was built after it.
        planned_steps = stage.config.stage.steps
        if not planned_steps and run.config.exists():
            planned_steps = load_config(run.config).stage.steps
        steps = f"{int(last_metrics(run.metrics).get('step', 0)):,}/{planned_steps:,}"
    figures = "; ".join(key_figures(run, result, stage.stage.key_figures))
    curve = sparkline([*measured(run, stage.stage.curve).values()], CURVE_WIDTH, ramp)
    return (stage.name, state, steps, duration, figures, curve, output_path)


def measured(run: RunDirectory, metric: str) -> dict[int, float]:
    """Returns the values of a metric by step; empty without a metrics file. The last line of a step wins.

    Raises:
        ArtefactError: a line is no metrics line.
    """
    if not run.metrics.exists():
        return {}
    return {line["step"]: value for line in read_metrics(run.metrics) if (value := line.get(metric)) is not None}


def key_figures(run: RunDirectory, result: Mapping[str, Any], lines: Sequence[Sequence[KeyFigure]]) -> list[str]:
    """Returns texts of first and last values, such as `val bits/byte 3.412 -> 2.104`; empty if no metric was measured.

    For an unfinished run that measured the metric once: value and step, such as `wins 54% (step 0)`.

    Args:
        result: `result.json`; empty for an unfinished run.
        lines: alternatives; the first one with a metric that the run has is used.

    Raises:
        ArtefactError: a line is no metrics line.
    """
    last = result.get("metrics") or last_metrics(run.metrics)
    before = result.get("before") or {}

    # The first line whose metrics the run has: not every run measures everything.
    figures_of_run: Sequence[KeyFigure] = ()
    for line in lines:
        figures_of_run = [figure for figure in line if last.get(figure.metric) is not None]
        if figures_of_run:
            break

    texts = []
    for figure in figures_of_run:
        name = figure.metric
        values = measured(run, name)
        # The results of a finished run name its first and its last value, which no line of metrics may have.
        if before.get(name) is not None:
            values = {0: before[name]} | values
        if result:
            values = values | {result.get("steps"): last[name]}

        (first_step, first_value), *later = values.items()
        text = figure.form(last[name])
        if later:
            text = f"{figure.form(first_value)} -> {text}"
        elif not result:
            text += f" (step {first_step:,})"
        texts.append(f"{figure.words} {text}")
    return texts


def next_commands(
    stage: PlannedStage, state: Literal["done", "failed", "stopped"], command: Sequence[str], verb: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    """Yields (purpose, shell command) of possible next steps, perhaps none; nothing is run.

    Unless the stage is done: to go on, and to see what happened. For a stage that runs in ranks and has metrics: to use
    what its run has. Only if such a stage is done: the first stage that starts from it and that a launch would not
    refuse, with the overrides of the command that both share.

    Args:
        stage: the last stage of the command; its run directory is read.
        command: program, then overrides.
        verb: words of the `dist-lm` verb that trained the stage, which has no overrides; empty: a launch did.

    Raises:
        ConfigError: the stage of another package cannot be imported.
    """
    config = stage.config
    work = str(config.work_dir)
    if state != "done":
        again = ["python", "-m", "dist_lm", *verb] if verb else ["python", "-m", "dist_lm.launch", *command[1:]]
        yield "go on", shlex.join(again)
        yield "what happened", shlex.join(["python", "-m", "dist_lm", "cluster", "status", work])

    run = run_of(config)
    path = str(run.path)
    trains = stage.stage.runs_in is RunsIn.RANKS
    if trains and run.metrics.exists():
        if run.result.exists() and stage.stage.writes_text:
            talk = ["python", "-m", "dist_lm", "generate", path]
            if stage.stage.answers_requests:
                talk.append("--chat")
            yield "talk to it", shlex.join(talk)
            yield "serve it", shlex.join(["python", "-m", "dist_lm", "serve", path])
        yield "report", shlex.join(["python", "-m", "dist_lm", "report", path])
        if list(run.wandb.glob("offline-run-*")):
            yield "curves", shlex.join(["python", "-m", "dist_lm", "dashboard", "show", "--offline", path])

    if state == "done" and trains and not verb:
        followers = [later for later in all_stages() if later.starts_from == stage.name]
        # The follower's own length of sequences comes first; a model with a short context needs that of this command.
        launches = (
            _launch_of_follower(stage, follower.name, command[1:], kept_keys)
            for follower in followers
            for kept_keys in ((), ("stage.seq_len=",))
        )
        for overrides in filter(can_be_launched, launches):
            yield "next stage", shlex.join(["python", "-m", "dist_lm.launch", *overrides])
            break


def _launch_of_follower(
    stage: PlannedStage, follower: str, arguments: Sequence[str], kept_keys: tuple[str, ...] = ()
) -> list[str]:
    """Returns the overrides of a launch of `follower` that starts from the run of `stage`.

    Args:
        arguments: of the command that trained `stage`, its target.
        kept_keys: beginnings of overrides of `stage` itself that `follower` gets, too.
    """
    # Keys of this stage, such as stage.lr, would be those of the other one.
    own_keys = ("stage=", "stage.", "profile.", *(f"{group}." for group in own_groups(stage.stage.schema)))
    overrides = with_config_dir(arguments)
    shared = [override for override in overrides if override.startswith(kept_keys) or not override.startswith(own_keys)]

    # Behind a run that did not start from the stage before it, the stages in between would be trained again.
    start = []
    if any(override.startswith(("stage.init_from=", "stage.branch_from=")) for override in overrides):
        start = [f"stage.init_from={run_of(stage.config).path}"]
    return [f"stage={follower}", *shared, *start]


def can_be_launched(overrides: Sequence[str]) -> bool:
    """Returns whether a launch has something to do, and is planned without an error of the user, such as a corpus that
    is not configured.

    Reads the work directory and writes nothing.

    Raises:
        OSError: a file cannot be read.
    """
    try:
        return bool(plan_command(overrides).missing)
    except UserError:
        return False


def _duration(seconds: float | None) -> str:
    """Returns a time for people; empty if it is not known."""
    if seconds is None:
        return ""
    return span(seconds)
