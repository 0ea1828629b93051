"""Data sets through the real `datasets` library, from local files and generators: order, retries, errors."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from datasets import IterableDataset
from omegaconf import OmegaConf

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.ingest import read_corpus
from dist_lm.data.screening import IngestReport
from dist_lm.data.sources.hub import is_transient, read_hub, resumed
from dist_lm.data.sources.reader import reader_of
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError

HUB_YAML = Path(__file__).parents[2] / "conf" / "corpus" / "hub.yaml"
STORIES = [f"Once upon a time there was story {i}.\r\nIt ended.\n" for i in range(30)]


def hub(dataset: Path | str, **options) -> SourceConfig:
    return SourceConfig("hub", "english", "CDLA-Sharing-1.0", dataset=str(dataset), **options)


def documents(source: SourceConfig) -> list[Document]:
    return [candidate for candidate in read_hub(source, 0) if isinstance(candidate, Document)]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_a_local_file_of_every_kind(tmp_path, suffix):
    path = tmp_path / f"stories.{suffix}"
    table = pa.table({"text": STORIES, "n": list(range(30))})
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif suffix == "csv":
        pyarrow.csv.write_csv(table, path)
    else:
        write_jsonl(path, table.to_pylist())
    got = documents(hub(path))
    assert [d.text for d in got] == STORIES
    assert got[7].source == f"{path}:7"
    assert got[7].licence == "CDLA-Sharing-1.0"


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "part").mkdir()
    write_jsonl(tmp_path / "part" / "b.jsonl", [{"text": "third"}])
    write_jsonl(tmp_path / "part" / "a.jsonl", [{"text": "first"}, {"text": "second"}])
    (tmp_path / "README.md").write_text("not data")
    assert [d.text for d in documents(hub(tmp_path))] == ["first", "second", "third"]


def test_the_corpus_counts_what_rows_cannot_give(tmp_path):
    rows = [{"text": text} for text in STORIES]
    rows += [{"text": None}, {"text": ""}, {"text": STORIES[3].replace("\r\n", "\n")}]
    source = hub(write_jsonl(tmp_path / "rows.jsonl", rows))
    report = IngestReport()
    kept = list(read_corpus(CorpusConfig("hub", {"language": [source]}, 0.2), "language", 0, report))
    counts = report.languages["english"]
    assert (counts.seen, counts.kept, counts.dropped) == (33, 30, {"empty": 2, "duplicate": 1})
    assert [d.text for _, d in kept] == STORIES
    assert {split for split, _ in kept} == {"train", "val"}


def test_limit_counts_kept_rows_and_stops_the_stream(tmp_path):
    source = hub(write_jsonl(tmp_path / "r.jsonl", [{"text": t} for t in [STORIES[0], *STORIES]]), limit=12)
    config = CorpusConfig("hub", {"language": [source]}, 0.3)
    report = IngestReport()
    assert [d.text for _, d in read_corpus(config, "language", 0, report)] == STORIES[:12]
    assert report.languages["english"].seen == 13


def test_the_licence_of_a_row_where_there_is_a_column(tmp_path):
    rows = [{"text": "a", "licences": ["MIT", "BSD"]}, {"text": "b", "licences": []}]
    got = documents(hub(write_jsonl(tmp_path / "r.jsonl", rows), licence_column="licences"))
    assert [d.licence for d in got] == ["MIT, BSD", "CDLA-Sharing-1.0"]


def test_what_a_user_can_mend_is_one_line_with_the_way_out(tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", [{"content": "x", "n": 1}])
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    write_jsonl(mixed / "a.jsonl", [{"text": "x"}])
    (mixed / "b.csv").write_text("text\nx\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"not parquet at all")
    cases = [
        (hub(path), "column=text: the columns there are content, n"),
        (hub(path, column="n"), "column=n holds int, expected text"),
        (hub(mixed), "folder of files, of one kind"),
        (hub(empty), "folder of files, of one kind"),
        (hub(tmp_path / "nowhere.jsonl"), "no such file or folder"),
        (hub(""), "dataset is empty"),
        (hub(broken), r"broken.parquet: stopped at row 0: .*dataset= to a local copy"),
    ]
    for source, message in cases:
        with pytest.raises((ConfigError, ArtefactError), match=message) as caught:
            list(read_hub(source, 0))
        assert "\n" not in str(caught.value)


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


def test_offline_the_hub_corpus_fails_at_once_and_says_what_to_do():
    code = f"""
from omegaconf import OmegaConf
from dist_lm.config.corpus import CorpusConfig
from dist_lm.data.ingest import read_corpus
from dist_lm.data.screening import IngestReport
values = OmegaConf.load({str(HUB_YAML)!r})
config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CorpusConfig), values))
try:
    next(read_corpus(config, "language", 0, IngestReport()))
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
