"""Data sets through the real `datasets` library, from local files and generators: order, retries, errors."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi
from omegaconf import OmegaConf

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.inputs import Input, Inputs, inputs_of
from dist_lm.data.manifest import changed_inputs, inputs_hash
from dist_lm.data.screening import IngestReport
from dist_lm.data.sources.failures import is_transient
from dist_lm.data.sources.hub import commit_of, read_hub, resumed
from dist_lm.data.sources.messages import read_messages
from dist_lm.data.sources.reader import reader_of
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError, UnreachableError
from tests.data.reading import read_corpus

HUB_YAML = Path(__file__).parents[2] / "conf" / "corpus" / "hub.yaml"
COMMIT = "a" * 40
STORIES = [f"Once upon a time there was story {i}.\r\nIt ended.\n" for i in range(30)]


def hub(dataset: Path | str = "owner/stories", **options) -> SourceConfig:
    return SourceConfig("hub", "english", "CDLA-Sharing-1.0", dataset=str(dataset), **options)


@pytest.fixture
def rows_of_hub(monkeypatch) -> Iterator[list[dict]]:
    """The rows that every data set of the hub has in this test, through the real library."""
    rows: list[dict] = []

    def load_dataset(dataset: str, streaming: bool, revision: str, split: str, **_: object) -> IterableDataset:
        assert (dataset, streaming, revision, split) == ("owner/stories", True, COMMIT, "train")
        return IterableDataset.from_generator(lambda: iter(rows))

    commits = iter([COMMIT, "b" * 40])  # the owner pushes after the first question
    commit_of.cache_clear()
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, revision: SimpleNamespace(sha=next(commits)))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    yield rows
    commit_of.cache_clear()


def documents(source: SourceConfig) -> list[Document]:
    return [candidate for candidate in read_hub(source, 0) if isinstance(candidate, Document)]


def test_a_data_set_gives_a_document_a_row(rows_of_hub):
    rows_of_hub += [{"text": text, "n": i} for i, text in enumerate(STORIES)]
    got = documents(hub())
    assert [d.text for d in got] == STORIES
    assert (got[7].source, got[7].licence) == ("owner/stories@main:7", "CDLA-Sharing-1.0")


def test_a_launch_reads_one_commit_and_records_it(rows_of_hub):
    rows_of_hub += [{"text": text} for text in STORIES]
    assert len(documents(hub())) == len(documents(hub())) == len(STORIES)  # at COMMIT, as load_dataset checks
    assert inputs_of(hub(), hashes=True).to_json() == [{"name": "hub:owner/stories", "etag": COMMIT}]
    assert inputs_of(hub(revision="c" * 40)).files == ()  # the configuration has it
    commit_of.cache_clear()  # another launch
    assert inputs_hash([inputs_of(hub())]) != inputs_hash([Inputs((Input("hub:owner/stories", etag=COMMIT),))])
    with pytest.raises(ArtefactError, match=r"owner/other@main: no answer of the hub: .*HF_TOKEN"):
        inputs_of(hub("owner/other"))  # the fake has no more commits


def test_a_hub_that_does_not_answer_is_asked_again_and_then_named(monkeypatch):
    answers = iter([ConnectionError("reset"), TimeoutError(), COMMIT, *[ConnectionError("down")] * 9])

    def dataset_info(*_: object, revision: str) -> SimpleNamespace:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(sha=answer)

    commit_of.cache_clear()
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    assert inputs_of(hub()).taken[0].etag == COMMIT
    with pytest.raises(UnreachableError, match=r"owner/other@main: no answer of the hub: .*down.*HF_ENDPOINT"):
        inputs_of(hub("owner/other"))
    assert len(list(answers)) == 4  # 5 of 9 were asked for
    commit_of.cache_clear()


def test_a_newer_commit_is_no_reason_to_build_a_corpus_again(rows_of_hub, monkeypatch, tmp_path):
    recorded = [[], [{"name": "hub:owner/stories", "etag": "0" * 40}]]  # the first one by an older version
    monkeypatch.setattr("dist_lm.data.manifest.read_manifest", lambda _: SimpleNamespace(inputs=recorded))
    config = CorpusConfig("hub", {"language": [hub(), hub()]})
    assert changed_inputs(config, "language", tmp_path) == []


def test_the_corpus_counts_what_rows_cannot_give(rows_of_hub):
    rows_of_hub += [{"text": text} for text in STORIES]
    rows_of_hub += [{"text": None}, {"text": ""}, {"text": STORIES[3].replace("\r\n", "\n")}]
    report = IngestReport()
    kept = list(read_corpus(CorpusConfig("hub", {"language": [hub()]}, 0.2), "language", 0, report))
    counts = report.languages["english"]
    assert (counts.seen, counts.kept, counts.dropped) == (33, 30, {"empty": 2, "duplicate": 1})
    assert sorted(d.text for _, d in kept) == sorted(STORIES)
    assert {split for split, _ in kept} == {"train", "val"}


def test_limit_counts_kept_rows_and_stops_the_stream(rows_of_hub):
    rows_of_hub += [{"text": text} for text in [STORIES[0], *STORIES]]
    config = CorpusConfig("hub", {"language": [hub(limit=12)]}, 0.3)
    report = IngestReport()
    assert sorted(d.text for _, d in read_corpus(config, "language", 0, report)) == sorted(STORIES[:12])
    assert report.languages["english"].seen == 13


def test_the_licence_of_a_row_where_there_is_a_column(rows_of_hub):
    rows_of_hub += [{"text": "a", "licences": ["MIT", "BSD"]}, {"text": "b", "licences": []}]
    assert [d.licence for d in documents(hub(licence_column="licences"))] == ["MIT, BSD", "CDLA-Sharing-1.0"]


def test_a_column_that_is_not_there_is_named(rows_of_hub):
    rows_of_hub += [{"content": "x", "n": 1}]
    with pytest.raises(ConfigError, match=r"dataset=owner/stories: column=text: .*; the columns there are content, n"):
        documents(hub())


def test_conversations_of_a_data_set_are_those_of_a_file_with_its_rows(rows_of_hub, tmp_path):
    """Finds keys of the hub that reading conversations loses, and nulls of `datasets` that change a conversation."""
    asked = {"role": "user", "content": "Is it dry in Oslo?"}
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "dry"}]
    answered = {"role": "assistant", "content": "It is."}
    rows = [{"messages": [asked, *turns, answered], "name": "a"}, {"messages": [asked, answered], "name": "b"}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows_of_hub += Dataset.from_list(rows)  # a turn has the keys of all turns, those that it lacks with None

    of_hub = list(read_messages(SourceConfig("messages", "chat", "MIT", dataset="owner/stories"), 0))
    of_file = list(read_messages(SourceConfig("messages", "chat", "MIT", path=str(tmp_path / "chats.jsonl")), 0))
    assert [replace(d, source="") for d in of_hub] == [replace(d, source="") for d in of_file]
    assert [d.source for d in of_hub] == ["owner/stories@main:0", "owner/stories@main:1"]
    assert all(isinstance(document, Document) for document in of_hub)
    assert inputs_of(SourceConfig("messages", "chat", dataset="owner/stories")).taken[0].etag == COMMIT

    with pytest.raises(ConfigError, match=r"reader=messages: dataset=owner/stories: column=turns: none of the first 2"):
        list(read_messages(SourceConfig("messages", "chat", dataset="owner/stories", column="turns"), 0))


@pytest.mark.parametrize("key", [{"revision": "v1"}, {"dataset": "owner/stories"}, {"subset": "all"}])
def test_conversations_of_files_take_no_key_of_the_hub(tmp_path, key):
    (tmp_path / "chats.jsonl").write_text("{}\n")
    source = SourceConfig("messages", "chat", path=str(tmp_path / "chats.jsonl"), **key)
    with pytest.raises(ConfigError, match=rf"{next(iter(key))}=.*: not together with path"):
        list(read_messages(source, 0))


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("hf:owner/chats", "write dataset: owner/chats$"),
        ("owner/chats@v1", "write dataset: owner/chats, revision: v1$"),
        ("hf://datasets/owner/chats@v1", "write dataset: owner/chats, revision: v1$"),
    ],
)
def test_an_id_with_a_prefix_or_a_revision_is_refused_with_the_keys(dataset, words):
    with pytest.raises(ConfigError, match=words):
        inputs_of(SourceConfig("messages", "chat", dataset=dataset))


@pytest.mark.parametrize("place", ["{}", "{}/rows.jsonl", "./rows", "~/rows", "a/b/c", "rows.parquet"])
def test_a_local_copy_is_refused_with_the_way_out(tmp_path, place):
    source = hub(place.format(tmp_path), split="test")
    with pytest.raises(ConfigError, match=r"is a place of this machine, .*: write reader: jsonl \(or pa.* and path: "):
        documents(source)


class Flaky:
    """A data set of the real library over a connection that breaks at row 5, a number of times."""

    def __init__(self, breaks: int, error: Exception) -> None:
        self.breaks, self.error, self.opened = breaks, error, []

    def rows(self) -> Iterator[dict]:
        for i, text in enumerate(STORIES):
            if i == 5 and self.breaks:
                self.breaks -= 1
                raise self.error
            yield {"text": text}

    def open_at(self, row: int) -> IterableDataset:
        self.opened.append(row)
        dataset = IterableDataset.from_generator(self.rows)
        return dataset.skip(row) if row else dataset


def test_a_broken_stream_goes_on_at_the_row_where_it_broke():
    flaky = Flaky(2, ConnectionError("reset by peer"))
    got = list(resumed(flaky.open_at, "flaky", first_wait_s=0.001))
    assert [number for number, _ in got] == list(range(30))
    assert [row["text"] for _, row in got] == STORIES
    assert flaky.opened == [0, 5, 5]


def test_retries_end_with_what_to_do():
    flaky = Flaky(99, ConnectionError("reset by peer"))
    got = []
    with pytest.raises(
        ArtefactError, match=r"corpus source flaky: stopped at row 5: .*reset by peer.*HF_ENDPOINT.*HF_TOKEN"
    ):
        got.extend(resumed(flaky.open_at, "flaky", attempts=3, first_wait_s=0.001))
    assert flaky.opened == [0, 5, 5, 5]


def test_what_would_fail_again_is_not_tried_again():
    flaky = Flaky(99, ValueError("Unknown split"))
    with pytest.raises(ArtefactError, match="Unknown split"):
        list(resumed(flaky.open_at, "flaky", first_wait_s=60))
    assert flaky.opened == [0]


def test_which_errors_pass():
    class Response:
        def __init__(self, status_code: int) -> None:
            self.status_code = status_code

    def http(status: int) -> OSError:
        error = OSError("http")
        error.response = Response(status)  # type: ignore[attr-defined]
        return error

    assert all(is_transient(e) for e in (ConnectionResetError(), TimeoutError(), OSError("ssl"), http(503), http(429)))
    assert not any(is_transient(e) for e in (FileNotFoundError(), ValueError(), http(401), http(404), KeyError("x")))
    assert not is_transient(ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)"))


@pytest.mark.heavy
def test_offline_the_hub_corpus_fails_at_once_and_says_what_to_do():
    code = f"""
