"""A build by tasks gives the corpus of a build in one process, whatever the tasks, the workers and their ends."""

import gzip
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import datasets
import pytest
import zstandard
from datasets import IterableDataset
from huggingface_hub import HfApi

from dist_lm.config.corpus import SPLITS, CleaningConfig, CorpusConfig, SourceConfig
from dist_lm.config.root import Config
from dist_lm.data import build_by_tasks
from dist_lm.data.build_by_tasks import plan_of
from dist_lm.data.build_tasks import run_task
from dist_lm.data.journal import REJECTED
from dist_lm.data.manifest import read_manifest
from dist_lm.data.shard_writer import read_origins
from dist_lm.data.sources.hub import commit_of
from dist_lm.data.task_workers import RunPass, in_this_process, local_workers
from dist_lm.errors import ArtefactError, ChangedInputError, ConfigError, UserError
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.shards import builds, identity
from dist_lm.stages.shards.stage import STAGE as SHARDS
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tracking.console import Console
from tests.conftest import TINY_MODEL
from tests.data.file_server import serving
from tests.data.mixed_corpora import write_corpora
from tests.data.s3_server import serving_bucket, upload
from tests.patience import patient
from tests.stages.test_several_corpora import decoded

CORPORA = ("first", "second")
Built = TypeVar("Built")  # what a build gives


def in_random_order(generator: random.Random) -> RunPass:
    """Returns a runner that runs each pass in this process in a random order, and some tasks twice."""

    def run(folder: Path, pass_name: str, numbers: Sequence[int]) -> Iterator[int]:
        for number in generator.sample(numbers, len(numbers)):
            for _ in range(generator.choice([1, 1, 2])):
                run_task(folder, pass_name, number)
            yield number

    return run


@pytest.fixture
def new_work(tiny_work: WorkDirectory, tmp_path: Path) -> Callable[[str], WorkDirectory]:
    """Makes work directories with a tokenizer and no corpus."""

    def make(name: str) -> WorkDirectory:
        shutil.copytree(tiny_work.tokenizer, tmp_path / name / "tokenizer")
        return WorkDirectory(tmp_path / name)

    return make


def config_of(work: WorkDirectory, corpus: CorpusConfig, **changes: Any) -> Config:
    config = compose_config(["stage=shards", *TINY_MODEL, "tokenizer.workers=1", f"work_dir={work.path}"])
    settings = {"documents_per_member": 8, "shard_tokens": 10**9} | changes
    return replace(config, corpus=replace(corpus, **settings))


def build(work: WorkDirectory, corpus: CorpusConfig, **changes: Any) -> dict[str, Path]:
    config = config_of(work, corpus, **changes)
    SHARDS.build(config, Console())
    assert SHARDS.inspect(config).ready
    return {name: identity.folder_of(config, name) for name in corpus.corpora}


def by_tasks(
    monkeypatch: pytest.MonkeyPatch, work: WorkDirectory, corpus: CorpusConfig, task_bytes: int, run_pass: RunPass
) -> dict[str, Path]:
    """Builds by tasks of a size with a runner of its own."""
    monkeypatch.setattr(build_by_tasks, "plan_of", partial(plan_of, task_bytes=task_bytes))
    monkeypatch.setattr(builds, "workers_of", lambda config: nullcontext(run_pass))
    return build(work, corpus, build="tasks")


def described(folder: Path) -> dict[str, Any]:
    """Returns all that a corpus holds and records, apart from how it is cut into tars."""
    manifest = read_manifest(folder)
    description: dict[str, Any] = {split: manifest.splits[split].languages for split in SPLITS}
    description |= {"content": manifest.content, "ingest": manifest.ingest, "settings": manifest.settings}
    description["documents"] = manifest.documents
    description["rejected"] = (folder / REJECTED).read_text()
    description["origins"] = {
        split: [origin for shard in manifest.splits[split].shards for origin in read_origins(folder / shard.name)]
        for split in SPLITS
    }
    return description


def files_of(folders: dict[str, Path]) -> dict[str, bytes]:
    """Returns the bytes of all tars, origins and manifests."""
    return {
        f"{name}/{path.name}": path.read_bytes()
        for name, folder in folders.items()
        for path in folder.iterdir()
        if path.suffix != ".index"
    }


