"""Thinking, turns without loss and turns of the system in the middle: their tokens and masks in every layout."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_lm.chat.documents import encode_document, read_conversation, sample_documents, samples, write_conversation
from dist_lm.chat.jinja_text import messages_of
from dist_lm.chat.messages import Call, ChatError, Conversation, Message
from dist_lm.chat.parse import parse
from dist_lm.chat.template import prompt, render
from dist_lm.document import Document
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.chat.layouts.read_rows import byte_tokenizer

transformers = pytest.importorskip("transformers")

TURNS = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if THINKS %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
    {{- message.content }}
    {%- for call in message.tool_calls or [] %}{{- '[' + call.function.name + ']' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
KEEPS = TURNS.replace("THINKS", "message.reasoning_content")
# As Qwen3 does: only the thinking behind the last question is shown.
DROPS = """\
{%- set last = namespace(question=0) %}
{%- for message in messages if message.role == 'user' %}{%- set last.question = message %}{%- endfor %}
{%- set last.index = messages.index(last.question) %}
""" + TURNS.replace("THINKS", "message.reasoning_content and loop.index0 > last.index")
# Templates from before thinking show it in the text of an answer, or take it out even there.
PLAIN = TURNS.replace("THINKS", "false")
TAKES_OUT = PLAIN.replace("{{- message.content }}", "{{- message.content.split('</think>')[-1] }}")

TALK = Conversation(
    (
        Message("user", "7 x 8?"),
        Message("assistant", "56", thinking="28 + 28."),
        Message("user", "7 x 9?"),
        Message("assistant", "Let me count.", (Call("count"),), thinking="A tool can."),
        Message("tool", results=(63,)),
        Message("assistant", "63", thinking="The tool says so."),
    )
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bytes")


def learned(conversation: Conversation, tokenizer: Tokenizer) -> list[str]:
    """The texts that the loss counts."""
    rendered = render(conversation, tokenizer)
    edges = np.flatnonzero(np.diff(rendered.loss_mask, prepend=0, append=0))
    spans = zip(edges[::2], edges[1::2], strict=True)
    return [tokenizer.content(rendered.tokens[first:stop].tolist()).decode() for first, stop in spans]


def test_our_layout_shows_thinking_and_the_loss_counts_it_unless_told_otherwise(folder: Path) -> None:
    tokenizer = byte_tokenizer(folder)
    turns = (Message("user", "5 x 5?"), Message("assistant", "25", thinking="A square."))
    context = Conversation((turns[0], replace(turns[1], learn_thinking=False)))
    assert learned(Conversation(turns), tokenizer) == ["<think>\nA square.\n</think>\n\n25"]
    assert learned(context, tokenizer) == ["25"]
    assert render(context, tokenizer).tokens.tolist() == render(Conversation(turns), tokenizer).tokens.tolist()
    assert learned(Conversation((turns[0], replace(turns[1], learn=False), *turns)), tokenizer) == [
        "<think>\nA square.\n</think>\n\n25"
    ]
    assert parse(render(context, tokenizer).tokens, tokenizer) == Conversation(turns)


def test_a_template_that_keeps_thinking_learns_all_in_one_sample(folder: Path) -> None:
    for template in (KEEPS, PLAIN):
        tokenizer = byte_tokenizer(folder, template)
        assert samples(TALK, tokenizer) == [TALK]
        assert learned(TALK, tokenizer) == [
            "<think>\n28 + 28.\n</think>\n\n56",
            "<think>\nA tool can.\n</think>\n\nLet me count.[count]",
            "<think>\nThe tool says so.\n</think>\n\n63",
        ]


def test_a_template_that_drops_earlier_thinking_gives_one_sample_for_each_answer(folder: Path) -> None:
    tokenizer = byte_tokenizer(folder, DROPS)
    parts = samples(TALK, tokenizer)
    assert [learned(part, tokenizer) for part in parts] == [
        ["<think>\n28 + 28.\n</think>\n\n56"],
        ["<think>\nA tool can.\n</think>\n\nLet me count.[count]"],
        ["<think>\nThe tool says so.\n</think>\n\n63"],
    ]
    # The thinking of the first answer is gone where the template drops it, and that of the same round stays.
    shown = [tokenizer.content(render(part, tokenizer).tokens.tolist()).decode() for part in parts]
    assert ["28 + 28." in text for text in shown] == [True, False, False]
    assert ["A tool can." in text for text in shown] == [False, True, True]
    with pytest.raises(ChatError, match=r"turn 1 \(assistant\): .*does not show its thinking.*`thinking: drop`"):
        render(Conversation(TALK.messages[:4]), tokenizer)


def test_ids_are_those_of_transformers(folder: Path) -> None:
    for template in (KEEPS, DROPS):
        tokenizer = byte_tokenizer(folder, template)
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        for part in samples(TALK, tokenizer):
            messages = messages_of(part.messages)
            ids = theirs.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=False)
            assert render(part, tokenizer).tokens.tolist() == ids


def test_conversations_that_need_no_samples_stay_whole(folder: Path) -> None:
    tokenizer = byte_tokenizer(folder, DROPS)
    last_only = Conversation(
        tuple(replace(turn, thinking="" if number < 5 else turn.thinking) for number, turn in enumerate(TALK.messages))
    )
    assert samples(last_only, tokenizer) == [last_only]
    assert len(learned(last_only, tokenizer)) == 3
    assert samples(TALK, byte_tokenizer(folder)) == [TALK]


def test_turns_without_loss_give_no_sample_and_no_loss(folder: Path) -> None:
    tokenizer = byte_tokenizer(folder, DROPS)
    unlearned = Conversation(
        tuple(replace(turn, learn=turn.role != "assistant" or number == 5) for number, turn in enumerate(TALK.messages))
    )
    (part,) = samples(unlearned, tokenizer)
    assert learned(part, tokenizer) == ["<think>\nThe tool says so.\n</think>\n\n63"]


@pytest.mark.parametrize("template", [KEEPS, DROPS, PLAIN])
def test_thinking_without_loss_ends_before_the_text_of_the_answer(template: str, folder: Path) -> None:
    tokenizer = byte_tokenizer(folder, template)
    turns = (Message("user", "7 x 8?"), Message("assistant", "56", thinking="28", learn_thinking=False))
    assert learned(Conversation(turns), tokenizer) == ["56"]


def test_a_template_that_never_shows_thinking_is_refused_by_name(folder: Path) -> None:
    tokenizer = byte_tokenizer(folder, TAKES_OUT)
    with pytest.raises(ChatError, match=r"has thinking, which the chat template .* `thinking: drop`"):
        render(Conversation(TALK.messages[:2]), tokenizer)


def test_documents_of_samples_are_encoded_one_by_one(folder: Path) -> None:
    tokenizer = byte_tokenizer(folder, DROPS)
    document = Document(write_conversation(TALK), "chat", "a.jsonl:1", "MIT", "0" * 64, form="conversation")
    documents = sample_documents(document, tokenizer)
    assert [read_conversation(part.text) for part in documents] == samples(TALK, tokenizer)
    assert {(part.source, part.licence, part.group) for part in documents} == {("a.jsonl:1", "MIT", "0" * 64)}
    assert all(encode_document(tokenizer, part).loss_mask is not None for part in documents)
    assert sample_documents(document, byte_tokenizer(folder)) == [document]


def test_a_document_without_switches_has_the_text_that_it_always_had() -> None:
    plain = Conversation((Message("user", "a"), Message("assistant", "b")))
    assert write_conversation(plain) == (
        '{"tools": [], "messages": [{"role": "user", "content": "a", "calls": [], "results": []}, '
        '{"role": "assistant", "content": "b", "calls": [], "results": []}]}'
    )
    switched = Conversation((plain.messages[0], Message("assistant", "b", thinking="c", learn_thinking=False)))
    for conversation in (switched, Conversation((plain.messages[0], Message("assistant", "b", learn=False)))):
        assert read_conversation(write_conversation(conversation)) == conversation


def test_turns_of_the_system_stand_in_the_middle_but_not_between_calls_and_results(folder: Path) -> None:
    tokenizer = byte_tokenizer(folder)
    turns = (Message("user", "a"), Message("system", "Be loud."), Message("assistant", "A"))
    assert parse(render(Conversation(turns), tokenizer).tokens, tokenizer) == Conversation(turns)
    calls = Message("assistant", calls=(Call("f"),))
    with pytest.raises(ChatError, match=r"turn 2 \(system\): expected tool"):
        render(Conversation((turns[0], calls, turns[1], Message("tool", results=(1,)))), tokenizer)
    with pytest.raises(ChatError, match="turn 3: missing"):
        render(Conversation((turns[0], turns[2], turns[1])), tokenizer)
    assert prompt(Conversation(turns[:2]), tokenizer) == render(Conversation(turns), tokenizer).tokens[:-3].tolist()
