"""A corpus that extends a finished one (`corpus.extends`) reads and writes its added sources alone, and keeps every
promise that a corpus makes."""

import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_lm.__main__ import app
from dist_lm.config.corpus import SPLITS, CleaningConfig, CorpusConfig, SourceConfig
from dist_lm.data import build_by_tasks
from dist_lm.data.build_by_tasks import plan_of
from dist_lm.data.containment import HeldOutIndex
from dist_lm.data.exclusions import excluded_documents, read_exclusions
from dist_lm.data.inspect import inspect_corpus
from dist_lm.data.journal import REJECTED
from dist_lm.data.manifest import decisions_path, excluded_path, read_manifest, write_manifest
from dist_lm.data.near_duplicates import band_hashes, jaccard, text_windows
from dist_lm.data.redaction import EMAIL
from dist_lm.data.task_workers import RunPass, in_this_process, local_workers
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.data.without import text_of
from dist_lm.errors import ArtefactError, ConfigError, UserError
from dist_lm.stages.continuing import left_out_by
from dist_lm.stages.registry import load_config
from dist_lm.stages.shards import builds, identity
from dist_lm.stages.shards.stage import STAGE as SHARDS
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.console import Console
from dist_lm.verbs.data_where import places_of_text
from tests.data.file_server import serving
from tests.data.mixed_corpora import random_text
from tests.stages.test_builds_by_tasks import built_through_kills, config_of, files_of, in_random_order
from tests.stages.test_several_corpora import decoded, hashes
from tests.training_run import prepare, train
from tests.verbs.test_data_without import tensors

SIMILARITY = 0.7
TASK_BYTES = 3000


@pytest.fixture
def new_work(tiny_work: WorkDirectory, tmp_path: Path) -> Callable[[str], WorkDirectory]:
    """Makes work directories with a tokenizer and no corpus."""

    def make(name: str) -> WorkDirectory:
        shutil.copytree(tiny_work.tokenizer, tmp_path / name / "tokenizer")
        return WorkDirectory(tmp_path / name)

    return make


@dataclass
class Sources:
    """Sources in three parts, each of which shares texts with those before it."""

    parts: list[list[SourceConfig]]
    corpus: CorpusConfig  # its settings

    def config(self, n_parts: int, **changes) -> CorpusConfig:
        """The corpus `code` of the first parts."""
        sources = [source for part in self.parts[:n_parts] for source in part]
        return replace(self.corpus, corpora={"code": sources}, **changes)


def write_sources(folder: Path, generator: random.Random, by_repository: bool = False) -> Sources:
    """Writes rows with copies, near-copies, texts inside others, addresses and stars, repositories, and held-out
    texts."""
    earlier: list[str] = []
    has_stars = generator.random() < 0.7
    parts = []
    for part in range(3):
        sources = []
        for number in range(2):
            lines = []
            for _ in range(40):
                text = random_text(generator, earlier)
                if earlier and generator.random() < 0.25:
                    text = nearly(generator.choice(earlier), generator)
                elif part and generator.random() < 0.2:
                    text = "\n".join(generator.choice(earlier).split("\n")[1:4])  # it may be val, and stands in train
                earlier.append(text)
                lines.append(json.dumps({"text": text, "stars": generator.randrange(5)}))
            path = folder / f"part{part}" / "rows" / f"{number}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines))
        stars = "stars" if has_stars else ""
        sources.append(
            SourceConfig("jsonl", "english", "mit", path=[f"{folder}/part{part}/rows/*.jsonl"], stars_column=stars)
        )

        copied = generator.sample(earlier, 6)
        for number in range(12):
            text = nearly(copied[number], generator) if number < len(copied) else random_text(generator, earlier)
            path = folder / f"part{part}" / "code" / f"project{number % 4}" / f"{number}.py"
            (path.parent / ".git").mkdir(parents=True, exist_ok=True)
            path.write_text(text, newline="")
        sources.append(SourceConfig("files", "", licence="mit", path=[f"{folder}/part{part}/code"]))
        parts.append(sources)

        # Texts that stand in earlier parts, in whole or inside others.
        if part and generator.random() < 0.6:
            chosen = [text for text in generator.sample(earlier, 8) if len(text.split()) > 8]
            path = folder / f"part{part}" / "held_out.jsonl"
            path.write_text("\n".join(json.dumps({"text": text}) for text in chosen))
            sources.append(SourceConfig("jsonl", "english", "mit", path=str(path), held_out=True))

    is_near = by_repository or generator.random() < 0.6
    cleaning = CleaningConfig(
        near_duplicates=SIMILARITY if is_near else 0.0, near_duplicates_by="repository" if by_repository else "document"
    )
    is_held_out = any(source.held_out for part in parts for source in part)
    val_tokens = 20_000 if is_held_out else generator.choice([1500, 4000])
    corpus = CorpusConfig(
        "test",
        {},
        val_fraction=0.3,
        val_tokens=val_tokens,
        max_document_bytes=1500,
        max_bad_fraction=0.5,
        build="tasks",
        shuffle_in_tasks=generator.random() < 0.5,
        cleaning=cleaning,
    )
    return Sources(parts, corpus)


