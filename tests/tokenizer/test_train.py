"""Training: the same text gives the same file, a vocabulary that does not fit says why, samples are fair."""

import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.config.corpus import TokenizerConfig
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError, UserError
from dist_lm.tokenizer.symbols import SPECIAL_TOKENS
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tokenizer.train import sample_by_language, train_tokenizer
from tests.tokenizer.stdlib_text import stdlib_texts

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrs"]


def small_texts() -> list[str]:
    return [" ".join(random.Random(n).choices(WORDS, k=200)) + "\n" for n in range(20)]


@pytest.mark.heavy
def test_the_same_texts_give_the_same_bytes(model_path: Path, tmp_path: Path) -> None:
    again = tmp_path / "tokenizer.model"
    train_tokenizer(iter(stdlib_texts()), again, TokenizerConfig(vocab_size=2000))
    assert again.read_bytes() == model_path.read_bytes()
    assert Tokenizer.load(again).sha256 == Tokenizer.load(model_path).sha256
    assert list(tmp_path.iterdir()) == [again]


def test_text_full_of_special_names_and_odd_characters_still_trains(tmp_path: Path) -> None:
    odd = "".join(SPECIAL_TOKENS) + " <0x41> a\0b \u2581 \u2585\r\n\t"
    texts = [*small_texts(), odd * 200, "", "\0"]
    train_tokenizer(texts, tmp_path / "t.model", TokenizerConfig(vocab_size=600))
    tokenizer = Tokenizer.load(tmp_path / "t.model")
    ids = tokenizer.encode(odd)
    assert tokenizer.decode(ids) == odd
    assert min(ids) >= len(SPECIAL_TOKENS)


def test_a_vocabulary_larger_than_the_text_says_what_fits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.vocab_size=32000: expected at most \d+, ") as refusal:
        train_tokenizer(small_texts(), tmp_path / "t.model", TokenizerConfig(vocab_size=32000))
    assert "\n" not in str(refusal.value)
    assert "tokenizer=PATH, tokenizer=keep" in str(refusal.value)
    assert not list(tmp_path.iterdir())
    fits = int(re.findall(r"at most (\d+)", str(refusal.value))[0])
    train_tokenizer(small_texts(), tmp_path / "t.model", TokenizerConfig(vocab_size=fits))
    assert Tokenizer.load(tmp_path / "t.model").vocab_size == fits


def test_a_vocabulary_too_small_for_the_characters_says_so(tmp_path: Path) -> None:
    texts = ["".join(chr(0x4E00 + n) for n in range(1000)) * 3]
    with pytest.raises(ConfigError, match=r"^model\.vocab_size=512: expected more than \d{4}, "):
        train_tokenizer(texts, tmp_path / "t.model", TokenizerConfig(vocab_size=512))


@pytest.mark.parametrize("texts", [[], ["", "\0"]])
def test_no_text_is_refused(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(UserError, match=r"no text to train on.*tokenizer=PATH"):
        train_tokenizer(texts, tmp_path / "t.model", TokenizerConfig(vocab_size=512))


def test_what_the_texts_raise_arrives_as_it_was(tmp_path: Path) -> None:
    def failing() -> Iterator[str]:
        yield "text"
        raise ArtefactError("shard is damaged")

    with pytest.raises(ArtefactError, match=r"^shard is damaged$"):
        train_tokenizer(failing(), tmp_path / "t.model", TokenizerConfig(vocab_size=512))
    with pytest.raises(UserError, match="text 1: character 2 is the lone surrogate"):
        train_tokenizer(["fine", "ab\ud800"], tmp_path / "t.model", TokenizerConfig(vocab_size=512))


def documents(language: str, count: int, size: int) -> list[Document]:
    return [Document(f"{language} {n} ".ljust(size, "."), language, f"{language}:{n}", "", "") for n in range(count)]


def bytes_by_language(sample: list[Document]) -> Counter[str]:
    return sum((Counter({d.language: len(d.text.encode())}) for d in sample), Counter())


def test_a_sample_gives_every_language_its_share_and_keeps_the_order() -> None:
    everything = documents("english", 1000, 100) + documents("python", 300, 100) + documents("sql", 20, 100)
    random.Random(0).shuffle(everything)
    sample = list(sample_by_language(iter(everything), 30_000))
    assert bytes_by_language(sample) == {"english": 14_000, "python": 14_000, "sql": 2_000}
    assert sample == [d for d in everything if d in sample]
    assert sample == list(sample_by_language(everything, 30_000))
    ranks = [int(d.source.split(":")[1]) for d in sample if d.language == "english"]
    assert min(ranks) < 200 < 800 < max(ranks)  # from all over the corpus, not its beginning


@settings(max_examples=100)
@given(
    sizes=st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(1, 200)), max_size=40),
    limit=st.integers(1, 3000),
)
def test_a_sample_stays_within_its_limit(sizes: list[tuple[str, int]], limit: int) -> None:
    everything = [Document("é" * size, language, str(n), "", "") for n, (language, size) in enumerate(sizes)]
    sample = list(sample_by_language(everything, limit))
    total = sum(bytes_by_language(sample).values())
    assert total <= limit or len(sample) == 1
    if sum(bytes_by_language(everything).values()) <= limit:
        assert sample == everything
    assert bool(sample) == bool(everything)
