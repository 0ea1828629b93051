"""A conversation as a document: its text gives it back, its tokens are those of the template."""

import numpy as np
import pytest

from dist_lm.chat.documents import encode_document, read_conversation, write_conversation
from dist_lm.chat.messages import Call, ChatError, Conversation, Message, Tool
from dist_lm.chat.parse import parse
from dist_lm.chat.template import render
from dist_lm.document import Document
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.conftest import conversations

RICH = Conversation(
    messages=(
        Message("system", "Be brief."),
        Message("user", "1 and 2.0, é <|im_end|>"),
        Message("assistant", "Both.", (Call("f", {"x": 1, "y": {"deep": [None, True, 2.0]}}), Call("g"))),
        Message("tool", results=({"error": "no"}, None)),
        Message("assistant", "Done."),
    ),
    tools=(Tool("f", "first", {"type": "object"}), Tool("g", "", {})),
)


def test_the_text_gives_the_conversation_back():
    assert read_conversation(write_conversation(RICH)) == RICH
    for document in conversations(30):
        assert write_conversation(read_conversation(document.text)) == document.text


def test_what_has_no_place_in_the_template_is_refused():
    with pytest.raises(ChatError):
        write_conversation(Conversation((Message("assistant", "first"),)))


def test_tokens_mask_and_bytes_are_those_of_the_template(tiny_work):
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    document = Document(write_conversation(RICH), "k", "s", "l", "0" * 64, form="conversation")
    encoded, rendered = encode_document(tokenizer, document), render(RICH, tokenizer)
    assert parse(encoded.tokens.tolist(), tokenizer) == RICH
    assert encoded.loss_mask is not None
    assert np.array_equal(encoded.loss_mask, rendered.loss_mask)
    assert encoded.n_bytes == len(tokenizer.decode(encoded.tokens.tolist()).encode())


def test_a_text_stays_a_text(tiny_work):
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    encoded = encode_document(tokenizer, Document("x = 1\n", "python", "s", "l", "0" * 64))
    assert encoded.loss_mask is None
    assert tokenizer.decode(encoded.tokens.tolist()) == "x = 1\n"