@pytest.mark.heavy
@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_tasks_build_what_one_process_builds(monkeypatch, new_work, tmp_path, seed, held_out):
    """Would find another winner of equal texts, another share of val, val text that stays in train, another order, and
    a document that a report does not count."""
    generator = random.Random(seed)
    corpus = write_corpora(tmp_path, generator, held_out)
    expected = build(new_work("serial"), corpus)
    for task_bytes in (1, 3000, 1 << 30):
        folders = by_tasks(monkeypatch, new_work(f"tasks{task_bytes}"), corpus, task_bytes, in_random_order(generator))
        for name in CORPORA:
            assert described(folders[name]) == described(expected[name])


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(2))
def test_tasks_compare_with_earlier_corpora(monkeypatch, new_work, tmp_path, seed):
    """Would find held-out text of a finished corpus in train of a new one, and the other way round."""
    generator = random.Random(seed)
    corpus = write_corpora(tmp_path, generator, held_out=False)
    earlier, later = ({name: corpus.corpora[name]} for name in CORPORA)
    folders = {}
    for how in ("serial", "tasks"):
        work = new_work(how)
        held_out = decoded(build(work, replace(corpus, corpora=earlier))["first"], "val")
        rows = [json.dumps({"text": f"before\n{text}", "licence": "mit"}) for text in held_out]
        (tmp_path / "second" / "rows" / "held_out.jsonl").write_text("\n".join(rows))
        if how == "serial":
            folders[how] = build(work, replace(corpus, corpora=later))["second"]
        else:
            run_pass = in_random_order(generator)
            folders[how] = by_tasks(monkeypatch, work, replace(corpus, corpora=later), 3000, run_pass)["second"]
    assert described(folders["tasks"]) == described(folders["serial"])
    assert read_manifest(folders["tasks"]).recipe.compared
    dropped = read_manifest(folders["tasks"]).ingest["sources"].values()
    assert any("contains_val" in source["dropped"] for source in dropped)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(2))
def test_tasks_find_the_same_near_duplicates_and_benchmarks(monkeypatch, new_work, tmp_path, seed):
    """Would find a near-duplicate that another task's text hides, a wrong winner of a chain of copies, and a text
    with a part of a benchmark that stays."""
    generator = random.Random(seed)
    corpus = write_corpora(tmp_path, generator, held_out=bool(seed))
    add_near_copies(tmp_path / "second" / "rows" / "copies.jsonl", tmp_path / "second" / "rows" / "0.jsonl", generator)
    benchmark = tmp_path / "benchmark.jsonl"
    benchmark.write_text((tmp_path / "first" / "rows" / "2.jsonl").read_text().splitlines()[-1])
    cleaning = replace(corpus.cleaning, near_duplicates=0.7, benchmarks=[str(benchmark)])
    corpus = replace(corpus, cleaning=cleaning, max_bad_fraction=0.9)
    expected = build(new_work("serial"), corpus)
    reasons = {json.loads(line)["reason"] for folder in expected.values() for line in (folder / REJECTED).open()}
    assert {"near_duplicate", "benchmark benchmark.jsonl"} <= reasons

    for task_bytes, search_texts in ((1, 1), (3000, 10**6)):
        monkeypatch.setattr(build_by_tasks, "SEARCH_TEXTS", search_texts)
        folders = by_tasks(monkeypatch, new_work(f"tasks{task_bytes}"), corpus, task_bytes, in_random_order(generator))
        for name in CORPORA:
            assert described(folders[name]) == described(expected[name])


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(2))
def test_tasks_drop_copies_of_texts_of_earlier_corpora(monkeypatch, new_work, tmp_path, seed):
    """Would find copies that are sought in each corpus alone, or among held-out texts, and a corpus that is added later
    whose texts a finished one has."""
    generator = random.Random(seed)
    corpus = write_corpora(tmp_path, generator, held_out=bool(seed % 2))
    add_near_copies(tmp_path / "second" / "rows" / "copies.jsonl", tmp_path / "first" / "rows" / "0.jsonl", generator)
    near_duplicates = 0.7 if seed else 0.0
    cleaning = replace(corpus.cleaning, across_corpora=True, near_duplicates=near_duplicates)
    corpus = replace(corpus, cleaning=cleaning, max_bad_fraction=0.9)
    for at_once in (True, False):
        described_by = {}
        for how in ("serial", "tasks"):
            work = new_work(f"{how}-{at_once}")
            settings = {"build": how}
            if how == "tasks":
                monkeypatch.setattr(build_by_tasks, "plan_of", partial(plan_of, task_bytes=3000))
                run_pass = in_random_order(generator)
                monkeypatch.setattr(builds, "workers_of", lambda config, run_pass=run_pass: nullcontext(run_pass))
            if not at_once:
                build(work, replace(corpus, corpora={"first": corpus.corpora["first"]}), **settings)
            folders = build(work, corpus, **settings)
            described_by[how] = {name: described(folders[name]) for name in CORPORA}
        assert described_by["tasks"] == described_by["serial"]
        second = described_by["serial"]["second"]
        assert any("duplicate" in source["dropped"] for source in second["ingest"]["sources"].values())


