"""The corpus: what this machine gives, what is kept and counted, and that val is never in train."""

import ast
import random
import sqlite3
import subprocess
import sys
import sysconfig
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.corpus import IngestReport, LocalText, read_corpus, split_of, text_corpora
from dist_lm.data.overlap import seen_texts
from dist_lm.data.sources.bash import read_bash, shell_files
from dist_lm.data.sources.candidate import Candidate, Rejected, read_file_document, text_hash
from dist_lm.data.sources.english import docstring_documents
from dist_lm.data.sources.python import python_files, read_python
from dist_lm.data.sources.sql import executes, read_sql, sql_document
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError

SPLITS = ("train", "val")
LOCAL_YAML = Path(__file__).parents[2] / "conf" / "corpus" / "local.yaml"
Corpora = dict[str, list[tuple[str, Document]]]


def local_config() -> CorpusConfig:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CorpusConfig), OmegaConf.load(LOCAL_YAML)))
    assert isinstance(config, CorpusConfig)
    return config


def config_of(*sources: SourceConfig, val_fraction: float = 0.3, max_document_bytes: int = 1000) -> CorpusConfig:
    return CorpusConfig("test", {"c": list(sources)}, val_fraction, max_document_bytes)


@pytest.fixture(scope="module")
def machine() -> tuple[Corpora, dict[str, IngestReport]]:
    """Every text that `conf/corpus/local.yaml` finds here."""
    config = local_config()
    config = replace(config, corpora={name: config.corpora[name] for name in text_corpora(config)})
    local = LocalText.read(config, seed=0)
    reports = {name: IngestReport() for name in config.corpora}
    return {name: list(read_corpus(config, name, 0, reports[name], local)) for name in config.corpora}, reports


def test_this_machine_gives_every_language_in_both_splits(machine):
    corpora, reports = machine
    assert set(corpora) == {"language", "code"}
    assert set(reports["language"].languages) == {"english"}
    assert set(reports["code"].languages) == {"english", "python", "bash", "sql"}
    for name, report in reports.items():
        for language, counts in report.languages.items():
            mine = [(split, d) for split, d in corpora[name] if d.language == language]
            assert counts.kept == len(mine) == sum(counts.documents.values())
            assert counts.seen == counts.kept + sum(
                getattr(counts, reason)
                for reason in (
                    *("duplicate", "empty", "invalid_utf8", "too_long"),
                    *("overlapping", "unreadable", "unparsable", "invalid_sql"),
                )
            )
            for split in SPLITS:
                assert counts.bytes[split] == sum(len(d.text.encode()) for s, d in mine if s == split)
                assert counts.bytes[split] > 0, (language, split)
    code = reports["code"].languages
    assert sum(code["english"].bytes.values()) > 1_000_000
    assert sum(code["python"].bytes.values()) > 5_000_000
    assert 800_000 < sum(code["sql"].bytes.values()) < 1_300_000


def test_no_val_document_is_part_of_a_train_document_of_any_corpus(machine):
    corpora, _ = machine
    train = {d.text for documents in corpora.values() for split, d in documents if split == "train"}
    val = {d.text: d.source for documents in corpora.values() for split, d in documents if split == "val"}
    assert len(val) > 50
    assert not train & set(val)
    long = {text.strip(): source for text, source in val.items() if len(text) > 80}
    assert [source for text, source in long.items() if any(text in whole for whole in train)] == []


def test_the_docstrings_of_a_module_are_on_the_side_of_the_module(machine):
    corpora, _ = machine
    side = {d.source: split for split, d in corpora["code"] if d.language == "python"}
    docstrings = [(d.source.rsplit(":", 1)[0], split) for split, d in corpora["language"]]
    pairs = [(side[path], split) for path, split in docstrings if path in side]
    assert len(pairs) > 500
    assert all(module == docstring for module, docstring in pairs)
    topics = [d for _, d in corpora["language"] if "topics.py:" in d.source]
    assert len(topics) > 50
    assert not [path for path in side if path.endswith("topics.py")]


def test_texts_are_the_bytes_of_their_files(machine):
    corpora, _ = machine
    files = [d for _, d in corpora["code"] if d.language in ("python", "bash")]
    for document in random.Random(0).sample(files, 50):
        assert Path(document.source).read_bytes() == document.text.encode()
        assert document.licence


