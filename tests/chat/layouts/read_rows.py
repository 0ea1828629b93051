"""Reads a file of rows as a corpus does, and writes what came of each row in a form that people can check."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from dist_lm.chat.documents import encode_document, read_conversation
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.propose import propose
from dist_lm.data.sources.messages import read_messages
from dist_lm.data.sources.reader import Rejected
from dist_lm.tokenizer.symbols import SPECIAL_TOKENS
from dist_lm.tokenizer.tokenizer import KeptTemplate, Tokenizer

ROWS = Path(__file__).parent / "rows"
EXPECTED = Path(__file__).parent / "expected.jsonl"


def byte_tokenizer(folder: Path, template: str = "") -> Tokenizer:
    """A tokenizer with an id for each byte and each of our marks, whose ids no training and no version changes.

    Args:
        template: the chat template of an imported model; empty: our layout.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({character: number for number, character in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    )
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    kept_template = KeptTemplate(template, (), "2026-01-31") if template else None
    return Tokenizer(path.read_bytes(), str(path), kept_template)


def source_of(file: Path, **keys: Any) -> SourceConfig:
    """The source that `dist-lm data new` writes for a file."""
    (proposal,) = propose(str(file))
    assert proposal.conversations, proposal
    return SourceConfig(**dict(proposal.source) | keys)


def outcomes(source: SourceConfig, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """What came of each row: roles, ids, spans of learned ids, and the text with what is learned in ⟦ ⟧; or the
    problem."""
    for candidate in read_messages(source, 0):
        if isinstance(candidate, Rejected):
            yield {"reason": candidate.reason, "error": candidate.error}
            continue
        encoded = encode_document(tokenizer, candidate)
        assert encoded.loss_mask is not None
        edges = np.flatnonzero(np.diff(encoded.loss_mask, prepend=0, append=0)).tolist()
        spans = list(zip(edges[::2], edges[1::2], strict=True))
        ids = encoded.tokens.tolist()
        text, end = "", 0
        for first, stop in spans:
            text += f"{spelled(ids[end:first], tokenizer)}⟦{spelled(ids[first:stop], tokenizer)}⟧"
            end = stop
        yield {
            "roles": [message.role for message in read_conversation(candidate.text).messages],
            "text": text + spelled(ids[end:], tokenizer),
            "learned": [list(span) for span in spans],
            "ids": ids,
        }


def spelled(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of ids, with the names of marks."""
    names = {number: name for name, number in tokenizer.special_ids.items()}
    content = b"".join(names[number].encode() if number in names else tokenizer.content([number]) for number in ids)
    return content.decode()


def expected() -> dict[str, list[dict[str, Any]]]:
    """File name -> what must come of each of its rows."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in EXPECTED.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        rows.setdefault(fields.pop("file"), []).append(fields)
    return rows
