"""Drills: what is asked for can be had from the request, and is what was asked for."""

import random

import pytest

from dist_lm.chat.json_text import read, write
from dist_lm.tools.data.catalogue import SHELVES, shelf_topics
from dist_lm.tools.data.choice import Scene
from dist_lm.tools.data.drills import as_list, as_object, echo, identifier, look_up, read_back, recall
from dist_lm.tools.data.episodes import choosing
from dist_lm.tools.data.execution import World
from dist_lm.tools.data.ladder import lists, wishes

ROUNDS = 400


def test_what_is_read_back_was_said():
    rng = random.Random(1)
    for again in (read_back, echo):
        for _ in range(ROUNDS):
            asked, answered = again(rng)
            assert asked.endswith(f": {answered}")


def test_what_is_looked_up_was_told():
    rng = random.Random(4)
    for _ in range(ROUNDS):
        asked, answered = look_up(rng)
        told, _, question = asked.partition(". ")
        known = dict(pair.split(" = ") for pair in told.split(", "))
        pairs = [pair.split(" = ") for pair in answered.split(", ")]
        assert all(known[word] == value for word, value in pairs)
        assert question.rstrip("?").endswith(", ".join(word for word, _ in pairs))


def test_what_is_recalled_was_told_and_every_word_is_asked_for_once():
    rng = random.Random(5)
    for _ in range(ROUNDS):
        turns = recall(rng)
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        told, _, _ = turns[0].content.partition(". ")
        pairs = told.replace("; ", "\n").replace(", ", "\n").split("\n")
        assert len(pairs) == len(turns) // 2
        for asked, answered in zip(turns[::2], turns[1::2], strict=True):
            fitting = [pair for pair in pairs if pair.endswith(answered.content)]
            assert any(key_of(pair, answered.content) in asked.content for pair in fitting), (asked, answered)


def key_of(pair: str, value: str) -> str:
    return pair.removesuffix(value).removesuffix(":").removesuffix(" =")


def test_a_list_has_what_was_listed_in_its_order():
    rng = random.Random(2)
    for _ in range(ROUNDS):
        asked, answered = as_list(rng)
        items = read(answered, "a list")
        assert answered == write(items, "a list")  # as calls spell it
        assert 2 <= len(items) <= 8
        assert len({type(item) for item in items}) == 1
        texts = [item for item in items if isinstance(item, str) and not item[:4].isdigit()]
        places = [asked.find(text) for text in texts]
        assert all(place >= 0 for place in places), (asked, answered)


def test_an_object_has_the_keys_that_were_asked_for_in_their_order():
    rng = random.Random(3)
    for _ in range(ROUNDS):
        asked, answered = as_object(rng)
        assert ", ".join(read(answered, "an object")) in asked, (asked, answered)


def test_of_tools_without_arguments_one_is_called_for_every_request():
    for seed in range(50):
        rng = random.Random(seed)
        scene = Scene(rng, World(rng), shelf_topics(seed % SHELVES))
        turns = choosing(scene)
        assert all(tool.tool.parameters == {"type": "object"} and not tool.parameters for tool in scene.tools)
        calls = [call for turn in turns for call in turn.calls]
        assert 2 <= len(calls) == [turn.role for turn in turns].count("user") <= 5
        assert {call.name for call in calls} <= {tool.tool.name for tool in scene.tools}
        assert all(call.arguments == {} for call in calls)


@pytest.mark.parametrize("drill", [lists, wishes])
def test_what_is_asked_of_a_list_stands_behind_its_words_there(drill):
    rng = random.Random(6)
    for _ in range(ROUNDS):
        told, *turns = drill(rng)
        assert told.role == "system"
        pairs = [line.split(": ") for line in told.content.split("\n")]
        assert 2 <= len(pairs) == len({key for key, _ in pairs}) <= 5
        for asked, answered in zip(turns[::2], turns[1::2], strict=True):
            keys = [key for key, value in pairs if f" {value}" == answered.content]
            said = set(asked.content.lower().replace(",", " ").split())
            assert any(words_of(key) <= said for key in keys), (told, asked, answered)


def words_of(key: str) -> set[str]:
    """Without articles: a list has `a`, a wish `the`."""
    return set(key.lower().split()) - {"a", "an"}


def test_a_name_is_spelled_from_its_words_in_many_ways():
    rng = random.Random(7)
    spelled = {identifier(rng) for _ in range(ROUNDS)}
    assert all(any(mark in name for name in spelled) for mark in "_.- ")
    assert any(name.isupper() for name in spelled)
    assert any(name.istitle() for name in spelled)
    assert any(name[0].islower() and any(letter.isupper() for letter in name) for name in spelled)


def test_what_is_said_again_is_spelled_as_names_are_in_some_drills():
    rng = random.Random(8)
    answers = [echo(rng)[1] for _ in range(ROUNDS)]
    assert 0.2 < sum("_" in answer for answer in answers) / ROUNDS < 0.6
