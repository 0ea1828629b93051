"""Trains the tokenizer, a SentencePiece BPE for code and text, and reports how well it fits."""

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
OPERATORS_EVERY = 5_000  # characters of text for each repetition of the operators, so that BPE learns them as pieces

# Text is cut at these characters: U+2581 would pass for a space; NUL and U+2585 make SentencePiece drop all of a chunk.
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
    """Yields at most `limit_bytes` of UTF-8 text, an equal share for every language, in the order of `documents`.

    A language that has less than its share leaves the rest to the others. Within a language, documents are chosen by
    the hash of their text, so that no part of a corpus is favoured. One pass, memory of about `limit_bytes`. One
    document is kept even if it is larger; nothing is yielded before all documents are read.

    Raises:
        UserError: a document is not Unicode text.
    """
    heaps: dict[str, list[tuple[int, int, int, Document]]] = defaultdict(list)  # max-heaps by hash, for each language
    sizes: dict[str, int] = defaultdict(int)  # bytes
    total_bytes = 0
    for index, document in enumerate(documents):
        content = utf8(document.text, document.source)
        text_hash = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
        heapq.heappush(heaps[document.language], (-text_hash, index, len(content), document))
        sizes[document.language] += len(content)
        total_bytes += len(content)

        # The largest language gives way first, so languages below their share lose nothing.
        while total_bytes > limit_bytes and sum(map(len, heaps.values())) > 1:
            largest = max(sizes, key=lambda language: sizes[language])
            dropped_bytes = heapq.heappop(heaps[largest])[2]
            sizes[largest] -= dropped_bytes
            total_bytes -= dropped_bytes

    # The heaps are in the order of hashes, readers of the sample want the order of the corpus.
    sample = [candidate for heap in heaps.values() for candidate in heap]
    yield from (document for _, _, _, document in sorted(sample, key=lambda candidate: candidate[1]))


class VocabularyError(ConfigError):
    """The vocabulary has more pieces than the text can fill, or fewer than its characters take."""

    def __init__(self, words: str, most: int | None = None) -> None:
        """`most`: the largest vocabulary that the text fills; None: the vocabulary is too small."""
        super().__init__(words)
        self.most = most


def train_tokenizer(texts: Iterable[str], path: Path, config: TokenizerConfig) -> None:
    """Trains a BPE of `config.vocab_size` pieces and writes it to `path`; the same texts give the same bytes.

    An existing file is replaced, and only after success.

    Raises:
        VocabularyError (ConfigError): the vocabulary is too large for the texts, or too small for their characters.
        UserError: there is no text, or it is not Unicode. What `texts` raises passes.
        RuntimeError: SentencePiece refuses for another reason.
        OSError: the file cannot be written.
    """
    model = io.BytesIO()
    learned_as = config.learned_as
    errors: list[BaseException] = []

    # SentencePiece has arguments of their own for three special tokens; no beginning of sentence is trained.
    special_tokens: dict[str, Any] = {"bos_id": -1, "control_symbols": list(SPECIAL_TOKENS[3:])}
    for name, token in (("eos", END_OF_TEXT), ("pad", PAD), ("unk", UNKNOWN)):
        special_tokens |= {f"{name}_id": SPECIAL_TOKENS.index(token), f"{name}_piece": token}

    # Text must come back as it was, so nothing is normalised, and characters without a piece become bytes.
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_recording(errors, _chunks(texts)),
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
            user_defined_symbols=user_defined_symbols(),
            minloglevel=2,
            **special_tokens,
        )
    except RuntimeError as error:
        if errors:
            raise errors[0] from None
        raise _explained(error, config) from error

    durable.write_bytes(path, model.getvalue())


def tokenizer_report(tokenizer: Tokenizer, documents: Iterable[Document]) -> dict[str, Any]:
    """Returns figures over `documents`, ready for JSON.

    `format`, `vocab_size`, `sha256`, `special_tokens` (name -> id), `bytes_per_token` (UTF-8 bytes; end-of-text is not
    counted; 0 without text), `languages` (the same by language, with the amount of text), `samples` (name -> pieces).

    Raises:
        UserError: a document is not Unicode text.
    """
    num_documents, num_bytes, num_tokens = defaultdict(int), defaultdict(int), defaultdict(int)  # language -> number
    for document in documents:
        tokenized = tokenizer.encode_document(document)
        num_documents[document.language] += 1
        num_bytes[document.language] += tokenized.n_bytes
        num_tokens[document.language] += len(tokenized.tokens) - 1  # end-of-text opens every document

    languages = {
        language: {
            "documents": num_documents[language],
            "bytes": num_bytes[language],
            "tokens": num_tokens[language],
            "bytes_per_token": _ratio(num_bytes[language], num_tokens[language]),
        }
        for language in sorted(num_documents)
    }
    return {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "special_tokens": tokenizer.special_ids,
        "bytes_per_token": _ratio(sum(num_bytes.values()), sum(num_tokens.values())),
        "languages": languages,
        "samples": {name: tokenizer.pieces(tokenizer.encode(text)) for name, text in SAMPLES.items()},
    }


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Yields parts of at most `CHUNK_CHARACTERS` with their newlines, then operators in proportion to the text.

    The characters of `UNLEARNABLE` are left out.

    Raises:
        UserError: a text holds a lone surrogate.
    """
    characters = 0
    for index, text in enumerate(texts):
        # A lone surrogate must be refused here: SentencePiece would stop without saying where it is.
        utf8(text, f"text {index}")
        for part in UNLEARNABLE.split(text):
            for start in range(0, len(part), CHUNK_CHARACTERS):
                yield part[start : start + CHUNK_CHARACTERS]
        characters += len(text)

    # BPE learns what is frequent, and operators are rare in small corpora.
    separator = "\n\t"  # a symbol: nothing is learned across it
    operators = separator.join(spelling for operator in OPERATORS for spelling in (operator, f" {operator}"))
    for _ in range(characters // OPERATORS_EVERY):
        yield operators


def _recording(errors: list[BaseException], chunks: Iterator[str]) -> Iterator[str]:
    """Yields `chunks` and records the error they raise: SentencePiece replaces it by a RuntimeError that quotes it."""
    try:
        yield from chunks
    except Exception as error:
        errors.append(error)
        raise


def _explained(error: RuntimeError, config: TokenizerConfig) -> Exception:
    """Returns, and does not raise, the refusal of SentencePiece in the words of our configuration.

    It is a UserError without text, a VocabularyError for one of the wrong size, else `error` itself.
    """
    message = str(error)
    if "sentences_.empty()" in message:
        return UserError(
            "the tokenizer has no text to train on: no corpus of text or conversations has a train split, and rankings "
            "do not count: add text, or take a tokenizer that is there (tokenizer=PATH, tokenizer=keep)"
        )

    if most := re.search(r"too high .*<= (\d+)", message):
        accepted = (
            f"at most {most[1]}, which is all this text has: a tokenizer that is there (tokenizer=PATH, "
            "tokenizer=keep) serves a small corpus better; or add text"
        )
    elif least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        accepted = f"more than {least[1]}, which bytes, special tokens, symbols and characters of this text take"
    else:
        return error

    # The user sets model.vocab_size, which tokenizer.vocab_size follows; another tokenizer.vocab_size is refused.
    words = f"model.vocab_size={config.vocab_size}: expected {accepted}"
    return VocabularyError(words, int(most[1]) if most else None)


def _ratio(n_bytes: int, tokens: int) -> float:
    """Returns the bytes per token; 0 if there is no text."""
    if tokens:
        return n_bytes / tokens
    return 0.0