def add_near_copies(path: Path, rows: Path, generator: random.Random) -> None:
    """Writes rows that differ from other ones by few words, in chains of slightly changed copies."""
    lines = []
    for line in rows.read_text().splitlines():
        if not line.startswith("{"):
            continue
        row = json.loads(line)
        for _ in range(4):
            words = row["text"].split(" ")
            words[generator.randrange(len(words))] = f"changed{generator.randrange(100)}"
            row = row | {"text": " ".join(words)}
            lines.append(json.dumps(row))
    path.write_text("\n".join(lines))


@pytest.mark.heavy
def test_documents_of_a_task_are_shuffled(monkeypatch, new_work, tmp_path):
    """Would find a document that a shuffle loses, a torn repository, an origin of another document, an order that
    depends on who ran a task, and neighbours in a source that stay neighbours."""
    corpus = write_corpora(tmp_path, random.Random(0), held_out=True)
    stored = by_tasks(monkeypatch, new_work("stored"), corpus, 3000, in_this_process)
    files: dict[str, bytes] = {}
    for seed in range(2):
        run_pass = in_random_order(random.Random(seed))
        shuffled = replace(corpus, build="tasks", shuffle_in_tasks=True)
        folders = by_tasks(monkeypatch, new_work(f"shuffled{seed}"), shuffled, 3000, run_pass)
        files = files or files_of(folders)
        assert files_of(folders) == files

    n_projects = 0
    for name in CORPORA:
        for split in SPLITS:
            before, after = (documents_of(corpora[name], split) for corpora in (stored, folders))
            assert sorted(itertools.chain(*after)) == sorted(itertools.chain(*before))
            assert [sorted(tar) for tar in after] == [sorted(tar) for tar in before]
            if split == "train":
                assert after != before

        # Files of a project stand together in a tar, in the order of their source.
        for tar in documents_of(folders[name], "train"):
            sources = [source for _, source in tar if "/project" in source]
            runs = [project for project, _ in itertools.groupby(Path(source).parent.name for source in sources)]
            assert len(runs) == len(set(runs))
            n_projects += len(runs)
            for project in runs:
                own = [source for source in sources if Path(source).parent.name == project]
                assert own == [
                    source
                    for tar_before in documents_of(stored[name], "train")
                    for _, source in tar_before
                    if source in own
                ]
    assert n_projects


def documents_of(folder: Path, split: str) -> list[list[tuple[str, str]]]:
    """Returns (text, source) of each document, by tar."""
    texts = iter(decoded(folder, split))
    shards_of_split = read_manifest(folder).splits[split].shards
    return [[(next(texts), origin.source) for origin in read_origins(folder / shard.name)] for shard in shards_of_split]


def test_a_shuffle_in_tasks_needs_tasks():
    """Would find a key that a build in one process silently passes over."""
    with pytest.raises(ConfigError, match=r"corpus\.shuffle_in_tasks=True: expected false with corpus\.build=serial"):
        CorpusConfig("test", {}, shuffle_in_tasks=True)


