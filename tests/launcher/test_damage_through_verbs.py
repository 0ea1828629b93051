"""Every verb of `dist-lm`, and the launcher, with a damaged file in its way: it does what it does with the intact file,
or one line says which file is damaged."""

import gzip
import io
import json
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from dist_lm import __main__ as program
from dist_lm import launch
from dist_lm.chat.documents import encode_document
from dist_lm.config.root import Config, load_yaml
from dist_lm.data import new
from dist_lm.data.manifest import read_manifest
from dist_lm.data.shard_writer import CorpusWriter
from dist_lm.data.split_index import split_index_path
from dist_lm.document import Document
from dist_lm.gpu_check import results as gpu_results
from dist_lm.gpu_check import run as gpu_check
from dist_lm.gpu_check.results import Result, Results
from dist_lm.prepare import plan
from dist_lm.stages.exporting.files import RECORD, export
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files
from dist_lm.verbs import data_trial
from tests.conftest import texts
from tests.evaluation.choice_task import CHOICES
from tests.launcher.test_damaged_files import damages, write_status_files
from tests.tracking.test_output import ATTACKS, harmful
from tests.training.test_profile_summary import CPU_STEPS
from tests.training_run import SAMPLED, SETTINGS, prepare, train

AT_LENGTH, SHORTLY = 1000, 100
FOREIGN_SHORTLY = 25  # damages of files that are no pointers or status files of ours: `tests/data` has many more
STEPS = 4
SHORT = (f"stage.steps={STEPS}", "stage.checkpoint_every=2", "stage.eval_every=2")
FROM_NOTHING = "stage.init_from=none"


@dataclass(frozen=True)
class World:
    """A work directory after a run of stage code, and what verbs wrote beside it."""

    work: WorkDirectory
    outside: Path  # sources, exports, results of other verbs

    @property
    def run(self) -> RunDirectory:
        return self.work.run("code", "default")

    @property
    def newest(self) -> Path:
        return self.run.checkpoints / checkpoint_files.step_name(STEPS)


@dataclass(frozen=True)
class Case:
    """A command line, and the files that it reads."""

    arguments: Callable[[World], Sequence[object]]
    files: Callable[[World], Sequence[Path]]
    exact: bool = False  # whether equal files give equal output: then a damage must not change it
    for_programs: bool = False  # its output is for programs, as it is
    draws: bool = False  # a library draws a bar, with carriage returns


def pointers(world: World) -> list[Path]:
    """The small files of a checkpoint that a verb chooses by the path of its run."""
    files = [world.run.checkpoints / checkpoint_files.LATEST, world.run.checkpoints / checkpoint_files.BEST]
    names = (checkpoint_files.STATE, checkpoint_files.INDEX, checkpoint_files.MANIFEST)
    return [*files, *(world.newest / name for name in names)]


def of_model(world: World) -> list[Path]:
    """The files of a verb that reads a model and its tokenizer."""
    tensors = sorted(world.newest.glob(f"*{checkpoint_files.TENSORS}"))[0]
    tokenizer = [world.work.tokenizer_model, world.work.tokenizer_report]
    return [*pointers(world), world.run.config, tensors, *tokenizer]


def of_measurement(world: World) -> list[Path]:
    """The files that an evaluation on val reads besides the checkpoint."""
    return [world.run.config, world.run.corpora, world.work.corpus_manifest("code"), world.work.tokenizer_model]


def of_documents(world: World) -> list[Path]:
    """The files that tell what a step read."""
    corpus = world.work.corpus("code")
    (origins, *_), (index, *_), (tar, *_) = (sorted(corpus.glob(f"train-*.{end}")) for end in ("zst", "index", "tar"))
    run = world.run
    return [
        run.config,
        run.corpora,
        world.work.corpus_manifest("code"),
        origins,
        index,
        split_index_path(corpus, "train"),
        tar,
        world.work.tokenizer_model,
    ]


def of_status(world: World) -> list[Path]:
    run = world.run
    pointer = run.checkpoints / checkpoint_files.LATEST
    return [world.work.pipeline("code", "default"), run.config, run.result, run.links, run.live, run.events, pointer]


def of_run(world: World) -> list[Path]:
    """The files that a launch or a report reads."""
    run, work = world.run, world.work
    corpora = [work.corpus_manifest(name) for name in ("code", "language")]
    own = [run.noted_files, run.corpora] if run.noted_files.exists() else [run.corpora]
    return [*of_status(world), *pointers(world), run.metrics, work.tokenizer_report, *corpora, *own]


