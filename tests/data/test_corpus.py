"""The corpus: what is kept and counted, readers by name and by import path, and that val is never in train."""

import subprocess
import sys
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.config.corpus import SPLITS, CorpusConfig, SourceConfig
from dist_lm.config.dotted_path import imported_function
from dist_lm.data.corpus import (
    IngestReport,
    LocalText,
    form_of,
    read_corpus,
    seen_texts,
    split_of,
)
from dist_lm.data.sources.reader import READERS, Candidate, text_hash, traits_of
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError


def own(function: str, **options) -> SourceConfig:
    return SourceConfig(f"tests.data.own_readers:{function}", "english", "MIT", **options)


def config_of(*sources: SourceConfig, val_fraction: float = 0.3, max_document_bytes: int = 1000) -> CorpusConfig:
    return CorpusConfig("test", {"c": list(sources)}, val_fraction, max_document_bytes)


def test_a_reader_is_named_by_its_import_path():
    report = IngestReport()
    documents = [d for _, d in read_corpus(config_of(own("read_numbers", subset="word")), "c", 0, report)]
    assert {d.text for d in documents} == {f"word number {i} of 40\n" for i in range(40)}
    assert {(d.language, d.licence) for d in documents} == {("english", "MIT")}
    assert form_of(config_of(own("read_numbers")), "c") == "text"


def test_what_is_not_kept_is_counted():
    report = IngestReport()
    kept = [d for _, d in read_corpus(config_of(own("read_mixed")), "c", 0, report)]
    counts = report.languages["english"]
    assert (counts.seen, counts.kept) == (28, 22)
    assert counts.dropped == {"duplicate": 1, "empty": 2, "too_long": 1, "invalid_utf8": 1, "unreadable": 1}
    assert kept[0].text == "#!/bin/sh\r\necho one\r\n"
    assert report.rejected == ["mixed:4: too_long", "mixed:invalid_utf8: invalid_utf8", "mixed:unreadable: unreadable"]
    assert asdict(report)["languages"]["english"]["bytes"]["train"] == counts.bytes["train"]
    for split in SPLITS:
        assert counts.bytes[split] > counts.documents[split] > 0
    assert sum(counts.bytes.values()) == sum(len(d.text.encode()) for d in kept)


@pytest.mark.parametrize(
    ("config", "name", "error", "match"),
    [
        (config_of(own("read_numbers")), "d", ConfigError, "corpus d does not exist .* are c"),
        (CorpusConfig("test", {"c": []}, 0.1), "c", ConfigError, "corpus c has no sources"),
        (config_of(SourceConfig("perl", "x")), "c", ConfigError, "reader=perl: expected one of csv, .*import path"),
        (config_of(own("read_nothing")), "c", ConfigError, "own_readers:read_nothing: cannot be imported"),
        (config_of(own("TEXTS")), "c", ConfigError, "own_readers:TEXTS: expected a function"),
        (config_of(own("read_strings")), "c", ConfigError, "read_strings yielded a value of type str: expected Doc"),
        (config_of(own("read_texts_as_conversations")), "c", ConfigError, "yielded a text: expected Document"),
        (
            config_of(own("read_numbers"), SourceConfig("tools", "tools")),
            "c",
            ConfigError,
            "give texts and conversations",
        ),
        (config_of(own("read_numbers"), max_document_bytes=1), "c", ArtefactError, "read_numbers gave no document"),
        (config_of(own("read_numbers"), val_fraction=1e-9), "c", ArtefactError, "none of its 40 documents"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_way_out(config, name, error, match):
    with pytest.raises(error, match=match) as caught:
        list(read_corpus(config, name, 0, IngestReport()))
    assert "\n" not in str(caught.value)


def test_sources_in_another_order_put_every_text_on_the_same_side():
    sources = [own("read_numbers"), own("read_seeded")]
    sides = {d.source: split for split, d in read_corpus(config_of(*sources), "c", 0, IngestReport())}
    turned = config_of(*reversed(sources))
    assert sides == {d.source: split for split, d in read_corpus(turned, "c", 0, IngestReport())}
    assert set(sides.values()) == set(SPLITS)


def test_limit_counts_documents_kept():
    report = IngestReport()
    kept = [d for _, d in read_corpus(config_of(own("read_mixed", limit=10), val_fraction=0.5), "c", 0, report)]
    assert len(kept) == report.languages["english"].kept == 10
    assert kept[-1].text == "#!/bin/sh\necho number 7 of 20\n"


def test_a_val_document_that_train_documents_contain_is_dropped_and_counted():
    source = own("read_numbers")
    inside = " ".join(f"word{i}" for i in range(40))

    def document(text: str, val: bool) -> Document:
        return Document(text, "python", "s", "", "0" * 64 if val else "f" * 64)

    documents: list[Candidate] = [
        document(inside, val=True),
        document("another text that stands for itself " * 5, val=True),
        document(f"def f():\n    '''\n    {inside}\n    '''\n", val=False),
    ]
    config = config_of(source)
    texts = [c.text for c in documents if isinstance(c, Document)]
    leaked = {text_hash(texts[i]) for i in seen_texts(texts[:2], texts[2:])}
    report = IngestReport()
    got = list(read_corpus(config, "c", 0, report, LocalText({repr(source): documents}, leaked)))
    assert [split for split, _ in got] == ["val", "train"]
    assert report.languages["python"].dropped == {"overlapping": 1}


@given(
    st.lists(st.text("abcxyz", min_size=1, max_size=12), min_size=1, max_size=60).filter(
        lambda w: len(" ".join(w)) > 80
    ),
    st.text("abcxyz \n", max_size=40),
    st.text("abcxyz \n", max_size=40),
)
def test_a_text_inside_another_is_always_seen(words, before, after):
    text = "\n".join(words)
    assert seen_texts(["unrelated words " * 20, text], [before + text + after]) == {1}
    assert seen_texts([text], ["something else entirely, at some length, about nothing of the kind"]) == set()


def test_the_split_depends_on_the_group_alone():
    groups = [text_hash(str(i)) for i in range(4000)]
    val = [split_of(group, 0.05) == "val" for group in groups]
    assert 120 < sum(val) < 280
    assert all(split_of(group, 0.2) == "val" for group, held in zip(groups, val, strict=True) if held)


def test_importing_the_corpus_imports_no_reader():
    code = "import sys, dist_lm.data.corpus as c; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    readers = {path.partition(":")[0] for _, path in READERS.values()}
    assert not imported & {"torch", "datasets", "dist_lm.tools", "dist_lm.chat", *readers}


@pytest.mark.parametrize("name", READERS)
def test_the_table_of_readers_has_the_form_that_each_reader_declares(name):
    form, path = READERS[name]
    assert form == traits_of(imported_function(path, "reader")).form
