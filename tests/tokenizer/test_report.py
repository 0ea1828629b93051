"""The report: figures that add up, and samples that read as code."""

import json

import pytest

from dist_lm.document import Document
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tokenizer.train import SAMPLES, tokenizer_report


def test_report_counts_bytes_and_tokens_by_language(tokenizer: Tokenizer) -> None:
    texts = {"python": ["a == b\n", "return x\n"], "english": ["naïve \u2581"]}
    documents = [Document(text, language, "", "", "") for language in texts for text in texts[language]]
    report = json.loads(json.dumps(tokenizer_report(tokenizer, documents)))
    assert report["vocab_size"] == 2000
    assert report["special_tokens"]["<|pad|>"] == 1
    tokens = {language: sum(len(tokenizer.encode(t)) for t in ts) for language, ts in texts.items()}
    assert report["languages"]["python"] == {
        "documents": 2,
        "bytes": 16,
        "tokens": tokens["python"],
        "bytes_per_token": 16 / tokens["python"],
    }
    assert report["languages"]["english"]["bytes"] == 10
    assert report["bytes_per_token"] == pytest.approx(26 / sum(tokens.values()))
    assert "".join(report["samples"]["comparison"]) == SAMPLES["comparison"]
    assert "#!/bin/bash" in report["samples"]["shebang"]
    assert {" ==", " !=", " >="} <= set(report["samples"]["comparison"])


def test_report_of_nothing(tokenizer: Tokenizer) -> None:
    report = tokenizer_report(tokenizer, [])
    assert report["languages"] == {}
    assert report["bytes_per_token"] == 0.0
