"""Stage shards on a corpus of one's own: inputs that change, corrected licences, files of others, and kills."""

import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dist_lm.config.corpus import SourceConfig
from dist_lm.config.root import Config, save_config
from dist_lm.data import screening
from dist_lm.data.ingest import TextSplits
from dist_lm.data.inspect import inspect_corpus
from dist_lm.data.journal import journal_path
from dist_lm.data.manifest import manifest_path, read_manifest, record_content
from dist_lm.data.sources import hub
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.document import Document, TokenizedDocument
from dist_lm.errors import ArtefactError, ChangedInputError, ConfigError
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.shards import builds, identity, other_corpora
from dist_lm.stages.shards.stage import STAGE as SHARDS
from dist_lm.stages.stage import Action
from dist_lm.stages.training.stage import training_stage
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.encode import encode_documents
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.console import Console
from dist_lm.training import checkpoint_files
from dist_lm.training.state import TrainState
from tests.conftest import tiny

WORDS = [f"{word}{number}" for word in ("return", "value", "self", "the", "index", "table") for number in range(100)]


def write_rows(path: Path, count: int, words: int = 30) -> None:
    draw = random.Random(path.name)
    with path.open("w") as file:
        for number in range(count):
            text = " ".join(draw.choices(WORDS, k=words))
            row = {"text": f"row {number} {draw.random()}: {text}\n"}
            own = {0: {"license": "Zlib"}, 1: {"license": "MIT"}}.get(number % 10, {})
            file.write(json.dumps(row | own) + "\n")


def source_of(path: Path, licence: str = "MIT") -> SourceConfig:
    return SourceConfig("jsonl", "english", licence, path=str(path), licence_column="license")


def config_of(work: WorkDirectory, *sources: SourceConfig, stage: str = "shards", **changes) -> Config:
    command = [f"stage={stage}", *tiny(stage), "tokenizer.workers=1", f"work_dir={work.path}"]
    config = compose_config(command)
    settings = {"documents_per_member": 8, "shard_tokens": 2_000, "val_fraction": 0.2} | changes
    corpus = replace(config.corpus, corpora={"mine": list(sources)}, **settings)
    own = replace(config.stage, corpus="mine") if stage != "shards" else config.stage
    return replace(config, corpus=corpus, stage=own)


def look(config: Config, *rebuilt: str) -> Action:
    return training_stage("language").look(config, is_target=True, rebuilt=rebuilt).action


def begin(config: Config) -> None:
    """A run of stage language on the corpus, with a checkpoint."""
    run = WorkDirectory(Path(config.work_dir)).run("language", config.run_id)
    run.create()
    save_config(config, run.config)
    record_content(run, config.corpus_names)
    directory = run.checkpoints / checkpoint_files.step_name(5)
    directory.mkdir()
    checkpoint_files.write_state(directory, TrainState(step=5), {})
    checkpoint_files.write_pointer(run.checkpoints, checkpoint_files.LATEST, directory)


def tars(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.glob("*.tar")}


@pytest.mark.heavy
@pytest.mark.parametrize("how", ["serial", "tasks"])
def test_a_tokenizer_of_earlier_inputs_is_named(
    work: WorkDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    """Would find a user who adds files in another language and never learns that the tokenizer has not seen them."""
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, 100)
    config = config_of(work, source_of(rows), build=how)
    words = f"{work.tokenizer} is kept, trained on earlier sources of mine: to train one on those of now, give another"
    SHARDS.build(config, Console())
    assert "is kept" not in capsys.readouterr().out

    write_rows(rows, 150)
    SHARDS.build(config, Console())
    assert words in capsys.readouterr().out
    SHARDS.build(config, Console())  # builds nothing
    write_rows(rows, 200)
    SHARDS.build(replace(config, tokenizer=replace(config.tokenizer, source="keep")), Console())
    assert "is kept" not in capsys.readouterr().out


