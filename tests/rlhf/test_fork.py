"""Forks of a recorded conversation without a model: what happens again, what is edited, and what is refused."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from dist_lm.environments.protocol import Observation, Verdict
from dist_lm.errors import ConfigError
from dist_lm.generation.request import Answer, Request
from dist_lm.rlhf.conversing import Conversing
from dist_lm.rlhf.episodes import Episode
from dist_lm.rlhf.fork import Forked, check_fork, forked
from dist_lm.rlhf.transcript import read_turn
from dist_lm.stages.rlhf.fork import edited_turn
from dist_lm.tokenizer.tokenizer import text_with_marks, tokens_with_marks
from tests.rlhf.test_replay_of_conversations import TASK, Echo, at, how, model, recorded, recorded_anew

__all__ = ["how", "recorded", "recorded_anew"]  # fixtures


def fork(
    how: Conversing, recorded: Episode, turn: int, edit: str | None = None, host: Any = None
) -> tuple[Forked, int]:
    """Returns a fork, and how many turns the model was asked for."""
    ask, asked = model(how), []

    async def counted(request: Request) -> Answer:
        asked.append(request.id)
        return await ask(request)

    ids = None if edit is None else edited_turn(edit, how.tokenizer)
    host = host or Echo()
    result = asyncio.run(forked(how, host, recorded, TASK, counted, turn, ids, is_exact=True))
    assert host.closed == 1
    return result, len(asked)


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_a_fork_without_an_edit_is_the_record(how, recorded, turn):
    """Finds turns before the fork that a model draws, and turns from it on that it does not."""
    result, n_asked = fork(how, recorded, turn)
    assert result.difference is None
    assert result.episode is not None
    assert (result.episode.samples, result.episode.verdict) == (recorded.samples, recorded.verdict)
    assert [spoken.origin for spoken in result.spoken] == ["recorded"] * (turn - 1) + ["drawn"] * (4 - turn)
    assert n_asked == 4 - turn


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_a_fork_goes_on_in_the_sample_of_its_turn(how, recorded_anew, turn):
    """Finds a fork that reads the ids of another sample than its turn did, before or behind a new beginning."""
    result, _ = fork(how, recorded_anew, turn, host=Echo(anew=True))
    assert result.difference is None
    assert result.episode is not None
    assert result.episode.samples == recorded_anew.samples

    edited, _ = fork(how, recorded_anew, turn, "deux", host=Echo(anew=True))
    assert edited.episode is not None
    assert ["deux" in text_with_marks(sample.ids, how.tokenizer) for sample in edited.episode.samples] == [
        turn == 1,
        True,  # the summary has the first turn's word
    ]


def test_an_edit_is_what_the_environment_reads(how, recorded):
    """Finds an edited turn that the environment, or the next prompt, never sees."""
    result, n_asked = fork(how, recorded, 2, "deux")
    assert result.episode is not None
    actions = [turn.action["text"] for turn in result.episode.turns]  # type: ignore[index]
    assert actions == ["one", "deux", "three"]
    assert result.episode.turns[0] == recorded.turns[0]
    assert "You said deux" in str(result.episode.turns[1].step)
    assert "deux" in text_with_marks(result.episode.samples[0].ids, how.tokenizer)
    assert [spoken.origin for spoken in result.spoken] == ["recorded", "edited", "drawn"]
    assert (n_asked, result.difference) == (1, None)


@pytest.mark.parametrize("changed_turn", [0, 1, 2, 3])
def test_another_environment_is_refused_before_the_fork_and_named_behind_it(how, recorded, changed_turn):
    """Finds a fork of another conversation than the recorded one, which nobody is told."""
    change = at(changed_turn, observation=Observation.user("What?"))
    if changed_turn == 3:
        change = at(3, verdict=Verdict.of(0.5))
    result, _ = fork(how, recorded, 2, host=Echo(change))
    if changed_turn < 2:
        assert result.episode is None
        assert result.refused is not None
        assert (result.refused.what, result.refused.turn) == [("reset", None), ("observation", 1)][changed_turn]
    else:
        assert result.refused is None
        assert result.difference is not None


def test_turns_that_nobody_drew_cannot_be_forked(recorded):
    """Finds a fork at a turn that only told the environment that no room was left."""
    check_fork(recorded, 3)
    without_room = replace(recorded, turns=(*recorded.turns, replace(recorded.turns[-1], new_tokens=0)))
    for episode, words in ((recorded, "1 to 3"), (without_room, "1 to 3"), (replace(recorded, turns=()), "no fork")):
        with pytest.raises(ConfigError, match=f"--fork=4: expected {words}"):
            check_fork(episode, 4)


def test_marks_of_an_edit_are_marks(how):
    """Finds a call that is edited and that the environment reads as text."""
    text = 'Let me see.\n<tool_call>\n{"name": "guess", "arguments": {"n": 1}}\n</tool_call>'
    ids = edited_turn(text, how.tokenizer)
    turn = read_turn(ids, how.tokenizer)
    assert (turn.text, [call.name for call in turn.calls], turn.is_readable) == ("Let me see.", ["guess"], True)
    assert edited_turn(f"{text}<|im_end|>", how.tokenizer) == ids
    assert text_with_marks(tokens_with_marks(text, how.tokenizer), how.tokenizer) == text
    for empty in ("", "<|im_end|>"):
        with pytest.raises(ConfigError, match="expected the text of a turn"):
            edited_turn(empty, how.tokenizer)


def test_errors_name_the_option_that_gave_an_edit(how, recorded):
    """Finds an error of a file that tells people to mend an option that they have not given."""
    for text in ("", "a<|im_end|>b"):
        with pytest.raises(ConfigError, match=r"^--edit-file="):
            edited_turn(text, how.tokenizer, "--edit-file")
    ids = edited_turn("many words " * 40, how.tokenizer)
    forking = forked(how, Echo(), recorded, TASK, model(how), 2, ids, is_exact=True, edit_option="--edit-file")
    with pytest.raises(ConfigError, match=r"^--edit-file=\d+ tokens: expected at most"):
        asyncio.run(forking)
