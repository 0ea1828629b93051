"""Conversations and rankings as documents: the text that a corpus keeps, and the tokens that its shards hold.

The text is JSON, and the same value always has the same text: two documents are equal if their values are.
"""

import numpy as np

from dist_lm.chat import json_text
from dist_lm.chat.messages import Call, Conversation, Json, Message, Tool, check_conversation
from dist_lm.chat.ranking import Judgement, Ranking, check_ranking, ranking_tokens, ranks_of_scores
from dist_lm.chat.template import render
from dist_lm.document import Document, TokenizedDocument, Verdict
from dist_lm.tokenizer.tokenizer import Tokenizer


def write_conversation(conversation: Conversation) -> str:
    """The text of a conversation; `read_conversation` gives it back.

    Raises:
        ChatError: it is not well formed; the message names the turn.
    """
    return json_text.write(_conversation_value(conversation), "conversation")


def read_conversation(text: str) -> Conversation:
    """The conversation that `write_conversation` wrote."""
    return _conversation_of(json_text.read(text, "conversation"))


def write_ranking(ranking: Ranking) -> str:
    """The text of a ranking; `read_ranking` gives it back, with ranks counted from 0 without gaps.

    Raises:
        ChatError: the ranking is empty, contradicts itself, or is not well formed; the message names the place.
    """
    check_ranking(ranking)
    value = {
        "prompt": _conversation_value(ranking.prompt),
        "completions": list(ranking.completions),
        "ranks": list(ranks_of_scores([-rank for rank in ranking.ranks])),
        "judgements": [[one.better, one.worse, one.margin] for one in ranking.judgements],
    }
    return json_text.write(value, "ranking")


def write_prompt(ranking: Ranking) -> str:
    """The text of the prompt of a ranking. Rankings with the same prompt go to the same split."""
    return json_text.write(_conversation_value(ranking.prompt), "prompt")


def read_ranking(text: str) -> Ranking:
    """The ranking that `write_ranking` wrote."""
    value = json_text.read(text, "ranking")
    return Ranking(
        prompt=_conversation_of(value["prompt"]),
        completions=tuple(value["completions"]),
        ranks=tuple(value["ranks"]),
        judgements=tuple(Judgement(*one) for one in value["judgements"]),
    )


def encode_document(tokenizer: Tokenizer, document: Document) -> TokenizedDocument:
    """A document as the shards hold it: a text behind end-of-text, a conversation as the template lays it out.

    Raises:
        UserError: it has no tokens; the message names its source, or the turn.
    """
    if document.form == "text":
        return tokenizer.encode_document(document)
    rendered = render(read_conversation(document.text), tokenizer)
    return TokenizedDocument(
        tokens=rendered.tokens,
        n_bytes=len(tokenizer.content(rendered.tokens.tolist())),
        language=document.language,
        source=document.source,
        licence=document.licence,
        own_licence=document.own_licence,
        loss_mask=rendered.loss_mask,
    )


def encode_ranking(tokenizer: Tokenizer, document: Document) -> TokenizedDocument:
    """A ranking as the shards hold it. A judgement without a margin gets margin 0, which is the same to the loss.

    Raises:
        ChatError: the prompt or a completion is not well formed.
    """
    ranking = read_ranking(document.text)
    tree = ranking_tokens(ranking, tokenizer)
    pairs = [(one.better, one.worse) for one in ranking.judgements]
    return TokenizedDocument(
        tokens=tree.tokens,
        n_bytes=len(tokenizer.content(tree.tokens.tolist())),
        language=document.language,
        source=document.source,
        licence=document.licence,
        own_licence=document.own_licence,
        loss_mask=(tree.branch > 0).astype(np.uint8),
        verdict=Verdict(
            branch=tree.branch,
            ranks=np.array(ranking.ranks, np.uint8),
            judgements=np.array(pairs, np.uint8).reshape(-1, 2),
            margins=np.array([one.margin or 0.0 for one in ranking.judgements], np.float32),
        ),
    )


def _conversation_value(conversation: Conversation) -> Json:
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


def _conversation_of(value: Json) -> Conversation:
    return Conversation(
        messages=tuple(
            Message(
                role=one["role"],
                content=one["content"],
                calls=tuple(Call(*call) for call in one["calls"]),
                results=tuple(one["results"]),
            )
            for one in value["messages"]
        ),
        tools=tuple(Tool(*one) for one in value["tools"]),
    )
