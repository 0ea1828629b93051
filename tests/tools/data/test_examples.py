"""Generated conversations: the same for everybody, well formed, and true."""

import hashlib
import itertools
import random
import re
from collections import Counter

import jsonschema
import pytest

from dist_lm.chat.documents import write_conversation
from dist_lm.chat.messages import Conversation, Message, check_conversation
from dist_lm.chat.schema import check_tool, problems
from dist_lm.tools.data.catalogue import SHELVES, shelf_topics
from dist_lm.tools.data.episodes import KINDS, _typing_error
from dist_lm.tools.data.examples import LONGEST, LONGEST_SESSION, REVISION, Example, example, examples
from dist_lm.tools.data.scene import Scene, World

COUNT = 2500


@pytest.fixture(scope="module")
def many() -> list[Example]:
    return list(examples(3, COUNT))


def test_an_example_hangs_on_seed_and_number_alone(many):
    for number in (0, 7, COUNT - 1):
        assert example(3, number) == many[number]
    assert list(examples(3, 5)) == many[:5]
    assert example(4, 0) != many[0]


def test_what_is_generated_has_a_number(many):
    """When this fails what is generated has changed: raise `REVISION`, so that corpora of before are refused, and then
    write the new pair here."""
    texts = [write_conversation(one.conversation) for one in many[:300]]
    assert (REVISION, hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]) == (9, "55cf6a44710cbd9b")


def test_examples_are_not_twice_the_same(many):
    assert len({repr(one.conversation) for one in many}) > 0.995 * COUNT


@pytest.mark.heavy
def test_conversations_are_well_formed_and_calls_fit_their_tools(many):
    for one in many:
        check_conversation(one.conversation)
        for tool in one.conversation.tools:
            check_tool(tool)
        # `check_tool` has checked the schemas themselves.
        validators = {tool.name: jsonschema.Draft202012Validator(tool.parameters) for tool in one.conversation.tools}
        for message in one.conversation.messages:
            for call in message.calls:
                validators[call.name].validate(call.arguments)
                assert problems(call, one.conversation.tools) == []


def test_every_kind_comes_by_its_share(many):
    counts = Counter(one.kind for one in many)
    assert counts.keys() == KINDS.keys()
    for kind, (share, _) in KINDS.items():
        assert abs(counts[kind] / COUNT - share) < 0.04, kind


