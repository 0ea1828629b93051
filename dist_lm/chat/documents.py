"""A conversation as a document: the text it is kept as until it is tokenized, and its tokens.

The text is JSON in one spelling, so two conversations are the same document when they are the same value.
"""

from dist_lm.chat import json_text
from dist_lm.chat.messages import Call, Conversation, Json, Message, Tool
from dist_lm.chat.rules import check_conversation
from dist_lm.chat.template import render
from dist_lm.document import Document, TokenizedDocument
from dist_lm.tokenizer.tokenizer import Tokenizer


def write_conversation(conversation: Conversation) -> str:
    """The text of a conversation; `read_conversation` gives it back.

    Raises:
        ChatError: it is not well formed; the message names the turn.
    """
    return json_text.write(conversation_value(conversation), "conversation")


def read_conversation(text: str) -> Conversation:
    """What `write_conversation` wrote."""
    return conversation_of(json_text.read(text, "conversation"))


def conversation_value(conversation: Conversation) -> Json:
    """A conversation as JSON; `conversation_of` gives it back.

    Raises:
        ChatError: it is not well formed; the message names the turn.
    """
    check_conversation(conversation)
    return {
        "tools": [[tool.name, tool.description, tool.parameters] for tool in conversation.tools],
        "messages": [
            {
                "role": message.role,
                "content": message.content,
                "calls": [[call.name, call.arguments] for call in message.calls],
                "results": list(message.results),
            }
            for message in conversation.messages
        ],
    }


def conversation_of(value: Json) -> Conversation:
    """What `conversation_value` made JSON of."""
    return Conversation(
        messages=tuple(_message(one) for one in value["messages"]),
        tools=tuple(Tool(*one) for one in value["tools"]),
    )


def encode_document(tokenizer: Tokenizer, document: Document) -> TokenizedDocument:
    """A document as the shards hold it: text behind the end-of-text that opens it, a conversation by its template.

    Raises:
        UserError: it has no tokens; the message names its source, or the turn.
    """
    if document.form == "text":
        return tokenizer.encode_document(document)
    rendered = render(read_conversation(document.text), tokenizer)
    return TokenizedDocument(
        tokens=rendered.tokens,
        n_bytes=len(tokenizer.decode(rendered.tokens.tolist()).encode()),
        language=document.language,
        source=document.source,
        licence=document.licence,
        loss_mask=rendered.loss_mask,
    )


def _message(value: dict[str, Json]) -> Message:
    return Message(
        role=value["role"],
        content=value["content"],
        calls=tuple(Call(*one) for one in value["calls"]),
        results=tuple(value["results"]),
    )