def launched(*overrides: str) -> Callable[[World], Sequence[object]]:
    """A launch that finds what there is, and plans the rest."""
    return lambda world: ["launch", *overrides[:1], *SETTINGS, *SHORT, f"work_dir={world.work.path}", *overrides[1:]]


CASES: dict[str, tuple[Case, ...]] = {
    "launch": (
        Case(launched("stage=code", *SAMPLED, FROM_NOTHING), of_run),
        Case(launched("stage=code", *SAMPLED, FROM_NOTHING, f"stage.steps={2 * STEPS}"), of_run),
        Case(lambda world: launched("stage=tools", f"stage.init_from={world.run.path}")(world), of_run),
    ),
    "generate": (
        Case(
            lambda world: ["generate", world.run.path, "--prompt", "def", "--max-new-tokens", 2, "--seed", 1],
            of_model,
            exact=True,
            for_programs=True,
        ),
    ),
    "lm-eval": (
        Case(
            lambda world: [
                *("lm-eval", world.run.path, "--include_path", world.outside / "tasks", "--tasks", "choices"),
                *("--limit", 1, "--device", "cpu"),
            ],
            of_model,
            draws=True,
        ),
    ),
    "export": (
        Case(
            lambda world: ["export", world.run.path, world.outside / "export"],
            lambda world: [*of_model(world), world.outside / "export" / RECORD],
        ),
    ),
    "import": (
        Case(
            lambda world: ["import", world.outside / "snapshot", "new", "--work-dir", world.outside / "imported"],
            lambda world: sorted((world.outside / "snapshot").glob("*.*")),
        ),
    ),
    "report": (
        Case(lambda world: ["report", world.work.path, "--output", world.outside / "report.html"], of_run),
        Case(lambda world: ["report", world.run.path, "--output", world.outside / "report.html"], of_run),
    ),
    "data inspect": (
        Case(
            lambda world: ["data", "inspect", world.work.corpus("code")],
            lambda world: [
                world.work.corpus_manifest("code"),
                *sorted(world.work.corpus("code").glob("*-*.index"))[:1],
                split_index_path(world.work.corpus("code"), "train"),
                *sorted(world.work.corpus("code").glob("*.tar"))[:1],
                world.work.tokenizer_model,
            ],
        ),
    ),
    "data list": (
        Case(
            lambda world: ["data", "list", world.work.path],
            lambda world: [world.work.corpus_manifest("code"), world.run.corpora],
        ),
    ),
    "data step": (Case(lambda world: ["data", "step", world.run.path, 1, "--text"], of_documents),),
    "data where": (Case(lambda world: ["data", "where", world.run.path, "def"], of_documents),),
    "data without": (
        Case(
            lambda world: ["data", "without", world.run.path, "--documents", world.outside / "ids.txt", "--yes"],
            lambda world: [world.outside / "ids.txt", *of_documents(world)],
        ),
    ),
    "data new": (
        Case(
            lambda world: ["data", "new", world.outside / "own.jsonl", "--out", world.outside / "conf/corpus/own.yaml"],
            lambda world: [world.outside / "own.jsonl"],
        ),
    ),
    "checkpoint inspect": (
        Case(lambda world: ["checkpoint", "inspect", world.run.path], of_model, exact=True),
        Case(lambda world: ["checkpoint", "inspect", world.newest], of_model),
    ),
    "checkpoint verify": (Case(lambda world: ["checkpoint", "verify", world.run.path], of_model, exact=True),),
    "checkpoint consolidate": (
        Case(
            lambda world: ["checkpoint", "consolidate", world.run.path, "--output", world.outside / "all.safetensors"],
            of_model,
            exact=True,
        ),
    ),
    "checkpoint average": (
        Case(lambda world: ["checkpoint", "average", world.run.path, "--last", 2, "--no-evaluate"], of_model),
        # Val is read completely, which takes half a second: only what a measurement reads besides is damaged.
        Case(lambda world: ["checkpoint", "average", world.run.path, "--last", 2, "--device", "cpu"], of_measurement),
    ),
    "cluster status": (
        Case(
            lambda world: ["cluster", "status", world.work.path], lambda world: [*of_status(world), world.run.metrics]
        ),
        Case(lambda world: ["cluster", "status", world.work.path, "--json"], of_status),
    ),
    "profile summarize": (
        Case(
            lambda world: ["profile", "summarize", world.run.path],
            lambda world: [world.run.trace(0), world.run.config],
        ),
    ),
    "gpu check": (
        Case(
            lambda world: [
                *("gpu", "check", "--only", "varlen", "--output", world.outside / "gpu"),
                *("--table", world.outside / "gpu" / "page.md"),
            ],
            lambda world: [world.outside / "gpu" / gpu_check.RESULTS],
        ),
    ),
}

