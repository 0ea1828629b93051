"""What is written comes back exactly; what would not is refused, on both ways."""

import sys

import pytest
from hypothesis import given, settings

from dist_lm.chat import json_text
from dist_lm.chat.messages import ChatError, Json
from tests.chat.conversations import json_values, spelled


@pytest.mark.heavy
@settings(max_examples=300)
@given(value=json_values)
def test_a_value_comes_back_with_its_types_and_the_order_of_its_keys(value: Json) -> None:
    text = json_text.write(value, "x")
    assert spelled(json_text.read(text, "x")) == spelled(value)
    assert json_text.write(json_text.read(text, "x"), "x") == text
    assert "\n" not in text


def test_the_spelling() -> None:
    value = {"b": [1, 1.0, True, None], "a": {"é": '"\n\0🙂'}}
    assert json_text.write(value, "x") == '{"b": [1, 1.0, true, null], "a": {"é": "\\"\\n\\u0000🙂"}}'


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "\ufeff1", "{", "[1,]", "{1: 2}", "'a'", '"a', '"\t"', "01", "+1", ".5", "1 2", "tru", "\x00"),
        *(
            "NaN",
            "Infinity",
            "-Infinity",
            "[NaN]",
            "1e400",
            "-1e999999999",
            '{"a": 1, "a": 1}',
            '{"a": {"b": 1, "b": 2}}',
        ),
        *('"\\ud800"', '{"\\udc00": 1}', '["\\udc00\\ud800"]', '"\\x41"'),
        *("[" * 65 + "]" * 65, "[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000),
        *("9" * 641, "-" + "9" * 641, "1" * 100_000),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_what_is_no_json_or_too_much_is_refused(text: str) -> None:
    with pytest.raises(ChatError, match=r"^here: "):
        json_text.read(text, "here")


def test_limits_are_the_same_on_both_ways_and_do_not_depend_on_the_interpreter() -> None:
    deepest: Json = 0
    for _ in range(json_text.DEEPEST):
        deepest = [deepest]
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(json_text.MOST_DIGITS)
    try:
        for value in (deepest, 10**json_text.MOST_DIGITS - 1, -(10**json_text.MOST_DIGITS) + 1):
            assert json_text.read(json_text.write(value, "x"), "x") == value
        for value in ([deepest], 10**json_text.MOST_DIGITS):
            with pytest.raises(ChatError):
                json_text.write(value, "x")
    finally:
        sys.set_int_max_str_digits(before)
