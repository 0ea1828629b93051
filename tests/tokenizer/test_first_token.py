"""The first token of a text: what the tokenizer of a model puts there is what the model reads there."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_lm.chat.messages import Conversation, Message
from dist_lm.chat.template import chat_template, prompt, render
from dist_lm.document import Document
from dist_lm.interop.gguf_tokenizer import gguf_vocabulary, tokenizer_file
from dist_lm.interop.hf_tokenizer import save_hf_tokenizer
from dist_lm.interop.snapshot import tokenizer_of
from dist_lm.tokenizer.byte_level import with_first_token
from dist_lm.tokenizer.tokenizer import Tokenizer, sentencepiece_without_first_token
from tests.tokenizer.made_json import trained_json
from tests.tokenizer.test_existing import their_sentencepiece

transformers = pytest.importorskip("transformers")

BEGIN = "<|im_start|>"  # any special token but end-of-text
PLAIN = trained_json(["def f(x): return x"], 300)
OPENED = with_first_token(PLAIN, BEGIN)
TEXT = "def f(x):"
EXACT = their_sentencepiece(byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)


def folder_with(folder: Path, content: bytes, settings: dict[str, Any]) -> Path:
    name = "tokenizer.json" if content[:1] == b"{" else "tokenizer.model"
    (folder / name).write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_prompt_has_the_ids_of_transformers(tmp_path: Path) -> None:
    tokenizer = Tokenizer(OPENED, "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(OPENED)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode_prompt(TEXT) == theirs(TEXT).input_ids
    assert tokenizer.encode_prompt(TEXT)[0] == tokenizer.special_ids[BEGIN] != tokenizer.eot_id


def test_shards_hold_end_of_text_whatever_the_opening_is() -> None:
    """So `tokens` says where documents begin and end, and a corpus does not depend on the first token."""
    document = Document(TEXT, "python", "here", "MIT", "here")
    for content in (PLAIN, OPENED):
        tokenizer = Tokenizer(content, "tokenizer.json")
        assert tokenizer.encode_document(document).tokens[0] == tokenizer.eot_id


def test_a_file_without_one_opens_with_end_of_text() -> None:
    tokenizer = Tokenizer(PLAIN, "tokenizer.json")
    assert tokenizer.encode_prompt(TEXT) == [tokenizer.eot_id, *tokenizer.encode(TEXT)]


def test_sentencepiece_opens_with_its_beginning_of_sentence() -> None:
    content = their_sentencepiece()
    tokenizer, without = Tokenizer(content, "m"), Tokenizer(sentencepiece_without_first_token(content), "m")
    assert tokenizer.encode_prompt(TEXT) == [tokenizer.special_ids["<s>"], *tokenizer.encode(TEXT)]
    assert without.encode_prompt(TEXT) == [without.eot_id, *tokenizer.encode(TEXT)]


@pytest.mark.parametrize(
    ("content", "settings", "first"),
    [
        (PLAIN, {}, "<|endoftext|>"),
        (PLAIN, {"add_bos_token": True, "bos_token": BEGIN}, BEGIN),  # as transformers' class of Llama puts it
        (PLAIN, {"add_bos_token": True, "bos_token": {"content": BEGIN}}, BEGIN),
        (PLAIN, {"add_bos_token": False, "bos_token": BEGIN}, "<|endoftext|>"),
        (OPENED, {"bos_token": BEGIN}, BEGIN),
        (their_sentencepiece(), {}, "<s>"),
        (their_sentencepiece(), {"add_bos_token": True}, "<s>"),
        (their_sentencepiece(), {"add_bos_token": False}, "</s>"),
    ],
)
def test_an_import_keeps_the_first_token(content: bytes, settings: dict[str, Any], first: str, tmp_path: Path) -> None:
    found, name = tokenizer_of(folder_with(tmp_path, content, settings), Tokenizer(content, "t").vocab_size)
    tokenizer = Tokenizer(found, name)
    assert tokenizer.pieces([tokenizer.first_token.id]) == [first]
    assert tokenizer.encode(TEXT) == Tokenizer(content, "t").encode(TEXT)


def test_an_import_keeps_the_names_of_tokens_that_transformers_adds(tmp_path: Path) -> None:
    content = their_sentencepiece(user_defined_symbols=["<mine>"])
    size = Tokenizer(content, "t").vocab_size
    added = {"1": "<s>", str(size + 1): "<|im_end|>", str(size + 2): "</s>"}  # the last one names a piece again
    settings = {"added_tokens_decoder": {number: {"content": name, "special": True} for number, name in added.items()}}
    folder = folder_with(tmp_path, content, settings)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size}))
    found, name = tokenizer_of(folder, size + 4)
    tokenizer = Tokenizer(found, name)
    last = ["<|im_start|>", "<|im_end|>", f"<|unused_{size + 2}|>", f"<|unused_{size + 3}|>"]
    assert tokenizer.pieces(range(size, size + 4)) == last
    assert tokenizer.mark("<|im_end|>") == [size + 1]
    assert tokenizer.encode(f"{TEXT}<|im_end|>")[:5] == Tokenizer(content, "t").encode(TEXT)[:5]


def test_a_conversation_of_our_layout_opens_alike_in_prompt_export_and_transformers(tmp_path: Path) -> None:
    tokenizer = Tokenizer(OPENED, "tokenizer.json")
    asked = Conversation((Message("user", TEXT),))
    assert render(asked, tokenizer).tokens[0] == tokenizer.eot_id  # as shards hold it
    (tmp_path / "tokenizer.json").write_bytes(OPENED)
    save_hf_tokenizer(tmp_path / "tokenizer.json", tmp_path / "export", chat_template())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert theirs.bos_token == BEGIN
    turns = [{"role": "user", "content": TEXT}]
    rendered = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert prompt(asked, tokenizer)[:4] == rendered[:4]
    assert rendered[0] == tokenizer.first_token.id
    assert theirs(TEXT).input_ids == tokenizer.encode_prompt(TEXT)


@pytest.mark.parametrize("content", [PLAIN, OPENED, EXACT, sentencepiece_without_first_token(EXACT)])
def test_a_gguf_file_keeps_the_first_token(content: bytes) -> None:
    tokenizer = Tokenizer(content, "t")
    found = gguf_vocabulary(tokenizer, content)
    values = {
        "model": found.model,
        "pre": found.pre,
        "tokens": found.tokens,
        "token_type": found.types,
        "scores": found.scores,
        "merges": found.merges,
        "bos_token_id": tokenizer.first_token.id,
        "eos_token_id": tokenizer.eot_id,
        "add_bos_token": found.add_bos,
        "add_space_prefix": found.add_space_prefix,
    }
    back = Tokenizer(*tokenizer_file({f"tokenizer.ggml.{name}": value for name, value in values.items()}, "m.gguf"))
    assert back.encode_prompt(TEXT) == tokenizer.encode_prompt(TEXT)
