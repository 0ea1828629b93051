"""Drills: what is asked for can be had from the request, and is what was asked for."""

import json
import random

from dist_lm.tool_data.catalogue import SHELVES, shelf_topics
from dist_lm.tool_data.choice import Scene
from dist_lm.tool_data.drills import as_list, as_object, echo, look_up, read_back, recall
from dist_lm.tool_data.episodes import choosing
from dist_lm.tool_data.execution import World

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
        items = json.loads(answered)
        assert 2 <= len(items) <= 8
        assert len({type(item) for item in items}) == 1
        texts = [item for item in items if isinstance(item, str) and not item[:4].isdigit()]
        places = [asked.find(text) for text in texts]
        assert all(place >= 0 for place in places), (asked, answered)


def test_an_object_has_the_keys_that_were_asked_for_in_their_order():
    rng = random.Random(3)
    for _ in range(ROUNDS):
        asked, answered = as_object(rng)
        keys = list(json.loads(answered))
        places = [asked.index(f'"{key}"') for key in keys]
        assert places == sorted(places), (asked, answered)


def test_of_tools_that_are_told_one_is_named_for_every_request():
    for seed in range(50):
        rng = random.Random(seed)
        scene = Scene(rng, World(rng), shelf_topics(seed % SHELVES))
        turns = choosing(scene)
        assert scene.tools == []
        offered, end = json.JSONDecoder().raw_decode(turns[0].content)
        assert turns[0].content[end:].strip()
        names = [json.loads(turn.content)[" name"] for turn in turns[1::2]]
        assert 2 <= len(names) <= 5
        assert set(names) <= {tool[" name"] for tool in offered}