# Verbs without a file of ours in their way.
NOT_DAMAGED = {
    "bench": "makes its own data and models, and reads no run",
    "data attach": "reads files of a server; tests/data/test_remote_corpus.py damages them",
    "metrics": "prints the registry of the package",
    "replay": "reads a model as generate does; tests/stages/test_conversation_record.py damages the conversations",
    "serve": "reads a model as generate does, before it listens",
    "recipe new": "reads a model as import does, and data as data new does",
    "tools bfcl": "reads a model as generate does, after questions that another package brings",
    "dashboard push": "reads the settings of wandb alone",
    "dashboard show": "names of files of an offline run, which wandb reads",
}


def leaves(group: Any, before: str = "") -> Iterator[str]:
    """Yields the full name of every verb."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, f"{before}{name} ")
        else:
            yield f"{before}{name}"


def test_every_verb_meets_damaged_files_or_reads_none() -> None:
    """Finds a new verb that nobody tried with damaged files."""
    verbs = set(leaves(typer.main.get_command(program.app)))
    assert {*CASES, *NOT_DAMAGED} == {*verbs, "launch"}


def write_tasks(folder: Path) -> None:
    """Writes a task of lm-evaluation-harness with one question."""
    folder.mkdir()
    (folder / "choices.jsonl").write_text(json.dumps({"context": "def", "choices": [" a", " b"], "label": 0}) + "\n")
    (folder / "choices.yaml").write_text(CHOICES.format(folder=folder))


@pytest.fixture(scope="module")
def world(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("damage")
    shutil.copytree(tiny_work.path, folder / "work")
    world = World(WorkDirectory(folder / "work"), folder / "outside")
    run = prepare(world.work, "default", *SHORT, FROM_NOTHING, stage="code")
    train(run, 1)
    began = run.config.stat().st_mtime - 60

    nodes = [{"host": "alpha", "address": "10.0.0.1"}]
    attempt = {"attempt": 1, "nodes": nodes, "ranks_per_node": 1, "device": "cpu", "layout": "dp_shard=1", "step": 0}
    failed = {"time": began + 1, "event": "failed", "error": "killed", "type": "Killed", "rank": 0, "restarts_left": 2}
    events = [{"time": began, "event": "started"} | attempt, failed, {"time": began + 2, "event": "started"} | attempt]
    run.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    write_status_files(run, began, ranks=1, steps=STEPS)
    run.profile.mkdir()
    run.trace(0).write_bytes(gzip.compress(json.dumps({"traceEvents": CPU_STEPS}).encode()))

    world.outside.mkdir()
    export(run.path, world.outside / "snapshot", "fp32")
    export(run.path, world.outside / "export", "fp32")
    with (world.outside / "own.jsonl").open("w") as file:
        for document in texts("python", 200):
            file.write(json.dumps({"text": document.text, "language": "python", "licence": "MIT"}) + "\n")
    results = Results(gpu_check.machine_of(1, rehearse=True))
    results.checks["attention"] = Result("passed", 1.0, "2026-11-30", facts={"kernel ms": 1.5})
    (world.outside / "gpu").mkdir()
    results.write(world.outside / "gpu" / gpu_check.RESULTS)
    (world.outside / "gpu" / "page.md").write_text(f"{gpu_results.BEGIN}\n{gpu_results.END}\n")
    write_tasks(world.outside / "tasks")
    (world.outside / "ids.txt").write_text("".join(f"code:{number}\n" for number in range(3)))
    return world


@dataclass
class Ending:
    """How a command ended, and what it printed."""

    code: int | str | None
    output: str
    errors: str
    traceback: str = ""

    def fault(self, path: Path, with_output: bool) -> str:
        """Returns what is wrong with this end after `path` was damaged; empty if nothing is.

        Args:
            with_output: whether the output is for people.
        """
        if self.traceback:
            return self.traceback.strip().splitlines()[-1] + " << " + self.traceback.strip().splitlines()[-3].strip()
        if found := harmful(self.errors + self.output * with_output):
            return f"prints {found!r}"
        if self.code in (0, None):
            return ""
        lines = self.errors.strip().splitlines()
        if self.code != 2 or not lines:
            return f"exit code {self.code}: {self.errors[-300:]!r}"
        if len(lines) > 1:
            return f"{len(lines)} lines: {self.errors[-300:]!r}"
        # The folder of a checkpoint is as good as the file in it.
        if path.name not in self.errors and path.parent.name not in self.output + self.errors:
            return f"does not name it: {self.errors[-300:]!r}"
        return ""


def ending(arguments: Sequence[object]) -> Ending:
    """Runs a command line of `dist-lm`, or of the launcher, in this process."""
    main, words = program.main, list(map(str, arguments))
    if words[0] == "launch":
        main, words = launch.main, words[1:]
    output, errors = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    before, sys.argv = sys.argv, ["dist-lm", *words]
    code: int | str | None = 0
    stack = ""
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            main()
    except SystemExit as end:
        code = end.code
    except Exception:  # what is looked for
        code, stack = 1, traceback.format_exc()
    finally:
        sys.argv = before
    printed, said = (stream.buffer.getvalue().decode() for stream in (output, errors))
    return Ending(code, printed, said, stack)


def clear(world: World) -> None:
    """Removes what the verbs write, so that each call starts with the same files."""
    shutil.rmtree(world.run.averages, ignore_errors=True)
    for name in ("imported", "conf"):
        shutil.rmtree(world.outside / name, ignore_errors=True)
    (world.outside / "all.safetensors").unlink(missing_ok=True)
    for directory in world.run.path.parent.glob("*-without-*"):
        shutil.rmtree(directory)


CarryOut = Callable[..., int]


def plan_alone(carry_out: CarryOut) -> CarryOut:
    """Returns a `launch.carry_out` that shows what is finished, and builds nothing that is missing."""
    return lambda planned, console, verb=(): 0 if planned.missing else carry_out(planned, console, verb)


def composed_once(compose: Callable[[Sequence[str]], Config]) -> Callable[[Sequence[str]], Config]:
    """Returns a composition that does its work once for the same words and the same files of a user.

    A launch that trains its tokenizer composes from files of the package alone, so that no damage changes what it gets;
    and it would take three quarters of the time.
    """
    composed: dict[tuple[str, ...], Config] = {}

    def compose_once(overrides: Sequence[str]) -> Config:
        folders = [word.partition("[")[2].rstrip("]") for word in overrides if word.startswith("hydra.searchpath=")]
        files = [str(load_yaml(file)) for folder in folders for file in sorted(Path(folder).rglob("*.yaml"))]
        words = (*overrides, *files)
        if words not in composed:
            composed[words] = compose(overrides)
        return deepcopy(composed[words])

    return compose_once


@contextmanager
def folder_named(path: Path) -> Iterator[str]:
    """Makes a folder for the block: a temporary one whose name is the same each time."""
    path.mkdir()
    try:
        yield str(path)
    finally:
        shutil.rmtree(path)


def counts_of_damages() -> Iterator[Any]:
    """Yields (count, verb), for CI and at length."""
    for verb in CASES:
        shortly = FOREIGN_SHORTLY if verb == "data new" else SHORTLY
        yield pytest.param(shortly, verb, marks=pytest.mark.heavy)
        yield pytest.param(AT_LENGTH, verb, marks=pytest.mark.bars)


@pytest.mark.parametrize(("count", "verb"), counts_of_damages())
def test_no_damage_ends_a_verb_in_a_traceback(
    world: World,
    count: int,
    verb: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """Finds a reader that trusts the bytes, the types or the keys of a file, and a refusal that names no file."""
    monkeypatch.setattr(launch, "carry_out", plan_alone(launch.carry_out))
    monkeypatch.setattr(plan, "compose_config", composed_once(plan.compose_config))
    # What `data new` tries is composed once for the same corpus file, too: the name of its folder is part of the words.
    for module in (data_trial, new):
        make = SimpleNamespace(TemporaryDirectory=lambda prefix: folder_named(tmp_path / prefix))
        monkeypatch.setattr(module, "tempfile", make)
    machine = gpu_check.machine_of(1, rehearse=True)
    monkeypatch.setattr(gpu_check, "machine_of", lambda gpus, rehearse: machine)
    monkeypatch.setattr(gpu_check, "run_check", lambda *_, **__: Result("passed", 1.0, "2026-11-30"))
    monkeypatch.setenv("COLUMNS", "500")

    if verb == "lm-eval":
        # The tasks take a second, and meet the same model each time: one that is damaged is not loaded.
        pytest.importorskip("lm_eval")
        from dist_lm.evaluation import harness

        run_harness, results = harness.run_harness, []

        def run_harness_once(*arguments: Any) -> dict[str, Any]:
            if not results:
                results.append(run_harness(*arguments))
            return deepcopy(results[0])

        monkeypatch.setattr(harness, "run_harness", run_harness_once)

    faults, endings = Counter[str](), Counter[str]()
    cases = CASES[verb]
    for case in cases:
        clear(world)
        intact = ending(case.arguments(world))
        assert intact.code in (0, None), f"refuses the intact files: {intact}"
        files = list(dict.fromkeys(case.files(world)))
        for path, content, what in damages(count, count // len(cases), files):
            before = path.read_bytes()
            clear(world)
            path.write_bytes(content)
            try:
                end = ending(case.arguments(world))
            finally:
                path.write_bytes(before)
            goes_on = end.code in (0, None)
            endings["goes on" if goes_on else "refused"] += 1
            if case.draws:
                end.errors = end.errors.replace("\r", "\n")
            fault = end.fault(path, with_output=not case.for_programs)
            is_told = "names no checkpoint" in end.output
            if not fault and goes_on and case.exact and end.output != intact.output and not is_told:
                fault = "another output, and no word"
            if fault:
                faults[f"{path.name}, {what}: {fault}"] += 1
                print("   ", path.name, what, fault, flush=True)
    record_property(verb, dict(endings))
    print(f"{verb}: {sum(endings.values())} damages, {dict(endings)}, {len(faults)} faults")
    assert not faults, "\n".join(list(faults)[:40])


HOSTILE = "".join(attack for name, attack in ATTACKS.items() if name != "surrogate")  # no file holds it


def hostile(value: Any) -> Any:
    """Returns a value of JSON, each of whose texts ends in all attacks."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


@contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """Replaces a file for the block."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@pytest.mark.heavy  # test_output.py fails for the same defects of the output layer
def test_no_verb_hands_a_terminal_what_a_file_says(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finds a verb that prints a sample, a document, an error, or a name past the output layer."""
    monkeypatch.setattr(launch, "carry_out", plan_alone(launch.carry_out))
    printed: dict[str, str] = {}

    def call(name: str, *arguments: object) -> None:
        end = ending(arguments)
        assert not end.traceback, end.traceback
        printed[name] = end.output + end.errors

    corpus = WorkDirectory(tmp_path / "work").corpus("code")
    documents = [Document(f"text {HOSTILE}", f"python{HOSTILE}", HOSTILE, HOSTILE, f"{n:064x}") for n in range(3)]
    recipe = read_manifest(world.work.corpus("code")).recipe
    tokenizer = Tokenizer.load(world.work.tokenizer_model)
    with CorpusWriter(corpus, recipe) as writer:
        for number, document in enumerate(documents):
            writer.write("train" if number else "val", encode_document(tokenizer, document))
        writer.finish({}, [])
    shutil.copytree(world.work.tokenizer, tmp_path / "work" / "tokenizer")
    call("data inspect", "data", "inspect", corpus)

    folder = tmp_path / f"model{HOSTILE}".replace("/", "")
    folder.mkdir()
    call("import, a name", "import", folder, "new", "--work-dir", tmp_path)
    shutil.copytree(world.outside / "snapshot", tmp_path / "snapshot")
    shape = tmp_path / "snapshot" / "config.json"
    shape.write_text(json.dumps(hostile(json.loads(shape.read_text()))))
    call("import, a value", "import", tmp_path / "snapshot", "new", "--work-dir", tmp_path)
    call("generate, a name", "generate", folder, "--prompt", HOSTILE)
    call("a verb that is none", f"generat{HOSTILE}")
    call("a stage that is none", "launch", f"stage='{HOSTILE}'")

    pipeline = world.work.pipeline("code", "default")
    facts = durable.read_json(pipeline)
    facts["error"] = HOSTILE
    facts["stages"] = [stage | {"detail": HOSTILE} for stage in facts["stages"]]
    with replaced(pipeline, json.dumps(facts | {"host": HOSTILE}).encode()):
        call("cluster status", "cluster", "status", world.work.path)
    (samples,) = world.run.samples.glob(f"step_{STEPS:08d}.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    texts_of = ("completion", "prompt")
    rows = [row | {key: hostile(row[key]) for key in texts_of} for row in rows]
    with replaced(samples, "".join(json.dumps(row) + "\n" for row in rows).encode()):
        call("launch, samples", *launched("stage=code", *SAMPLED, FROM_NOTHING)(world))

    for name, text in printed.items():
        assert not harmful(text), name
    for name in ("data inspect", "import, a name", "import, a value", "cluster status", "launch, samples"):
        assert "owned" in printed[name], f"{name} shows nothing of it: {printed[name]}"
