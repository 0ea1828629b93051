"""Existing tokenizers: the ids of their own library, marks that text cannot forge, and any size of vocabulary."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings

from dist_lm.chat.messages import Call, Conversation, Message, Tool
from dist_lm.chat.parse import parse, parse_turn
from dist_lm.chat.template import answer_tokens, prompt, render
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, UserError
from dist_lm.tokenizer.symbols import CALL, END, END_OF_TEXT, FIM_PREFIX, MARKS, PAD, REPOSITORY, START
from dist_lm.tokenizer.tokenizer import Tokenizer, with_marks
from tests.tokenizer.hard_texts import FRAGMENTS, hard_text
from tests.tokenizer.made_json import SPECIAL, large_json, trained_json
from tests.tokenizer.stdlib_text import stdlib_texts

transformers = pytest.importorskip("transformers")

PLAIN = "<tool_call>"  # an added token that is not special, as in Qwen's vocabulary


@pytest.fixture(scope="module")
def content() -> bytes:
    return trained_json(stdlib_texts()[:60], 3000, plain=[PLAIN])


@pytest.fixture(scope="module")
def ours(content: bytes) -> Tokenizer:
    return Tokenizer(content, "tokenizer.json")


def theirs_of(content: bytes, folder: Path) -> Any:
    (folder / "tokenizer.json").write_bytes(content)
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def theirs(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return theirs_of(content, tmp_path_factory.mktemp("theirs"))


def ids_of(theirs: Any, text: str) -> list[int]:
    return theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids


@pytest.mark.heavy
def test_ids_are_those_of_transformers_over_real_code(ours: Tokenizer, theirs: Any) -> None:
    for text in stdlib_texts()[:40]:
        assert ours.encode(text) == ids_of(theirs, text)
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.heavy
@settings(max_examples=300)
@given(text=hard_text.filter(lambda text: PLAIN not in text))
@example(text="".join(SPECIAL))
def test_ids_are_those_of_transformers_over_hard_texts(ours: Tokenizer, theirs: Any, text: str) -> None:
    assert ours.encode(text) == ids_of(theirs, text)
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.heavy
@settings(max_examples=200)
@given(text=hard_text)
@example(text="".join((*SPECIAL, *MARKS)))
def test_no_text_is_ever_a_mark(ours: Tokenizer, text: str) -> None:
    ids = ours.encode(text)
    assert not set(ids) & set(ours.special_ids.values())
    assert ours.decode(ids) == text == ours.content(ids).decode()


def test_marks_have_our_names_and_their_ids(ours: Tokenizer, theirs: Any) -> None:
    for ours_name, theirs_name in {END_OF_TEXT: END_OF_TEXT, REPOSITORY: "<repo_name>", CALL: PLAIN}.items():
        assert ours.mark(ours_name) == [theirs.convert_tokens_to_ids(theirs_name)] == [ours.mark_id(ours_name)]
    assert ours.pad_id == ours.eot_id
    assert ours.vocabulary()[ours.eot_id] == b""
    assert ours.pieces([ours.eot_id, *ours.encode("a é")[:2]])[0] == END_OF_TEXT


TOOL = Tool("to", "converts", {"type": "object", "properties": {"x": {"type": "integer"}}})
TALK = Conversation(
    (
        Message("user", "3 kg in g"),
        Message("assistant", "Let me see", (Call("to", {"x": 3}), Call("to", {"x": 4}))),
        Message("tool", results=(3000, 4000)),
        Message("assistant", "3000"),
    ),
    (TOOL,),
)


def test_lacking_marks_are_plain_text_and_a_conversation_still_comes_back(ours: Tokenizer) -> None:
    assert FIM_PREFIX in ours.lacking()
    assert ours.mark(FIM_PREFIX) == ours.encode(FIM_PREFIX)
    with pytest.raises(UserError, match=r"has no <\|fim_prefix\|>.*tokenizer.add_marks=true"):
        ours.mark_id(FIM_PREFIX)
    assert parse(render(TALK, ours).tokens.tolist(), ours) == TALK


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_marks_are_appended_on_request(kind: str, content: bytes) -> None:
    exact = {"byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False}
    content = content if kind == "json" else their_sentencepiece(**exact, remove_extra_whitespaces=False)
    before, after = Tokenizer(content, kind), Tokenizer(with_marks(content, kind), kind)
    assert not after.lacking()
    assert after.vocab_size == before.vocab_size + len(before.lacking())
    appended = [after.mark_id(mark) for mark in before.lacking()]
    assert appended == list(range(before.vocab_size, after.vocab_size))
    assert after.pad_id != after.eot_id
    assert with_marks(with_marks(content, kind), kind) == with_marks(content, kind)
    for text in (*FRAGMENTS, "".join(MARKS), *stdlib_texts()[:5]):
        assert after.encode(text) == before.encode(text)
    assert not after.adds_space
    assert parse(render(TALK, after).tokens.tolist(), after) == TALK


@pytest.mark.parametrize("marks", ["appended", "spelled"])
def test_the_space_that_sentencepiece_puts_before_a_text_is_no_part_of_a_conversation(marks: str) -> None:
    """As in Llama 2, Mistral and TinyLlama."""
    content = their_sentencepiece(
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=[]
    )
    tokenizer = Tokenizer(with_marks(content, "m") if marks == "appended" else content, "m")
    assert tokenizer.adds_space
    assert tokenizer.content(tokenizer.encode("a")) == b" a"
    spaced = Message("assistant", "  two spaces, one behind ", (Call("to", {"x": 1}),))
    answered = (*TALK.messages, Message("user", " a\n"), spaced, Message("tool", results=(" r ",)))
    for talk in (
        TALK,
        replace(TALK, messages=(Message("system", "Be brief."), *answered, Message("assistant", "end"))),
    ):
        assert parse(render(talk, tokenizer).tokens.tolist(), tokenizer) == talk
    for answer in (Message("assistant", "the cat"), Message("assistant", " the cat "), spaced, TALK.messages[1]):
        written = answer_tokens(answer, tokenizer)
        assert parse_turn(written, tokenizer) == answer
        asked = Conversation((Message("user", "what?"),))  # a chat keeps what it reads: the same tokens again
        whole = replace(asked, messages=(*asked.messages, parse_turn(written, tokenizer)))
        opened = prompt(asked, tokenizer)
        kept = render(whole, tokenizer).tokens.tolist()[: len(opened) + len(written)]
        assert kept[1:] == [*opened, *written][1:]  # the first is the tokenizer's own


def test_a_tokenizer_with_all_marks_is_the_same_file(model_path: Path) -> None:
    assert with_marks(model_path.read_bytes(), "trained") == model_path.read_bytes()


def their_sentencepiece(**options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text[:2000] for text in stdlib_texts()[:200]),
        model_writer=model,
        vocab_size=1000,
        minloglevel=2,
        **{"model_type": "bpe", "user_defined_symbols": [START, END]} | options,
    )
    return model.getvalue()


@pytest.mark.heavy
@pytest.mark.parametrize("options", [{}, {"model_type": "unigram"}, {"byte_fallback": True, "add_dummy_prefix": False}])
def test_a_sentencepiece_model_of_others_is_taken_as_it_is(options: dict[str, Any]) -> None:
    content = their_sentencepiece(**options)
    tokenizer, processor = Tokenizer(content, "m"), sentencepiece.SentencePieceProcessor(model_proto=content)
    assert tokenizer.eot_id == processor.eos_id() == tokenizer.pad_id
    assert PAD in tokenizer.lacking()
    for text in stdlib_texts()[:50]:
        assert tokenizer.encode(text) == processor.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == processor.decode(processor.encode(text))
    # its own library reads these user-defined symbols in text
    assert processor.piece_to_id(START) in processor.encode(f"a {START} b")
    assert tokenizer.mark_id(START) == processor.piece_to_id(START)
    assert not set(tokenizer.encode(f"a {START} b{END}")) & set(tokenizer.special_ids.values())


@pytest.mark.heavy
def test_ids_of_a_large_vocabulary_are_uint32() -> None:
    large, small = Tokenizer(large_json(70_000), "large"), Tokenizer(large_json(65_536), "small")
    document = Document("a last", "python", "s", "", "00")
    for tokenizer, dtype in ((large, np.uint32), (small, np.uint16)):
        tokens = tokenizer.encode_document(document).tokens
        assert tokens.dtype == dtype
        assert tokens[-1] == tokenizer.vocab_size - 1
        assert render(TALK, tokenizer).tokens.dtype == dtype


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (b"{}", "not a tokenizer.json of Hugging Face .it has no key 'model'"),
        (b"{", "not a tokenizer.json of Hugging Face .it is no JSON: Expecting"),
        (b"[1, 2]", "cannot read it"),
        (b'{"model": {"type": "WordPiece"}, "decoder": {}}', "not a byte-level BPE"),
        (b'{"model": {"type": "BPE", "byte_fallback": true}, "decoder": {"type": "ByteLevel"}}', "byte-level BPE"),
        (b'{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}', "tokenizers cannot read it"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(change: bytes, words: str) -> None:
    with pytest.raises(ArtefactError, match=words) as refused:
        Tokenizer(change, "some/tokenizer.json")
    assert "some/tokenizer.json" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"becomes 'f\(x\):return"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}, "becomes ' def f"),
        ({"piece": "漢"}, "not a byte-level BPE: its piece '漢'"),
        ({"byte": "Ċ"}, r"no piece for 1 bytes of UTF-8 text \(0x0A\)"),
        ({"byte": "Ã"}, r"no piece for 1 bytes of UTF-8 text \(0xC3\)"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(change: dict[str, Any], words: str) -> None:
    value = json.loads(trained_json([], 300))
    if "byte" in change:
        del value["model"]["vocab"][change["byte"]]
    elif "piece" in change:
        value["model"]["vocab"][change["piece"]] = 400
    else:
        value |= change
    with pytest.raises(ArtefactError, match=words) as refused:
        Tokenizer(json.dumps(value).encode(), "some/tokenizer.json")
    assert str(refused.value).startswith("some/tokenizer.json: ")


def test_a_normaliser_may_change_text_and_control_characters_may_be_missing() -> None:
    """As in Qwen (NFC) and SmolLM2 (no pieces for these bytes)."""
    value = json.loads(trained_json([], 300)) | {"normalizer": {"type": "Sequence", "normalizers": []}}
    value["normalizer"]["normalizers"] += [{"type": "NFC"}, {"type": "Lowercase"}]
    for piece in "ĄĆēĔĖĝÀÁñòõö÷øùúûüýþÿ":
        del value["model"]["vocab"][piece]
    tokenizer = Tokenizer(json.dumps(value).encode(), "some/tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("E\u0301 B")) == "é b"


def test_a_tokenizer_without_end_of_text_is_refused_and_may_get_one(content: bytes) -> None:
    value = json.loads(content)
    value["added_tokens"] = [token for token in value["added_tokens"] if token["content"] != END_OF_TEXT]
    bare = json.dumps(value).encode()
    with pytest.raises(ArtefactError, match=r"has no end-of-text \(none of .*</s>.*tokenizer.add_marks=true"):
        Tokenizer(bare, "bare")
    assert Tokenizer(with_marks(bare, "bare"), "bare").mark_id(END_OF_TEXT) >= 3000


def test_truncation_and_padding_of_the_file_are_not_applied(content: bytes, ours: Tokenizer) -> None:
    value = json.loads(content)
    value["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    assert Tokenizer(json.dumps(value).encode(), "cut").encode("a b c d e f g") == ours.encode("a b c d e f g")


def test_documents_of_a_trained_tokenizer_stay_uint16(tokenizer: Tokenizer) -> None:
    document = replace(Document("x", "python", "s", "", "00"), text="y = 1")
    assert tokenizer.encode_document(document).tokens.dtype == np.uint16
