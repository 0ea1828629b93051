"""Stage shards: conversations with their mask, and nothing built that is there."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
import pytest

from dist_lm.chat.documents import read_conversation
from dist_lm.chat.parse import parse
from dist_lm.chat.template import render
from dist_lm.config.corpus import SPLITS, SourceConfig
from dist_lm.config.root import Config
from dist_lm.data.manifest import read_manifest
from dist_lm.data.screening import IngestReport
from dist_lm.data.sources import tools
from dist_lm.data.sources.reader import reader, traits_of
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.prepare.compose import compose_config
from dist_lm.stages import tokenizer
from dist_lm.stages.shards import identity
from dist_lm.stages.shards.identity import corpus_fingerprint, text_fingerprint
from dist_lm.stages.shards.stage import STAGE as SHARDS
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.console import Console
from tests.conftest import TINY_MODEL, conversations
from tests.data.reading import read_corpus


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[Document]:
    """What reader=tools gives; the group of every fifth is one of val."""
    made = [replace(one, group=f"{1 + (i % 5 > 0) * 2**63:016x}") for i, one in enumerate(conversations(50))]

    @reader(**asdict(traits_of(tools.read_tools)))
    def read(source: SourceConfig, seed: int) -> Iterator[Document]:
        yield from made

    monkeypatch.setattr(tools, "read_tools", read)
    return made


def config_for(work: WorkDirectory, *overrides: str) -> Config:
    return compose_config(["stage=shards", *TINY_MODEL, "tokenizer.workers=1", f"work_dir={work.path}", *overrides])


def test_conversations_of_another_layout_are_another_corpus(work, few, monkeypatch):
    config = config_for(work)
    assert identity.folder_of(config, "tools") == work.corpus("tools")
    monkeypatch.setattr(identity, "FORMAT", 0)
    assert identity.folder_of(config, "tools").name.startswith("tools-")
    assert identity.folder_of(config, "code") == work.corpus("code")


def test_documents_of_another_revision_of_their_reader_are_another_corpus(work, few, monkeypatch):
    config = config_for(work)
    read = tools.read_tools
    monkeypatch.setattr(read, "traits", replace(traits_of(read), revision=0))
    found = SHARDS.inspect(config)
    assert not found.ready
    assert ", beside another tools of other settings)" in found.detail


@pytest.mark.parametrize(("function", "depends"), [("read_numbers", False), ("read_seeded", True)])
def test_a_corpus_depends_on_the_seed_if_its_reader_says_so(work, function, depends):
    config = config_for(work).corpus
    own = SourceConfig(f"tests.data.own_readers:{function}", "english")
    config = replace(config_for(work), corpus=replace(config, corpora={"own": [own]}))
    assert (corpus_fingerprint(config, "own") != corpus_fingerprint(replace(config, seed=3), "own")) == depends


def test_conversations_come_back_with_their_mask_in_the_split_of_their_group(work, few):
    shutil.rmtree(work.corpus("tools"))
    SHARDS.build(config_for(work), Console())
    tokenizer = Tokenizer.load(work.tokenizer_model)
    for split in SPLITS:
        corpus = TokenCorpus.open(work.corpus("tools"), split)
        expected = [
            read_conversation(document.text) for i, document in enumerate(few) if (i % 5 > 0) == (split == "train")
        ]
        assert corpus.n_documents == len(expected)
        for document, conversation in enumerate(expected):
            whole = (document, 0, int(corpus.lengths[document]))
            assert parse(corpus.tokens(*whole).tolist(), tokenizer) == conversation
            assert np.array_equal(corpus.mask(*whole), render(conversation, tokenizer).loss_mask)


def test_only_what_is_missing_is_built(work, few):
    shutil.rmtree(work.corpus("tools"))
    config = config_for(work, "stage.corpora=[language,code,tools]")
    assert SHARDS.inspect(config).detail == "corpora tools (language, code there)"
    before = {name: read_manifest(work.corpus(name)) for name in ("language", "code")}
    stamps = {path: path.stat().st_mtime_ns for path in work.path.rglob("*") if path.is_file()}
    SHARDS.build(config, Console())
    assert SHARDS.inspect(config).ready
    assert {name: read_manifest(work.corpus(name)) for name in before} == before
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"path": "/nowhere/a.jsonl"}, "path=/nowhere/a.jsonl: no such file"),
        ({"path": "conftest.py", "subset": "python"}, "reader=jsonl: subset=python: this reader does not take subset"),
    ],
)
def test_sources_are_checked_before_anything_is_built(work, keys, words):
    config = config_for(work)
    own = SourceConfig("jsonl", "english", **keys)
    config = replace(config, corpus=replace(config.corpus, corpora={"own": [own]}))
    with pytest.raises(ConfigError, match=words):
        SHARDS.inspect(config)


def test_corpora_that_are_not_asked_for_may_be_missing(work):
    shutil.rmtree(work.corpus("tools"))
    assert SHARDS.inspect(config_for(work, "stage.corpora=[code]")).ready


def test_conversations_change_nothing_about_the_texts_beside_them(work):
    config = config_for(work)
    without = replace(config, corpus=replace(config.corpus, corpora=dict(list(config.corpus.corpora.items())[:2])))
    assert "tools" not in without.corpus.corpora
    assert text_fingerprint(config) == text_fingerprint(without)
    assert corpus_fingerprint(config, "code") == text_fingerprint(config) != corpus_fingerprint(config, "tools")
    assert corpus_fingerprint(replace(config, seed=3), "tools") != corpus_fingerprint(config, "tools")


def test_a_corpus_of_texts_and_conversations_is_refused(work):
    config = config_for(work).corpus
    mixed = replace(config, corpora={"both": [config.corpora["tools"][0], config.corpora["language"][0]]})
    with pytest.raises(
        ConfigError, match="corpus both: readers tools, dist_lm\.demo\.wheels:read_english give texts and conversations"
    ):
        next(read_corpus(mixed, "both", 0, IngestReport()))


def old_tokenizer(work: WorkDirectory) -> None:
    report = json.loads(work.tokenizer_report.read_text())
    del report["format"]  # reports of format 1 have none
    work.tokenizer_report.write_text(json.dumps(report))


def old_corpus(work: WorkDirectory) -> None:
    manifest = json.loads(work.corpus_manifest("tools").read_text())
    work.corpus_manifest("tools").write_text(json.dumps(manifest | {"format": 1}))


@pytest.mark.parametrize(
    ("stage", "age", "said"),
    [
        (
            tokenizer.STAGE,
            old_tokenizer,
            r"^\S*/tokenizer holds a tokenizer of format 1, .* format 2: use another work_dir",
        ),
        (
            SHARDS,
            old_corpus,
            r"^\S*/corpora/tools is a corpus of format 1, .* formats 3 and 4: use another work_dir",
        ),
    ],
)
def test_artefacts_of_an_old_format_are_refused_by_name(work, stage, age, said):
    config = config_for(work)
    assert stage.inspect(config).ready
    before = {path: path.read_bytes() for path in work.path.rglob("*") if path.is_file()}
    age(work)
    with pytest.raises(ArtefactError, match=said) as refused:
        stage.inspect(config)
    assert "\n" not in str(refused.value)
    assert set(before) == {path for path in work.path.rglob("*") if path.is_file()}