@pytest.mark.heavy
def test_any_number_of_workers_gives_the_same_bytes(monkeypatch, new_work, tmp_path):
    """Would find a tar or a count that depends on who read it, and on the order in which tasks end."""
    generator = random.Random(0)
    corpus = write_corpora(tmp_path, generator, held_out=True)
    monkeypatch.setattr(build_by_tasks, "plan_of", partial(plan_of, task_bytes=3000))
    expected: dict[str, bytes] = {}
    for workers in (1, 2, 4):
        work = new_work(str(workers))
        config = config_of(work, corpus, build="tasks")
        config = replace(config, tokenizer=replace(config.tokenizer, workers=workers))
        SHARDS.build(config, Console())
        files = files_of({name: identity.folder_of(config, name) for name in CORPORA})
        expected = expected or files
        assert files == expected
    assert len([name for name in expected if name.startswith("first/train-")]) > 2 * 2


@pytest.mark.heavy
def test_a_search_over_many_tasks_holds_few_files(monkeypatch, new_work, tmp_path):
    """Would find a search that holds a file of each task: near-duplicates of a licence are in all of them."""
    n_tasks, n_free = 60, 20
    licence = " ".join(f"w{number}" for number in range(400))
    for number in range(n_tasks):
        own = " ".join(f"own{number}-{place}" for place in range(20))
        rows = [json.dumps({"text": text}) for text in (f"{licence} copy {number}", own)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(rows))
    source = SourceConfig("jsonl", "english", "mit", path=f"{tmp_path}/*.jsonl")
    cleaning = CleaningConfig(near_duplicates=0.8)
    corpus = CorpusConfig("test", {"text": [source]}, cleaning=cleaning, val_fraction=0.3)

    def run_with_few_files(folder: Path, pass_name: str, numbers: Sequence[int]) -> Iterator[int]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if pass_name == "search":
            is_open = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
            free = (number for number in itertools.count() if number not in is_open)
            resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, n_free, None)), hard))
        try:
            yield from in_this_process(folder, pass_name, numbers)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    folders = by_tasks(monkeypatch, new_work("few"), corpus, 1, run_with_few_files)
    reasons = [json.loads(line)["reason"] for line in (folders["text"] / REJECTED).open()]
    assert reasons.count("near_duplicate") >= n_tasks - 1


class Killed(BaseException):
    """Ends a build where a kill could."""


def built_through_kills(
    monkeypatch: pytest.MonkeyPatch,
    work: WorkDirectory,
    generator: random.Random,
    most_writes: int,
    build: Callable[[], Built],
) -> Built:
    """Returns what `build` gives at last: it is ended again and again after fewer than `most_writes` durable writes,
    and one of its results is damaged."""
    counted = {"left": 0}
    fsync = durable.fsync

    def fsync_or_end(path: Path) -> None:
        counted["left"] -= 1
        if counted["left"] == 0:
            raise Killed
        fsync(path)

    monkeypatch.setattr(durable, "fsync", fsync_or_end)
    n_kills = 0
    while True:
        counted["left"] = generator.randrange(1, most_writes)
        try:
            built = build()
            break
        except Killed:
            n_kills += 1
            damage_a_result(generator, work)
    assert n_kills
    return built


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(3))
def test_a_build_that_is_killed_anywhere_gives_the_same_bytes(monkeypatch, new_work, tmp_path, seed):
    """Would find a half-written result that is used, a finished one that is lost, and a tar of the first attempt in the
    second."""
    generator = random.Random(seed)
    corpus = write_corpora(tmp_path, generator, held_out=bool(seed % 2))
    expected = files_of(by_tasks(monkeypatch, new_work("whole"), corpus, 3000, in_random_order(random.Random(seed))))

    work = new_work("killed")
    folders = built_through_kills(
        monkeypatch,
        work,
        generator,
        400,
        lambda: by_tasks(monkeypatch, work, corpus, 3000, in_random_order(generator)),
    )
    assert files_of(folders) == expected
    assert not list((work.path / "builds").iterdir())


def damage_a_result(generator: random.Random, work: WorkDirectory) -> None:
    """Shortens a file of a result, as a failing disk could."""
    files = [path for path in (work.path / "builds").glob("*/*/*/*") if path.stat().st_size]
    if files:
        damaged = generator.choice(sorted(files))
        content = damaged.read_bytes()[:-1]
        damaged.unlink()  # a tar of the corpus may be the same file under another name
        damaged.write_bytes(content)