@pytest.mark.heavy
def test_changed_inputs_are_named_and_build_a_corpus_beside_the_old_one(work: WorkDirectory, tmp_path: Path) -> None:
    """Finds a finished corpus that is built again in place, and a run that cannot go on with it."""
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, 100)
    config, training = (config_of(work, source_of(rows), stage=stage) for stage in ("shards", "language"))
    SHARDS.build(config, Console())
    assert SHARDS.inspect(config).ready
    before, manifest = tars(work.corpus("mine")), manifest_path(work.corpus("mine")).read_bytes()
    begin(training)
    assert look(training) is Action.RESUME

    size = rows.stat().st_size
    write_rows(rows, 300)
    found = SHARDS.inspect(config)
    assert not found.ready
    assert f"beside another mine ({rows}: {rows.stat().st_size:,} bytes, was {size:,})" in found.detail
    assert look(training, "shards") is Action.RESUME  # on what it began with
    readers = SHARDS.for_readers(config, [training])
    for_run = SHARDS.look(readers, is_target=False, rebuilt=())
    assert for_run.action is Action.READY
    assert "mine stays, in folder mine: " in for_run.detail

    SHARDS.build(config, Console())
    assert SHARDS.inspect(config).ready
    folder = identity.folder_of(config, "mine")
    assert folder != work.corpus("mine")
    assert read_manifest(folder).ingest["languages"]["english"]["seen"] == 300
    assert (tars(work.corpus("mine")), manifest_path(work.corpus("mine")).read_bytes()) == (before, manifest)
    assert look(training) is Action.RESUME


@pytest.mark.heavy
def test_a_run_of_an_earlier_release_goes_on_with_the_folder_of_the_corpus(work: WorkDirectory, tmp_path: Path) -> None:
    """Finds a run whose record names no folder, and which goes on with a newer data set."""
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, 100)
    config, training = (config_of(work, source_of(rows), stage=stage) for stage in ("shards", "language"))
    SHARDS.build(config, Console())
    begin(training)
    run = work.run("language", training.run_id)
    durable.write_sealed(run.corpora, {"mine": read_manifest(work.corpus("mine")).content})

    write_rows(rows, 300)
    SHARDS.build(config, Console())
    newer = identity.folder_of(config, "mine")
    assert run.corpus("mine") == work.corpus("mine") != newer
    planned = replace(training, corpus=replace(training.corpus, folders={"mine": newer.name}))
    found = training_stage("language").look(planned, is_target=True, rebuilt=())
    assert found.action is Action.RESUME
    assert found.config.corpus.folders == {"mine": "mine"}

    # A run of its own takes what the plan has found.
    other = training_stage("language").look(replace(planned, run_id="other"), is_target=True, rebuilt=())
    assert other.config.corpus.folders == {"mine": newer.name}