def nearly(text: str, generator: random.Random) -> str:
    words = text.split(" ")
    words[generator.randrange(len(words))] = f"changed{generator.randrange(100)}"
    return " ".join(words)


def build_with(
    monkeypatch: pytest.MonkeyPatch,
    work: WorkDirectory,
    corpus: CorpusConfig,
    run_pass: RunPass = in_this_process,
    task_bytes: int = TASK_BYTES,
) -> Path:
    monkeypatch.setattr(build_by_tasks, "plan_of", partial(plan_of, task_bytes=task_bytes))
    monkeypatch.setattr(builds, "workers_of", lambda config: nullcontext(run_pass))
    config = config_of(work, corpus)
    assert not SHARDS.inspect(config).ready
    SHARDS.build(config, Console())
    assert SHARDS.inspect(config).ready
    return identity.folder_of(config, "code")


def trained(folder: Path) -> list[str]:
    """Returns the train texts that are not excluded."""
    excluded = excluded_documents(folder)
    return [text for number, text in enumerate(decoded(folder, "train")) if number not in excluded]


def check_promises(folders: Sequence[Path], has_near_duplicates: bool) -> None:
    """Brute force: compares all texts of the last folder with each other, and with val of all folders."""
    base, folder = folders[-2:]
    before, manifest = read_manifest(base), read_manifest(folder)
    train, val = trained(folder), decoded(folder, "val")

    # The documents that were there keep their places.
    for split in SPLITS:
        n_before = len(decoded(base, split))
        assert decoded(folder, split)[:n_before] == decoded(base, split)
        assert manifest.splits[split].shards[: len(before.splits[split].shards)] == before.splits[split].shards
        if split == "val":
            assert set(decoded(base, "val")) <= set(val)

    assert len(train) == len(set(train))
    for text in train:
        for other in folders:
            for held_out in decoded(other, "val"):
                assert len(held_out.split()) < 5 or held_out not in text, (other, held_out, text)

    # Each document is in a tar, or has a reason.
    for tally in manifest.ingest["sources"].values():
        assert tally["seen"] == tally["kept"] + sum(tally["dropped"].values())
    n_kept = sum(tally["kept"] for tally in manifest.ingest["sources"].values())
    assert n_kept == sum(manifest.splits[split].counts.documents for split in SPLITS)

    # Exclusions grow, and each has a line.
    exclusions, earlier = read_exclusions(folder), read_exclusions(base)
    assert set(earlier) <= set(exclusions)
    assert manifest.n_excluded == len(exclusions)
    lines = [json.loads(line) for line in (folder / REJECTED).open()]
    listed = {(line["excluded"], line["reason"], line["for"]) for line in lines if "excluded" in line}
    assert listed == set(exclusions)
    if has_near_duplicates:
        n_before = before.splits["train"].counts.documents
        texts = decoded(folder, "train")
        # Texts with placeholders were compared as their sources have them.
        compared = [n for n in range(len(texts)) if n not in excluded_documents(folder) and EMAIL not in texts[n]]
        windows = {number: text_windows(texts[number]) for number in compared}
        bands = {number: band_hashes(windows[number]) for number in compared}
        for new in (number for number in compared if number >= n_before):
            # Signatures find nearly all pairs: those with a band in common.
            for other in compared:
                if other != new and (bands[new] == bands[other]).any():
                    assert jaccard(windows[new], windows[other]) < SIMILARITY


