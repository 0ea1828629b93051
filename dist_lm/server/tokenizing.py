"""Answers to /tokenize and /detokenize: text to ids and back."""

from collections.abc import Mapping

from dist_lm.chat.openai_errors import ProtocolError
from dist_lm.chat.openai_fields import Json, is_id, typed
from dist_lm.errors import UserError
from dist_lm.server.chat_fields import chat_of
from dist_lm.server.served import Served


def tokenized(body: Mapping[str, Json], served: Served, client: str = "") -> Json:
    """Returns the ids of `prompt`, with the token that opens a document unless `add_special_tokens` is false, or of the
    conversation in `messages` and `tools`, up to where the model goes on.

    Raises:
        ProtocolError: there is neither, or it is not well formed.
    """
    if body.get("messages") is not None:
        tokens = chat_of({"tool_choice": "none"} | {**body}, served, None, client).prompt
    else:
        text = typed(body, "prompt", str, None)
        if text is None:
            raise ProtocolError("prompt: expected a text, or messages", param="prompt")
        try:
            if typed(body, "add_special_tokens", bool, True):
                tokens = served.tokenizer.encode_prompt(text)
            else:
                tokens = served.tokenizer.encode(text)
        except UserError as error:
            raise ProtocolError(str(error), param="prompt") from error
    return {"tokens": tokens, "count": len(tokens), "max_model_len": served.context}


def detokenized(body: Mapping[str, Json], served: Served) -> Json:
    """Returns the text of `tokens`; special tokens have none.

    Raises:
        ProtocolError: they are no ids of the vocabulary.
    """
    tokens = typed(body, "tokens", list, None)
    size = served.tokenizer.vocab_size
    if tokens is None or not all(is_id(token) and 0 <= token < size for token in tokens):
        raise ProtocolError(f"tokens: expected ids from 0 to {size - 1}", param="tokens")
    return {"prompt": served.tokenizer.content(tokens).decode(errors="replace")}