from omegaconf import OmegaConf
from dist_lm.config.corpus import CorpusConfig
from dist_lm.data.ingest import split_documents
from dist_lm.data.screening import IngestReport
values = OmegaConf.load({str(HUB_YAML)!r})
config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CorpusConfig), values))
try:
    next(split_documents(config, "language", 0, IngestReport()))
except ValueError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("ArtefactError corpus source roneneldan/TinyStories@f54c09fd")
    assert "HF_HUB_OFFLINE" in done.stdout


def test_without_the_library_the_error_is_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[hub\]'"):
        next(read_hub(hub("roneneldan/TinyStories"), 0))


def test_the_hub_configuration_is_the_75_k_samples():
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CorpusConfig), OmegaConf.load(HUB_YAML)))
    assert isinstance(config, CorpusConfig)
    assert [(s.language, s.limit) for s in config.corpora["code"]] == [
        ("bash", 25000),
        ("python", 25000),
        ("sql", 25000),
    ]
    for sources in config.corpora.values():
        for source in sources:
            if source.reader == "tools":  # made here
                continue
            assert source.reader in ("hub", "hub_tools", "hub_rankings")
            assert source.dataset.count("/") == 1
            assert source.licence
            assert bool(source.column) == (source.reader == "hub")
            reader_of(source)  # takes every key