def test_every_kind_has_its_turns(many):
    for one in many:
        roles = [message.role for message in one.conversation.messages if message.role != "system"]
        calls = [len(message.calls) for message in one.conversation.messages if message.role == "assistant"]
        assert roles[0] == "user"
        assert roles[-1] == "assistant"
        assert not one.conversation.messages[-1].calls, "the last word is an answer"
        match one.kind:
            case "irrelevant":
                assert calls == [0]
            case "parallel":
                assert calls[0] in (2, 3)
            case "sequential":
                assert calls == [1, 1, 0]
            case "missing":
                assert calls == [0, 1, 0]
            case "recovery":
                assert calls == [1, 1, 0]
                assert "error" in results(one.conversation)[0]
            case "single" | "session":
                assert calls == [1, 0] * (len(calls) // 2)


def test_errors_come_in_recoveries_only(many):
    for one in many:
        failed = [result for result in results(one.conversation) if isinstance(result, dict) and "error" in result]
        assert len(failed) == (one.kind == "recovery")


def test_the_second_call_of_a_chain_takes_what_the_first_returned(many):
    for one in (one for one in many if one.kind == "sequential"):
        first = results(one.conversation)[0]
        record = first["ids"][0] if "ids" in first else first["id"]
        second = [message for message in one.conversation.messages if message.calls][1].calls[0]
        assert record in second.arguments.values()
        asked = next(message.content for message in one.conversation.messages if message.role == "user")
        assert record not in asked, "it cannot be known before"


def test_an_answer_says_what_the_tool_returned(many):
    for one in many:
        messages = one.conversation.messages
        for before, after in itertools.pairwise(messages):
            if before.role == "tool" and not after.calls:
                for result in before.results:
                    if isinstance(result, dict) and "id" in result and "assignee" not in result:
                        assert result["id"] in after.content
                    if isinstance(result, int | float | str) and not isinstance(result, bool):
                        assert str(result) in after.content


def test_what_a_call_takes_is_said_before_it(many):
    """Numbers and codes in arguments stand in what the model has read; nothing is to be guessed."""
    for one in many:
        read = ""
        for message in one.conversation.messages:
            for call in message.calls:
                for value in leaves(call.arguments):
                    if isinstance(value, str) and re.search(r"\d", value) and not re.match(r"\d{4}-\d\d-\d\d$", value):
                        assert value in read, (value, read)
                    elif isinstance(value, int | float) and not isinstance(value, bool) and value > 10:
                        assert str(value) in read
            read += said(message)


def test_conversations_are_short(many):
    lengths = {one.kind: 0 for one in many}
    for one in many:
        lengths[one.kind] = max(lengths[one.kind], len(write_conversation(one.conversation)))
    assert lengths.pop("session") < 2 * LONGEST_SESSION
    assert max(lengths.values()) < 2 * max(LONGEST)


def test_a_session_asks_for_tools_that_are_offered_again_and_again(many):
    sessions = [one for one in many if one.kind == "session"]
    called = [[call.name for message in one.conversation.messages for call in message.calls] for one in sessions]
    assert all(2 <= len(one.tools) <= 4 for one in sessions)
    assert sum(map(len, called)) > 3 * len(called)
    assert sum(len(set(names)) > 1 for names in called) > 0.8 * len(called)


def test_conversations_have_one_tool_to_four(many):
    assert {len(one.tools) for one in many} == {1, 2, 3, 4}


def results(conversation: Conversation) -> list:
    return [result for message in conversation.messages for result in message.results]


def said(message: Message) -> str:
    return " ".join([message.content, *map(str, message.results)])


def leaves(value) -> list:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in leaves(part)]
    if isinstance(value, list):
        return [leaf for part in value for leaf in leaves(part)]
    return [value]


def test_calls_have_the_order_of_the_schema_and_requests_any(many):
    turned = 0
    for one in many:
        parameters = {tool.name: tool.parameters for tool in one.conversation.tools}
        for asked, answered in itertools.pairwise(one.conversation.messages):
            for call in answered.calls:
                keys = list(parameters[call.name].get("properties", {}))
                assert [key for key in keys if key in call.arguments] == list(call.arguments)
            if one.kind in ("single", "session") and asked.role == "user" and len(answered.calls) == 1:
                texts = [leaf for leaf in leaves(answered.calls[0].arguments) if isinstance(leaf, str)]
                places = [asked.content.find(text) for text in texts if asked.content.count(text) == 1]
                turned += places != sorted(places)
    assert turned > 50


def test_no_two_arguments_of_a_kind_have_one_value():
    for seed in range(300):
        rng = random.Random(seed)
        scene = Scene(rng, World(rng), shelf_topics(seed % SHELVES))
        given = scene.arguments(scene.take())
        said = [(one.kind, repr(value.json)) for one, value in given.items() if one.kind not in ("flag", "rating")]
        assert len(set(said)) == len(said), said


def test_a_typing_error_exchanges_two_neighbours_that_differ():
    """Finds an exchange of equal characters, after which the "mistyped" id is right."""
    for record_id in ("AA-1122", "X-001", "aab1"):
        for seed in range(20):
            mistyped = _typing_error(record_id, {}, random.Random(seed))
            changed = [index for index, pair in enumerate(zip(record_id, mistyped, strict=True)) if len({*pair}) == 2]
            assert len(changed) == 2, (record_id, mistyped)
            first, second = changed
            assert second == first + 1
            assert mistyped[first] + mistyped[second] == record_id[second] + record_id[first]
