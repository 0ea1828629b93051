"""Reads what a report shows: one run, all runs of a stage, or a work directory with its newest command.

Missing files are left out, so that a run that failed early has a report too.
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_lm.cluster.events import read_events
from dist_lm.config.model import ModelConfig
from dist_lm.data.manifest import Manifest, read_manifest
from dist_lm.errors import ArtefactError
from dist_lm.parallel.layout import AXES, Layout
from dist_lm.report.facts import Checkpoint, Facts, RunFacts, Samples, Series, State, WorkFacts
from dist_lm.storage import durable
from dist_lm.storage.durable import json_lines
from dist_lm.storage.lock import is_locked
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.metrics import read_metrics
from dist_lm.tracking.redact import redact, redact_command, redact_text
from dist_lm.training import checkpoint_files

EXPECTED = "give a run (work/runs/STAGE/RUN_ID), all runs of a stage (work/runs/STAGE), or a work directory"
SHOWN_SAMPLES = 16
STALL = "checkpoint/stall_s"


def read_facts(paths: Sequence[Path], run_id: str | None = None) -> Facts:
    """Read the runs that `paths` name.

    Args:
        run_id: of a command in a work directory; None: the newest one.

    Raises:
        ArtefactError: a path cannot be reported on, or one of its files is damaged.
    """
    runs: list[RunDirectory] = []
    pipelines: dict[Path, dict[str, Any]] = {}
    for path in (path.resolve() for path in paths):
        work = _work_of(path)
        if work:
            pipelines[work.path] = _pipeline(work, run_id)
            runs += _runs_of(work, pipelines[work.path])
        else:
            runs += _named(path)
    runs = list(dict.fromkeys(runs))
    facts = tuple(read_run(run, label) for run, label in zip(runs, labels(runs), strict=True))
    works = dict.fromkeys([*pipelines, *(run.work.path for run in runs)])
    return Facts(
        _title(runs, pipelines),
        facts,
        tuple(
            _read_work(
                WorkDirectory(path), pipelines.get(path, {}), [run for run in facts if run.path.parents[2] == path]
            )
            for path in works
        ),
    )


def require_paths(paths: Sequence[Path], run_id: str | None) -> None:
    """Check the arguments before anything is read.

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
    """Names of runs, as short as they stay unique: `second`, `code`, `code/second` or `work/code/second`."""
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
    """The work directory `path`, or the parent of the `runs` folder `path`; None for anything else."""
    if path.name == "runs" and path.is_dir():
        path = path.parent
    is_work = any((path / name).is_dir() for name in ("runs", "pipelines")) and not (path / "config.yaml").exists()
    return WorkDirectory(path) if is_work else None


def _named(path: Path) -> list[RunDirectory]:
    if RunDirectory(path).config.is_file():
        return [RunDirectory(path)]
    below = [RunDirectory(config.parent) for config in sorted(path.glob("[!.]*/config.yaml"))]
    if not below:
        raise ArtefactError(f"{path}: nothing to report on; {EXPECTED}")
    return below


def _pipeline(work: WorkDirectory, run_id: str | None) -> dict[str, Any]:
    """The newest command, of any stage, with `run_id`."""
    found = [durable.read_json(path) for path in work.pipelines()]
    chosen = [facts for facts in found if run_id in (None, facts["run_id"])]
    if not chosen:
        known = ", ".join(sorted({facts["run_id"] for facts in found})) or "none"
        raise ArtefactError(
            f"{work.path}: no command was given here{f' with run_id={run_id}' if run_id else ''}; run ids: {known}"
        )
    newest = dict(chosen[-1])
    newest["command"] = redact_command(newest.get("command", []))
    newest["error"] = redact_text(newest.get("error", ""))
    return newest


def _runs_of(work: WorkDirectory, pipeline: dict[str, Any]) -> list[RunDirectory]:
    runs = [work.run(stage["name"], pipeline["run_id"]) for stage in pipeline["stages"]]
    there = [run for run in runs if run.config.is_file()]
    if not there:
        raise ArtefactError(f"{work.path}: run_id={pipeline['run_id']} has no run of a stage yet")
    return there


def _title(runs: Sequence[RunDirectory], pipelines: dict[Path, dict[str, Any]]) -> str:
    if len(pipelines) == 1 and all(run.work.path in pipelines for run in runs):
        return f"{next(iter(pipelines)).name} / {next(iter(pipelines.values()))['run_id']}"
    if len(runs) == 1:
        return f"{runs[0].path.parent.name} / {runs[0].path.name}"
    stages = sorted({run.path.parent.name for run in runs})
    return f"{len(runs)} runs of {stages[0]}" if len(stages) == 1 else f"{len(runs)} runs"


def _read_work(work: WorkDirectory, pipeline: dict[str, Any], runs: Sequence[RunFacts]) -> WorkFacts:
    read = frozenset[str]().union(*(run.corpora for run in runs))
    names = sorted(name for name in read if work.corpus_manifest(name).is_file())
    corpora: dict[str, Manifest] = {name: read_manifest(work.corpus(name)) for name in names}
    tokenizer = durable.read_json(work.tokenizer_report)
    return WorkFacts(work.path, corpora, tokenizer, pipeline)