def test_a_plan_without_the_hub_says_so(work: WorkDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> str:
        raise ConnectionError("OfflineModeIsEnabled")

    monkeypatch.setattr(hub, "commit_of", offline)
    config = config_of(work, SourceConfig("hub", "english", dataset="owner/stories"))
    found = SHARDS.inspect(replace(config, dry_run=True))
    assert not found.ready
    assert "corpora mine (corpus source owner/stories@main: no answer of the hub: " in found.detail
    with pytest.raises(ArtefactError, match="no answer of the hub"):
        SHARDS.inspect(config)


@pytest.mark.heavy
def test_a_corpus_that_is_built_again_alone_holds_no_val_of_the_others(work: WorkDirectory, tmp_path: Path) -> None:
    """The other corpora stay as they are, so they cannot drop what its new inputs contain."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_rows(first, 100)
    write_rows(second, 100, words=40)
    config = config_of(work, source_of(first))
    corpora = {"mine": [source_of(first)], "others": [source_of(second)]}
    config = replace(config, corpus=replace(config.corpus, corpora=corpora))
    SHARDS.build(config, Console())
    before = read_manifest(work.corpus("others"))
    first.write_text(first.read_text() + second.read_text().replace("row ", "again row "))
    assert not SHARDS.inspect(config).ready
    SHARDS.build(config, Console())
    assert SHARDS.inspect(config).ready
    assert read_manifest(work.corpus("others")) == before
    held_out, learned = (
        texts_of(work, "others", "val"),
        texts_of(work, identity.folder_of(config, "mine").name, "train"),
    )
    assert held_out
    assert {f"again {text}" for text in texts_of(work, "others", "train")} & learned
    assert not {f"again {text}" for text in held_out} & learned


def texts_of(work: WorkDirectory, name: str, split: str) -> set[str]:
    tokenizer, corpus = Tokenizer.load(work.tokenizer_model), TokenCorpus.open(work.corpus(name), split)
    return {
        tokenizer.decode(corpus.tokens(number, 0, int(corpus.lengths[number]))) for number in range(corpus.n_documents)
    }


def test_a_file_without_a_corpus_is_refused_and_builds_nothing(work: WorkDirectory) -> None:
    config = config_of(work)
    config.corpus.corpora.clear()
    with pytest.raises(ConfigError, match=r"^corpus.corpora=\{\}: corpus=\w+ has no corpus: expected NAME"):
        SHARDS.inspect(config)


def test_a_corpus_whose_train_documents_all_contain_val_is_not_finished(work: WorkDirectory, tmp_path: Path) -> None:
    rows, copy = tmp_path / "rows.jsonl", tmp_path / "copy.jsonl"
    write_rows(rows, 20)
    copy.write_bytes(rows.read_bytes())
    config = config_of(work, source_of(rows), replace(source_of(copy), held_out=True))
    for _ in range(2):
        with pytest.raises(ArtefactError, match="corpus mine: none of its 20 documents is left for train"):
            SHARDS.build(config, Console())
        assert not SHARDS.inspect(config).ready


@pytest.mark.heavy
def test_settings_that_change_no_document_are_not_compared_and_others_are_named(
    work: WorkDirectory, tmp_path: Path
) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_rows(first, 100)
    write_rows(second, 60, words=40)
    SHARDS.build(config_of(work, source_of(first)), Console())
    assert SHARDS.inspect(config_of(work, source_of(first), name="renamed", max_bad_fraction=0.5)).ready
    more = SHARDS.inspect(config_of(work, source_of(first), source_of(second)))
    assert not more.ready
    assert "beside another mine (corpus.corpora.mine[1] is new)" in more.detail
    changed = replace(source_of(second), limit=5, only=["english"])
    other = SHARDS.inspect(config_of(work, changed, val_fraction=0.3))
    words = ["corpus.corpora.mine[0].limit=5, was 0; ", f'.path[0]="{second}", was "{first}"', "; 1 more)"]
    assert all(word in other.detail for word in words), other.detail


def test_the_plan_names_comparisons_that_pass_over_conversations(work: WorkDirectory, tmp_path: Path) -> None:
    """Finds a setting of corpus.cleaning that silently does nothing for a corpus."""
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    config = config_of(work, SourceConfig("messages", "english", "MIT", path=str(rows)))
    assert "compares texts" not in SHARDS.inspect(config).detail
    config.corpus.cleaning.near_duplicates = 0.8
    detail = SHARDS.inspect(config).detail
    assert "corpus.cleaning.near_duplicates compares texts, not the conversations of mine" in detail
    assert "benchmarks" not in detail

    write_rows(rows, 10)
    config.corpus.corpora["mine"] = [source_of(rows)]
    assert "compares texts" not in SHARDS.inspect(config).detail


@pytest.mark.heavy
def test_inputs_that_are_gone_are_no_reason_to_build_again(work: WorkDirectory, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, 100)
    config, training = (config_of(work, source_of(rows), stage=stage) for stage in ("shards", "language"))
    SHARDS.build(config, Console())
    begin(training)
    rows.unlink()
    found = SHARDS.inspect(config)
    assert found.ready
    assert "inputs of mine are not compared" in found.detail
    assert str(rows) in found.detail
    assert look(training) is Action.RESUME


@pytest.mark.heavy
def test_a_corrected_licence_changes_no_tar_and_stops_no_run(work: WorkDirectory, tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_rows(first, 100)
    write_rows(second, 60, words=40)
    sources = [source_of(first), source_of(second)]
    SHARDS.build(config_of(work, *sources), Console())
    begin(config_of(work, *sources, stage="language"))
    before, manifest = tars(work.corpus("mine")), read_manifest(work.corpus("mine"))

    corrected = [source_of(first, "Apache-2.0"), source_of(second)]
    config = config_of(work, *corrected)
    found = SHARDS.inspect(config)
    assert not found.ready
    assert "mine changed: licences only" in found.detail
    SHARDS.build(config, Console())
    assert SHARDS.inspect(config).ready
    assert tars(work.corpus("mine")) == before
    assert read_manifest(work.corpus("mine")).content == manifest.content
    assert look(config_of(work, *corrected, stage="language")) is Action.RESUME
    licences = {row["licence"]: row["documents"] for row in inspect_corpus(work.corpus("mine"))["licences"]}
    assert licences == {"Apache-2.0": 80, "MIT": 64, "Zlib": 16}  # a row's own licence is not that of its source


@pytest.mark.parametrize("whole", [True, False])
def test_files_of_others_are_refused_before_anything_is_built(work: WorkDirectory, tmp_path: Path, whole: bool) -> None:
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, 100)
    config, directory = config_of(work, source_of(rows)), work.corpus("mine")
    if whole:
        SHARDS.build(config, Console())
        next(iter(directory.glob("train-*.tar"))).unlink()
    (directory / "notes").mkdir(parents=True)
    (directory / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ArtefactError, match=r"corpora/mine holds notes/, which its manifest does not name: move them"):
        SHARDS.inspect(config)
    assert (directory / "notes" / "a.txt").read_text() == "mine"


def test_a_file_in_the_place_of_a_corpus_is_refused(work: WorkDirectory, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, 10)
    work.corpus("mine").write_text("mine")
    with pytest.raises(ArtefactError, match=r"corpora/mine is a file, but a corpus is a folder: move it away"):
        SHARDS.inspect(config_of(work, source_of(rows)))


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sources are read in every pass, as large ones are."""
    monkeypatch.setattr(screening, "CACHED_CHARACTERS", -1)


def edited_while_tokenized(monkeypatch: pytest.MonkeyPatch, edit: Callable[[], object]) -> None:
    def encoded(*arguments):
        edit()
        yield from encode_documents(*arguments)

    monkeypatch.setattr(builds, "encode_documents", encoded)


def again(rows: Path) -> str:
    """Rows that contain the texts of other rows."""
    return rows.read_text().replace('{"text": "row ', '{"text": "again: row ')


@pytest.mark.usefixtures("uncached")
def test_a_file_that_grows_while_it_is_tokenized_is_read_up_to_its_old_end(
    work: WorkDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finds val that stands in train: a pass that reads lines which the choice of val did not know."""
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, 200)
    size = rows.stat().st_size

    def grow() -> None:
        more = again(rows)
        with rows.open("a") as file:
            file.write(more)

    edited_while_tokenized(monkeypatch, grow)
    SHARDS.build(config_of(work, source_of(rows)), Console())
    manifest = read_manifest(work.corpus("mine"))
    assert manifest.inputs[0][0]["size"] == size, "the next plan sees that the file has grown"
    train, val = texts_of(work, "mine", "train"), texts_of(work, "mine", "val")
    assert len(train) + len(val) == 200
    assert not [text for text in val if any(text in other for other in train)]


@pytest.mark.heavy
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("kind", ["replaced", "shrunk", "deleted"])
def test_a_file_that_changes_while_it_is_tokenized_ends_the_build_without_a_corpus(
    work: WorkDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rows, other = tmp_path / "rows.jsonl", tmp_path / "other"
    write_rows(rows, 200)
    other.write_text(again(rows))
    edits = {"replaced": lambda: other.rename(rows), "shrunk": lambda: os.truncate(rows, 900), "deleted": rows.unlink}
    edited_while_tokenized(monkeypatch, edits[kind])
    config = config_of(work, source_of(rows))
    with pytest.raises(ChangedInputError, match=rf"{rows}: changed while it was read"):
        SHARDS.build(config, Console())
    assert not manifest_path(work.corpus("mine")).exists()

    monkeypatch.setattr(builds, "encode_documents", encode_documents)
    write_rows(rows, 100)
    SHARDS.build(config, Console())
    assert read_manifest(work.corpus("mine")).ingest["languages"]["english"]["seen"] == 100


@pytest.mark.heavy
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_does_not_go_on_behind_tars_of_other_documents(
    work: WorkDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Finds finished tars with text that val holds out now: the file changed without a trace in size and time."""
    monkeypatch.setattr("dist_lm.tokenizer.encode.CHUNK_DOCUMENTS", 1)
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, 300)
    config = config_of(work, source_of(rows))
    earlier = other_corpora.earlier_corpora(config, other_corpora.earlier_folders(config, "mine"))
    texts = TextSplits(config.corpus, config.seed, earlier=earlier)
    with pytest.raises(RuntimeError, match="killed"):
        builds.build_corpus(config, "mine", texts, Console(), killed_after(150))
    assert recorded(work.corpus("mine"), "finished")

    status = rows.stat()
    rows.write_text(rows.read_text().replace("value", "eulav"))
    os.utime(rows, ns=(status.st_atime_ns, status.st_mtime_ns))
    config = replace(config, tokenizer=replace(config.tokenizer, workers=workers))
    with pytest.raises(ArtefactError, match=r"train-000000.tar was made of other documents .*remove .*mine to build"):
        SHARDS.build(config, Console())
    assert not manifest_path(work.corpus("mine")).exists()


@pytest.mark.heavy
@pytest.mark.usefixtures("uncached")
def test_a_corpus_that_stays_was_compared_with_the_documents_of_now(work: WorkDirectory, tmp_path: Path) -> None:
    """Finds val of one corpus in train of another one, whose file changed without a trace before it was built."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_rows(first, 100)
    write_rows(second, 100)
    config = config_of(work, source_of(first))
    corpora = {"mine": [source_of(first)], "others": [source_of(second)]}
    config = replace(config, corpus=replace(config.corpus, corpora=corpora))
    SHARDS.build(config, Console())
    shutil.rmtree(work.corpus("others"))
    SHARDS.build(config, Console())

    shutil.rmtree(work.corpus("others"))
    status = second.stat()
    content = first.read_text().replace("row ", "wor ")
    second.write_text((content + content)[: status.st_size - 1] + "\n")
    os.utime(second, ns=(status.st_atime_ns, status.st_mtime_ns))
    config = replace(config, corpus=replace(config.corpus, max_bad_fraction=0.1))
    with pytest.raises(ArtefactError, match=r"mine was built when corpus others had other documents"):
        SHARDS.build(config, Console())
    assert not manifest_path(work.corpus("others")).exists()


def recorded(directory: Path, event: str) -> set[str]:
    """The tars that the journal calls `begun` or `finished`."""
    path = journal_path(directory)
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    values = [json.loads(line).get(event) for line in lines]
    return {value["name"] if isinstance(value, dict) else value for value in values if value}


def killed_after(documents: int) -> Callable[[Tokenizer, Document], TokenizedDocument]:
    """What encodes so many documents and then ends the build."""
    left = iter(range(documents))

    def encode(tokenizer: Tokenizer, document: Document) -> TokenizedDocument:
        if next(left, None) is None:
            raise RuntimeError("killed")
        return tokenizer.encode_document(document)

    return encode


@pytest.mark.heavy
def test_val_begins_behind_the_last_tar_of_train(
    work: WorkDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So one tar at most is open when a build is killed."""
    monkeypatch.setattr("dist_lm.tokenizer.encode.CHUNK_DOCUMENTS", 1)
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, 300)
    config, directory = config_of(work, source_of(rows), shard_tokens=10**6), work.corpus("mine")
    SHARDS.build(config, Console())
    documents = {name: split.counts.documents for name, split in read_manifest(directory).splits.items()}
    assert documents["val"] > 8 + 1
    for path in directory.iterdir():
        path.unlink()
    encode = killed_after(documents["train"] + 8 + 1)  # val has a member of 8 documents then
    with pytest.raises(RuntimeError, match="killed"):
        builds.build_corpus(config, "mine", TextSplits(config.corpus, config.seed), Console(), encode)
    assert recorded(directory, "begun") - recorded(directory, "finished") == {"val-000000.tar"}