def check_reasons(base: Path, folder: Path, added: Sequence[str], held_out: Sequence[str]) -> set[str]:
    """Compares each document that is excluded now with the added texts; returns the reasons."""
    texts = decoded(folder, "train")
    reasons = set()
    for exclusion in set(read_exclusions(folder)) - set(read_exclusions(base)):
        reasons.add(exclusion.reason)
        text = texts[exclusion.document]
        if EMAIL in text:
            continue
        if exclusion.reason == "duplicate":
            assert text.replace("\r\n", "\n") in {other.replace("\r\n", "\n") for other in added}
        elif exclusion.reason == "near_duplicate":
            windows = text_windows(text)
            assert max(jaccard(windows, text_windows(other)) for other in added) >= SIMILARITY
        else:
            assert "held_out.jsonl" in exclusion.cause
            index = HeldOutIndex(held_out, [True] * len(held_out))
            assert index.compare([text.encode()]).all()
    return reasons


def texts_of(folder: Path, part: int) -> tuple[list[str], list[str]]:
    """Returns all texts that the sources of a part have, and those of its sources with `held_out`."""
    folder = folder / f"part{part}"
    rows = [json.loads(line)["text"] for path in (folder / "rows").iterdir() for line in path.open()]
    held_out = [json.loads(line)["text"] for path in folder.glob("held_out.jsonl") for line in path.open()]
    return rows + [path.read_text() for path in (folder / "code").glob("*/*.py")], held_out


@pytest.mark.heavy
@pytest.mark.parametrize(("seed", "by_repository"), [*((seed, False) for seed in range(6)), (0, True), (1, True)])
def test_an_extended_corpus_keeps_the_promises_of_a_corpus(monkeypatch, new_work, tmp_path, seed, by_repository):
    """Would find a copy or near-copy of an added text that stays, val in train, a text that is lost, a document that is
    excluded for nothing, and a change of the corpus that is extended; once more where that one is an extension."""
    generator = random.Random(seed)
    sources = write_sources(tmp_path, generator, by_repository)
    work = new_work("work")
    folders = [build_with(monkeypatch, work, sources.config(1), in_random_order(generator))]
    for n_parts in (2, 3):
        before = [hashes(folder) for folder in folders]
        corpus = sources.config(n_parts, extends={"code": folders[-1].name})
        folders.append(build_with(monkeypatch, work, corpus, in_random_order(generator)))
        assert [hashes(folder) for folder in folders[:-1]] == before
        # A repository resembles another one as a whole, which its documents do not tell.
        is_by_document = corpus.cleaning.near_duplicates > 0 and not by_repository
        check_promises(folders, has_near_duplicates=is_by_document)
        if not by_repository:
            added, held_out = texts_of(tmp_path, n_parts - 1)
            check_reasons(folders[-2], folders[-1], added, held_out)


@dataclass(frozen=True)
class Extended:
    """A corpus that extends another one, with a document excluded for each reason."""

    work: WorkDirectory
    base: Path
    folder: Path
    corpus: CorpusConfig  # of the extension
    copied: str  # train text of the base that an added one replaces, and the others
    nearly: str
    containing: str


def words(generator: random.Random, count: int) -> str:
    return " ".join(f"w{generator.randrange(10**6)}" for _ in range(count))


def write_rows(path: Path, texts: Sequence[str], stars: int) -> SourceConfig:
    path.write_text("\n".join(json.dumps({"text": text, "stars": stars}) for text in texts))
    return SourceConfig("jsonl", "english", "mit", path=str(path), stars_column="stars")