def test_reading_again_gives_the_same(machine):
    corpora, _ = machine
    sources = [s for s in local_config().corpora["code"] if s.reader != "english"]  # the slow one has its own order
    config = local_config()
    config.corpora = {"code": sources}
    again = [d.source for _, d in read_corpus(config, "code", 0, IngestReport())]
    before = [d.source for _, d in corpora["code"] if d.language != "english"]
    assert set(before) <= set(again)  # fewer texts to overlap with: a val document more may stay
    assert [source for source in again if source in set(before)] == before


def candidates_of(tmp_path: Path) -> list[Candidate]:
    source = SourceConfig("bash", "bash", "x")
    contents = {
        "a_crlf.sh": b"#!/bin/sh\r\necho one\r\n",
        "b_lf.sh": b"#!/bin/sh\necho one\n",
        "c_latin1.sh": "#!/bin/sh\necho caf\u00e9\n".encode("latin-1"),
        "d_empty.sh": b"",
        "e_blank.sh": b" \n\t\n",
        "f_long.sh": b"#!/bin/sh\n" + b"echo long\n" * 200,
        "g_nul.sh": b"#!/bin/sh\nprintf '\0'\n",
        **{f"h_{i}.sh": f"#!/bin/sh\necho number {i}\n".encode() for i in range(20)},
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "z_gone.sh").symlink_to(tmp_path / "nowhere")
    return [read_file_document(path, source) for path in sorted(tmp_path.iterdir())]


def test_what_is_not_kept_is_counted(tmp_path):
    source = SourceConfig("bash", "bash", "x")
    local = LocalText({repr(source): candidates_of(tmp_path)}, leaked=set())
    report = IngestReport()
    kept = [d for _, d in read_corpus(config_of(source), "c", 0, report, local)]
    counts = report.languages["bash"]
    assert (counts.seen, counts.kept) == (28, 22)
    assert (counts.duplicate, counts.empty, counts.invalid_utf8, counts.too_long) == (1, 2, 1, 1)
    assert counts.unreadable == 1
    assert kept[0].text == "#!/bin/sh\r\necho one\r\n"
    assert [line.rsplit("/", 1)[1] for line in report.rejected] == [
        "c_latin1.sh: invalid_utf8",
        "f_long.sh: too_long",
        "z_gone.sh: unreadable",
    ]
    assert report.as_dict()["languages"]["bash"]["bytes"]["train"] == counts.bytes["train"]


def test_a_val_document_that_train_documents_hold_is_dropped_and_counted():
    source = SourceConfig("python", "python")
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
    assert report.languages["python"].overlapping == 1


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


def test_the_split_hangs_on_the_group_alone():
    groups = [text_hash(str(i)) for i in range(4000)]
    val = [split_of(group, 0.05) == "val" for group in groups]
    assert 120 < sum(val) < 280
    assert all(split_of(group, 0.2) == "val" for group, held in zip(groups, val, strict=True) if held)


def test_sources_in_another_order_put_every_text_on_the_same_side():
    sources = [SourceConfig("sql", "sql", limit=40), SourceConfig("bash", "bash")]
    config = config_of(*sources, val_fraction=0.2, max_document_bytes=10**6)
    turned = config_of(*reversed(sources), val_fraction=0.2, max_document_bytes=10**6)
    sides = {d.source: split for split, d in read_corpus(config, "c", 0, IngestReport())}
    assert sides == {d.source: split for split, d in read_corpus(turned, "c", 0, IngestReport())}
    assert set(sides.values()) == set(SPLITS)


def test_limit_counts_documents_kept():
    source = SourceConfig("python", "python", limit=30)
    report = IngestReport()
    config = config_of(source, max_document_bytes=10**6)
    assert len(list(read_corpus(config, "c", 0, report))) == 30
    assert report.languages["python"].kept == 30


FIVE = SourceConfig("sql", "sql", limit=5)


