"""What RUN... on the command line means: runs, all runs of a stage, or a work directory with its newest pipeline."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_lm.data.manifest import Manifest, read_manifest
from dist_lm.errors import ArtefactError
from dist_lm.report.facts import Facts, RunFacts, WorkFacts
from dist_lm.report.read_run import read_run
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.redact import redact_command, redact_text

EXPECTED = "give a run (work/runs/STAGE/RUN_ID), all runs of a stage (work/runs/STAGE), or a work directory"


def read_facts(paths: Sequence[Path], run_id: str | None = None) -> Facts:
    """Read everything that `paths` name.

    Args:
        run_id: of a work directory's pipeline; None: the one written last.

    Raises:
        ArtefactError: a path is none of what can be reported on, or a file in it is damaged.
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
    """Refuse what is not there, and a run id that nothing would heed, before anything is read.

    Raises:
        ArtefactError: a path is no directory, or `run_id` was given without a work directory.
    """
    for path in paths:
        if not path.is_dir():
            raise ArtefactError(f"{path}: {'no directory' if path.exists() else 'does not exist'}; {EXPECTED}")
    if run_id is not None and not any(_work_of(path.resolve()) for path in paths):
        raise ArtefactError(f"--run-id {run_id}: chooses a command of a work directory; name one, or leave it out")


def labels(runs: Sequence[RunDirectory]) -> list[str]:
    """What to call runs: `code`, `second`, `code/second` or `work/code/second`: as much as tells them apart."""
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
    """The work directory that `path` is, or whose `runs` it is."""
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
    """The command that was given last, of any stage, under `run_id`."""
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