def test_a_begun_build_that_a_newer_commit_drops_is_announced_with_the_way_out(
    work: WorkDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, encode = tmp_path / "rows.jsonl", killed_after(100)
    write_rows(rows, 300)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    monkeypatch.setattr("dist_lm.tokenizer.encode.CHUNK_DOCUMENTS", 1)
    monkeypatch.setattr(hub, "hub_rows", lambda *_: lambda row: lines[row:])
    config = config_of(work, SourceConfig("hub", "english", dataset="owner/stories"))

    def build_at(commit: str) -> str:
        monkeypatch.setattr(hub, "commit_of", lambda *_: commit)
        with pytest.raises(RuntimeError, match="killed"):
            builds.build_corpus(config, "mine", TextSplits(config.corpus, config.seed), Console(), encode)
        return " ".join(capsys.readouterr().err.split())

    assert "warning" not in build_at("a" * 40)
    assert recorded(work.corpus("mine"), "finished")
    assert "warning" not in build_at("a" * 40)  # goes on
    assert f"`revision` of a source keeps it at one commit; those read now: hub:owner/stories {'b' * 40}" in build_at(
        "b" * 40
    )


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("rows", "words", "shard_tokens", "kills"),
    [
        pytest.param(2_500, 60, 20_000, 3, id="small"),
        pytest.param(80_000, 500, 8_000_000, 10, id="300 MB", marks=[pytest.mark.bars, pytest.mark.timeout(7200)]),
    ],
)
@pytest.mark.cluster
def test_kills_of_the_stage_change_no_byte_whatever_the_workers(
    work: WorkDirectory, tmp_path: Path, rows: int, words: int, shard_tokens: int, kills: int
) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows, words)
    config = config_of(work, source_of(path), shard_tokens=shard_tokens, documents_per_member=64)
    directory = work.corpus("mine")
    for _ in range(2):  # the second one is timed: it imports nothing
        shutil.rmtree(directory, ignore_errors=True)
        began = time.monotonic()
        SHARDS.build(config, Console())
        seconds = time.monotonic() - began
    expected = {name: content for name, (_, content) in tars(directory).items()}
    kept = {path.name: path.read_bytes() for path in directory.glob("*.zst")}
    manifest = manifest_path(directory).read_bytes()
    for one in directory.iterdir():
        one.unlink()
    parallel = replace(config, tokenizer=replace(config.tokenizer, workers=2))
    draw, fork = random.Random(0), multiprocessing.get_context("fork")
    finished: dict[str, int] = {}  # tar -> inode
    for number in range(kills):
        process = fork.Process(target=SHARDS.build, args=(parallel if number % 2 else config, Console()))
        process.start()
        wanted = len(finished) + draw.randrange(2)
        while process.is_alive() and len(recorded(directory, "finished")) < wanted:
            time.sleep(0.01)
        # The timed build may have been slowed down by others, so this one is killed before its last tar in any case.
        until = time.monotonic() + draw.uniform(0, 1.5) * seconds / len(expected)
        while process.is_alive() and time.monotonic() < until:
            if len(recorded(directory, "finished")) >= min(wanted + 2, len(expected) - 1):
                break
            time.sleep(0.005)
        process.kill()
        process.join()
        assert not manifest_path(directory).exists(), "every kill hits a build"
        assert all((directory / name).stat().st_ino == inode for name, inode in finished.items())
        done = recorded(directory, "finished")
        assert len(recorded(directory, "begun") - done) <= 1  # tars that are begun again
        finished = {name: (directory / name).stat().st_ino for name in done}
    assert finished
    SHARDS.build(parallel, Console())
    print(f"{kills} kills of a build of {path.stat().st_size / 1e6:.0f} MB in {len(expected)} tars")
    assert {name: content for name, (_, content) in tars(directory).items()} == expected
    assert {path.name: path.read_bytes() for path in directory.glob("*.zst")} == kept
    assert manifest_path(directory).read_bytes() == manifest
    assert TokenCorpus.open(directory, "train").n_documents > 0
    assert not [path for path in directory.iterdir() if path.name.endswith(".tmp")]
