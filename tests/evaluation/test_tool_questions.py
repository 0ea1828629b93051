"""Which turns are asked, and that they come back from the shards as they went in."""

import re
import shutil

import pytest
import torch

from dist_lm.chat.documents import encode_document
from dist_lm.chat.messages import Call, Conversation, Message, Tool
from dist_lm.chat.parse import parse, parse_turn
from dist_lm.data.shard_writer import CorpusWriter
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError
from dist_lm.evaluation.tasks import Asking, tool_items
from dist_lm.evaluation.tool_questions import asked, choose, no_questions, questions_of
from dist_lm.parallel.mesh import World
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.shards.identity import recipe_of
from dist_lm.stages.tools import examine
from dist_lm.stages.training.arguments import EvaluationArguments
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.symbols import START
from dist_lm.tokenizer.tokenizer import Tokenizer, text_with_marks
from dist_lm.tools.data.examples import examples
from tests.conftest import TINY, composed, conversations

USER, CALLS = Message("user", "?"), Message("assistant", calls=(Call("a"),))
DONE, WORDS = Message("tool", results=(1,)), Message("assistant", "One.")
TOOLS = (Tool("a", "", {"type": "object"}),)
ROUND = (USER, CALLS, DONE, WORDS)


@pytest.mark.parametrize(
    ("kind", "turns", "places"),
    [
        ("single", ROUND * 2, [1]),
        ("parallel", ROUND, [1]),
        ("sequential", (USER, CALLS, DONE, CALLS, DONE, WORDS), [1, 3]),
        ("irrelevant", (USER, WORDS), [1]),
        ("missing", (USER, WORDS, *ROUND), [1, 3]),
        ("recovery", (USER, CALLS, DONE, CALLS, DONE, WORDS), [3]),
        ("answer", (*ROUND, USER, WORDS), [5]),
        ("other", (*ROUND, *ROUND), [1, 5]),
    ],
)
def test_decisions_are_asked_and_results_in_words_are_not(kind, turns, places):
    found = questions_of(Conversation(turns, TOOLS), kind)
    assert [len(question.asked.messages) for question in found] == places
    assert [question.expected for question in found] == [turns[place] for place in places]


@pytest.mark.parametrize("tools", [(), (Tool("a", "", {"type": "string"}),), (Tool("b", "", {"type": "object"}),)])
def test_nothing_is_asked_where_calls_cannot_be_checked(tools):
    assert questions_of(Conversation(ROUND, tools), "single") == []


def test_every_generated_conversation_with_tools_has_questions():
    for one in examples(0, 60):
        found = questions_of(one.conversation, one.kind)
        assert bool(found) == bool(one.conversation.tools), one
        assert all(question.kind == one.kind for question in found)


def test_questions_come_from_the_tokens_of_val_alone(tiny_work):
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    corpus = TokenCorpus.open(tiny_work.corpus("tools"), "val")
    found = choose(corpus, tokenizer, per_kind=5, context=256)
    assert found == choose(corpus, tokenizer, per_kind=5, context=256)
    assert [one.question.kind for one in found] == ["single"] * 5  # those without tools are no questions
    for one in found:
        opening = [tokenizer.special_ids[START], *tokenizer.encode("assistant\n")]
        assert one.prompt[-len(opening) :] == opening
        assert parse(one.prompt[: -len(opening)], tokenizer) == one.question.asked
        assert parse_turn(one.expected, tokenizer) == one.question.expected
    longest = max(len(one.prompt) + len(one.expected) for one in found)
    assert choose(corpus, tokenizer, per_kind=0, context=256) == []
    short = choose(corpus, tokenizer, per_kind=5, context=longest - 1)
    assert all(len(one.prompt) + len(one.expected) < longest for one in short)


def replace_by_conversations_without_tools(work: WorkDirectory) -> None:
    shutil.rmtree(work.corpus("tools"))
    tokenizer = Tokenizer.load(work.tokenizer_model)
    recipe = recipe_of(composed(["stage=tools", *TINY, f"work_dir={work.path}"]), "tools")
    plain = [document for document in conversations(12) if document.language == "tools_none"]
    with CorpusWriter(work.corpus("tools"), recipe) as writer:
        for split, document in zip(("train", "val") * 2, plain, strict=True):
            writer.write(split, encode_document(tokenizer, document))
        writer.finish({}, [])


@pytest.mark.heavy
def test_a_val_without_questions_is_named_before_anything_is_asked(work, caplog):
    """Finds an assertion about a mean of nothing, minutes later, and a stage that asks nothing without saying so."""
    replace_by_conversations_without_tools(work)
    tokenizer = Tokenizer.load(work.tokenizer_model)
    reason = r"tools: val has no question \(2 conversations, none with tools\): raise corpus.val_fraction"
    with pytest.raises(ArtefactError, match=reason):
        tool_items(Asking.greedy(tokenizer, 256, True, 9), work.corpus("tools"))

    arguments = EvaluationArguments(
        config=compose_config(["stage=tools", *TINY, f"work_dir={work.path}"]),
        run=work.run("tools", "default"),
        world=World(0, 1, 0, torch.device("cpu")),
        tokenizer=tokenizer,
        model=lambda: pytest.fail("a model is copied for no question"),
        step=1,
    )
    assert examine(arguments) == {}
    assert re.search(f"stage.questions.per_kind=.*{reason}", caplog.text)


def test_questions_longer_than_the_context_are_named_as_such(tiny_work):
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    corpus = TokenCorpus.open(tiny_work.corpus("tools"), "val")
    assert choose(corpus, tokenizer, per_kind=5, context=4) == []
    assert "no question that fits the model's context of 4 tokens (30 " in no_questions(corpus, tokenizer, context=4)


def test_marks_are_shown_by_their_names(tiny_work):
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    (one,) = asked(questions_of(Conversation((Message("user", "Bergen?"), CALLS), TOOLS), "single"), tokenizer)
    assert text_with_marks(one.prompt, tokenizer).endswith(
        "<|im_start|>user\nBergen?<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = text_with_marks(one.expected, tokenizer)
    assert expected.startswith('<tool_call>\n{"name": "')
    assert expected.endswith('a", "arguments": {}}\n</tool_call><|im_end|>')
