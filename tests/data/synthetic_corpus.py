"""Small corpora made of numbers, for tests of shards, order and stream."""

import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dist_lm.data.manifest import Recipe, manifest_path
from dist_lm.data.shard_writer import CorpusWriter
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.document import TokenizedDocument

EOT = 1
LANGUAGES = ("python", "bash", "sql")


def documents(lengths: Sequence[int], seed: int = 0, masked: bool = False) -> list[TokenizedDocument]:
    """Documents of random tokens from 2 on, in three languages by turns; every second one masked."""
    generator = np.random.default_rng(seed)
    made = []
    for i, length in enumerate(lengths):
        tokens = generator.integers(2, 60000, length).astype(np.uint16)
        tokens[0] = EOT
        mask = generator.integers(0, 2, length).astype(np.uint8) if masked and i % 2 else None
        language = LANGUAGES[i % len(LANGUAGES)]
        n_bytes = int(generator.integers(length, 5 * length))
        made.append(TokenizedDocument(tokens, n_bytes, language, f"/text/{language}/{i}", "MIT", mask))
    return made


def write(
    directory: Path,
    made: Sequence[TokenizedDocument],
    val: Sequence[TokenizedDocument] = (),
    documents_per_member: int = 4,
    shard_tokens: int = 200,
    vocab_size: int = 2**16,
    tokenizer: str = "t" * 64,
) -> Path:
    """A corpus of `made` as train and `val` as val: tars and a manifest, in place of those that are there."""
    fingerprint = secrets.token_hex(32) if manifest_path(directory).exists() else "c" * 64  # nothing there is kept
    with CorpusWriter(
        directory, Recipe(tokenizer, vocab_size, fingerprint, documents_per_member, shard_tokens)
    ) as writer:
        for split, part in (("train", made), ("val", val)):
            for document in part:
                writer.write(split, document)
        writer.finish({"dropped": 3})
    return directory


def corpus(directory: Path, lengths: Sequence[int], masked: bool = False) -> TokenCorpus:
    """`documents` of the given lengths, written and opened."""
    write(directory, documents(lengths, masked=masked))
    return TokenCorpus.open(directory, "train")


def lengths(n: int, longest: int, seed: int = 0) -> list[int]:
    """n document lengths in [1, longest]."""
    return np.random.default_rng(seed).integers(1, longest + 1, n).tolist()
