"""Corpora of conversations that become several samples: each is a document of the tars, and killed builds go on."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dist_lm.chat.documents import encode_document
from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.config.root import Config
from dist_lm.data.ingest import TextSplits
from dist_lm.data.manifest import read_manifest
from dist_lm.document import Document, TokenizedDocument
from dist_lm.stages.shards.builds import build_corpus
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.console import Console
from tests.chat.layouts.read_rows import byte_tokenizer
from tests.chat.test_thinking import DROPS, KEEPS
from tests.conftest import composed

ANSWERS = 3  # of each conversation, with thinking
CHATS = 40


def configuration(folder: Path, template: str) -> Config:
    """A work directory with a byte tokenizer of this chat template, and a corpus of conversations that think."""
    work = WorkDirectory(folder / "work")
    work.tokenizer.mkdir(parents=True)
    kept_template = byte_tokenizer(work.tokenizer, template).kept_template
    assert kept_template
    kept_template.write(work.tokenizer)

    turns = [
        [
            turn
            for number in range(ANSWERS)
            for turn in (
                {"role": "user", "content": f"{chat} + {number}?"},
                {"role": "assistant", "content": f"{chat + number}", "reasoning_content": f"Adds {number} to {chat}."},
            )
        ]
        for chat in range(CHATS)
    ]
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))
    corpus = CorpusConfig(
        "own",
        {"chats": [SourceConfig("messages", "chat", "MIT", path=str(path))]},
        val_fraction=0.2,
        documents_per_member=4,
        shard_tokens=1500,
    )
    config = composed(["stage=shards", f"work_dir={work.path}"])
    return replace(config, corpus=corpus, tokenizer=replace(config.tokenizer, workers=1))


def build(config: Config, encode: Callable[[Tokenizer, Document], TokenizedDocument] = encode_document) -> Path:
    console = Console(io.StringIO(), io.StringIO(), live=False)
    build_corpus(config, "chats", TextSplits(config.corpus, config.seed), console, encode)
    return WorkDirectory(Path(config.work_dir)).corpus("chats")


def tars(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.tar")}


@pytest.mark.heavy
@pytest.mark.parametrize(("template", "samples"), [(DROPS, ANSWERS), (KEEPS, 1)])
def test_each_sample_is_a_document(tmp_path: Path, template: str, samples: int) -> None:
    manifest = read_manifest(build(configuration(tmp_path, template)))
    assert sum(split.counts.documents for split in manifest.splits.values()) == samples * CHATS
    assert sum(tally["kept"] for tally in manifest.ingest["languages"].values()) == CHATS  # the rows that were read


class StoppedError(Exception):
    pass


def stopping_after(limit: int) -> Callable[[Tokenizer, Document], TokenizedDocument]:
    """An encoder that fails at this document."""
    encoded: list[str] = []

    def encode(tokenizer: Tokenizer, document: Document) -> TokenizedDocument:
        encoded.append(document.source)
        if len(encoded) == limit:
            raise StoppedError
        return encode_document(tokenizer, document)

    return encode


@pytest.mark.heavy
def test_a_build_that_ends_between_samples_of_a_conversation_goes_on(tmp_path: Path) -> None:
    undisturbed = build(configuration(tmp_path / "a", DROPS))
    assert len(tars(undisturbed)) > 4

    config = configuration(tmp_path / "b", DROPS)
    for limit in (50, 51, 70):
        with pytest.raises(StoppedError):
            build(config, stopping_after(limit))
    assert tars(build(config)) == tars(undisturbed)