@pytest.mark.parametrize(
    ("config", "name", "error", "match"),
    [
        (config_of(FIVE), "d", ConfigError, "corpus d does not exist .* are c"),
        (CorpusConfig("test", {"c": []}, 0.1), "c", ConfigError, "corpus c has no sources"),
        (config_of(SourceConfig("perl", "x")), "c", ConfigError, "reader=perl: expected one of bash, .*sql"),
        (config_of(FIVE, max_document_bytes=10), "c", ArtefactError, "reader=sql found no document"),
        (config_of(FIVE, val_fraction=1e-9, max_document_bytes=9999), "c", ArtefactError, "none of its 5"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_way_out(config, name, error, match):
    with pytest.raises(error, match=match) as caught:
        list(read_corpus(config, name, 0, IngestReport()))
    assert "\n" not in str(caught.value)


def test_sql_hangs_on_the_seed_and_the_number_alone():
    def texts(limit: int, seed: int) -> list[str]:
        return [c.text for c in read_sql(SourceConfig("sql", "sql", limit=limit), seed) if isinstance(c, Document)]

    assert texts(20, seed=1) == texts(40, seed=1)[:20]
    assert not set(texts(20, seed=1)) & set(texts(20, seed=2))


def test_every_generated_statement_runs_and_documents_differ():
    documents = [sql_document(random.Random(f"test {i}")) for i in range(500)]
    for text in documents:
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.executescript(text)
    assert all(400 <= len(text) <= 3600 for text in documents)
    statements = [part.strip() for text in documents for part in text.split(";") if part.strip()]
    assert len(set(statements)) > 0.95 * len(statements)
    repeated = seen_texts(documents[:250], documents[250:])
    assert len(repeated) <= 5, "documents of which half can be read in others"
    assert not executes("SELECT * FROM nowhere;")
    for keyword in (
        "JOIN",
        "OVER (",
        "WITH",
        "UNION",
        "CREATE VIEW",
        "TRIGGER",
        "ON CONFLICT",
        "RECURSIVE",
        "CASE",
    ):
        assert sum(keyword in text.upper() for text in documents) > 10, keyword


def test_docstrings_become_prose_with_names():
    source = '''"""A module that says what it is for, at some length, so that it counts as prose here."""

def f(a, *, b=2):
    """Do something with a and b, and give back what is left over when it is done with them."""

class C(dict):
    """A class that keeps things in order, and knows more about them than it says in this place.

        Indented further.

    It ends after a paragraph that says where to look for the rest of what it does, and who asked for it.
    """

    def short(self):
        """Tiny."""

    async def g(self) -> None:
        """Wait until every other one has come back, then go on as though nothing had happened in between."""
'''
    documents = dict(docstring_documents(ast.parse(source), "pkg.mod"))
    assert list(documents) == ["pkg.mod.C"]  # the module's own is below the length of a document
    assert documents["pkg.mod.C"].startswith("pkg.mod.C\n\nA class that keeps")
    assert "\n\n    Indented further." in documents["pkg.mod.C"]
    assert "g(self)\n\nWait until" in documents["pkg.mod.C"]
    assert "Tiny" not in documents["pkg.mod.C"]


def test_shell_files_are_scripts_that_say_so(tmp_path):
    def put(name: str, content: str, executable: bool = True) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755 if executable else 0o644)

    put("bin/posix", "#!/bin/sh\n:")
    put("bin/env", "#!/usr/bin/env bash\n:")
    put("bin/options", "#! /usr/bin/bash -eu\n:")
    put("bin/fish", "#!/usr/bin/fish\n:")
    put("bin/python", "#!/usr/bin/env python3\n:")
    put("bin/plain", "#!/bin/sh\n:", executable=False)
    put("lib/part.sh", ": sourced", executable=False)
    put("share/bash-completion/completions/tool", "complete -F _tool tool", executable=False)
    put("share/fish/completions/tool", "complete -c tool", executable=False)
    put("venv/pyvenv.cfg", "")
    put("venv/bin/hidden.sh", "#!/bin/sh\n:")
    (tmp_path / "bin" / "link").symlink_to(tmp_path / "bin" / "posix")
    (tmp_path / "sbin").symlink_to(tmp_path / "bin")
    put("a/b/c/d/e/f/g/h/i/deep.sh", ":")
    found = shell_files([tmp_path, tmp_path / "bin", tmp_path / "sbin", tmp_path / "missing"])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "bin/env",
        "bin/options",
        "bin/posix",
        "lib/part.sh",
        "share/bash-completion/completions/tool",
    ]


def test_readers_pass_over_what_is_not_theirs():
    library = Path(sysconfig.get_path("stdlib"))
    names = {path.relative_to(library).as_posix() for path in python_files(library)}
    assert "json/decoder.py" in names
    assert not [n for n in names if n.startswith(("test/", "site-packages/")) or "/tests/" in n]
    assert not any(isinstance(c, Rejected) for c in read_python(SourceConfig("python", "python"), 0))
    here = Path(__file__).parents[2]
    assert not [c for c in read_bash(SourceConfig("bash", "bash"), 0) if Path(c.source).is_relative_to(here)]


def test_importing_the_corpus_imports_nothing_heavy():
    code = "import sys, dist_lm.data.corpus as c; print([m for m in ('torch', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
