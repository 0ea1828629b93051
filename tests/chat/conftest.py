"""A small tokenizer that has seen JSON, made once."""

import pytest

from dist_lm.config.corpus import TokenizerConfig
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tokenizer.train import train_tokenizer
from tests.conftest import texts

CALL = '{"name": "weather", "arguments": {"city": "Oslo", "days": 3, "metric": true}}\n'


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("chat") / "tokenizer.model"
    said = [document.text for language in ("english", "python") for document in texts(language, 100)]
    train_tokenizer([*said, CALL * 50], path, TokenizerConfig(vocab_size=560))
    return Tokenizer.load(path)
