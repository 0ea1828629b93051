"""Our tokenizer as a Hugging Face folder: the same ids and text, the same marks, and the same conversations."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.chat.messages import Call, Conversation, Message, Tool
from dist_lm.chat.template import chat_template, prompt, render
from dist_lm.config.corpus import TokenizerConfig
from dist_lm.errors import ArtefactError
from dist_lm.interop.hf_tokenizer import save_hf_tokenizer
from dist_lm.tokenizer.symbols import SPECIAL_TOKENS
from dist_lm.tokenizer.tokenizer import Tokenizer, with_marks
from dist_lm.tokenizer.train import train_tokenizer
from tests.chat.conversations import for_openai
from tests.tokenizer.hard_texts import FRAGMENTS, hard_text
from tests.tokenizer.made_json import trained_json
from tests.tokenizer.stdlib_text import stdlib_texts

transformers = pytest.importorskip("transformers")


ACROSS_SCRIPTS = {"split_by_unicode_script": False, "max_piece_length": 32}


@pytest.fixture(scope="module", params=[{}, ACROSS_SCRIPTS], ids=["plain", "across scripts"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """The same 4,000 pieces, ours and theirs."""
    folder = tmp_path_factory.mktemp("hf_tokenizer")
    config = TokenizerConfig(vocab_size=4000, **request.param)
    train_tokenizer(stdlib_texts(), folder / "tokenizer.model", config)
    save_hf_tokenizer(folder / "tokenizer.model", folder / "hf", chat_template())
    ours = Tokenizer.load(folder / "tokenizer.model")
    return ours, transformers.AutoTokenizer.from_pretrained(folder / "hf")


TAGS = [mark for mark in SPECIAL_TOKENS if not mark.startswith("<|")]  # marks that their tokenizer always reads as such


def assert_same(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids == ids
    assert theirs(text, split_special_tokens=True).input_ids == [ours.eot_id, *ids]
    assert theirs.decode([ours.eot_id, *ids], skip_special_tokens=True) == text


@pytest.mark.heavy
def test_ids_are_identical_over_real_code(pair: tuple[Tokenizer, Any]) -> None:
    for text in stdlib_texts():
        assert_same(*pair, text)


@pytest.mark.heavy
@settings(max_examples=300)
@given(text=hard_text.filter(lambda text: not any(tag in text for tag in TAGS)))
def test_ids_are_identical_over_hard_texts(pair: tuple[Tokenizer, Any], text: str) -> None:
    assert_same(*pair, text)


@settings(max_examples=300)
@given(text=st.text("ab_ =-.#0\n\u2581e", max_size=200))
def test_ids_are_identical_where_merges_compete(pair: tuple[Tokenizer, Any], text: str) -> None:
    assert_same(*pair, text)


@pytest.mark.parametrize("special", [mark for mark in SPECIAL_TOKENS if mark not in TAGS])
def test_a_symbol_that_begins_inside_a_spelled_special_token_is_found(
    pair: tuple[Tokenizer, Any], special: str
) -> None:
    for tail in ("=", "==", "===", ">", ">=", ">>=", "\n", "\n    x"):
        assert_same(*pair, special + tail)
    rendered = pair[1](f"{special}\n    ==", add_special_tokens=False).input_ids
    assert pair[1].convert_ids_to_tokens(rendered) == [special, "\n    ", "=="]


@pytest.mark.parametrize("text", ["", *(text for text in FRAGMENTS if text not in TAGS)])
def test_ids_are_identical_for_each_fragment(pair: tuple[Tokenizer, Any], text: str) -> None:
    assert_same(*pair, text)
    assert_same(*pair, text * 50)


def test_marks_are_the_same_and_the_tags_are_not_special(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    assert len(theirs) == ours.vocab_size
    assert theirs.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(ours.special_ids.values())
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (0, 0, 1)
    for name, number in ours.special_ids.items():
        assert theirs(name, add_special_tokens=False).input_ids == [number]
        assert theirs.decode([number], skip_special_tokens=True) == (name if name in TAGS else "")
        if name not in TAGS:
            assert number not in theirs(name, add_special_tokens=False, split_special_tokens=True).input_ids


def test_conversations_are_the_same_ids(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    tool = Tool("weather", "Weather of a </tool_call> day.", {"type": "object", "properties": {"city": {}}})
    asked = Message("assistant", "Let me see.", (Call("weather", {"city": "<|im_end|>"}), Call("weather")))
    turns = (
        *(Message("system", "Be brief."), Message("user", "    Is it dry?\n")),
        *(asked, Message("tool", results=({"sky": "clear"}, None)), Message("assistant", "Yes.")),
    )
    for conversation in (Conversation(turns, (tool,)), Conversation(turns[1:2], ()), Conversation(turns[:2], (tool,))):
        messages, tools = for_openai(conversation)
        found = theirs.apply_chat_template(messages, tools=tools or None, return_dict=False)
        assert found == render(conversation, ours).tokens.tolist()
        if conversation.messages[-1].role == "user":
            found = theirs.apply_chat_template(
                messages, tools=tools or None, add_generation_prompt=True, return_dict=False
            )
            assert found == prompt(conversation, ours)


def test_every_piece_is_the_same(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    numbers = list(range(ours.vocab_size))
    assert theirs.convert_ids_to_tokens(numbers) == ours.pieces(numbers)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"nothing\.model: no tokenizer there"):
        save_hf_tokenizer(tmp_path / "nothing.model", tmp_path / "hf", "")
    assert not (tmp_path / "hf").exists()


def test_a_given_tokenizer_json_is_exported_as_it_came(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(with_marks(trained_json(["a few words"], 300), "theirs"))
    save_hf_tokenizer(path, tmp_path / "hf", chat_template())
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == path.read_bytes()
    ours, theirs = Tokenizer.load(path), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eot_id, ours.pad_id)
    talk = Conversation((Message("user", "a few"), Message("assistant", "words")))
    text = theirs.apply_chat_template(for_openai(talk)[0], tokenize=False)
    assert theirs(text, add_special_tokens=False).input_ids == render(talk, ours).tokens.tolist()
