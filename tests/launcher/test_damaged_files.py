"""Damaged pointers and status files: the intact run goes on, or one line says which file is damaged."""

import io
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from dist_lm.data.inspect import print_corpus
from dist_lm.errors import ArtefactError, UserError
from dist_lm.prepare.compose import compose_config
from dist_lm.report.page import write_report
from dist_lm.stages.registry import load_config, stage_named
from dist_lm.stages.stage import Action
from dist_lm.stages.training.stage import find_run
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.readable import OutputConsole
from dist_lm.training import checkpoint_files
from dist_lm.training.checkpoint_inspect import print_checkpoint
from dist_lm.training.state import TrainState
from dist_lm.verbs.cluster_status import as_json, print_status, read_status
from tests.report.made_runs import BEGAN, MODEL, make_corpora, make_run

STEPS = 10
SETTINGS = ("stage=code", *MODEL, f"stage.steps={STEPS}")
DAMAGES = 26  # two of each file; test_damage_through_verbs.py makes more of them


def make_work(path: Path) -> WorkDirectory:
    """A work directory of a finished run of stage code, with every small file that verbs read."""
    work = WorkDirectory(path)
    make_corpora(work)
    run = make_run(work, "code", steps=STEPS, failures=1)
    config = load_config(run.config)

    for step in (STEPS // 2, STEPS):
        directory = run.checkpoints / checkpoint_files.step_name(step)
        checkpoint_files.write_state(directory, TrainState(step=step, tokens=step * 4096), asdict(config.model))
        state_file = directory / checkpoint_files.STATE
        checkpoint_files.write_manifest(directory, {state_file.name: durable.sha256_of(state_file)})

    durable.write_sealed(run.result, durable.read_json(run.result) | {"metrics": {"val/loss": 2.5}})
    write_status_files(run, BEGAN, ranks=4, steps=STEPS)
    return work


def write_status_files(run: RunDirectory, began: float, ranks: int, steps: int) -> None:
    """Writes what a launch of this one run has left: heartbeats, links and its pipeline.

    Args:
        began: seconds since 1970.
    """
    heartbeats = [{"rank": rank, "step": 3, "age_s": 0.5, "state": "S", "phase": "in a step"} for rank in range(ranks)]
    run.live.write_text(json.dumps({"time": began + 3, "ranks": heartbeats}) + "\n")
    durable.write_sealed(run.links, {"ranks": ranks, "bytes": 1 << 20, "seconds": 0.1, "bus_gb_per_s": 1.5})

    stages = [{"name": "code", "state": "done", "detail": f"{steps} steps", "seconds": 5.0}]
    facts = {"run_id": "default", "command": ["dist_lm.launch", "stage=code"], "host": "alpha", "process": 7}
    times = {"started": began, "updated": began + 9}
    pipeline = run.work.pipeline("code", "default")
    pipeline.parent.mkdir()
    durable.write_sealed(pipeline, facts | times | {"job": None, "state": "done", "error": "", "stages": stages})


def status(work: WorkDirectory) -> None:
    read = read_status(work.path)
    as_json(read)
    print_status(read, OutputConsole(file=io.StringIO(), width=160))


def report(work: WorkDirectory) -> None:
    write_report([work.path], work.path / "report.html", None)


def verify(work: WorkDirectory) -> None:
    directory = checkpoint_files.find_checkpoint(work.run("code", "default").path)
    if damage := list(checkpoint_files.damage(directory)):
        raise ArtefactError(f"{directory}: {damage}")


def inspect(work: WorkDirectory) -> None:
    print_checkpoint(work.run("code", "default").path, OutputConsole(file=io.StringIO(), width=160))


def launch(work: WorkDirectory) -> None:
    """Plans the command that has finished, and the one that continues it, and prints the summary of the stage."""
    stage = stage_named("code")
    for steps in (STEPS, 2 * STEPS):
        config = compose_config([*SETTINGS, f"stage.steps={steps}", f"work_dir={work.path}"])
        find_run(config, is_target=True)
        stage.look(config, is_target=True, rebuilt=())
    stage.progress(config)
    stage.figures(stage.read_result(work.run("code", "default")))


def inspect_data(work: WorkDirectory) -> None:
    print_corpus(work.corpus("code"), OutputConsole(file=io.StringIO(), width=160))


Verb = Callable[[WorkDirectory], None]


def files_of(work: WorkDirectory) -> dict[Path, tuple[Verb, ...]]:
    """Returns the small files of `make_work`, each with the verbs that read it."""
    run = work.run("code", "default")
    newest = run.checkpoints / checkpoint_files.step_name(STEPS)
    return {
        run.checkpoints / checkpoint_files.LATEST: (status, report, verify, inspect, launch),
        run.checkpoints / checkpoint_files.BEST: (report, inspect),
        newest / checkpoint_files.STATE: (verify, inspect),
        newest / checkpoint_files.MANIFEST: (verify, inspect),
        work.pipeline("code", "default"): (status, report),
        run.result: (status, report, launch),
        run.config: (status, report, launch),
        run.links: (status, report),
        run.live: (status,),
        run.events: (status, report),
        run.metrics: (status, report),
        work.tokenizer_report: (report,),
        work.corpus_manifest("code"): (inspect_data, report),
    }


def damages(seed: int, count: int, paths: list[Path]) -> Iterator[tuple[Path, bytes, str]]:
    """Yields (file, damaged content, what was done): in turn a flipped bit, a shorter file, zeros at the end."""
    generator = random.Random(seed)
    for number in range(count):
        path = paths[number % len(paths)]
        content = bytearray(path.read_bytes())
        at = generator.randrange(len(content))
        match number // len(paths) % 4:
            case 0 | 1:
                bit = generator.randrange(8)
                content[at] ^= 1 << bit
                yield path, bytes(content), f"bit {bit} of byte {at}"
            case 2:
                yield path, bytes(content[:at]), f"cut at byte {at}"
            case _:
                yield path, bytes(content[:at]) + b"\0" * (len(content) - at), f"zeros from byte {at}"


@pytest.mark.heavy
def test_a_damaged_file_ends_no_verb_in_a_traceback(tmp_path: Path) -> None:
    """Finds a reader of a small file that trusts its bytes, its types or its keys."""
    work = make_work(tmp_path / "work")
    files = files_of(work)
    for verb in dict.fromkeys(verb for verbs in files.values() for verb in verbs):
        try:
            verb(work)
        except UserError as error:
            raise AssertionError(f"{verb.__name__} refuses the intact run: {error}") from error

    tracebacks = []
    for path, content, what in damages(DAMAGES, DAMAGES, list(files)):
        intact = path.read_bytes()
        path.write_bytes(content)
        for verb in files[path]:
            try:
                verb(work)
            except UserError:
                pass  # one line says so
            except Exception as error:  # what is looked for
                tracebacks.append(f"{verb.__name__}: {path.name}, {what}: {type(error).__name__}: {error}")
        path.write_bytes(intact)
    assert not tracebacks, "\n".join(tracebacks)


@pytest.mark.parametrize("content", ["null", "[1]", "7", '"text"', "{}", '{"run_id": 3}', "", "\ufeff{}"])
def test_a_status_file_with_other_content_is_refused_by_its_path(tmp_path: Path, content: str) -> None:
    """Finds a reader that takes any JSON for the status of a command."""
    work = make_work(tmp_path)
    path = work.pipeline("code", "default")
    path.write_text(content)
    for verb in (status, report):
        with pytest.raises(ArtefactError, match=rf"^{re.escape(str(path))}: "):
            verb(work)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("command", 7),
        ("command", [7]),
        ("error", None),
        ("state", "odd"),
        ("state", "waiting"),
        ("stages", [{"name": "code"}]),
        ("stages", [{"name": "code", "state": "odd", "detail": ""}]),
    ],
)
def test_a_damaged_record_of_an_earlier_release_is_refused_by_its_path(tmp_path: Path, key: str, value: object) -> None:
    """It has no checksum. Finds a verb that checks less of the record than it uses: `report` ended in a traceback."""
    work = make_work(tmp_path)
    path = work.pipeline("code", "default")
    path.write_text(json.dumps(durable.read_json(path) | {key: value}))
    for verb in (status, report):
        with pytest.raises(ArtefactError, match=rf"^{re.escape(str(path))}: "):
            verb(work)


