"""The sources of a corpus: readers by name and by import path, and what is refused."""

import json
import subprocess
import sys

import pytest

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.config.root import imported_function
from dist_lm.data.screening import IngestReport
from dist_lm.data.sources.reader import READERS, form_of, traits_of
from dist_lm.errors import ArtefactError, ConfigError
from tests.data.reading import read_corpus


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


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden", "-x", "a\nb", "x" * 101])
def test_a_corpus_cannot_leave_its_folder_by_its_name(name):
    with pytest.raises(ConfigError, match=r"the name of a corpus in corpus.corpora='.*': expected up to 100 letters"):
        CorpusConfig("test", {name: [own("read_numbers")]})


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"reader": "jsonl", "limit": "ten"}, ".limit=ten: expected an integer"),
        ({"reader": "jsonl", "held_out": "maybe"}, ".held_out=maybe: expected true or false"),
        ({"reader": "jsonl", "exclude": "vendor/"}, ".exclude=vendor/: expected a list of texts"),
        ({"reader": "jsonl", "only": {"a": "b"}}, "={'reader': 'jsonl', 'only': {'a': 'b'}}: Cannot merge"),
        ({"reader": "jsonl", "licence_colum": "x"}, ".licence_colum: no such key; did you mean licence_column?"),
        ({"path": "x"}, ": reader is missing: expected a reader such as"),
        ("jsonl", "=jsonl: expected keys of a source"),
    ],
)
def test_a_wrong_source_is_named_by_its_place_and_key(item, words):
    with pytest.raises(ConfigError) as refused:
        CorpusConfig("test", {"c": [own("read_numbers"), item]})
    assert str(refused.value).startswith(f"corpus.corpora.c[1]{words}")


def test_a_path_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="source jsonl: path=5: expected a file"):
        SourceConfig("jsonl", path=5)


@pytest.mark.parametrize(
    ("config", "name", "error", "match"),
    [
        (config_of(own("read_numbers")), "d", ConfigError, "corpus d does not exist .* are c"),
        (CorpusConfig("test", {"c": []}, 0.1), "c", ConfigError, "corpus c has no sources"),
        (
            config_of(SourceConfig("perl", "x")),
            "c",
            ConfigError,
            "reader=perl: expected one of arrow, csv, files, .*import path",
        ),
        (config_of(own("read_nothing")), "c", ConfigError, "own_readers:read_nothing: cannot be imported"),
        (config_of(own("TEXTS")), "c", ConfigError, "own_readers:TEXTS: expected a function"),
        (config_of(own("read_strings")), "c", ConfigError, "read_strings yielded a value of type str: expected Doc"),
        (
            config_of(own("read_objects")),
            "c",
            ConfigError,
            "yielded a text whose text is of type dict .objects:0.: exp",
        ),
        (
            config_of(own("read_named_groups")),
            "c",
            ConfigError,
            "yielded the group 'my_repository' .named:0.: expected a hexadecimal hash",
        ),
        (config_of(own("read_texts_as_conversations")), "c", ConfigError, "yielded a text .texts.: expected Document"),
        (
            config_of(own("read_numbers"), SourceConfig("tools", "tools")),
            "c",
            ConfigError,
            "give texts and conversations",
        ),
        (
            config_of(own("read_numbers"), max_document_bytes=1),
            "c",
            ArtefactError,
            "read_numbers gave no document: dropped were too_long 40;",
        ),
        (config_of(own("read_numbers"), val_fraction=1e-9), "c", ArtefactError, "none of its 40 documents"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_way_out(config, name, error, match):
    with pytest.raises(error, match=match) as caught:
        list(read_corpus(config, name, 0, IngestReport()))
    assert "\n" not in str(caught.value)


def test_importing_the_corpus_imports_no_reader():
    code = "import sys, dist_lm.data.sources.reader as c; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    readers = {path.partition(":")[0] for _, path in READERS.values()}
    assert not imported & {"torch", "datasets", "dist_lm.tools", "dist_lm.chat", *readers}


@pytest.mark.parametrize("name", READERS)
def test_the_table_of_readers_has_the_form_that_each_reader_declares(name):
    form, path = READERS[name]
    assert form == traits_of(imported_function(path, "reader")).form


def test_a_corpus_has_at_most_as_many_languages_as_a_byte_names(tmp_path):
    sources = []
    for name in ("a", "b"):
        rows = [json.dumps({"text": f"{name} {n}", "lang": f"{name}{n}"}) for n in range(150)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        sources.append(SourceConfig("jsonl", path=f"{tmp_path}/{name}.jsonl", language_column="lang"))
    with pytest.raises(ConfigError, match=r"corpus c: more than 256 languages, the last at .*b.jsonl:107: choose some"):
        list(read_corpus(config_of(*sources), "c", 0, IngestReport()))
    sources[1].limit = 106
    assert len(list(read_corpus(config_of(*sources), "c", 0, IngestReport()))) == 256
