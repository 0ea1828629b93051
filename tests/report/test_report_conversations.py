"""Conversations on the page: which ones, how they compare, and that whatever they hold stays text of a bounded size."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dist_lm.chat.messages import Message
from dist_lm.environments.protocol import Action, Observation, Step, Verdict
from dist_lm.environments.values import action_value, observation_value, step_value
from dist_lm.report.conversation_page import BYTES, MOST_TURNS, readable_json, shown_conversation
from dist_lm.report.conversations import (
    CHOSEN,
    ITERATIONS,
    MOST,
    ChosenConversation,
    IterationConversations,
    iterations_for,
    read_conversations,
    thinking_of,
)
from dist_lm.report.page import write_report
from dist_lm.rlhf.environment_rollouts import file_name
from dist_lm.rlhf.episodes import Episode, EpisodeFile, Turn
from dist_lm.rlhf.transcript import Sample
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer, tokens_with_marks
from tests.report.made_runs import HOSTILE, conversation_of, make_agent_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_agent_run(WorkDirectory(tmp_path_factory.mktemp("work")))


@pytest.fixture(scope="module")
def iterations(run: RunDirectory) -> tuple[IterationConversations, ...]:
    return read_conversations(run, ITERATIONS, is_finished=True)


def test_first_middle_and_last_iteration_show_their_extremes(iterations):
    """Finds a choice that depends on the order of writing, an extreme that is none, and wrong numbers of rollouts."""
    assert [iteration.number for iteration in iterations] == [1, 3, 5]
    for iteration in iterations:
        assert (iteration.total, iteration.cut, iteration.failures) == (8, 2, {"timeout": 2})
        chosen = [(c.why, c.number, c.episode.position % 2, c.episode.sample) for c in iteration.chosen]
        assert chosen == [("best", 2, 0, 1), ("worst", 1, 0, 0), ("cut", 3, 0, 2), ("no verdict", 4, 0, 3)]


def test_advantages_are_those_of_the_algorithm(iterations):
    """Finds advantages that forget the penalty of a cut, or count a conversation without a verdict as 0."""
    scores = np.array([0.1, 1.1, 0.35 - 1.0])  # GRPO's penalty of a completion that was cut
    expected = (scores - scores.mean()) / (scores.std(ddof=1) + 1e-4)
    by_sample = {c.episode.sample: c for c in iterations[0].chosen}
    assert [by_sample[sample].advantage for sample in range(3)] == pytest.approx(expected.tolist(), abs=1e-5)
    assert by_sample[3].advantage is None
    assert by_sample[2].penalty == 1.0
    assert {c.group for c in iterations[0].chosen} == {3}
    assert by_sample[3].group_reward == pytest.approx((0.1 + 1.1 + 0.35) / 3)


def test_an_algorithm_without_groups_gives_no_advantage(tmp_path):
    """Finds advantages of a group that a critic's algorithm never computed."""
    run = make_agent_run(WorkDirectory(tmp_path), iterations=1, overrides=["rlhf.algorithm=ppo"])
    (iteration,) = read_conversations(run, ITERATIONS, is_finished=True)
    assert [c.advantage for c in iteration.chosen] == [None] * 4


def test_of_equal_rewards_a_cut_one_is_the_worse(tmp_path):
    """Finds a best conversation whose advantage is below that of another one."""
    run = make_agent_run(WorkDirectory(tmp_path), iterations=0)
    with EpisodeFile(run.conversations / file_name(0), "settings") as file:
        for sample, cut in enumerate(("turns", "", "turns")):
            file.add(replace(conversation_of(0, 1, 0), sample=sample, cut=cut))
    (iteration,) = read_conversations(run, ITERATIONS, is_finished=True)
    assert [(c.why, c.episode.sample) for c in iteration.chosen] == [("best", 1), ("worst", 0)]
    best, worst = (c.advantage for c in iteration.chosen)
    assert best is not None
    assert worst is not None
    assert best > 0 > worst


def test_numbers_of_rollouts_are_those_of_replay_or_none(tmp_path):
    """Finds a number that `--rollout` takes for another conversation, where an iteration has several draws."""
    settings = ("rlhf.algorithm=dapo", "rlhf.sampling_rounds=2")
    run = make_agent_run(WorkDirectory(tmp_path), iterations=2, overrides=settings)
    first, second = read_conversations(run, ITERATIONS, is_finished=True)
    assert (first.number, second.number) == (1, 2)
    assert {c.number for c in (*first.chosen, *second.chosen)} == {None}
    page = write_report([run.path], None, None)[0].read_text(encoding="utf-8")
    assert "--rollout" not in page
    assert "Iteration 2" in page


def test_what_is_still_drawn_waits_for_its_iteration(run, iterations):
    """Finds extremes of half an iteration, and a live run that shows nothing."""
    assert [i.number for i in read_conversations(run, ITERATIONS, is_finished=False)] == [1, 3, 4]
    assert [i.number for i in read_conversations(run, 1, is_finished=True)] == [5]
    assert [i.number for i in read_conversations(run, 2, is_finished=True)] == [1, 5]
    assert all(iterations_for(runs) * CHOSEN * runs <= MOST for runs in range(200))
    assert iterations_for(1) == ITERATIONS


