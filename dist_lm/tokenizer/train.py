"""Training of the tokenizer: SentencePiece BPE for code and text, and the report on how well it fits."""

import hashlib
import heapq
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from dist_lm.config.corpus import TokenizerConfig
from dist_lm.document import Document
from dist_lm.errors import ConfigError, UserError, utf8
from dist_lm.storage import durable
from dist_lm.tokenizer.symbols import END_OF_TEXT, OPERATORS, PAD, SPECIAL_TOKENS, UNKNOWN, user_defined_symbols
from dist_lm.tokenizer.tokenizer import FORMAT, Tokenizer

CHUNK_CHARACTERS = 4_000  # SentencePiece drops sentences longer than 65,536 bytes; a character has at most 4
OPERATORS_EVERY = 5_000  # characters of text: as often the operators are added, so that BPE learns each one as a piece

# Never learned from: U+2581 would pass for a space; NUL and U+2585 make SentencePiece drop the whole chunk.
UNLEARNABLE = re.compile("[\0\u2581\u2585]")

SAMPLES = {
    "shebang": '#!/bin/bash\nset -euo pipefail\necho "$HOME"\n',
    "comparison": "if a == b and c != d or e >= 10:\n",
    "indentation": "def add(a, b):\n    if a:\n        return a + b\n\n    return None\n",
    "tabs": "all:\n\tcc -o main main.c\n",
    "sql": "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;\n",
    "english": "Once upon a time there was a little dog.",
    "unicode": "naïve café 🙂 日本",
}


def sample_by_language(documents: Iterable[Document], limit_bytes: int) -> Iterator[Document]:
    """At most `limit_bytes` of UTF-8 text, an equal share for every language, in the order of `documents`.

    A language that has less than its share leaves the rest to the others. Within a language, documents are chosen by
    hash, so that no part of a corpus is favoured. One pass, memory of about `limit_bytes`; at least one document is
    kept.

    Raises:
        UserError: a document is not Unicode text.
    """
    kept: dict[str, list[tuple[int, int, int, Document]]] = defaultdict(list)  # max-heaps by hash
    size: dict[str, int] = defaultdict(int)  # bytes
    total = 0
    for number, document in enumerate(documents):
        content = utf8(document.text, document.source)
        rank = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
        heapq.heappush(kept[document.language], (-rank, number, len(content), document))
        size[document.language] += len(content)
        total += len(content)
        while total > limit_bytes and sum(map(len, kept.values())) > 1:
            largest = max(size, key=lambda language: size[language])
            dropped = heapq.heappop(kept[largest])[2]
            size[largest] -= dropped
            total -= dropped
    entries = [entry for heap in kept.values() for entry in heap]
    yield from (document for _, _, _, document in sorted(entries, key=lambda entry: entry[1]))


def train_tokenizer(texts: Iterable[str], path: Path, config: TokenizerConfig) -> None:
    """Train a BPE of `config.vocab_size` pieces and write it to `path`; the same texts give the same bytes.

    Raises:
        ConfigError: the vocabulary is too large for the texts, or too small for their characters.
        UserError: there is no text, or it is not Unicode.
    """
    model = io.BytesIO()
    learned_as = config.learned_as
    failure: list[BaseException] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_raising_into(failure, _chunks(texts)),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            split_by_unicode_script=learned_as["split_by_unicode_script"],
            max_sentencepiece_length=learned_as["max_piece_length"],
            allow_whitespace_only_pieces=True,
            max_sentence_length=65536,
            eos_id=SPECIAL_TOKENS.index(END_OF_TEXT),
            eos_piece=END_OF_TEXT,
            pad_id=SPECIAL_TOKENS.index(PAD),
            pad_piece=PAD,
            unk_id=SPECIAL_TOKENS.index(UNKNOWN),
            unk_piece=UNKNOWN,
            bos_id=-1,
            control_symbols=list(SPECIAL_TOKENS[3:]),
            user_defined_symbols=user_defined_symbols(),
            minloglevel=2,
        )
    except RuntimeError as error:
        if failure:
            raise failure[0] from None
        raise _explained(error, config) from error
    durable.write_bytes(path, model.getvalue())


def tokenizer_report(tokenizer: Tokenizer, documents: Iterable[Document]) -> dict[str, Any]:
    """Figures over `documents`, ready for JSON.

    `format`, `vocab_size`, `sha256`, `special_tokens` (name -> id), `bytes_per_token` (UTF-8 bytes; end-of-text is not
    counted), `languages` (the same by language, with the amount of text), `samples` (name -> pieces).
    """
    documents_by, bytes_by, tokens_by = defaultdict(int), defaultdict(int), defaultdict(int)
    for document in documents:
        tokenized = tokenizer.encode_document(document)
        documents_by[document.language] += 1
        bytes_by[document.language] += tokenized.n_bytes
        tokens_by[document.language] += len(tokenized.tokens) - 1
    languages = {
        language: {
            "documents": documents_by[language],
            "bytes": bytes_by[language],
            "tokens": tokens_by[language],
            "bytes_per_token": _ratio(bytes_by[language], tokens_by[language]),
        }
        for language in sorted(documents_by)
    }
    return {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "special_tokens": tokenizer.special_ids,
        "bytes_per_token": _ratio(sum(bytes_by.values()), sum(tokens_by.values())),
        "languages": languages,
        "samples": {name: tokenizer.pieces(tokenizer.encode(text)) for name, text in SAMPLES.items()},
    }


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Parts of at most `CHUNK_CHARACTERS` with their newlines, then the operators, as often as the text is long."""
    characters = 0
    for number, text in enumerate(texts):
        utf8(text, f"text {number}")
        for part in UNLEARNABLE.split(text):
            for start in range(0, len(part), CHUNK_CHARACTERS):
                yield part[start : start + CHUNK_CHARACTERS]
        characters += len(text)
    between = "\n\t"  # a symbol: nothing is learned across it
    operators = between.join(operator for plain in OPERATORS for operator in (plain, f" {plain}"))
    for _ in range(characters // OPERATORS_EVERY):
        yield operators


def _raising_into(failure: list[BaseException], chunks: Iterator[str]) -> Iterator[str]:
    """`chunks`, recording the error they raise: SentencePiece replaces it by a RuntimeError that quotes it."""
    try:
        yield from chunks
    except Exception as error:
        failure.append(error)
        raise


def _explained(error: RuntimeError, config: TokenizerConfig) -> Exception:
    """The refusal of SentencePiece, in the words of our configuration."""
    message = str(error)
    if "sentences_.empty()" in message:
        return UserError(
            "the tokenizer has no text to train on: no corpus of text has a train split, and conversations and "
            "rankings do not count: add text, or take a tokenizer that is there (tokenizer=PATH, tokenizer=keep)"
        )
    if most := re.search(r"too high .*<= (\d+)", message):
        accepted = f"at most {most[1]}, which is all this text has (or more text)"
    elif least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        accepted = f"more than {least[1]}, which bytes, special tokens, symbols and characters of this text take"
    else:
        return error
    return ConfigError(f"tokenizer.vocab_size={config.vocab_size}: expected {accepted}")


def _ratio(n_bytes: int, tokens: int) -> float:
    """Bytes per token; 0 if there is no text."""
    return n_bytes / tokens if tokens else 0.0
