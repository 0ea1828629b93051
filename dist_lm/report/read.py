"""Reads the facts of a report: one run, all runs of a stage, or a work directory (its newest command with runs).

Missing files are no error, so that a run that failed early has a report, too.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from dist_lm.cluster.events import read_events
from dist_lm.config.model import ModelConfig
from dist_lm.config.root import read_groups
from dist_lm.data.manifest import Manifest, read_manifest
from dist_lm.errors import ArtefactError
from dist_lm.parallel.layout import AXES, PARAMETER_AXES, Layout
from dist_lm.report.conversations import iterations_for, read_conversations
from dist_lm.report.facts import EMPTY, Checkpoint, Facts, RunFacts, Samples, Series, State, WorkFacts, newest_attempt
from dist_lm.storage import durable
from dist_lm.storage.durable import json_lines
from dist_lm.storage.lock import is_locked
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.metrics import read_metrics
from dist_lm.tracking.redact import redact, redact_command, redact_text
from dist_lm.training import checkpoint_files

EXPECTED = "give a run (work/runs/STAGE/RUN_ID), all runs of a stage (work/runs/STAGE), or a work directory"
MOST_SAMPLES = 16  # samples of one run
STALL = "checkpoint/stall_s"


def read_facts(paths: Sequence[Path], run_id: str | None = None) -> Facts:
    """Returns what a report shows of the runs that `paths` name, each once: of a run, of all runs of a stage, or of the
    newest command in a work directory that has runs. Secrets are removed.

    Args:
        run_id: the run_id of a command in a work directory; None: of any.

    Raises:
        ArtefactError: a path cannot be reported on, or one of its files is damaged.
        OSError: a file cannot be read.
    """
    runs: list[RunDirectory] = []
    pipelines: dict[Path, dict[str, Any]] = {}

    for path in map(Path.resolve, paths):
        work = _work_of(path)
        if work:
            pipelines[work.path] = _pipeline(work, run_id)
            runs += _existing_runs(work, pipelines[work.path])
        else:
            runs += _named(path)

    # A run may be named twice: by its path and by its work directory.
    runs = list(dict.fromkeys(runs))
    iterations = iterations_for(len(runs))
    facts = tuple(read_run(run, label, iterations) for run, label in zip(runs, labels(runs), strict=True))

    work_facts = []
    for work_path in dict.fromkeys([*pipelines, *(run.work.path for run in runs)]):
        members = [run for run in facts if run.path.parents[2] == work_path]
        work_facts.append(_read_work(WorkDirectory(work_path), pipelines.get(work_path, {}), members))
    return Facts(_title(runs, pipelines), facts, tuple(work_facts))


def require_paths(paths: Sequence[Path], run_id: str | None) -> None:
    """Checks the arguments before any file is read.

    Raises:
        ArtefactError: a path is not a directory, or `run_id` was given without a work directory.
    """
    for path in paths:
        if not path.is_dir():
            raise ArtefactError(f"{path}: {'not a directory' if path.exists() else 'does not exist'}; {EXPECTED}")

    if run_id is not None and not any(_work_of(path.resolve()) for path in paths):
        raise ArtefactError(
            f"--run-id {run_id}: selects a command of a work directory; give one, or leave --run-id out"
        )


def labels(runs: Sequence[RunDirectory]) -> list[str]:
    """Returns the shortest names of runs that differ, all of one form: RUN_ID, STAGE, `STAGE/RUN_ID`,
    `WORK/STAGE/RUN_ID`, or else their paths. One run has its RUN_ID."""
    forms = (
        [run.path.name for run in runs],
        [run.path.parent.name for run in runs],
        [f"{run.path.parent.name}/{run.path.name}" for run in runs],
        [f"{run.work.path.name}/{run.path.parent.name}/{run.path.name}" for run in runs],
        [str(run.path) for run in runs],
    )

    if len(runs) == 1:
        return forms[0]
    return list(next(form for form in forms if max(Counter(form).values(), default=0) <= 1))


def _work_of(path: Path) -> WorkDirectory | None:
    """Returns the work directory `path`, or the parent of the `runs` folder `path`; None for any other path."""
    if path.name == "runs" and path.is_dir():
        path = path.parent

    is_work = any((path / name).is_dir() for name in ("runs", "pipelines")) and not (path / "config.yaml").exists()
    return WorkDirectory(path) if is_work else None


def _named(path: Path) -> list[RunDirectory]:
    """Returns the run `path`, or the runs of the stage folder `path`, sorted by name.

    Raises:
        ArtefactError: it is neither.
    """
    if RunDirectory(path).config.is_file():
        return [RunDirectory(path)]

    below = [RunDirectory(config.parent) for config in sorted(path.glob("[!.]*/config.yaml"))]
    if not below:
        raise ArtefactError(f"{path}: nothing to report on; {EXPECTED}")

    return below


def _pipeline(work: WorkDirectory, run_id: str | None) -> dict[str, Any]:
    """Returns the record of the newest command in a work directory that has runs, with `run_id` unless that is None.
    Secrets are removed.

    Raises:
        ArtefactError: there is no such command (the message lists the run ids), or a record is damaged.
    """
    commands = list(work.commands().values())
    matching = [command for command in commands if run_id in (None, command["run_id"])]

    if not matching:
        run_ids = ", ".join(sorted({command["run_id"] for command in commands})) or "none"
        requested = f" with run_id={run_id}" if run_id else ""
        raise ArtefactError(f"{work.path}: no command was given here{requested}; run ids: {run_ids}")

    # A launch that failed early has left a record and no run: the commands before it have something to show.
    with_runs = [command for command in matching if _existing_runs(work, command)]
    if not with_runs:
        reported = {command["run_id"] for command in commands if _existing_runs(work, command)}
        hint = f"; --run-id {' or '.join(sorted(reported))} has" if reported else ""
        raise ArtefactError(f"{work.path}: run_id={matching[-1]['run_id']} has no run of a stage yet{hint}")

    # The record is printed on the page.
    newest = dict(with_runs[-1])
    newest["command"] = redact_command(newest["command"])
    newest["error"] = redact_text(newest["error"])
    return newest


def _existing_runs(work: WorkDirectory, pipeline: dict[str, Any]) -> list[RunDirectory]:
    runs = [work.run(stage["name"], pipeline["run_id"]) for stage in pipeline["stages"]]
    return [run for run in runs if run.config.is_file()]


def _title(runs: Sequence[RunDirectory], pipelines: dict[Path, dict[str, Any]]) -> str:
    """Returns the title of a report: `WORK / RUN_ID` for one command, `STAGE / RUN_ID` for one run, else their
    number."""
    if len(pipelines) == 1 and all(run.work.path in pipelines for run in runs):
        return f"{next(iter(pipelines)).name} / {next(iter(pipelines.values()))['run_id']}"

    if len(runs) == 1:
        return f"{runs[0].path.parent.name} / {runs[0].path.name}"

    stages = sorted({run.path.parent.name for run in runs})
    if len(stages) == 1:
        return f"{len(runs)} runs of {stages[0]}"
    return f"{len(runs)} runs"


def _read_work(work: WorkDirectory, pipeline: dict[str, Any], runs: Sequence[RunFacts]) -> WorkFacts:
    folders_read = {run.folders.get(name, name) for run in runs for name in run.corpora}
    folders = sorted(folder for folder in folders_read if work.corpus_manifest(folder).is_file())
    corpora: dict[str, Manifest] = {folder: read_manifest(work.corpus(folder)) for folder in folders}
    return WorkFacts(work.path, corpora, _tokenizer_report(work.tokenizer_report), pipeline)


def _tokenizer_report(path: Path) -> dict[str, Any]:
    kinds: dict[str, durable.Kind] = {"vocab_size": int, "bytes_per_token": (int, float)}
    report = durable.read_json(path, kinds | {"languages": (dict, NoneType)})
    for name, facts in (report.get("languages") or {}).items():
        if not (isinstance(facts, dict) and isinstance(facts.get("bytes_per_token"), int | float)):
            raise durable.damaged(path, f"languages: {name}")
    return report


def read_run(run: RunDirectory, label: str, iterations: int = 1) -> RunFacts:
    """Returns the facts of one run, without secrets; missing files but config.yaml count as empty.

    Args:
        label: its name in the report.
        iterations: most iterations whose conversations are read.

    Raises:
        ArtefactError: not a run, or one of its files is damaged.
        OSError: a file cannot be read.
        UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
    """
    if not run.config.is_file():
        raise ArtefactError(f"{run.path}: not a run, it has no {run.config.name}; give work/runs/STAGE/RUN_ID")

    config = _config(run.config)
    events = tuple(redact(event) for event in read_events(run.events))
    series, clock = read_series(run.metrics)
    state = _state(run)

    return RunFacts(
        path=run.path,
        label=label,
        stage=str(config.get("stage", {}).get("name") or run.path.parent.name),
        run_id=str(config.get("run_id") or run.path.name),
        state=state,
        config=config,
        folders=run.corpus_folders(),
        model=_model(config),
        layout=_layout(events),
        series=series,
        clock=clock,
        result=durable.read_json(run.result),
        events=events,
        links=durable.read_json(run.links),
        checkpoints=tuple(_checkpoints(run, series.get(STALL, EMPTY).by_step(), clock.by_step())),
        samples=_samples(run),
        conversations=read_conversations(run, iterations, is_finished=state == "finished"),
    )


def read_series(path: Path) -> tuple[dict[str, Series], Series]:
    """Returns every metric of a metrics file by name, and the time of every step; empty without a file. It takes 16
    bytes for each value. Of several values of a step the last one counts.

    A line that is added to a step later, such as scores of tasks, does not change the time of the step.

    Raises:
        ArtefactError: a line is damaged.
    """
    if not path.exists():
        return {}, EMPTY

    # Arrays take 8 bytes for a number; lists of Python numbers would take four times as much.
    steps: dict[str, array] = defaultdict(lambda: array("q"))
    values: dict[str, array] = defaultdict(lambda: array("d"))

    for line in read_metrics(path):
        step = line["step"]
        for name, value in line.items():
            if name == "step":
                continue
            steps[name].append(step)
            values[name].append(np.nan if value is None else value)

    series = {
        name: _by_step(np.array(steps[name], np.int64), np.array(values[name]), first=name == "time") for name in steps
    }

    return series, series.pop("time", EMPTY)


def _by_step(steps: np.ndarray, values: np.ndarray, first: bool) -> Series:
    """Returns values in order of steps, each step once; of several the one written first (`first`) or last. Neither
    array may be empty."""
    # A stable sort keeps the order of writing among equal steps.
    order = np.argsort(steps, kind="stable")
    steps = steps[order]
    values = values[order]

    changes = steps[1:] != steps[:-1]
    selected = np.insert(changes, 0, True) if first else np.append(changes, True)
    return Series(steps[selected], values[selected])


def _config(path: Path) -> dict[str, Any]:
    """Returns the configuration of a run without secrets; interpolations are not resolved.

    Raises:
        ArtefactError: the file cannot be read, or is no configuration.
    """
    return redact(read_groups(path))


def _model(config: Mapping[str, Any]) -> ModelConfig | None:
    try:
        return ModelConfig(**config["model"])
    except (KeyError, TypeError, ValueError):
        # Written by another version: no picture of its layout.
        return None


def _layout(events: tuple[Mapping[str, Any], ...]) -> Layout | None:
    """Returns the layout of the newest attempt, None if it is unknown; it differs from the configured one after a node
    was lost or added."""
    text = str(newest_attempt(events).get("layout", ""))
    pairs = dict(part.split("=", 1) for part in text.split())
    if set(PARAMETER_AXES) <= pairs.keys():
        return Layout(**{axis: int(pairs[axis]) for axis in AXES if axis in pairs})  # cp is there if it is not 1
    return None


def _state(run: RunDirectory) -> State:
    if run.result.exists():
        return "finished"
    return "running" if is_locked(run.launch_lock) else "unfinished"


def _checkpoints(
    run: RunDirectory, stall_of: Mapping[int, float], time_of: Mapping[int, float]
) -> Iterator[Checkpoint]:
    """Yields the checkpoints of a run by rising step: those on disk, and deleted ones whose steps are in `stall_of`.

    A checkpoint on disk whose step is not in `time_of` has the time of its folder. A deleted one without a time is left
    out.

    Args:
        stall_of: step -> seconds that training waited for the checkpoint of this step.
        time_of: step -> seconds since 1970.
    """
    marks: dict[str, list[str]] = {}
    for pointer, mark in ((checkpoint_files.LATEST, "newest"), (checkpoint_files.BEST, "best")):
        if target := checkpoint_files.read_pointer(run.checkpoints, pointer):
            marks.setdefault(target.name, []).append(mark)

    path_of = {checkpoint_files.step_of(path): path for path in checkpoint_files.steps_in(run.checkpoints)}
    for step in sorted(path_of.keys() | stall_of.keys()):
        at, mark = time_of.get(step), "gone"
        if path := path_of.get(step):
            # A checkpoint of a step without metrics has the time of its folder.
            at = at or path.stat().st_mtime
            mark = ", ".join(marks.get(path.name, []))
        if at is not None:
            yield Checkpoint(step, at, mark, stall_of.get(step))


def _samples(run: RunDirectory) -> Samples:
    """Returns a selection of the rows in a run's newest file of samples (of stage generate: its first part); empty
    without a file.

    Raises:
        ArtefactError: the file is damaged.
    """
    # Files of steps belong to different weights, so the newest counts; all parts belong to one model.
    files = sorted(run.samples.glob("step_*.jsonl"), reverse=True) or sorted(run.samples.glob("part-*.jsonl"))
    if not files:
        return Samples()

    file = files[0]
    try:
        rows = [dict(row) for row in islice(json_lines(file), 1 << 16)]
    except (ValueError, TypeError) as error:
        raise ArtefactError(f"{file}: not a file of samples ({error}); move it away to go on") from error
    return Samples(file.name, tuple(_spread(rows)), len(rows), len(files))


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns at most MOST_SAMPLES of the rows, the first few of each kind or language, in their order."""
    indices_of: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        indices_of.setdefault(str(row.get("kind") or row.get("language") or ""), []).append(index)

    # Every kind is shown, also where one has most of the rows.
    share = max(2, MOST_SAMPLES // max(1, len(indices_of)))
    chosen = sorted(index for indices in indices_of.values() for index in indices[:share])
    return [rows[index] for index in chosen[:MOST_SAMPLES]]