@pytest.fixture
def extended(monkeypatch, new_work, tmp_path) -> Extended:
    generator = random.Random(0)
    base_texts = [words(generator, 60) for _ in range(60)]
    corpus = CorpusConfig(
        "test",
        {"code": [write_rows(tmp_path / "base.jsonl", base_texts, stars=1)]},
        val_fraction=0.2,
        build="tasks",
        cleaning=CleaningConfig(near_duplicates=SIMILARITY),
    )
    work = new_work("work")
    base = build_with(monkeypatch, work, corpus)
    copied, near, containing = decoded(base, "train")[3:6]
    val = decoded(base, "val")[0]

    # Added texts have more stars, so that they stay in place of equal and nearly equal ones of train, but not of val.
    changed = near.rsplit(" ", 1)[0] + " changed"
    added = [copied, changed, val, *(words(generator, 60) for _ in range(20))]
    held_out = SourceConfig("jsonl", "english", "mit", path=str(tmp_path / "held_out.jsonl"), held_out=True)
    Path(str(tmp_path / "held_out.jsonl")).write_text(json.dumps({"text": containing[30:]}))
    sources = [*corpus.corpora["code"], write_rows(tmp_path / "added.jsonl", added, stars=2), held_out]
    corpus = replace(corpus, corpora={"code": sources}, extends={"code": base.name})
    folder = build_with(monkeypatch, work, corpus)
    return Extended(work, base, folder, corpus, copied, near, containing)


@pytest.mark.heavy
def test_each_reason_is_listed_and_said(extended, tmp_path):
    """Would find a document that is excluded without a line for it, or one whose cause is another one; and val of the
    base that gives way to an added text."""
    exclusions = {decoded(extended.folder, "train")[e.document]: e for e in read_exclusions(extended.folder)}
    assert exclusions.keys() == {extended.copied, extended.nearly, extended.containing}
    of_copy, of_near_copy, of_containing = (
        exclusions[text] for text in (extended.copied, extended.nearly, extended.containing)
    )
    added, held_out = tmp_path / "added.jsonl", tmp_path / "held_out.jsonl"
    assert (of_copy.reason, of_copy.cause) == ("duplicate", f"{added}:1")
    assert (of_near_copy.reason, of_near_copy.cause) == ("near_duplicate", f"{added}:2")
    assert (of_containing.reason, of_containing.cause) == ("contains_val", f"{held_out}:1")
    # The added copy of val has left.
    val = decoded(extended.folder, "val")
    assert val[: len(decoded(extended.base, "val"))] == decoded(extended.base, "val")
    assert len(val) == len(set(val))

    output = CliRunner().invoke(app, ["data", "inspect", str(extended.folder)], catch_exceptions=False).output
    assert "3 train documents (contains_val 1, duplicate 1, near_duplicate 1)" in output
    run = prepare_run(extended.work, "run", extended.folder)
    places, _ = places_of_text(load_config(run.config), run, extended.copied, most=9)
    assert [(place.excluded, place.excluded_for) for place in places] == [("duplicate", f"{added}:1"), ("", "")]


def prepare_run(work: WorkDirectory, run_id: str, folder: Path, *settings: str) -> RunDirectory:
    options = (f"corpus.folders={{code: {folder.name}}}", "stage.init_from=none", "stage.steps=8", "stage.seq_len=64")
    options += ("stage.warmup_steps=1", "stage.eval_every=0", "stage.sampling.samples_per_prompt=0")
    return prepare(work, run_id, *options, *settings, stage="code")


@pytest.mark.heavy
def test_training_leaves_out_what_is_excluded(extended, tmp_path):
    """Would find a loss that an excluded document gives, and one that another document loses."""
    ids = {"code-00000000": excluded_documents(extended.folder)}
    whole = extended.work.corpus("code-00000000")
    shutil.copytree(extended.folder, whole)
    excluded_path(whole).unlink()
    write_manifest(whole, replace(read_manifest(whole), excluded={}))
    (tmp_path / "ids.txt").write_text(text_of(ids))

    runs = [
        prepare_run(extended.work, "excluded", extended.folder),
        prepare_run(extended.work, "without", whole, f"stage.without={tmp_path / 'ids.txt'}"),
        prepare_run(extended.work, "whole", whole),
    ]
    for run in runs:
        train(run, 1)
    excluded, without, with_all = (tensors(run, step=8) for run in runs)
    assert excluded == without != with_all
    unmasked = prepare_run(extended.work, "unmasked", extended.folder, "stage.document_mask=false")
    with pytest.raises(ConfigError, match=r"stage\.document_mask=false: expected true: .* excludes 3 documents"):
        left_out_by(load_config(unmasked.config), unmasked)


