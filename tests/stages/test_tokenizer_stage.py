"""Stage tokenizer: trained, kept or given; what a corpus, a run and a checkpoint know of it is its hash."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_lm.config.corpus import SourceConfig
from dist_lm.config.root import Config
from dist_lm.data.manifest import read_manifest
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.shards import identity, stage
from dist_lm.stages.shards.stage import STAGE as SHARDS
from dist_lm.stages.tokenizer import OLD_SETTINGS, READ, REPORT_BYTES, STAGE
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.symbols import CALL
from dist_lm.tokenizer.tokenizer import Tokenizer, with_marks
from dist_lm.tracking.console import Console
from tests.conftest import TINY_MODEL
from tests.data.counted_readers import GIVEN, source
from tests.tokenizer.made_json import large_json, trained_json
from tests.tokenizer.stdlib_text import stdlib_texts

SHAPE = [override for override in TINY_MODEL if not override.startswith("model.vocab_size")]
SOURCES = {"c": [source("a"), source("b")], "d": [source("c", "read_short")]}


def config_for(work_dir: Path, *overrides: str, sources: dict[str, list[SourceConfig]] | None = None) -> Config:
    config = compose_config(["stage=shards", *SHAPE, "tokenizer.workers=1", f"work_dir={work_dir}", *overrides])
    corpora: Any = {"d": SOURCES["d"]} if sources is None else sources
    return replace(config, corpus=replace(config.corpus, corpora=corpora, val_fraction=0.2))


@pytest.fixture
def given_json(tmp_path: Path) -> Path:
    path = tmp_path / "theirs" / "tokenizer.json"
    path.parent.mkdir()
    path.write_bytes(trained_json(stdlib_texts()[:5], 320))
    return path


def test_training_reads_at_most_twice_what_it_is_told_to_learn_from(tmp_path: Path) -> None:
    GIVEN.clear()
    config = config_for(tmp_path / "work", "model.vocab_size=512", "tokenizer.train_bytes=100000", sources=SOURCES)
    STAGE.build(config, Console())
    assert 150_000 < GIVEN.total() <= READ * 100_000
    assert min(GIVEN["a"], GIVEN["b"]) > 60_000


@pytest.mark.heavy
def test_a_given_tokenizer_is_copied_as_it_is_and_the_vocabulary_follows_it(tmp_path: Path, given_json: Path) -> None:
    for named in (given_json, given_json.parent):
        config = config_for(tmp_path / "work", f"tokenizer={named}")
        assert config.model.vocab_size == config.tokenizer.vocab_size == 320
    work = WorkDirectory(Path(config.work_dir))
    assert STAGE.inspect(config).detail == f"320 pieces from {given_json.parent}"
    GIVEN.clear()
    STAGE.build(config, Console())
    assert GIVEN.total() <= READ * REPORT_BYTES
    assert work.tokenizer_model.read_bytes() == given_json.read_bytes()
    assert STAGE.inspect(config).ready
    assert json.loads(work.tokenizer_report.read_text())["sha256"] == durable.sha256_of(given_json)
    # a later command keeps it without the file it came from
    given_json.unlink()
    kept = config_for(tmp_path / "work", "tokenizer=keep")
    assert kept.model.vocab_size == 320
    assert STAGE.inspect(kept).detail == "320 pieces, kept"


def test_a_given_tokenizer_without_text_has_no_figures(tmp_path: Path, given_json: Path) -> None:
    """Finds `0.00 bytes/token` in the plan."""
    config = config_for(tmp_path / "work", f"tokenizer={given_json}", sources={})
    STAGE.build(config, Console())
    assert STAGE.inspect(config).detail == "320 pieces"


@pytest.mark.heavy
def test_another_tokenizer_than_the_one_that_is_there_is_refused_with_the_ways_out(
    tmp_path: Path, given_json: Path
) -> None:
    STAGE.build(config_for(tmp_path / "work", f"tokenizer={given_json}"), Console())
    other = tmp_path / "other.json"
    other.write_bytes(trained_json(["other words"], 300))
    with pytest.raises(ArtefactError, match=r"holds tokenizer [0-9a-f]{12}, tokenizer=.*json is .*tokenizer=keep"):
        STAGE.inspect(config_for(tmp_path / "work", f"tokenizer={other}"))
    with pytest.raises(ArtefactError, match=r"holds 320 pieces, expected 640"):
        STAGE.inspect(config_for(tmp_path / "work", "model.vocab_size=640"))


@pytest.mark.heavy
def test_the_vocabulary_of_the_model_is_checked_against_a_given_tokenizer(tmp_path: Path, given_json: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model.vocab_size=4096: tokenizer=\S+ has 320 pieces: give model.vocab"):
        config_for(tmp_path / "work", f"tokenizer={given_json}", "model.vocab_size=4096")
    assert config_for(tmp_path, f"tokenizer={given_json}", "model.vocab_size=320").model.vocab_size == 320
    with pytest.raises(ConfigError, match=r"^tokenizer=/: the folder has no tokenizer.json or tokenizer.model: exp"):
        config_for(tmp_path / "work", "tokenizer=/")
    with pytest.raises(ConfigError, match=r"^tokenizer=/nowhere: no file /nowhere: expected train, keep"):
        config_for(tmp_path / "work", "tokenizer=/nowhere")
    with pytest.raises(ConfigError, match=r"^tokenizer.add_marks=True: expected false with tokenizer=train"):
        config_for(tmp_path / "work", "tokenizer.add_marks=true")
    with pytest.raises(ArtefactError, match=r"^tokenizer=keep: .* holds no tokenizer"):
        STAGE.inspect(config_for(tmp_path / "work", "tokenizer=keep"))


@pytest.mark.heavy
def test_other_pieces_are_another_tokenizer(tmp_path: Path) -> None:
    keys = ("model.vocab_size=512", "tokenizer.train_bytes=100000")
    base = config_for(tmp_path / "work", *keys, sources={"code": [source("a")]})

    def with_pieces(work: str = "work", **pieces: Any) -> Config:
        return replace(base, work_dir=str(tmp_path / work), tokenizer=replace(base.tokenizer, **pieces))

    STAGE.build(with_pieces(), Console())
    STAGE.build(with_pieces("other", max_piece_length=17, split_by_unicode_script=False), Console())
    found = [durable.sha256_of(WorkDirectory(tmp_path / work).tokenizer_model) for work in ("work", "other")]
    assert found[0] != found[1]
    for config in (
        with_pieces(),
        with_pieces(max_piece_length=16, split_by_unicode_script=True),
        with_pieces("other"),  # null: as it is there
        with_pieces("other", max_piece_length=17),
    ):
        assert STAGE.inspect(config).ready
    for config, said in (
        (with_pieces(max_piece_length=32), "with tokenizer.max_piece_length=16, expected 32: keep it by tokenizer.max"),
        (with_pieces(split_by_unicode_script=False), "with tokenizer.split_by_unicode_script=True, expected False"),
        (with_pieces("other", split_by_unicode_script=True), "with .*=False, expected True"),
    ):
        with pytest.raises(ArtefactError, match=said):
            STAGE.inspect(config)
    # a report of a version without these keys
    report = tmp_path / "work/tokenizer/report.json"
    value = durable.read_json(report)  # without its checksum, as that version wrote it
    value["config"] = {key: one for key, one in value["config"].items() if key not in OLD_SETTINGS}
    report.write_text(json.dumps(value))
    assert STAGE.inspect(with_pieces(max_piece_length=16)).ready
    with pytest.raises(ArtefactError, match="max_piece_length=16, expected 32"):
        STAGE.inspect(with_pieces(max_piece_length=32))
    for pieces, said in (
        ({"max_piece_length": 8}, "tokenizer.max_piece_length=8: expected from 16 to 512"),
        ({"max_piece_length": 32, "source": "keep"}, "tokenizer.max_piece_length=32: expected null with tokenizer=kee"),
    ):
        with pytest.raises(ConfigError, match=said):
            with_pieces(**pieces)


def test_marks_are_appended_and_counted(tmp_path: Path, given_json: Path) -> None:
    config = config_for(tmp_path / "work", f"tokenizer={given_json}", "tokenizer.add_marks=true")
    STAGE.build(config, Console())
    made = Tokenizer.load(WorkDirectory(Path(config.work_dir)).tokenizer_model)
    assert made.vocab_size == config.model.vocab_size > 320
    assert made.mark_id(CALL) >= 320
    assert with_marks(given_json.read_bytes(), "") == (tmp_path / "work/tokenizer/tokenizer.json").read_bytes()
    assert STAGE.inspect(config).ready


@pytest.mark.heavy
def test_a_trained_tokenizer_is_kept_while_the_corpora_change(work: WorkDirectory) -> None:
    before = work.tokenizer_model.read_bytes()
    config = config_for(work.path, "tokenizer=keep")
    assert config.model.vocab_size == 640
    assert STAGE.inspect(config).ready
    assert (
        "kept although it was trained on another text"
        in STAGE.inspect(config_for(work.path, "model.vocab_size=640")).detail
    )
    SHARDS.build(replace(config, stage=replace(stage.own(config), corpora=["d"])), Console())
    assert read_manifest(work.corpus("d")).recipe.tokenizer_sha256 == durable.sha256_of(work.tokenizer_model)
    assert work.tokenizer_model.read_bytes() == before


def test_a_copied_tokenizer_stays_while_a_corpus_was_written_with_it(tmp_path: Path, work: WorkDirectory) -> None:
    """Would find a training over a copied file that an attached corpus needs, or a plan that refuses its path."""
    copy = WorkDirectory(tmp_path / "copy")
    shutil.copytree(work.corpus("code"), copy.corpus("code"))
    folder = copy.corpus("code")
    with pytest.raises(ArtefactError, match="its tokenizer is missing"):
        identity.check_tokenizer(config_for(copy.path), folder)
    identity.check_tokenizer(config_for(copy.path, f"tokenizer={work.tokenizer_model}"), folder)

    copy.tokenizer.mkdir()
    shutil.copy(work.tokenizer_model, copy.tokenizer)
    assert STAGE.inspect(config_for(copy.path, "model.vocab_size=640")).ready
    with pytest.raises(ArtefactError, match="holds 640 pieces, expected 512"):
        STAGE.inspect(config_for(copy.path, "model.vocab_size=512"))
    shutil.rmtree(folder)
    assert not STAGE.inspect(config_for(copy.path, "model.vocab_size=640")).ready


@pytest.mark.heavy
def test_a_vocabulary_past_65536_goes_through_the_shards(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.write_bytes(large_json(66_000))
    config = config_for(tmp_path / "work", f"tokenizer={path}")
    assert config.model.vocab_size == 66_000
    STAGE.build(config, Console())
    SHARDS.build(config, Console())
    work = WorkDirectory(Path(config.work_dir))
    tokenizer = Tokenizer.load(work.tokenizer_model)
    corpus = TokenCorpus.open(work.corpus("d"), "train")
    tokens = corpus.tokens(0, 0, int(corpus.lengths[0]))
    assert tokens[0] == tokenizer.eot_id
    assert tokenizer.decode(tokens.tolist()).startswith("c ")


def test_a_given_tokenizer_replaces_the_file_of_another_kind(work: WorkDirectory, given_json: Path) -> None:
    shutil.rmtree(work.path / "corpora")
    config = config_for(work.path, f"tokenizer={given_json}")
    STAGE.build(config, Console())
    assert [path.name for path in sorted(work.tokenizer.iterdir())] == ["report.json", "tokenizer.json"]


@pytest.mark.heavy
def test_a_new_corpus_builds_its_own_shards_alone_and_holds_no_val_of_the_others(tmp_path: Path) -> None:
    first, second = source("one", "read_short"), source("two", "read_short", limit=50)
    path = tmp_path / "given.json"
    path.write_bytes(trained_json(stdlib_texts()[:5], 320))
    config = config_for(tmp_path / "work", f"tokenizer={path}", sources={"c": [first]})
    STAGE.build(config, Console())
    SHARDS.build(config, Console())
    work = WorkDirectory(tmp_path / "work")
    before = read_manifest(work.corpus("c"))
    both = {"c": [first], "d": [second, source("one", "read_copies")]}  # it holds the texts of the old one too
    config = config_for(tmp_path / "work", f"tokenizer={path}", sources=both)
    assert SHARDS.inspect(config).detail == "corpora d (c there)"
    SHARDS.build(config, Console())
    assert SHARDS.inspect(config).ready
    assert read_manifest(work.corpus("c")) == before
    tokenizer = Tokenizer.load(work.tokenizer_model)

    def texts(name: str, split: str) -> set[str]:
        corpus = TokenCorpus.open(work.corpus(name), split)
        parts = [corpus.tokens(n, 0, int(corpus.lengths[n])).tolist() for n in range(corpus.n_documents)]
        return {tokenizer.decode(tokens) for tokens in parts}

    copied = {text.removeprefix("a copy: ") for text in texts("d", "train")}
    assert texts("c", "val")
    assert not texts("c", "val") & copied
    assert texts("c", "train") & copied
    other = {"c": [replace(first, limit=3)], "d": [second]}
    found = SHARDS.inspect(config_for(tmp_path / "work", "tokenizer=keep", sources=other))
    assert not found.ready
    assert "beside another c (corpus.corpora.c[0].limit=3, was 0" in found.detail
