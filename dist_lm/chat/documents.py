"""Turns conversations and rankings into documents: the text that a corpus keeps, and the tokens that its shards hold.

The text is JSON, and the same value always has the same text: two documents are equal if their values are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from dist_lm.chat import json_text
from dist_lm.chat.message_values import message_of, message_value
from dist_lm.chat.messages import ChatError, Conversation, Json, Tool, check_conversation
from dist_lm.chat.ranking import Judgement, Ranking, check_ranking, ranking_tokens, ranks_of_scores
from dist_lm.chat.template import render
from dist_lm.document import Document, RankingArrays, TokenizedDocument
from dist_lm.tokenizer.tokenizer import Tokenizer


def write_conversation(conversation: Conversation) -> str:
    """Returns the text of a conversation; `read_conversation` gives the conversation back.

    Raises:
        ChatError: the conversation is not well formed; the message names the turn.
    """
    return json_text.write(_conversation_value(conversation), "conversation")


def read_conversation(text: str) -> Conversation:
    """Returns the conversation that `write_conversation` wrote. Whether it is well formed is not checked.

    Raises:
        ChatError: `text` is no JSON.
    """
    return _conversation_of(json_text.read(text, "conversation"))


def samples(conversation: Conversation, tokenizer: Tokenizer) -> list[Conversation]:
    """Returns the conversations that a conversation is trained as: itself, or one for each learned answer.

    There is one for each learned answer if the template of an imported model leaves out the thinking of earlier answers
    when others follow, as that of Qwen3 does: each answer is then the last of a conversation of its own, where its
    thinking is shown, and the answers before it are not learned again.

    Raises:
        ChatError: the template exceeds a limit.
    """
    messages = conversation.messages
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not tokenizer.kept_template or not any(messages[number].thinking for number in answers[:-1]):
        return [conversation]
    from dist_lm.chat import kept_template  # jinja2 is for imported models only

    # A template that shows no thinking at all refuses the conversation by name.
    if kept_template.keeps_thinking(tokenizer):
        return [conversation]
    parts = []
    for last in (number for number in answers if messages[number].learn):
        before = [replace(message, learn=message.role != "assistant") for message in messages[:last]]
        parts.append(replace(conversation, messages=(*before, messages[last])))
    return parts


def sample_documents(document: Document, tokenizer: Tokenizer) -> list[Document]:
    """Returns the documents that are encoded in place of a document: one for each of its `samples`.

    Raises:
        ChatError: as `samples`.
    """
    # The text of a conversation with thinking has the key, so most documents need no parsing.
    if document.form != "conversation" or not tokenizer.kept_template or '"thinking"' not in document.text:
        return [document]
    conversations = samples(read_conversation(document.text), tokenizer)
    if len(conversations) == 1:
        return [document]
    return [replace(document, text=write_conversation(conversation)) for conversation in conversations]


def write_ranking(ranking: Ranking) -> str:
    """Returns the text of a ranking; `read_ranking` gives it back, with ranks counted from 0 without gaps.

    Raises:
        ChatError: `check_ranking` refuses the ranking, or JSON cannot hold a value; the message names the place.
    """
    check_ranking(ranking)
    # Ranks are counted from 0 without gaps, so rankings with the same order have the same text.
    ranking_value = {
        "prompt": _conversation_value(ranking.prompt),
        "completions": list(ranking.completions),
        "ranks": list(ranks_of_scores([-rank for rank in ranking.ranks])),
        "judgements": [[judgement.better, judgement.worse, judgement.margin] for judgement in ranking.judgements],
    }
    if ranking.label is not None:
        ranking_value["label"] = ranking.label
    return json_text.write(ranking_value, "ranking")


def write_prompt(ranking: Ranking) -> str:
    """Returns the text of the prompt of a ranking. Rankings with the same prompt go to the same split."""
    return json_text.write(_conversation_value(ranking.prompt), "prompt")


def read_ranking(text: str) -> Ranking:
    """Returns the ranking that `write_ranking` wrote. Whether it is well formed is not checked.

    Raises:
        ChatError: `text` is no JSON.
    """
    ranking_value = json_text.read(text, "ranking")
    return Ranking(
        prompt=_conversation_of(ranking_value["prompt"]),
        completions=tuple(ranking_value["completions"]),
        ranks=tuple(ranking_value["ranks"]),
        judgements=tuple(Judgement(*fields) for fields in ranking_value["judgements"]),
        label=ranking_value.get("label"),
    )


def row_of(document: Document) -> str:
    """Returns what a corpus keeps of the row of a conversation or ranking: JSON of the document and of its other
    columns; empty if its reader gives no row."""
    if not document.row:
        return ""
    return f'{{"document": {document.text}, "columns": {document.row}}}'


def read_kept_row(line: str) -> tuple[Conversation, dict[str, Json]]:
    """Returns (prompt, columns) of a row that `row_of` wrote. The prompt ends before the first answer that is learned.

    Columns also have the whole conversation as `messages`, or `completions`, `ranks` and `judgements` of a ranking,
    unless the row has columns of these names. What the JSON holds is not checked.

    Raises:
        ChatError: the line is no JSON, or a result cannot be written as JSON.
        KeyError, TypeError: it is not the JSON of `row_of`.
    """
    from dist_lm.chat.jinja_text import messages_of  # imports jinja2, which only this function needs

    row = json_text.read(line, "row")
    document, columns = row["document"], row["columns"]
    if "completions" in document:
        own_columns = {name: document[name] for name in ("completions", "ranks", "judgements")}
        return _conversation_of(document["prompt"]), own_columns | columns

    conversation = _conversation_of(document)
    messages = conversation.messages
    learned = [n for n, message in enumerate(messages) if message.role == "assistant" and message.learn]
    end = learned[0] if learned else len(messages)
    prompt = Conversation(messages[:end], conversation.tools)
    return prompt, {"messages": messages_of(messages)} | columns


def encode_document(tokenizer: Tokenizer, document: Document) -> TokenizedDocument:
    """Returns a document as the shards hold it: end-of-text and the text, or a conversation laid out by the template.

    Stage shards encodes texts and conversations by this function. A text goes on to `Tokenizer.encode_document`.
    The loss mask, (n,) uint8, is 1 in the answers of a conversation; a text has none, as all its tokens are learned.
    `n_bytes` of a conversation also counts the text that the template adds, such as the names of roles. Rankings go
    through `encode_ranking`.

    Raises:
        UserError: the document is no Unicode text (names its source); ChatError, one of these: it is no well-formed
            conversation, or the template of an imported model refuses it (names the source and the turn).
    """
    if document.form == "text":
        return tokenizer.encode_document(document)

    with _named(document):
        rendered = render(read_conversation(document.text), tokenizer)
    return TokenizedDocument(
        tokens=rendered.tokens,
        n_bytes=len(tokenizer.content(rendered.tokens.tolist())),
        language=document.language,
        source=document.source,
        licence=document.licence,
        own_licence=document.own_licence,
        loss_mask=rendered.loss_mask,
        row=row_of(document),
    )


def encode_ranking(tokenizer: Tokenizer, document: Document) -> TokenizedDocument:
    """Returns a ranking as the shards hold it: the tree of tokens, its branches, ranks and judgements.

    The loss mask is 1 in the completions. A label is the rank of its only completion: 0 if it is wanted, else 1. A
    missing margin becomes 0, which is the same to the loss. `n_bytes` also counts the text that the template adds.

    Args:
        document: its text is that of `write_ranking`.

    Raises:
        ChatError: the prompt or a completion is not well formed, or the template of an imported model refuses it; names
            the source.
    """
    # Shards hold plain arrays, so judgements become pairs of indices and a margin each.
    ranking = read_ranking(document.text)
    with _named(document):
        tree = ranking_tokens(ranking, tokenizer)
    pairs = [(judgement.better, judgement.worse) for judgement in ranking.judgements]
    margins = [judgement.margin or 0.0 for judgement in ranking.judgements]
    ranks = ranking.ranks if ranking.label is None else (int(not ranking.label),)

    return TokenizedDocument(
        tokens=tree.tokens,
        n_bytes=len(tokenizer.content(tree.tokens.tolist())),
        language=document.language,
        source=document.source,
        licence=document.licence,
        own_licence=document.own_licence,
        loss_mask=(tree.branch > 0).astype(np.uint8),
        row=row_of(document),
        ranking=RankingArrays(
            branch=tree.branch,
            ranks=np.array(ranks, np.uint8),
            judgements=np.array(pairs, np.uint8).reshape(-1, 2),
            margins=np.array(margins, np.float32),
        ),
    )


@contextmanager
def _named(document: Document) -> Iterator[None]:
    """Adds the source of a document, its file and line, to a ChatError that is raised inside."""
    try:
        yield
    except ChatError as error:
        raise type(error)(f"{document.source}: {error}") from error


def _conversation_value(conversation: Conversation) -> Json:
    """Returns the conversation as a JSON value; tools and calls are lists without keys.

    Whether JSON can hold results and arguments is left to `json_text.write`.

    Raises:
        ChatError: the conversation is not well formed.
    """
    check_conversation(conversation)
    return {
        "tools": [[tool.name, tool.description, tool.parameters] for tool in conversation.tools],
        "messages": [message_value(message) for message in conversation.messages],
    }


def _conversation_of(value: Json) -> Conversation:
    """Returns the conversation of a value that `_conversation_value` made; the value is not checked."""
    return Conversation(
        messages=tuple(message_of(turn) for turn in value["messages"]),
        tools=tuple(Tool(*fields) for fields in value["tools"]),
    )