@pytest.mark.heavy
def test_damage_is_named_and_repaired(monkeypatch, extended):
    """Would find a run that learns from excluded documents because their list is damaged, and an extension of decisions
    that are damaged."""
    before, base_before = hashes(extended.folder), hashes(extended.base)
    path = excluded_path(extended.folder)
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(ArtefactError, match=r"excluded\.jsonl: other contents than the manifest says"):
        read_exclusions(extended.folder)
    assert any("excluded.jsonl" in problem for problem in inspect_corpus(extended.folder)["problems"])
    assert build_with(monkeypatch, extended.work, extended.corpus) == extended.folder
    assert (hashes(extended.folder), hashes(extended.base)) == (before, base_before)

    decisions = decisions_path(extended.base)
    content = bytearray(decisions.read_bytes())
    content[len(content) // 2] ^= 1
    decisions.write_bytes(content)
    assert any("decisions.zip" in problem for problem in inspect_corpus(extended.base)["problems"])
    shutil.rmtree(extended.folder)
    with pytest.raises(ArtefactError, match=r"decisions\.zip: other contents than the manifest says"):
        build_with(monkeypatch, extended.work, extended.corpus)


@pytest.mark.heavy
def test_exclusions_travel_with_an_attached_corpus(extended, tmp_path):
    """Would find a run on an attached corpus that learns from excluded documents."""
    with serving(extended.folder.parent) as served:
        attach_corpus = [
            "data",
            "attach",
            f"{served.url}/{extended.folder.name}",
            "far",
            "--work",
            str(tmp_path / "far"),
        ]
        attach_corpus += ["--cache", str(tmp_path / "cache")]
        assert CliRunner().invoke(app, attach_corpus, catch_exceptions=False).exit_code == 0
        far = WorkDirectory(tmp_path / "far").corpus("far")
        assert TokenCorpus.open(far, "train").excluded == excluded_documents(extended.folder)
        excluded_path(extended.folder).write_text("")
        result = CliRunner().invoke(app, [*attach_corpus[:3], "again", *attach_corpus[4:]])
        assert result.exit_code
        assert "excluded.jsonl is not of this corpus" in str(result.exception)


@pytest.mark.heavy
def test_val_of_a_corpus_that_came_from_elsewhere_excludes_old_train(monkeypatch, extended, new_work, tmp_path):
    """Would find train of the base that holds val of a finished folder with which neither was compared."""
    texts = decoded(extended.base, "train")
    generator = random.Random(1)
    rows = write_rows(tmp_path / "elsewhere.jsonl", [*texts[10:40], *(words(generator, 60) for _ in range(30))], 0)
    elsewhere = build_with(
        monkeypatch, new_work("elsewhere"), CorpusConfig("test", {"code": [rows]}, val_fraction=0.3, build="tasks")
    )
    held_out = {text for text in decoded(elsewhere, "val") if text in texts}
    assert held_out
    shutil.copytree(elsewhere, extended.work.corpus("language"))
    shutil.rmtree(extended.folder)

    folder = build_with(monkeypatch, extended.work, extended.corpus)
    assert not held_out & set(trained(folder))
    excluded = [e for e in read_exclusions(folder) if e.cause == "val of language"]
    assert {decoded(folder, "train")[e.document] for e in excluded} == held_out
    assert {e.reason for e in excluded} == {"contains_val"}


@pytest.mark.heavy
def test_a_limit_counts_texts_that_were_dropped_and_come_again(monkeypatch, new_work, tmp_path):
    """Would find a source with `limit` that ends late because a text of it was dropped from the corpus that is
    extended."""
    generator = random.Random(0)
    texts = [words(generator, 60) for _ in range(40)]
    long_text = words(generator, 60)
    benchmark = tmp_path / "benchmark.jsonl"
    base = write_rows(tmp_path / "base.jsonl", [*texts[:20], long_text], 0)
    added = replace(write_rows(tmp_path / "added.jsonl", [texts[0], long_text, *texts[20:]], 0), limit=5)
    benchmark.write_text(json.dumps({"text": long_text}))
    cleaning = CleaningConfig(benchmarks=[str(benchmark)])
    corpus = CorpusConfig("test", {"code": [base]}, val_fraction=0.2, build="tasks", cleaning=cleaning)
    work = new_work("work")
    folder = build_with(monkeypatch, work, corpus)
    corpus = replace(corpus, corpora={"code": [base, added]}, extends={"code": folder.name})
    report = read_manifest(build_with(monkeypatch, work, corpus)).ingest["sources"]
    (tally,) = (tally for name, tally in report.items() if "added" in name)
    # The copy does not count, the text with a part of a benchmark does.
    assert (tally["seen"], tally["kept"]) == (6, 4)
    assert tally["dropped"] == {"duplicate": 1, "benchmark benchmark.jsonl": 1}


@pytest.mark.heavy
@pytest.mark.parametrize("near_duplicates", [0.0, SIMILARITY])
def test_old_inputs_are_read_for_candidates_alone(monkeypatch, new_work, tmp_path, near_duplicates):
    """Would find an extension that surveys or writes old documents again, or opens their files."""
    generator = random.Random(0)
    for number in range(20):
        (tmp_path / "old").mkdir(exist_ok=True)
        write_rows(tmp_path / "old" / f"{number}.jsonl", [words(generator, 60) for _ in range(9)], stars=0)
    candidate = json.loads((tmp_path / "old" / "7.jsonl").read_text().splitlines()[4])["text"]
    added = write_rows(tmp_path / "added.jsonl", [candidate + " more", *(words(generator, 60) for _ in range(9))], 0)
    old = replace(added, path=f"{tmp_path}/old/*.jsonl")
    cleaning = CleaningConfig(near_duplicates=near_duplicates)
    corpus = CorpusConfig("test", {"code": [old]}, val_fraction=0.2, build="tasks", cleaning=cleaning)
    work = new_work("work")
    base = build_with(monkeypatch, work, corpus)

    ran: list[tuple[str, int]] = []
    opened_files: set[str] = set()

    def run_and_note(folder: Path, pass_name: str, numbers: Sequence[int]):
        ran.extend((pass_name, number) for number in numbers)
        return in_this_process(folder, pass_name, numbers)

    is_noted = True

    def note(event: str, arguments: tuple) -> None:
        if is_noted and event == "open" and str(arguments[0]).startswith(f"{tmp_path}/old/"):
            opened_files.add(Path(str(arguments[0])).name)

    sys.addaudithook(note)
    extension = replace(corpus, corpora={"code": [old, added]}, extends={"code": base.name})
    folder = build_with(monkeypatch, work, extension, run_and_note)
    is_noted = False
    n_old = len(read_manifest(base).splits["train"].shards)
    assert n_old == 20
    assert {number for pass_name, number in ran if pass_name in ("survey", "write")} == {n_old}
    assert opened_files == ({"7.jsonl"} if near_duplicates else set())
    dropped = read_manifest(folder).ingest["languages"]["english"]["dropped"]
    assert dropped.get("near_duplicate", 0) == bool(near_duplicates)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", [1, 3])
def test_bytes_depend_on_neither_workers_nor_kills(monkeypatch, new_work, tmp_path, seed):
    """Would find an extension whose bytes depend on who ran its tasks, or that a kill changes."""
    generator = random.Random(seed)
    sources = write_sources(tmp_path, generator)
    first = new_work("first")
    base = build_with(monkeypatch, first, sources.config(1))
    corpus = sources.config(2, extends={"code": base.name})
    for name in ("second", "killed"):
        shutil.copytree(first.path, tmp_path / name)
    expected = files_of({"code": build_with(monkeypatch, first, corpus, in_random_order(generator))})
    with local_workers(2) as run_pass:
        two_workers = build_with(monkeypatch, WorkDirectory(tmp_path / "second"), corpus, run_pass)
    assert files_of({"code": two_workers}) == expected

    killed = WorkDirectory(tmp_path / "killed")
    folder = built_through_kills(
        monkeypatch,
        killed,
        generator,
        300,
        lambda: build_with(monkeypatch, killed, corpus, in_random_order(generator)),
    )
    assert files_of({"code": folder}) == expected


def write_code(folder: Path, files: Iterator[Path], n_bytes: int) -> SourceConfig:
    """Copies files up to so many bytes; returns the source of them."""
    folder.mkdir()
    while n_bytes > 0:
        content = next(files).read_bytes()
        (folder / f"{n_bytes}.py").write_bytes(content)
        n_bytes -= len(content) + 1
    return SourceConfig("files", "", licence="mit", path=[str(folder)])


@pytest.mark.bars
@pytest.mark.parametrize("near_duplicates", [0.0, SIMILARITY])
def test_added_sources_cost_less_than_all(monkeypatch, new_work, tmp_path, near_duplicates):
    """Prints what both cost; would find an extension whose sources have given other documents."""
    installed = sorted(Path(pytest.__file__).parents[1].glob("t*/**/*.py"))  # torch, transformers
    random.Random(0).shuffle(installed)
    files = (path for path in installed if path.stat().st_size)
    old, added = write_code(tmp_path / "old", files, 24 << 20), write_code(tmp_path / "added", files, 2 << 20)
    cleaning = CleaningConfig(near_duplicates=near_duplicates)
    corpus = CorpusConfig("test", {"code": [old]}, val_fraction=0.02, build="tasks", cleaning=cleaning)
    both = replace(corpus, corpora={"code": [old, added]})

    def measured(work: WorkDirectory, corpus: CorpusConfig) -> tuple[float, int]:
        """Returns CPU seconds, and the number of documents that the sources have given."""
        began = time.process_time()
        folder = build_with(monkeypatch, work, corpus, task_bytes=4 << 20)
        seconds = time.process_time() - began
        return seconds, sum(tally["seen"] for tally in read_manifest(folder).ingest["sources"].values())

    work = new_work("extended")
    of_old, _ = measured(work, corpus)
    extended, n_extended = measured(work, replace(both, extends={"code": "code"}))
    whole, n_whole = measured(new_work("whole"), both)
    print(f"24 MiB: {of_old:.1f} CPU s; 2 MiB added: {extended:.1f}; both from nothing: {whole:.1f}")
    assert n_extended == n_whole


@pytest.mark.heavy
def test_only_what_the_folder_was_built_from_is_extended(monkeypatch, new_work, tmp_path):
    """Would find an extension of a corpus that has other documents than the first sources would give."""
    generator = random.Random(0)
    first, second, third = (
        write_rows(tmp_path / f"{name}.jsonl", [words(generator, 60) for _ in range(30)], stars=0) for name in "abc"
    )
    work = new_work("work")
    corpus = CorpusConfig("test", {"code": [first]}, val_fraction=0.2, build="tasks")
    build_with(monkeypatch, work, corpus)
    both = replace(corpus, corpora={"code": [first, second]})
    note = SHARDS.inspect(config_of(work, both)).detail
    assert "`corpus.extends.code=code` builds only the added source" in note
    serial = replace(both, build="serial")
    assert "`corpus.build=tasks corpus.extends.code=code`" in SHARDS.inspect(config_of(work, serial)).detail

    def refused(changed: CorpusConfig, words: str) -> None:
        with pytest.raises(UserError, match=words):
            SHARDS.inspect(config_of(work, changed))

    extending = replace(both, extends={"code": "code"})
    refused(
        replace(corpus, extends={"code": "code"}), r"corpus\.extends\.code=code: expected a folder with fewer sources"
    )
    refused(
        replace(extending, corpora={"code": [second, third]}), r"corpus\.extends\.code=code: expected the settings and"
    )
    refused(replace(extending, val_fraction=0.1), r"corpus\.extends\.code=code: .*val_fraction=0\.1, was 0\.2")
    refused(replace(extending, extends={"code": "codes"}), r"corpus\.extends\.code=codes: expected a finished folder")
    refused(replace(extending, extends={"cod": "code"}), r"corpus\.extends\.cod=code: expected the name of a corpus")
    with pytest.raises(ConfigError, match=r"corpus\.extends\.code=code: expected none with corpus\.build=serial"):
        replace(serial, extends={"code": "code"})
    with pytest.raises(ConfigError, match=r"expected none with corpus\.cleaning\.across_corpora=true"):
        replace(extending, cleaning=CleaningConfig(across_corpora=True))

    SHARDS.build(config_of(work, replace(corpus, corpora={"code": [third]}, build="serial")), Console())
    (other,) = work.path.glob("corpora/code-*")
    by_one = replace(corpus, corpora={"code": [third, first]}, extends={"code": other.name})
    refused(by_one, "was not built with corpus.build=tasks by a release that keeps decisions")
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text() + "\n")
    refused(extending, r"corpus\.extends\.code=code: the inputs of .* have changed")
