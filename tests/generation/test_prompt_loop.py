"""Lines of a terminal: commands as values, and the conversation with a script in place of the user."""

import re
import signal
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dist_lm.errors import UserError
from dist_lm.generation.load import Openings
from dist_lm.generation.prompt_loop import (
    ACTIONS,
    HELP,
    KEYS,
    Change,
    Do,
    PromptLoop,
    carries_on,
    help_text,
    is_command,
    parse_command,
    unescape,
    value_of,
)
from dist_lm.generation.request import Answer, SamplingParams
from dist_lm.generation.session import Outcome, Session, Settings
from dist_lm.generation.terminal import interrupts
from dist_lm.tracking.readable import visible

OPENINGS = Openings({"sql": ["CREATE TABLE t;\n\nSELECT", "DELETE\n"]}, "code", ["bash", "sql"])
SETTINGS = Settings(SamplingParams(max_new_tokens=12), seed=5)


class Person:
    """Types a script; an entry can be what the person does instead. Keeps what was before the cursor."""

    def __init__(self, script: Sequence[str | type[BaseException]]) -> None:
        self.script = list(script)
        self.seen: list[str] = []

    def __call__(self, before: str, typed: str) -> str:
        self.seen.append(before + typed)
        said = self.script.pop(0) if self.script else EOFError
        if isinstance(said, str):
            return typed + said
        raise said


def talk(session, *script, output=None, openings=OPENINGS, settings=SETTINGS):
    """(the loop afterwards, lines of the screen, the person)."""
    output, person = output or StringIO(), Person(script)
    console = Console(file=output, width=60, highlight=False)
    loop = PromptLoop(session, settings, lambda: openings, console, person, interrupts)
    loop.run()
    return loop, output.getvalue().splitlines()[1:], person


def text_of(session: Session, prompt: str, settings: Settings = SETTINGS) -> str:
    parts: list[str] = []
    session.answer(session.tokens(prompt), settings, 1, lambda index, text: parts.append(text))
    return visible("".join(parts))


def test_a_prompt_is_answered_with_the_seed_after_the_last_one(session):
    loop, lines, _ = talk(session, "def f", "/again", "/seed 5", "/again")
    screen = "\n".join(lines)
    first, second = (text_of(session, "def f", Settings(SETTINGS.params, seed)) for seed in (5, 6))
    assert first != second
    begin = f"{first}\n12 tokens, "
    assert screen.startswith(begin)
    assert f"max_new_tokens reached, seed 5\n{second}\n12 tokens, " in screen
    assert f"seed 6\nseed 5\n{begin}" in screen
    assert loop.settings.seed == 6


def test_a_backslash_carries_on_and_pasted_lines_stay_together(session):
    _, lines, person = talk(session, "def f(x):\\", "    return x\\\\")
    assert person.seen == ["> ", ". ", "> "]
    assert "\n".join(lines).startswith(text_of(session, "def f(x):\n    return x\\"))
    _, lines, _ = talk(session, "a \\\nb")
    assert "\n".join(lines).startswith(text_of(session, "a \\\nb"))


def test_an_opening_is_there_already_and_can_be_dropped(session):
    _, lines, person = talk(session, "/lang sql", " name", "/lang sql", "/top_k 7", KeyboardInterrupt, "/lang sql")
    assert person.seen == ["> ", ". SELECT", "> ", ". ", ". ", "> ", ". SELECT"]
    assert lines[0].startswith("opening of sql (1 of 2)")
    assert lines[1:3] == ["> CREATE TABLE t;", ". "]
    assert "\n".join(lines[3:]).startswith(text_of(session, "CREATE TABLE t;\n\nSELECT name"))
    assert lines.count("> DELETE") == 2  # shown again after the command


def test_what_makes_no_sense_changes_nothing(session):
    def openings() -> Openings:
        raise UserError("config.yaml: cannot\nbe read")

    script = ("/temperature warm", "/nothing", "/top_p 2", "/again", "/lang cobol", "\udcff", "x " * 300, "")
    loop, lines, _ = talk(session, *script)
    assert loop.settings == SETTINGS
    assert [line.partition(":")[0] for line in lines[:-1]] == [
        "temperature=warm",
        "/nothing",
        "top_p=2.0",
        "/again",
        "/lang cobol",
        "the prompt",
        lines[6].partition(":")[0],
    ]
    assert lines[6].startswith("the prompt has 601 tokens and the model's context is 256 (model.max_seq_len)")
    output = StringIO()
    PromptLoop(session, SETTINGS, openings, Console(file=output), Person(["/lang"]), interrupts).run()
    assert "config.yaml: cannot be read" in output.getvalue().splitlines()


