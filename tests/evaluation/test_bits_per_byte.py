"""Bits per byte: of which corpora, and of which weights."""

import shutil
from pathlib import Path

import pytest

from dist_lm.errors import ArtefactError
from dist_lm.evaluation.bits_per_byte import document_bits, documents_of, text_corpora
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.conftest import TINY_MODEL, composed
from tests.training_run import linked, write_untrained


def folders(work: WorkDirectory, *names: str) -> list[Path]:
    return [work.corpus(name) for name in names]


def test_a_corpus_is_missing_only_where_nobody_named_it(tiny_work):
    mistyped = folders(tiny_work, "language", "cdoe")
    assert text_corpora(mistyped, may_lack=True) == mistyped[:1]
    with pytest.raises(ArtefactError, match=r"^stage\.corpora=\[language,cdoe\]: no cdoe in .*: run stage=shards"):
        text_corpora(mistyped, may_lack=False)
    with pytest.raises(ArtefactError, match="no cdoe and no cdoe in"):
        text_corpora(folders(tiny_work, "cdoe", "cdoe"), may_lack=True)


def test_text_of_another_tokenizer_is_refused(tiny_work, tmp_path):
    other = tmp_path / "other.model"
    shutil.copy(tiny_work.tokenizer_model, other)
    assert len(documents_of(folders(tiny_work, "language"), other, 2)) == 2
    other.write_bytes(other.read_bytes() + bytes([0x98, 0x06, 0x01]))  # an unknown field: the same pieces
    with pytest.raises(ArtefactError, match="language was written with tokenizer"):
        documents_of(folders(tiny_work, "language"), other, 2)


def test_a_damaged_checkpoint_is_not_measured(tiny_work, tmp_path):
    work = linked(tiny_work, tmp_path / "work")
    checkpoint = write_untrained(work, "code", 0).checkpoints / "step_00000005"
    config = composed(["stage=evaluate", *TINY_MODEL, f"work_dir={work.path}"])
    documents, tokenizer = (
        documents_of(folders(work, "code"), work.tokenizer_model, 1),
        Tokenizer.load(work.tokenizer_model),
    )
    assert document_bits(checkpoint, config, tokenizer, documents, lambda: True)
    largest = max((one for one in checkpoint.rglob("*") if one.is_file()), key=lambda one: one.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-1] ^= 1
    largest.write_bytes(content)
    with pytest.raises(ArtefactError, match="other checkpoints of the run: none"):
        document_bits(checkpoint, config, tokenizer, documents, lambda: True)