def test_a_damaged_file_hides_no_other(tmp_path):
    """Finds a report that one damaged line prevents, or that keeps silent about it."""
    run = make_agent_run(WorkDirectory(tmp_path), iterations=3)
    path = run.conversations / file_name(2)
    path.write_text("{}\n" + path.read_text())
    first, middle, last = read_conversations(run, ITERATIONS, is_finished=True)
    assert (len(first.chosen), len(middle.chosen), len(last.chosen)) == (4, 0, 4)
    assert "line 1 is damaged" in middle.problem
    assert "line 1 is damaged" in write_report([run.path], None, None)[0].read_text(encoding="utf-8")


def test_nothing_of_a_conversation_becomes_markup_or_a_control_character(run, tmp_path):
    """Finds text of model, environment or failure that the page takes for markup, or that reverses its text."""
    page = write_report([run.path], tmp_path / "report.html", None)[0].read_text(encoding="utf-8")
    assert page.count("<script") == 3
    assert HOSTILE not in page
    for sign in ("\x1b", "\x07", "\u202e"):
        assert sign not in page
    assert "\u241b]0;taken\u2407 \ufffdtxt.exe" in page
    assert f"dist-lm replay {run.path} --iteration 5 --rollout 1 --fork 1" in page
    for words in ("advantage", "penalty 1", "timeout: no step in 30 s &lt;/script&gt;", "reward +0.1", "1 error"):
        assert words in page


def chosen(episode: Episode) -> ChosenConversation:
    return ChosenConversation("best", 1, episode, 1, 1.0, 0.0)


def long_conversation(turns: int, text: str) -> Episode:
    """Returns a conversation in which each side writes `text`, with many results."""
    step = step_value(Step(Observation((Message("tool", results=(text,) * 50),)), False))
    action = action_value(Action(text))
    end = step_value(Step(Observation(), True, Verdict.of(1.0)))
    model_turns = (*[Turn(9, True, action, step)] * (turns - 1), Turn(9, True, action, end))
    opening = observation_value(Observation((Message("user", text),)))
    return replace(conversation_of(0, 1, 0), opening=opening, turns=model_turns)


@pytest.mark.parametrize(("turns", "text"), [(2, '"' * 100_000), (200, "'<&>\"" * 2000), (200, "\U0001f600" * 9000)])
def test_a_conversation_has_a_bounded_size(turns, text):
    """Finds a page that grows with what a model writes."""
    shown = shown_conversation(chosen(long_conversation(turns, text)))
    assert shown.html_bytes <= 2 * BYTES
    assert len(shown.turns) <= MOST_TURNS + 1
    assert shown.turns[0].role == "user"
    assert shown.turns[-1].role == "model"


@pytest.mark.heavy
def test_a_report_of_hostile_sizes_stays_under_three_megabytes(tmp_path):
    """Finds conversations whose number or size is not bounded over all runs of a page."""
    work = WorkDirectory(tmp_path)
    runs = [make_agent_run(work, f"run{number}", iterations=1) for number in range(MOST // CHOSEN)]
    for run in runs:
        path = run.conversations / file_name(0)
        path.unlink()
        with EpisodeFile(path, "settings") as file:
            for sample in range(4):
                episode = replace(conversation_of(0, sample, 0), turns=long_conversation(12, '"' * 2000).turns)
                num_drawn = sum(turn.new_tokens for turn in episode.turns)
                if episode.verdict.valid:
                    ids = (Sample([3] * num_drawn, [True] * num_drawn),)
                    episode = replace(episode, samples=ids, logprobs=(-1.0,) * num_drawn)
                file.add(episode)
    path, size = write_report([run.path for run in runs], tmp_path / "report.html", None)
    assert path.read_text(encoding="utf-8").count("turns left out") == 4 * len(runs)
    assert size < 3_000_000


def test_a_record_of_another_form_is_named(run):
    """Finds a traceback in place of the page where a line is whole and holds something else."""
    shown = shown_conversation(chosen(replace(conversation_of(0, 1, 0), opening={"messages": 3})))
    assert shown.turns == ()
    assert shown.ending.startswith("the record cannot be read")


def test_thinking_is_read_from_the_drawn_ids(tiny_work):
    """Finds thinking that is lost, as actions do not hold it, or that stands at another turn."""
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    texts = ("I compute it.<|im_end|>", "<think>\nIt is two.\n</think>\n\nThe sum is\n2<|im_end|>")
    turns, sample = [], Sample([])
    for turn, text in zip(conversation_of(1, 1, 0).turns, texts, strict=True):
        ids = tokens_with_marks(text, tokenizer)
        sample.append([3], drawn=False)
        sample.append(ids, drawn=True)
        turns.append(replace(turn, new_tokens=len(ids)))
    logprobs = (-1.0,) * sum(sample.drawn)
    episode = replace(conversation_of(1, 1, 0), turns=tuple(turns), samples=(sample,), logprobs=logprobs)
    thinking = thinking_of(episode, tokenizer)
    assert thinking == ("", "It is two.")
    shown = shown_conversation(replace(chosen(episode), thinking=thinking))
    assert [turn.thinking for turn in shown.turns if turn.role == "model"] == ["", "It is two."]
    assert thinking_of(replace(episode, samples=()), tokenizer) == thinking_of(episode, None) == ()


def test_objects_are_read_field_by_field():
    """Finds code in a call whose lines are hidden behind escapes."""
    assert readable_json({"code": "a = 1\nprint(a)\n", "timeout": 3}) == "code:\na = 1\nprint(a)\ntimeout: 3"
    assert readable_json("as it is") == "as it is"
    assert json.loads(readable_json([1, {"a": None}])) == [1, {"a": None}]
