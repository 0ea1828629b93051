"""Turns that call tools: every call parses and satisfies the schema of its tool, whatever the model has learned."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from dist_lm.chat.messages import ChatError, Conversation, Message, Tool
from dist_lm.chat.parse import parse_turn
from dist_lm.chat.schema import problems
from dist_lm.chat.template import prompt, stop_tokens
from dist_lm.evaluation.figures import request_of
from dist_lm.evaluation.tasks import Asking, tool_items
from dist_lm.generation.call_grammar import ToolChoice, call_constraint
from dist_lm.generation.load import LoadedModel
from dist_lm.generation.request import Answer, Request, SamplingParams
from dist_lm.generation.session import build_engine
from dist_lm.model.transformer import Transformer
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tools.data.examples import examples

WEATHER = Tool(
    "weather",
    "Weather of a day.",
    {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 9}, "days": {"$ref": "#/$defs/days"}},
        "required": ["city"],
        "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
    },
)
CLOCK = Tool("clock", "Time.", {"type": "object", "properties": {"utc": {"type": "boolean"}}})
QUESTION = Conversation((Message("user", "Is it dry in Oslo?"),), (WEATHER, CLOCK))


class Asked:
    """A model that has learned nothing, with its tokenizer."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        loaded = LoadedModel("small", model.config, dict(model.named_parameters()), tokenizer, run=None)
        self._engine = build_engine(loaded, torch.device("cpu"), answers=32)

    def turns(
        self,
        question: Conversation,
        choice: ToolChoice,
        n: int,
        end: float = 3.0,
        temperature: float = 1.0,
        strict: bool = True,
    ) -> Sequence[Message]:
        """The turns that ended by themselves. `end`: added to the logit of the mark that ends a turn."""
        constraint = call_constraint(question.tools, self.tokenizer, choice, strict=strict)
        # The model would rarely open a call in free text.
        bias = {self.tokenizer.mark("<tool_call>")[0]: 6.0, self.tokenizer.mark_id("<|im_end|>"): end}
        params = SamplingParams(150, temperature, stop_tokens=stop_tokens(self.tokenizer), logit_bias=bias)
        ids = prompt(question, self.tokenizer)[-60:]
        self._engine.submit(Request("turn", ids, params, n=n, constraint=constraint))
        answers = self._engine.run()
        ended = [each for each in answers if isinstance(each, Answer) and each.finish in ("eot", "stop")]
        return [parse_turn(_without_end_of_text(answer, self.tokenizer), self.tokenizer) for answer in ended]


def _without_end_of_text(answer: Answer, tokenizer: Tokenizer) -> Sequence[int]:
    return answer.tokens[:-1] if answer.tokens[-1] == tokenizer.eot_id else answer.tokens


@pytest.fixture(scope="module")
def asked(small_model: Transformer, tiny_work: WorkDirectory) -> Asked:
    return Asked(small_model, Tokenizer.load(tiny_work.tokenizer_model))


@pytest.mark.parametrize("mode", ["auto", "required", "clock", "none"])
def test_calls_satisfy_their_tool_and_the_choice(asked: Asked, mode: str):
    turns = asked.turns(QUESTION, ToolChoice(mode), 24, temperature=1.5)
    assert len(turns) >= 12
    calls = [call for message in turns for call in message.calls]
    assert not [problem for call in calls for problem in problems(call, QUESTION.tools)]
    if mode == "none":
        assert not calls
    else:
        assert calls
    if mode in ("required", "clock"):
        assert all(message.calls and not message.content for message in turns)
    if mode == "clock":
        assert {call.name for call in calls} == {"clock"}
        assert all(len(message.calls) == 1 for message in turns)


@pytest.mark.heavy
def test_one_call_a_turn_where_calls_may_not_be_parallel(asked: Asked):
    turns = asked.turns(QUESTION, ToolChoice("required", parallel=False), 12)
    assert turns
    assert all(len(message.calls) == 1 for message in turns)
    turns = asked.turns(QUESTION, ToolChoice("required"), 24, end=-3.0)
    assert max(len(message.calls) for message in turns) > 1