@pytest.mark.heavy
def test_killed_workers_cost_their_tasks_alone(monkeypatch, new_work, tmp_path):
    """Would find a build that ends, waits forever or has other bytes after SIGKILL of its workers."""
    corpus = write_corpora(tmp_path, random.Random(1), held_out=False)
    expected = files_of(by_tasks(monkeypatch, new_work("whole"), corpus, 3000, in_random_order(random.Random(1))))

    def run_and_kill(folder: Path, pass_name: str, numbers: Sequence[int]) -> Iterator[int]:
        for place, number in enumerate(run_pass(folder, pass_name, numbers)):
            if place == 0 and pass_name in ("survey", "write"):
                os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
            yield number

    with local_workers(2) as run_pass:
        folders = by_tasks(monkeypatch, new_work("killed"), corpus, 3000, run_and_kill)
    assert files_of(folders) == expected


@pytest.mark.heavy
def test_a_command_that_is_killed_goes_on(monkeypatch, new_work, tmp_path):
    """Would find results that SIGKILL of the command and its workers leaves half written, and workers that stay."""
    generator = random.Random(0)
    corpus = write_corpora(tmp_path, generator, held_out=False)
    expected = files_of(by_tasks(monkeypatch, new_work("whole"), corpus, 3000, in_random_order(random.Random(1))))

    work = new_work("killed")
    context = multiprocessing.get_context("spawn")
    deadline = time.monotonic() + patient(300)
    n_kills = 0
    while True:
        n_results = len(results_of(work)) + generator.randrange(1, 15)
        command = context.Process(target=build_with_two_workers, args=(work, corpus))
        command.start()
        while command.is_alive() and len(results_of(work)) < n_results:
            assert time.monotonic() < deadline
            command.join(0.02)
        if not command.is_alive():
            break
        command.kill()
        command.join()
        n_kills += 1
    assert command.exitcode == 0
    assert n_kills > 2
    assert files_of({name: work.corpus(name) for name in CORPORA}) == expected


def results_of(work: WorkDirectory) -> list[Path]:
    return list((work.path / "builds").glob("*/*/[0-9]*/result.json"))


def build_with_two_workers(work: WorkDirectory, corpus: CorpusConfig) -> None:
    """Runs in a process of its own."""
    build_by_tasks.plan_of = partial(plan_of, task_bytes=3000)
    config = config_of(work, corpus, build="tasks")
    SHARDS.build(replace(config, tokenizer=replace(config.tokenizer, workers=2)), Console())


@pytest.mark.heavy
def test_an_input_that_changes_between_passes_is_named(monkeypatch, new_work, tmp_path):
    """Would find text that one pass held out and the next one puts into train, and an error that a worker cannot
    send."""
    corpus = write_corpora(tmp_path, random.Random(0), held_out=False)
    path = tmp_path / "first" / "rows" / "1.jsonl"
    state = path.stat()

    def run_and_change(folder: Path, pass_name: str, numbers: Sequence[int]) -> Iterator[int]:
        yield from run_pass(folder, pass_name, numbers)
        if pass_name == "copies":
            # As many bytes, at the old time: only the text tells.
            path.write_text(path.read_text().replace("w", "v"))
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))

    with local_workers(2) as run_pass, pytest.raises(ChangedInputError, match=r"1\.jsonl.*changed while it was read"):
        by_tasks(monkeypatch, new_work("changed"), corpus, 3000, run_and_change)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(4))
def test_a_limit_counts_documents_as_one_process_does(monkeypatch, new_work, tmp_path, seed):
    """Would find a limit that counts copies, or copies of texts behind the limit of an earlier source, a broken row
    behind the last document that is reported, and a limit that each task has for itself."""
    generator = random.Random(seed)
    corpus = write_corpora(tmp_path, generator, held_out=bool(seed % 2))
    corpora = {
        name: [replace(source, limit=generator.choice([0, 9, 15, 30])) for source in sources]
        for name, sources in corpus.corpora.items()
    }
    corpora["first"][0] = replace(corpora["first"][0], limit=12)
    add_near_copies(tmp_path / "second" / "rows" / "0a.jsonl", tmp_path / "first" / "rows" / "0.jsonl", generator)
    cleaning = replace(corpus.cleaning, across_corpora=seed > 1, near_duplicates=0.7 if seed % 2 else 0.0)
    corpus = replace(
        corpus, corpora=corpora, max_bad_fraction=0.9, val_tokens=4000, val_fraction=0.6, cleaning=cleaning
    )
    expected = build(new_work("serial"), corpus)
    for task_bytes in (1, 3000, 1 << 30):
        folders = by_tasks(monkeypatch, new_work(f"tasks{task_bytes}"), corpus, task_bytes, in_random_order(generator))
        for name in CORPORA:
            assert described(folders[name]) == described(expected[name])


