"""Recorded conversations against the same ones now: each difference is found where it begins. No model takes part."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dist_lm.chat.messages import Message
from dist_lm.chat.template import stop_tokens
from dist_lm.environments.protocol import Action, Limits, Observation, Step, Task, Verdict
from dist_lm.errors import ArtefactError
from dist_lm.generation.request import Answer, Request, SamplingParams
from dist_lm.rlhf.conversing import Conversing
from dist_lm.rlhf.episodes import Episode, EpisodeFile, read_episodes
from dist_lm.rlhf.replay import Outcome, drawn_again, executed_again, shortened
from dist_lm.rlhf.request_feed import Ask
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer, text_with_marks
from tests.rlhf.guessing import GUESS

TASK = Task.of("0", {"word": "sum"})


class Echo:
    """An environment that says what it read, for three turns.

    Args:
        change: makes it answer otherwise.
        anew: whether the conversation begins anew after its first turn.
    """

    def __init__(self, change: Callable[[int, Step], Step] = lambda turn, step: step, anew: bool = False) -> None:
        self.change, self.anew, self.turns, self.closed = change, anew, 0, 0

    def episode(self, task: Task) -> "Echo":
        self.turns = 0
        return self

    async def reset(self) -> Step:
        return self.change(0, Step(Observation.user("Say a word"), False))

    async def step(self, action: Action) -> Step:
        self.turns += 1
        step = Step(Observation.user(f"You said {action.text}"), False, turn_reward=0.5)
        if self.turns == 1 and self.anew:
            summary = Message("user", f"You said {action.text} so far")
            step = replace(step, observation=Observation((summary,), (GUESS,), begins_anew=True))
        if self.turns == 3 or action.cut:
            step = Step(Observation(), True, Verdict.of(1.0))
        return self.change(self.turns, step)

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture(scope="module")
def how(tiny_work: WorkDirectory) -> Conversing:
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    params = SamplingParams(max_new_tokens=16, stop_tokens=stop_tokens(tokenizer))
    return Conversing(tokenizer, Limits(turns=5, tokens=400), params, 512, seed=0)


def model(how: Conversing, change: Callable[[int, Answer], Answer] = lambda turn, answer: answer) -> Ask:
    """Returns a model that says a word for each turn; `change` makes it say another one."""

    async def ask(request: Request) -> Answer:
        turn = int(request.id.rsplit(".", 1)[1])
        tokens = (*how.tokenizer.encode(("one", "two", "three")[turn]), stop_tokens(how.tokenizer)[0])
        logprobs = tuple(-0.1 * (turn + 1) - 0.01 * index for index in range(len(tokens)))
        answer = Answer(request.id, 0, len(request.prompt), tokens, "", logprobs, logprobs, "stop", 0, 7)
        return change(turn + 1, answer)

    return ask


@pytest.fixture(scope="module")
def recorded(how: Conversing, tmp_path_factory: pytest.TempPathFactory) -> Episode:
    """A conversation as it comes from a file."""
    path = tmp_path_factory.mktemp("record") / "tasks.jsonl"
    with EpisodeFile(path, "settings") as file:
        file.add(asyncio.run(how.hold(Echo(), TASK, 4, 1, model(how))))
    return read_episodes(path)[0]


@pytest.fixture(scope="module")
def recorded_anew(how: Conversing, tmp_path_factory: pytest.TempPathFactory) -> Episode:
    """A conversation that begins anew after its first turn, as it comes from a file."""
    path = tmp_path_factory.mktemp("record") / "tasks.jsonl"
    with EpisodeFile(path, "settings") as file:
        file.add(asyncio.run(how.hold(Echo(anew=True), TASK, 4, 1, model(how))))
    return read_episodes(path)[0]


def drawn(how: Conversing, recorded: Episode, ask: Ask | None = None, is_exact: bool = True) -> Outcome:
    return asyncio.run(drawn_again(how, recorded, TASK, ask or model(how), is_exact))


def executed(recorded: Episode, host: Any) -> Outcome:
    return asyncio.run(executed_again(host, recorded, TASK))


def at(turn: int, **changes: Any) -> Callable[[int, Any], Any]:
    """Returns what changes fields of the value of one turn."""
    return lambda now, value: replace(value, **changes) if now == turn else value


def test_an_undisturbed_conversation_is_equal_both_ways(how, recorded):
    """Finds a comparison that sees differences where there are none."""
    assert len(recorded.turns) == 3
    outcome = drawn(how, recorded)
    assert (outcome.difference, outcome.n_equal, outcome.largest_gap) == (None, len(recorded.logprobs), 0.0)
    echo = Echo()
    assert executed(recorded, echo).difference is None
    assert echo.closed == 1


def test_another_token_is_named_with_its_turn(how, recorded):
    """Finds a token that is compared with one of another turn, or not at all."""

    def flipped(turn: int, answer: Answer) -> Answer:
        return replace(answer, tokens=(5, *answer.tokens[1:])) if turn == 2 else answer

    outcome = drawn(how, recorded, model(how, flipped))
    assert outcome.difference is not None
    assert (outcome.difference.what, outcome.difference.turn, outcome.difference.token) == ("token", 2, 1)
    assert str(outcome.difference.now).startswith("5 ")
    assert outcome.n_equal == recorded.turns[0].new_tokens


def test_a_last_bit_of_a_log_probability_counts_only_where_bits_are_compared(how, recorded):
    """Finds log-probabilities that nobody compares, and a GPU whose rounding counts as another conversation."""

    def rounded(turn: int, answer: Answer) -> Answer:
        return replace(answer, logprobs=(*answer.logprobs[:-1], answer.logprobs[-1] + 1e-6)) if turn == 3 else answer

    exact = drawn(how, recorded, model(how, rounded)).difference
    assert exact is not None
    assert (exact.what, exact.turn, exact.token) == ("log-probability", 3, recorded.turns[2].new_tokens)
    outcome = drawn(how, recorded, model(how, rounded), is_exact=False)
    assert outcome.difference is None
    assert outcome.largest_gap == pytest.approx(1e-6, rel=0.1)


def test_a_turn_of_other_length_is_found(how, recorded):
    """Finds a comparison that ends with the shorter of two turns."""

    def longer(turn: int, answer: Answer) -> Answer:
        return replace(answer, tokens=(*answer.tokens, 5), logprobs=(*answer.logprobs, -1.0)) if turn == 1 else answer

    difference = drawn(how, recorded, model(how, longer)).difference
    assert difference is not None
    assert (difference.turn, difference.token) == (1, recorded.turns[0].new_tokens + 1)
    assert difference.recorded == "the end"


def test_a_conversation_that_begins_anew_has_a_sample_of_its_own_and_is_replayed(how, recorded_anew):
    """Finds turns that are learned from ids which the model did not read, and a record that lacks the new beginning."""
    first, second = recorded_anew.samples
    texts = [text_with_marks(sample.ids, how.tokenizer) for sample in (first, second)]
    assert "Say a word" in texts[0]
    assert "Say a word" not in texts[1]
    assert "You said one so far" in texts[1]
    assert "guess" in texts[1], "the tools are those of the new beginning"
    assert [sum(sample.drawn) for sample in (first, second)] == [
        recorded_anew.turns[0].new_tokens,
        sum(turn.new_tokens for turn in recorded_anew.turns[1:]),
    ]
    assert recorded_anew.reward == 2.0

    outcome = drawn(how, recorded_anew)
    assert (outcome.difference, outcome.n_equal) == (None, len(recorded_anew.logprobs))
    assert executed(recorded_anew, Echo(anew=True)).difference is None

    # The same turns, appended, are another conversation.
    def appended(turn: int, step: Step) -> Step:
        return replace(step, observation=replace(step.observation, tools=(), begins_anew=False))

    difference = executed(recorded_anew, Echo(appended, anew=True)).difference
    assert difference is not None
    assert (difference.what, difference.turn) == ("observation", 1)
    other = changed(recorded_anew, 1, lambda step: step["observation"].update(begins_anew=False, tools=[]))
    difference = drawn(how, other).difference
    assert difference is not None
    assert (difference.what, difference.turn) == ("prompt", 2)


def changed(recorded: Episode, turn: int, change: Callable[[dict], None]) -> Episode:
    """Returns a record in which the step of a turn is another one."""
    step = json.loads(json.dumps(recorded.turns[turn - 1].step))
    change(step)
    turns = list(recorded.turns)
    turns[turn - 1] = replace(turns[turn - 1], step=step, reward=step["turn_reward"])
    return replace(recorded, turns=tuple(turns))


def test_a_changed_observation_is_found_without_and_with_the_environment(how, recorded):
    """Finds a record whose observations nobody compares with the ids that the model read."""
    other = changed(recorded, 1, lambda step: step["observation"]["messages"][0].update(content="You said nothing"))
    difference = drawn(how, other).difference
    assert difference is not None
    assert (difference.what, difference.turn) == ("prompt", 2)
    difference = executed(other, Echo()).difference
    assert difference is not None
    assert (difference.what, difference.turn) == ("observation", 1)
    assert "said nothing" in str(difference)
    assert "said one" in str(difference)


def test_a_changed_verdict_or_reward_is_found(how, recorded):
    """Finds verdicts that are taken from the record alone."""
    other = replace(recorded, verdict=Verdict.of(0.25))
    difference = drawn(how, other).difference
    assert difference is not None
    assert str(difference) == "verdict: recorded [0.25, true, null], now [1.0, true, null]"
    assert executed(other, Echo()).difference is not None

    # Where the step has the changed verdict as well, only the environment knows the right one.
    other = changed(other, 3, lambda step: step.update(verdict=[0.25, True, None, ""]))
    assert drawn(how, other).difference is None
    difference = executed(other, Echo()).difference
    assert difference is not None
    assert (difference.what, difference.turn) == ("verdict", 3)
    difference = executed(changed(recorded, 2, lambda step: step.update(turn_reward=0.75)), Echo()).difference
    assert difference is not None
    assert (difference.what, difference.turn, difference.recorded, difference.now) == ("reward", 2, 0.75, 0.5)


@pytest.mark.parametrize(
    ("change", "what", "turn"),
    [
        (at(0, observation=Observation.user("Say two words")), "reset", None),
        (at(2, observation=Observation.user("What?")), "observation", 2),
        (at(2, observation=Observation(), done=True, verdict=Verdict.of(0.0)), "step", 2),
        (at(3, verdict=Verdict.failed("crashed", "now")), "verdict", 3),
        (at(0, observation=Observation(), done=True, verdict=Verdict.failed("refused", "now")), "reset", None),
    ],
)
def test_an_environment_that_answers_otherwise_is_found_out(recorded, change, what, turn):
    """Finds an environment that is not deterministic, wherever it begins to differ."""
    difference = executed(recorded, Echo(change)).difference
    assert difference is not None
    assert (difference.what, difference.turn) == (what, turn)


def test_a_failure_of_the_machine_need_not_happen_again(how, recorded):
    """Finds a timeout that counts as a difference, and a crash that does not."""
    failing = []
    for reason in ("timeout", "crashed"):
        verdict = Verdict.failed(reason, "on demand")  # type: ignore[arg-type]
        failed = at(2, observation=Observation(), done=True, verdict=verdict)
        failing.append(asyncio.run(how.hold(Echo(failed), TASK, 4, 1, model(how))))
    timeout, crash = (executed(episode, Echo()) for episode in failing)
    assert (timeout.difference, timeout.is_complete) == (None, False)
    assert crash.difference is not None
    assert (crash.difference.what, crash.difference.turn) == ("step", 2)
    # Neither has ids, and both are drawn again up to their end.
    assert [drawn(how, episode).difference for episode in failing] == [None, None]


def test_a_record_that_holds_no_values_of_the_protocol_is_refused(how, recorded):
    """Finds a traceback where one line can say what is damaged."""
    for other in (replace(recorded, opening={"messages": 3}), changed(recorded, 1, lambda step: step.pop("done"))):
        with pytest.raises(ArtefactError, match=r"record of task 4, sample 1 cannot be replayed .*from a copy"):
            drawn(how, other)
    turns = (replace(recorded.turns[0], action={"text": "a"}), *recorded.turns[1:])
    with pytest.raises(ArtefactError, match="task 4, sample 1"):
        executed(replace(recorded, turns=turns), Echo())


def test_two_texts_are_shown_where_they_begin_to_differ():
    """Finds a long observation that hides its difference behind its beginning."""
    equal = "..." + "a" * 20
    assert shortened("a" * 500 + "b" * 500, "a" * 500 + "c") == (f"{equal}{'b' * 60}...", f"{equal}c")
    assert shortened("ab", "ac") == ("ab", "ac")