@pytest.mark.heavy
def test_tools_of_generated_conversations_can_be_called(asked: Asked):
    """Finds a keyword of our own tools that no constraint can hold to."""
    with_tools = [example.conversation for example in examples(5, 40) if example.conversation.tools]
    for conversation in with_tools:
        call_constraint(conversation.tools, asked.tokenizer, ToolChoice("required"))

    for conversation in with_tools[:4]:
        question = replace(conversation, messages=(Message("user", "Do it."),))
        for message in asked.turns(question, ToolChoice("required"), 2):
            assert message.calls
            assert not [problem for call in message.calls for problem in problems(call, question.tools)]


@pytest.mark.parametrize(
    ("keyword", "value"), [("minProperties", 1), ("not", {"type": "null"}), ("uniqueItems", True), ("if", {})]
)
def test_a_tool_whose_schema_no_answer_can_hold_to_is_refused_by_name(asked: Asked, keyword: str, value: object):
    tool = Tool("odd", "", {"type": "object", "properties": {"a": {keyword: value}}})
    with pytest.raises(ChatError, match=f"tool odd, parameters/properties/a/{keyword}: this keyword is not supported"):
        call_constraint((tool,), asked.tokenizer)


def test_a_choice_that_names_no_tool_is_refused(asked: Asked):
    with pytest.raises(ChatError, match=r"tool_choice=wether: expected .*\(weather, clock\)"):
        call_constraint(QUESTION.tools, asked.tokenizer, ToolChoice("wether"))


@pytest.mark.heavy
def test_marks_that_a_tokenizer_lacks_are_written_as_text(asked: Asked, tiny_work: WorkDirectory):
    """Finds free text of an imported model that spells a mark and so becomes a broken call."""
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    for mark in ("<tool_call>", "</tool_call>"):
        del tokenizer.special_ids[mark]
    spelling = Asked.__new__(Asked)
    spelling.__dict__ = asked.__dict__ | {"tokenizer": tokenizer}
    turns = [turn for mode in ("auto", "required") for turn in spelling.turns(QUESTION, ToolChoice(mode), 16, end=1.0)]
    calls = [call for message in turns for call in message.calls]
    assert len(calls) >= 8
    assert not [problem for call in calls for problem in problems(call, QUESTION.tools)]


def test_keywords_that_no_grammar_holds_to_may_be_left_out(asked: Asked):
    """A user's function with a set among its arguments must not lose its calls."""
    parameters = {
        "type": "object",
        "properties": {
            "tags": {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "maxItems": 2},
            "one": {"oneOf": [{"type": "integer", "maximum": 9}, {"type": "number", "maximum": 1e300}]},
        },
        "required": ["tags", "one"],
        "minProperties": 1,
    }
    question = replace(QUESTION, tools=(Tool("odd", "", parameters),))
    turns = asked.turns(question, ToolChoice("required"), 8, strict=False)
    assert turns
    for call in [call for message in turns for call in message.calls]:
        assert {*call.arguments} == {"tags", "one"}
        assert {*call.arguments["tags"]} <= {1, 2}


def test_questions_about_held_out_tools_are_constrained_where_it_is_asked(asked: Asked, tiny_work: WorkDirectory):
    """Finds `stage.constrain_calls` that ends on the way to the engine."""
    asking = Asking.greedy(asked.tokenizer, 256, True, 64, constrain_calls=True)
    items = tool_items(asking, tiny_work.corpus("tools"))
    assert items
    assert all(item.constraint for item in items)
    plain = tool_items(replace(asking, constrain_calls=False), tiny_work.corpus("tools"))
    assert not [item for item in plain if item.constraint]
    item = items[0]
    request = request_of(3, "tools", item, seed=1)
    assert request.constraint == item.constraint