def test_nothing_is_read_behind_a_limit(monkeypatch, new_work, tmp_path):
    """Would find a data set of a terabyte that is read whole for its first thousand rows."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "0.jsonl").write_text("\n".join([*ROWS[:20], "broken", *ROWS[:20]]))
    (folder / "1.jsonl").write_text("\n".join([*ROWS[10:25], '{"text"']))
    damaged = gzip.compress("\n".join(ROWS).encode())[:50]
    (folder / "2.jsonl.gz").write_bytes(damaged)
    source = SourceConfig("jsonl", "english", "mit", path=f"{folder}/*", limit=25)
    corpus = CorpusConfig("test", {"text": [source]}, val_fraction=0.2, max_bad_fraction=0.1)
    expected = described(build(new_work("serial"), corpus)["text"])
    run_pass = in_random_order(random.Random(0))
    assert described(by_tasks(monkeypatch, new_work("tasks"), corpus, 1, run_pass)["text"]) == expected


@pytest.mark.heavy
def test_a_corpus_that_was_compared_with_other_documents_is_named(monkeypatch, new_work, tmp_path):
    """Would find train text that holds val of a finished corpus, which never saw it: sizes and times are the same."""
    corpus = write_corpora(tmp_path, random.Random(0), held_out=False)
    work = new_work("work")
    folders = by_tasks(monkeypatch, work, corpus, 3000, in_this_process)
    shutil.rmtree(folders["second"])

    path = tmp_path / "second" / "rows" / "0.jsonl"
    times = path.stat()
    path.write_text(path.read_text().replace(" w", " v"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ArtefactError, match=r"first was built when corpus second had other documents"):
        by_tasks(monkeypatch, work, corpus, 3000, in_this_process)


ROWS = [f'{{"text": "{number} {" ".join(f"word{number * 20 + i}" for i in range(20))}"}}' for number in range(30)]


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (["broken"] * 20 + ROWS, {}, "20 of 50 rows are broken"),
        (["broken"] * 50, {}, "none of the first 50 rows can be read"),
        (['{"text": ""}'] * 3, {}, "gave no document"),
        (ROWS, {"val_fraction": 1e-9}, "is held out: there are too few"),
        (ROWS, {"val_fraction": 0.5, "val_tokens": 1}, "val_tokens=1 is less"),
        (ROWS[:1], {}, "are one text or of one repository"),
        ([*ROWS, ROWS[0], *(row.replace(" w", "  w") for row in ROWS)], {}, ""),
        (ROWS, {"val_fraction": 0.9999999}, "is left for train"),
    ],
)
def test_errors_are_those_of_one_process(monkeypatch, new_work, tmp_path, rows, changes, words):
    """Would find a limit over a whole source that each task judges alone, and a corpus without val."""
    for number, begin in enumerate(range(0, len(rows), 10)):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(rows[begin : begin + 10]))
    source = SourceConfig("jsonl", "english", "mit", path=f"{tmp_path}/*.jsonl")
    corpus = CorpusConfig("test", {"text": [source]}, **changes)
    messages = []
    for how in ("serial", "tasks"):
        work = new_work(how)
        try:
            if how == "serial":
                build(work, corpus)
            else:
                by_tasks(monkeypatch, work, corpus, 1, in_random_order(random.Random(0)))
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    assert words in messages[0]
    assert messages[1] == messages[0]


@pytest.mark.heavy
def test_files_behind_urls_are_built_as_by_one_process(monkeypatch, new_work, tmp_path):
    """Would find a task that lists a server anew, and a file that is taken for another one of the server."""
    (tmp_path / "served").mkdir()
    names = [f"{number}.jsonl.gz" for number in range(3)]
    for number, name in enumerate(names):
        (tmp_path / "served" / name).write_bytes(gzip.compress("\n".join(ROWS[number::3]).encode()))
    with serving(tmp_path / "served") as server:
        source = SourceConfig("jsonl", "english", "mit", path=[f"{server.url}/{name}" for name in names])
        corpus = CorpusConfig("test", {"text": [source]}, val_fraction=0.2)
        expected = described(build(new_work("serial"), corpus)["text"])
        run_pass = in_random_order(random.Random(0))
        assert described(by_tasks(monkeypatch, new_work("tasks"), corpus, 1, run_pass)["text"]) == expected


@pytest.mark.heavy
def test_files_of_s3_are_built_as_by_one_process(monkeypatch, new_work):
    """Would find worker processes that list the store anew or that its environment does not reach, and an object that
    changes between two passes."""
    objects = {f"d/{number}.jsonl": "\n".join(ROWS[number::3]).encode() for number in range(3)}
    with serving_bucket("mine") as bucket, local_workers(2) as run_pass:
        upload(bucket, objects | {"d/_tmp/half.jsonl": b"{"})
        source = SourceConfig("jsonl", "english", "mit", path=f"s3://{bucket}/d")
        corpus = CorpusConfig("test", {"text": [source]}, val_fraction=0.2)
        expected = described(build(new_work("serial"), corpus)["text"])
        assert described(by_tasks(monkeypatch, new_work("tasks"), corpus, 1, run_pass)["text"]) == expected

        def run_and_change(folder: Path, pass_name: str, numbers: Sequence[int]) -> Iterator[int]:
            yield from run_pass(folder, pass_name, numbers)
            if pass_name == "copies":
                upload(bucket, {"d/1.jsonl": objects["d/1.jsonl"].replace(b"word", b"work")})

        with pytest.raises(ChangedInputError, match=r"d/1\.jsonl.*changed while it was read"):
            by_tasks(monkeypatch, new_work("changed"), corpus, 1, run_and_change)


@pytest.mark.heavy
@pytest.mark.parametrize("limit", [0, 20])
def test_a_data_set_of_the_hub_is_read_at_one_commit(monkeypatch, new_work, limit):
    """Would find a worker process that asks for the commit of the branch again: its owner pushes under the build."""
    rows = [json.loads(row) for row in ROWS]
    commits: list[str] = []
    pushes = itertools.count()

    def load_dataset(dataset: str, revision: str, **_: object) -> IterableDataset:
        commits.append(revision)
        return IterableDataset.from_generator(lambda: iter(rows))

    def dataset_info(*_: object, revision: str) -> SimpleNamespace:
        return SimpleNamespace(sha=f"{next(pushes):040x}")

    def as_another_process(folder: Path, pass_name: str, numbers: Sequence[int]) -> Iterator[int]:
        for number in numbers:
            commit_of.cache_clear()
            run_task(folder, pass_name, number)
            yield number

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(builds, "workers_of", lambda config: nullcontext(as_another_process))
    source = SourceConfig("hub", "english", "mit", dataset="owner/stories", limit=limit)
    corpus = CorpusConfig("test", {"text": [source]}, val_fraction=0.2)
    descriptions = []
    for how in ("serial", "tasks"):
        commit_of.cache_clear()
        work = new_work(how)
        SHARDS.build(config_of(work, corpus, build=how), Console())
        descriptions.append(described(work.corpus("text")))
    commit_of.cache_clear()
    assert len(set(commits)) == 2  # one of each build
    assert descriptions[1] == descriptions[0]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_damaged_compressed_file_is_named_as_by_one_process(monkeypatch, new_work, tmp_path, compress):
    """Would find a cut file that is taken as whole, and an error that names a task in place of the file."""
    suffix = "gz" if compress is gzip.compress else "zst"
    content = compress("\n".join(ROWS).encode())
    (tmp_path / f"0.jsonl.{suffix}").write_bytes(content)
    (tmp_path / f"1.jsonl.{suffix}").write_bytes(content[: len(content) // 2])
    corpus = CorpusConfig("test", {"text": [SourceConfig("jsonl", "english", "mit", path=f"{tmp_path}/*.{suffix}")]})
    with pytest.raises(UserError, match=rf"1\.jsonl\.{suffix}.*replace or remove it") as of_one_process:
        build(new_work("serial"), corpus)
    with pytest.raises(UserError) as of_tasks:
        by_tasks(monkeypatch, new_work("tasks"), corpus, 1, in_this_process)
    assert str(of_tasks.value) == str(of_one_process.value)
