"""How well a tokenizer fits the text: bytes per token by language, and how it splits what code is made of."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from dist_lm.document import Document
from dist_lm.tokenizer.tokenizer import Tokenizer

SAMPLES = {
    "shebang": '#!/bin/bash\nset -euo pipefail\necho "$HOME"\n',
    "comparison": "if a == b and c != d or e >= 10:\n",
    "indentation": "def add(a, b):\n    if a:\n        return a + b\n\n    return None\n",
    "tabs": "all:\n\tcc -o main main.c\n",
    "sql": "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;\n",
    "english": "Once upon a time there was a little dog.",
    "unicode": "naïve café 🙂 日本",
}


def tokenizer_report(tokenizer: Tokenizer, documents: Iterable[Document]) -> dict[str, Any]:
    """Figures over `documents`, ready for JSON.

    `vocab_size`, `sha256`, `special_tokens` (name -> id), `bytes_per_token` (UTF-8 bytes, end-of-text not
    counted), `languages` (the same by language, with what it was measured on), `samples` (name -> pieces).
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
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "special_tokens": tokenizer.special_ids,
        "bytes_per_token": _ratio(sum(bytes_by.values()), sum(tokens_by.values())),
        "languages": languages,
        "samples": {name: tokenizer.pieces(tokenizer.encode(text)) for name, text in SAMPLES.items()},
    }


def _ratio(n_bytes: int, tokens: int) -> float:
    """Bytes per token; 0 where there is no text."""
    return n_bytes / tokens if tokens else 0.0