@pytest.mark.heavy
@pytest.mark.parametrize("damaged", [b"step_00000010\x80", b"\xff\xfe", b"", b"..", b"step_0000\x000010\n", b"/tmp"])
def test_a_damaged_pointer_means_the_newest_checkpoint(tmp_path: Path, damaged: bytes) -> None:
    """Finds a pointer whose bytes are trusted: an empty one named the folder itself."""
    run = make_work(tmp_path).run("code", "default")
    (run.checkpoints / checkpoint_files.LATEST).write_bytes(damaged)
    (run.checkpoints / checkpoint_files.BEST).write_bytes(damaged)
    newest = run.checkpoints / checkpoint_files.step_name(STEPS)
    assert checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST) == newest
    assert checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.BEST) is None


@pytest.mark.heavy
def test_changed_digits_of_a_result_are_noticed(tmp_path: Path) -> None:
    """Finds a result without a checksum, or a reader that does not compare it."""
    work = make_work(tmp_path)
    run = work.run("code", "default")
    written = run.result.read_text()
    for damaged in (written.replace("2.5", "1.5"), "[1]"):
        run.result.write_text(damaged)
        for verb in (status, report, launch):
            with pytest.raises(ArtefactError, match=rf"^{re.escape(str(run.result))}: "):
                verb(work)


@pytest.mark.heavy
def test_a_result_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    work = make_work(tmp_path)
    run = work.run("code", "default")
    content = durable.read_json(run.result)
    assert durable.CHECKSUM not in content
    run.result.write_text(json.dumps(content))
    status(work)
    report(work)
    config = compose_config([*SETTINGS, f"work_dir={work.path}"])
    assert stage_named("code").look(config, is_target=True, rebuilt=()).action is Action.READY


@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b"stage: 3", b"\xff", b"a: [", b"stage:\n  name: [code]"])
def test_a_damaged_configuration_of_a_run_is_refused_by_its_path(tmp_path: Path, content: bytes) -> None:
    """Finds a verb that takes any YAML for the configuration of a run."""
    run = make_work(tmp_path).run("code", "default")
    run.config.write_bytes(content)
    with pytest.raises(ArtefactError, match=rf"^{re.escape(str(run.config))}: "):
        load_config(run.config)
    with pytest.raises(ArtefactError, match=re.escape(str(run.config))):
        status(RunDirectory(run.path).work)
