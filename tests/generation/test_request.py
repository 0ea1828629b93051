"""Texts of tokens as they come."""

from hypothesis import given
from hypothesis import strategies as st

from dist_lm.generation.request import TextStream

VOCABULARY = [bytes([byte]) for byte in range(256)]


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_what_is_shown_is_the_text_up_to_the_first_stop(text, stops):
    stream, shown = TextStream(VOCABULARY, stops), ""
    for byte in text.encode():
        shown += stream.add(byte)
        assert (stream.text + "\ufffd").startswith(shown)
        if stream.stopped:
            break
    shown += stream.finish()
    # the first character at which some stop text is complete ends the answer, before the earliest one that is there
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert stream.stopped == bool(ends)
    read = text[: min(ends)] if ends else text
    expected = read[: min(read.index(stop) for stop in stops if stop in read)] if ends else read
    assert shown == stream.text == expected


def test_half_a_character_waits_for_the_rest_and_is_marked_when_none_comes():
    stream = TextStream(VOCABULARY, ())
    first, second = "é".encode()
    assert (stream.add(first), stream.add(second)) == ("", "é")
    assert (stream.add(first), stream.finish()) == ("", "\ufffd")


def test_nothing_is_shown_that_a_stop_text_may_take_back():
    stream = TextStream(VOCABULARY, ("</end>",))
    assert [stream.add(byte) for byte in b"a</x"] == ["a", "", "", "</x"]
    assert [stream.add(byte) for byte in b"</end>"] == [""] * 6
    assert stream.finish() == ""
    assert stream.text == "a</x"
