"""Lines that are no prompts."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.errors import UserError
from dist_lm.generation.commands import (
    ACTIONS,
    HELP,
    KEYS,
    Change,
    Do,
    Tell,
    carries_on,
    is_command,
    parse_command,
    unescape,
    value_of,
)
from dist_lm.generation.params import SamplingParams
from dist_lm.generation.session import Settings

SETTINGS = Settings(SamplingParams(), seed=3)


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("/temperature 0.7", "temperature", 0.7),
        ("/temperature   0", "temperature", 0),
        ("/top_k 5 ", "top_k", 5),
        ("/top_p 0.5", "top_p", 0.5),
        ("/min_p .05", "min_p", 0.05),
        ("/repetition_penalty 1.2", "repetition_penalty", 1.2),
        ("/max_new_tokens 7", "max_new_tokens", 7),
        ("/stop  a\\n", "stop", (" a\n",)),
    ],
)
def test_a_setting_changes_and_the_others_stay(line, key, value):
    assert parse_command(line, SETTINGS) == Change(
        key, replace(SETTINGS, params=replace(SETTINGS.params, **{key: value}))
    )


def test_stop_texts_add_up_and_go_together():
    first = parse_command("/stop a", SETTINGS)
    assert isinstance(first, Change)
    second = parse_command("/stop b c", first.settings)
    assert isinstance(second, Change)
    assert second.settings.params.stop == ("a", "b c")
    assert parse_command("/stop", second.settings) == Tell("stop")
    assert parse_command("/stop off", second.settings) == Change("stop", SETTINGS)
    assert (value_of(SETTINGS, "stop"), value_of(second.settings, "stop")) == ("none", "'a' 'b c'")


def test_a_setting_alone_is_shown_and_actions_are_done():
    assert parse_command("/top_p", SETTINGS) == Tell("top_p")
    assert parse_command("/seed -4", SETTINGS) == Change("seed", replace(SETTINGS, seed=-4))
    assert parse_command("/lang  python ", SETTINGS) == Do("lang", "python")
    assert [parse_command(line, SETTINGS) for line in ("/show", "/again ", "/help", "/lang")] == [
        Do("show"),
        Do("again"),
        Do("help"),
        Do("lang"),
    ]
    assert [parse_command(line, SETTINGS) for line in ("/quit", "/exit")] == [Do("quit")] * 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/temprature 1", "/temprature: no such command; /help"),
        ("/temperature warm", "temperature=warm: expected a number"),
        ("/temperature -1", r"temperature=-1\.0: expected a number >= 0"),
        ("/temperature nan", "temperature=nan"),
        ("/top_k 1.5", r"top_k=1\.5: expected a whole number"),
        ("/top_k 99999999999999999999", "top_k=.*below"),
        ("/top_p 0", r"top_p=0\.0: expected in \(0, 1\]"),
        ("/max_new_tokens 0", "max_new_tokens=0: expected a positive integer"),
        ("/seed 9223372036854775808", "seed=9223372036854775808"),
        ("/again twice", "/again takes no value, found 'twice'"),
    ],
)
def test_what_makes_no_sense_is_one_line(line, words):
    with pytest.raises(UserError, match=words) as refusal:
        parse_command(line, SETTINGS)
    assert "\n" not in str(refusal.value)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["", "/", *(f"/{key} " for key in KEYS)]), st.text(max_size=20))
def test_no_line_does_harm(begin, rest):
    line = begin + rest
    if not is_command(line):
        return
    try:
        command = parse_command(line, SETTINGS)
    except UserError:
        return
    assert isinstance(command, Do | Tell | Change)


@pytest.mark.parametrize("line", ["/usr/bin/env", "// a comment", "/* a comment */", "/", " /help", "a /help", ""])
def test_text_that_begins_with_a_slash_can_be_a_prompt(line):
    assert not is_command(line)


def test_the_help_names_every_setting():
    assert all(re.search(rf"/{key}\b", HELP) for key in (*KEYS, *ACTIONS))


@pytest.mark.parametrize(
    ("line", "meant"),
    [("a", ("a", False)), ("a\\", ("a", True)), ("a\\\\", ("a\\", False)), ("\\\\\\", ("\\", True)), ("", ("", False))],
)
def test_a_backslash_at_the_end_carries_on_and_two_are_one(line, meant):
    assert carries_on(line) == meant


def test_escapes_stand_for_what_cannot_be_typed():
    assert unescape(r"\n\n") == "\n\n"
    assert unescape(r"\\n\t\d é") == "\\n\t\\d é"