def test_settings_are_shown(session):
    _, lines, _ = talk(session, "/stop \\n", "/show", "/top_k", "/lang")
    assert lines[0] == r"stop '\n'"
    assert "temperature         1" in lines
    assert r"stop                '\n'" in lines
    assert "top_k 0" in lines
    assert lines[-2].startswith("openings for sql (corpus code holds bash, sql)")


class PressesCtrlC(StringIO):
    """A screen; the person presses Ctrl-C once it shows so much."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def write(self, text: str) -> int:
        self.left -= len(text)
        if self.left <= 0 < self.left + len(text):
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_ends_the_answer_and_not_the_session(session):
    before = signal.getsignal(signal.SIGINT)
    settings = Settings(SamplingParams(max_new_tokens=200), seed=5)
    _, lines, _ = talk(session, "def f", "/max_new_tokens 3", "def g", output=PressesCtrlC(100), settings=settings)
    endings = [line for line in lines if "tokens/s" in line]
    assert ["stopped" in line for line in endings] == [True, False]
    assert int(endings[0].split()[0]) < 150
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("script", [(), (KeyboardInterrupt, KeyboardInterrupt), ("half a \\",)])
def test_ctrl_d_leaves_wherever_one_is(session, script):
    loop, _, person = talk(session, *script)
    assert not person.script
    assert loop.settings == SETTINGS


@pytest.mark.parametrize("word", ["/quit", "/exit"])
def test_a_word_leaves_too(session, word):
    _, _, person = talk(session, word, "never typed")
    assert person.script == ["never typed"]


def test_an_answer_that_was_stopped_before_it_began_has_no_speed():
    answer = Answer("1", 0, 3, (), "", (), (), "cancelled", 5, 0)
    assert str(Outcome((answer,), 0.5, 5)) == "stopped before the first token, seed 5"
    assert str(Outcome((answer, answer), 0.5, 5)) == "2 answers, stopped before the first token, seed 5"


def test_a_language_without_an_opening_is_refused_with_the_way_out():
    with pytest.raises(
        UserError,
        match=r"^/lang cobol: .* has no opening of that language; use one of sql, or type a beginning",
    ):
        OPENINGS.of("cobol")
    with pytest.raises(UserError, match=r"that language; type a beginning yourself$"):
        Openings().of("cobol")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_help_breaks_between_words(width):
    lines = help_text(width).splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(lines).split() == HELP.split()


def test_a_terminal_is_told_nothing_but_text():
    assert visible("a\x1b[2J\r\x7f\x9b\0é\n\tb") == "a␛[2J␍␡\ufffd␀é\n\tb"


DEFAULTS = Settings(SamplingParams(), seed=3)


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
    assert parse_command(line, DEFAULTS) == Change(
        key, replace(DEFAULTS, params=replace(DEFAULTS.params, **{key: value}))
    )


def test_stop_texts_add_up_and_go_together():
    first = parse_command("/stop a", DEFAULTS)
    assert isinstance(first, Change)
    second = parse_command("/stop b c", first.settings)
    assert isinstance(second, Change)
    assert second.settings.params.stop == ("a", "b c")
    assert parse_command("/stop", second.settings) == Change("stop", second.settings)
    assert parse_command("/stop off", second.settings) == Change("stop", DEFAULTS)
    assert (value_of(DEFAULTS, "stop"), value_of(second.settings, "stop")) == ("none", "'a' 'b c'")


def test_a_setting_alone_is_shown_and_actions_are_done():
    assert parse_command("/top_p", DEFAULTS) == Change("top_p", DEFAULTS)
    assert parse_command("/seed -4", DEFAULTS) == Change("seed", replace(DEFAULTS, seed=-4))
    assert parse_command("/lang  python ", DEFAULTS) == Do("lang", "python")
    assert [parse_command(line, DEFAULTS) for line in ("/show", "/again ", "/help", "/lang")] == [
        Do("show"),
        Do("again"),
        Do("help"),
        Do("lang"),
    ]
    assert [parse_command(line, DEFAULTS) for line in ("/quit", "/exit")] == [Do("quit")] * 2


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
        parse_command(line, DEFAULTS)
    assert "\n" not in str(refusal.value)


@settings(max_examples=50)
@given(st.sampled_from(["", "/", *(f"/{key} " for key in KEYS)]), st.text(max_size=20))
def test_no_line_does_harm(begin, rest):
    line = begin + rest
    if not is_command(line):
        return
    try:
        command = parse_command(line, DEFAULTS)
    except UserError:
        return
    assert isinstance(command, Do | Change)


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
