"""Domains that nobody knows."""

import random

from dist_lm.tools.data.catalogue import SHELVES, fields_of, invented_topics, shelf_of, specification
from dist_lm.tools.data.invented import invented_domain, invented_word
from dist_lm.tools.data.scene import CONDITIONS, Scene, World, call_of
from dist_lm.tools.data.words import domains


def test_a_domain_is_the_same_every_time_and_like_no_other():
    assert invented_domain("invented 7") == invented_domain("invented 7")
    found = {invented_domain(f"invented {number}") for number in range(200)}
    assert len(found) == 200


def test_all_that_belongs_to_a_domain_lies_on_its_shelf():
    for shelf in range(SHELVES):
        topics = invented_topics(shelf, random.Random(shelf))
        assert {shelf_of(topic) for topic in topics} == {shelf}
        assert not {topic.domain for topic in topics} & domains().keys()


def test_records_can_be_found_by_some_field():
    for number in range(300):
        fields = fields_of(f"invented {number}")
        names = [name for name, _ in fields]
        assert len(set(names)) == len(names)
        for topic in invented_topics(number % SHELVES, random.Random(number)):
            if topic.action in CONDITIONS:
                assert specification(topic, 0).parameters


def test_hardly_a_word_comes_twice():
    rng = random.Random(0)
    assert len({invented_word(rng) for _ in range(1000)}) > 900


def test_a_field_may_have_the_name_of_what_an_action_leaves_behind():
    rng = random.Random(0)
    for action in ("comment", "tag"):
        topic = next(topic for topic in invented_topics(0, random.Random(1)) if topic.action == action)
        scene = Scene(rng, World(rng), (topic,))
        tool = scene.take()
        given = scene.arguments(tool)
        (record,) = scene.world.records[tool.subject].values()
        record |= {"comments": 3, "own tags": 3, "tags": 3}
        assert scene.world.execute(tool, call_of(tool, given))
