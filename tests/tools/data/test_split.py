"""Val asks for tools that train never shows."""

import random

import pytest

from dist_lm.data.ingest import split_of_group
from dist_lm.tools.data.catalogue import SHELVES, VARIANTS, group_of, shelf_of, specification, topics
from dist_lm.tools.data.examples import examples

VAL = 0.05


@pytest.fixture(scope="module")
def tools():
    return [specification(topic, variant) for topic in topics() for variant in range(VARIANTS)]


def bare(name: str) -> str:
    """A name without its style."""
    return name.lower().replace("_", "").replace("-", "").replace(".", "")


def is_val(group: str) -> bool:
    return int(group[:16], 16) / 2**64 < VAL


def test_there_are_thousands_of_tools(tools):
    assert len({tool.tool.name for tool in tools}) > 10_000
    assert len({repr(tool.tool) for tool in tools}) > 15_000


def test_a_name_lies_on_one_shelf_in_whatever_style(tools):
    shelf: dict[str, int] = {}
    words: dict[str, int] = {}
    for tool in tools:
        assert shelf.setdefault(bare(tool.tool.name), tool.shelf) == tool.shelf, tool.tool.name
        key = " ".join(sorted(f"{tool.verb} {tool.subject}".split()))
        assert words.setdefault(key, tool.shelf) == tool.shelf, key


def test_shares_of_shelves_are_even():
    groups = [group_of(shelf) for shelf in range(SHELVES)]
    assert len(set(groups)) == SHELVES
    assert all(len(group) == 16 for group in groups)
    for share in (0.05, 0.1, 0.5):
        below = sum(int(group, 16) / 2**64 < share for group in groups)
        assert below == round(share * SHELVES)


def test_one_per_cent_holds_out_a_shelf():
    assert [shelf for shelf in range(SHELVES) if split_of_group(group_of(shelf), 0.01) == "val"] == [0]


@pytest.mark.heavy
def test_val_holds_out_tools_and_names():
    many = list(examples(0, 3000))
    sides: dict[bool, set[str]] = {True: set(), False: set()}
    for one in many:
        assert {group_of(tool.shelf) for tool in one.tools} <= {one.group}
        sides[is_val(one.group)] |= {bare(tool.name) for tool in one.conversation.tools}
    assert sides[True]
    assert not sides[True] & sides[False]
    assert 0.03 < sum(is_val(one.group) for one in many) / len(many) < 0.07


def test_val_is_made_as_train_is():
    """All families are in val, and most of the words of its names are in train."""
    val = [topic for topic in topics() if is_val(group_of(shelf_of(topic)))]
    assert {topic.family for topic in val} == {"record", "formula", "service"}
    train = {word for topic in topics() if topic not in val for word in topic.subject.split()}
    seen = [set(topic.subject.split()) <= train for topic in val if topic.family == "record"]
    assert sum(seen) > 0.9 * len(seen)


def test_a_tool_is_the_same_whenever_it_is_asked_for():
    rng = random.Random(1)
    for topic in rng.sample(topics(), 50):
        assert specification(topic, 3) == specification(topic, 3)
