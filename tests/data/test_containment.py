"""Held-out texts inside train texts: what is found, by whichever batches, and what a given text refuses."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.data import containment
from dist_lm.data.containment import Comparison, HeldOutIndex
from tests.data.reading import seen_texts


def prose(n_words: int, seed: int = 0) -> str:
    words = random.Random(seed)
    return " ".join(f"{words.choice('abcdefgh')}{words.randrange(10**6)}" for _ in range(n_words))


def windows(text: str) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[start:] for start in range(8)), strict=False))


@pytest.mark.heavy
@given(
    st.lists(st.text("abcxyz", min_size=1, max_size=40), min_size=1, max_size=60).filter(
        lambda w: len(" ".join(w)) > 80 and len(w) > 4
    ),
    st.text("abcxyz \n", max_size=40),
    st.text("abcxyz \n", max_size=40),
)
def test_a_text_inside_another_is_always_seen(words, before, after):
    text = "\n".join(words)
    assert seen_texts(["unrelated words " * 20, text], [before + text + after]) == {1}
    assert seen_texts([text], ["something else entirely, at some length, about nothing of the kind"]) == set()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_long_texts_are_seen_by_the_share_of_their_windows(held_out, trained):
    text, other = (" ".join("abcd"[i] * 20 for i in words) for words in (held_out + [0] * 16, trained))
    own, there = windows(text), set(windows(other))
    assert seen_texts([text], [other]) == ({0} if sum(w in there for w in own) > len(own) / 2 else set())


def test_windows_add_up_over_texts_and_not_across_their_border():
    text = prose(40)
    words = text.split()
    assert seen_texts([text], [" ".join(words[:22]), " ".join(words[15:])]) == {0}
    assert seen_texts([text], [" ".join(words[start : start + 7]) for start in range(0, 40, 7)]) == set()


@pytest.mark.parametrize(
    "text", ["yes", "one two", "four words of text", "print(1)\nexit()", "select a from b where c"]
)
def test_a_short_text_is_seen_where_its_words_stand(text):
    assert seen_texts([text], [f"x = 1\n  {text}\n y"]) == {0}
    assert seen_texts([text], ["nothing of that", text[::-1]]) == set()


def test_cut_words_of_a_short_text_are_seen_and_other_letters_are_not():
    text = "select name from users where id = 3;"
    assert seen_texts([text], [f'run("{text}")']) == {0}
    assert seen_texts([text], ['run("select name from users where id = 4;")']) == set()


def test_text_without_spaces_is_compared_by_character():
    text = "".join(chr(0x4E00 + (i * 7919) % 5000) for i in range(60))
    assert seen_texts([text], [f"他说{text[2:]}。"]) == {0}
    assert seen_texts([text], [text[::-1]]) == set()


def test_long_words_that_differ_anywhere_in_their_first_or_last_bytes_are_different():
    words = " ".join("x" * at + "y" + "x" * (31 - at) for at in range(32))
    raw = np.frombuffer(b" " + words.encode() + containment.MARGIN, np.uint8)
    _, hashes = containment.word_hashes(raw)
    assert len(set(hashes.tolist())) == 32


@pytest.mark.parametrize("batch", [1, 3000, 10**9])
def test_the_size_of_batches_and_the_number_of_threads_change_nothing(batch, monkeypatch):
    val = [prose(60, seed) for seed in range(20)] + [prose(9, seed) for seed in range(20, 30)]
    train = [prose(30, 99) + " " + (val[seed] if seed % 3 == 0 else prose(50, seed + 1000)) for seed in range(30)]
    monkeypatch.setattr(containment, "BATCH_BYTES", batch)
    found = []
    for n in (1, 2, 8):
        monkeypatch.setattr(containment, "cores", lambda n=n: n)
        index = HeldOutIndex(val, [number % 2 == 0 for number in range(len(val))])
        comparison = Comparison(index)
        for i, text in enumerate(train):
            comparison.add(str(i).encode(), text)
        refused = comparison.finish()
        found.append((sorted(map(int, refused)), sorted(index.contained())))
    assert found[0] == found[1] == found[2]
    # texts with an even number refuse the train text that has them; those with an odd number are contained
    assert found[0] == ([i for i in range(30) if i % 6 == 0], [i for i in range(30) if i % 6 == 3])


def test_a_part_of_a_given_text_is_refused():
    text = prose(200)
    index = HeldOutIndex([text], [True])
    parts = [" ".join(text.split()[start : start + 20]).encode() for start in range(0, 200, 20)]
    assert index.compare([*parts, prose(50, 3).encode()]).tolist() == [True] * 10 + [False]
    assert index.contained() == set()
