"""One small tokenizer for this room."""

from pathlib import Path

import pytest

from dist_lm.config.corpus import TokenizerConfig
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tokenizer.train import train_tokenizer
from tests.tokenizer.stdlib_text import stdlib_texts


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 2,000 pieces, trained on code."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(stdlib_texts(), path, TokenizerConfig(vocab_size=2000))
    return path


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    return Tokenizer.load(model_path)