def read_run(run: RunDirectory, label: str) -> RunFacts:
    """Read one run.

    Raises:
        ArtefactError: not a run, or one of its files is damaged.
    """
    if not run.config.is_file():
        raise ArtefactError(f"{run.path}: not a run, it has no {run.config.name}; give work/runs/STAGE/RUN_ID")
    config = _config(run.config)
    events = tuple(redact(event) for event in read_events(run.events))
    series, clock = read_series(run.metrics)
    return RunFacts(
        path=run.path,
        label=label,
        stage=str(config.get("stage", {}).get("name") or run.path.parent.name),
        run_id=str(config.get("run_id") or run.path.name),
        state=_state(run),
        config=config,
        model=_model(config),
        layout=_layout(events),
        series=series,
        clock=clock,
        result=durable.read_json(run.result),
        events=events,
        links=durable.read_json(run.links),
        checkpoints=tuple(_checkpoints(run, series.get(STALL), clock)),
        samples=_samples(run),
    )


def read_series(path: Path) -> tuple[dict[str, Series], Series]:
    """Every metric of a metrics file by name, and when every step was done; needs 16 bytes a value.

    Lines that add to a step later, as figures of tasks may do, leave its time alone.

    Raises:
        ArtefactError: a line is damaged.
    """
    steps: dict[str, array] = {}
    values: dict[str, array] = {}
    for line in read_metrics(path) if path.exists() else ():
        step = line["step"]
        for name, value in line.items():
            if name == "step":
                continue
            if name not in steps:
                steps[name], values[name] = array("q"), array("d")
            steps[name].append(step)
            values[name].append(float("nan") if value is None else value)
    found = {
        name: _by_step(np.array(steps[name], np.int64), np.array(values[name]), first=name == "time") for name in steps
    }
    return found, found.pop("time", Series(np.zeros(0, np.int64), np.zeros(0)))


def _by_step(steps: np.ndarray, values: np.ndarray, first: bool) -> Series:
    """In order of steps; of several values of a step the first or the last one written."""
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    changes = steps[1:] != steps[:-1]
    chosen = np.insert(changes, 0, True) if first else np.append(changes, True)
    return Series(steps[chosen], values[chosen])


def _config(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
        raise ArtefactError(f"{path}: cannot be read ({error})") from error
    if not isinstance(loaded, dict):
        raise ArtefactError(f"{path}: not the configuration of a run")
    return redact(loaded)


def _model(config: Mapping[str, Any]) -> ModelConfig | None:
    try:
        return ModelConfig(**config["model"])
    except (KeyError, TypeError, ValueError):  # written by another version: no picture of its layout
        return None


def _layout(events: tuple[Mapping[str, Any], ...]) -> Layout | None:
    """The layout of the newest attempt, which differs from the configured one after a node was lost or added."""
    for event in reversed(events):
        if event["event"] == "started":
            pairs = dict(part.split("=", 1) for part in str(event.get("layout", "")).split())
            return Layout(*(int(pairs[axis]) for axis in AXES)) if set(AXES) <= pairs.keys() else None
    return None


def _state(run: RunDirectory) -> State:
    if run.result.exists():
        return "finished"
    return "running" if is_locked(run.launch_lock) else "unfinished"


def _checkpoints(run: RunDirectory, stalls: Series | None, clock: Series) -> Iterator[Checkpoint]:
    """Existing checkpoints, and deleted ones that are known from the metrics."""
    marks: dict[str, list[str]] = {}
    for pointer, mark in ((checkpoint_files.LATEST, "newest"), (checkpoint_files.BEST, "best")):
        if target := checkpoint_files.read_pointer(run.checkpoints, pointer):
            marks.setdefault(target.name, []).append(mark)
    kept = {checkpoint_files.step_of(path): path for path in checkpoint_files.steps_in(run.checkpoints)}
    stall_of = dict(zip(stalls.steps.tolist(), stalls.values.tolist(), strict=True)) if stalls else {}
    time_of = dict(zip(clock.steps.tolist(), clock.values.tolist(), strict=True)) if kept or stall_of else {}
    for step in sorted(kept.keys() | stall_of.keys()):
        path = kept.get(step)
        at = time_of.get(step) or (path.stat().st_mtime if path else None)
        if at is not None:
            mark = ", ".join(marks.get(path.name, [])) if path else "gone"
            yield Checkpoint(step, at, mark, stall_of.get(step))


def _samples(run: RunDirectory) -> Samples:
    files = sorted(run.samples.glob("step_*.jsonl")) or sorted(run.samples.glob("part-*.jsonl"))
    if not files:
        return Samples()
    newest = files[-1] if files[-1].name.startswith("step_") else files[0]  # all parts are of one model
    try:
        rows = [dict(row) for row in islice(json_lines(newest), 1 << 16)]
    except (ValueError, TypeError) as error:
        raise ArtefactError(f"{newest}: not a file of samples ({error}); move it away to go on") from error
    return Samples(newest.name, tuple(_spread(rows)), len(rows), len(files))


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A selection of rows, some of each kind or language, in their order."""
    kinds: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        kinds.setdefault(str(row.get("kind") or row.get("language") or ""), []).append(number)
    share = max(2, SHOWN_SAMPLES // max(1, len(kinds)))
    chosen = sorted(number for numbers in kinds.values() for number in numbers[:share])
    return [rows[number] for number in chosen[:SHOWN_SAMPLES]]
