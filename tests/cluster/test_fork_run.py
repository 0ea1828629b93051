"""`dist-lm replay --fork` on a real run: what was not edited happens again, and an edit changes only what follows."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from dist_lm.__main__ import app
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.rlhf.environment_rollouts import file_name
from dist_lm.rlhf.episodes import Episode, read_episodes
from dist_lm.stages.rlhf.config import RlhfRunConfig
from dist_lm.stages.rlhf.fork import Fork, fork
from dist_lm.stages.rlhf.record import recorded_run
from dist_lm.stages.rlhf.replay import Chosen
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.verbs.data_step import config_of
from tests.cluster.test_environment_run import ENVIRONMENT, ITERATIONS, prepared, started_work
from tests.cluster.test_replay_run import contents
from tests.training_run import train

pytestmark = [pytest.mark.cluster, pytest.mark.heavy]
__all__ = ["started_work"]  # a fixture


@pytest.fixture(scope="module")
def run(started_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    settings = ("stage.checkpoint_every=1", "rlhf.top_p=0.9")
    run = prepared(started_work, tmp_path_factory.mktemp("files"), *settings)
    train(run, ranks=1)
    return run


def forked(run: RunDirectory, iteration: int, rollout: int, turn: int, edit: str | None = None) -> Fork:
    config = config_of(run)
    assert isinstance(config, RlhfRunConfig)
    return fork(recorded_run(run, config), Chosen(iteration, rollout), turn, edit)


def replay(run: RunDirectory, *options: str) -> Result:
    return CliRunner().invoke(app, ["replay", str(run.path), *options])


def episodes_of(run: RunDirectory, iteration: int) -> list[Episode]:
    return read_episodes(run.conversations / file_name(3 * (iteration - 1)))


def rollout_of_two_turns(run: RunDirectory, iteration: int) -> int:
    """Returns the number of the first conversation of an iteration that has two turns and a verdict."""
    numbered = enumerate(episodes_of(run, iteration), 1)
    return next(number for number, episode in numbered if len(episode.turns) == 2 and episode.verdict.valid)


def test_a_fork_without_an_edit_is_the_recorded_conversation(run):
    """Finds turns that are drawn with another seed, prompt or cache than in the run; failed conversations, too."""
    before = contents(run.path)
    n_forks = n_failed = 0
    for iteration in range(1, ITERATIONS + 1):
        for rollout, recorded in enumerate(episodes_of(run, iteration), 1):
            for turn in range(1, len(recorded.turns) + 1):
                result = forked(run, iteration, rollout, turn)
                assert result.forked.difference is None, (iteration, rollout, turn)
                origins = [spoken.origin for spoken in result.forked.spoken]
                assert origins == ["recorded"] * (turn - 1) + ["drawn"] * (len(recorded.turns) - turn + 1)
                assert result.now.logprobs == tuple(map(np.float32, recorded.logprobs))
                n_forks += 1
                n_failed += not result.now.verdict.valid
    assert n_forks >= 50
    assert n_failed > 0
    assert contents(run.path) == before


def test_an_edited_turn_changes_only_what_follows_it(run):
    """Finds an edit that reaches back, is not what the environment reads, or that nothing answers."""
    rollout = rollout_of_two_turns(run, 2)
    result = forked(run, 2, rollout, 2, "zzz")
    recorded, now = result.recorded, result.now
    assert now.turns[0] == recorded.turns[0]
    assert now.opening == recorded.opening
    assert now.turns[1].action == {"text": "zzz", "calls": [], "cut": None}
    assert now.verdict.reward == 1.0
    length = recorded.samples[0].drawn.index(False, recorded.samples[0].drawn.index(True))
    assert now.samples[0].ids[:length] == recorded.samples[0].ids[:length]

    result = forked(run, 2, rollout, 1, "aaa")
    assert [s.origin for s in result.forked.spoken] == ["edited", "drawn"]
    assert result.now.turns[0].reward == 0.0
    # The same edit gives the same conversation.
    again = forked(run, 2, rollout, 1, "aaa")
    assert (again.now.turns, again.now.samples, again.texts) == (result.now.turns, result.now.samples, result.texts)


def test_what_cannot_be_forked_is_one_line(run):
    """Finds an environment that answers otherwise before the fork, and turns or edits that do not fit."""
    rollout = rollout_of_two_turns(run, 3)
    for turn, edit, words in [
        (3, None, "--fork=3: expected 1 to 2, the turns of that conversation"),
        (1, "", "--edit='': expected the text of a turn"),
        (1, "a<|im_end|>b", r"--edit=<\|im_end\|>: expected a turn's end only at the end"),
        (1, "a b c d e f g h i j k l m n", "tokens: expected at most 10 in this turn"),
    ]:
        with pytest.raises(ConfigError, match=words):
            forked(run, 3, rollout, turn, edit)
    for options in (["--fork", "1"], ["--edit", "a"], ["--edit-file", str(run.config)], ["--fork", "1", "--verify"]):
        error = replay(run, *options).exception
        assert isinstance(error, ConfigError), options
        assert str(error).startswith(f"{'--verify' if '--verify' in options else options[0]}="), options

    name = next(word for word in run.config.read_text().split() if word.endswith("letters.py:Letters"))
    environment = Path(name.rpartition(":")[0])
    environment.write_text(ENVIRONMENT.replace("Again", "And again"))
    run.note_files({f"rlhf.environment={name}": [environment]})
    try:
        with pytest.raises(ArtefactError, match=r"forked at turn 2, as it does not happen again: turn 1, observation"):
            forked(run, 3, rollout, 2)
        # Before the first turn nothing has changed.
        assert forked(run, 3, rollout, 1).forked.difference is not None
    finally:
        environment.write_text(ENVIRONMENT)
        run.note_files({f"rlhf.environment={name}": [environment]})


def test_a_fork_is_printed_for_people_and_programs(run, tmp_path):
    """Finds a conversation that is printed with parts missing, and a text that cannot be given back as an edit."""
    rollout = str(rollout_of_two_turns(run, 2))
    said = replay(run, "--iteration", "2", "--rollout", rollout, "--fork", "2")
    assert said.exit_code == 0, said.output
    assert said.stdout.splitlines()[-1] == "equal to the record"
    for words in ("--- user\nGo ", "--- model, turn 1: recorded, ", "--- user\nAgain", "--- model, turn 2: drawn, "):
        assert words in said.stdout

    def value(*options: str) -> dict:
        return json.loads(replay(run, "--iteration", "2", "--rollout", rollout, "--json", *options).stdout)

    drawn = value("--fork", "1")
    assert (drawn["equal"], drawn["reward"]) == (True, drawn["recorded"]["reward"])
    # A drawn turn that is given as an edit is the same turn.
    (tmp_path / "turn.txt").write_text(drawn["turns"][0]["text"] + "\n")
    edited = value("--fork", "1", "--edit-file", str(tmp_path / "turn.txt"))
    assert edited["turns"][0]["origin"] == "edited"
    assert edited["turns"][0]["action"] == drawn["turns"][0]["action"]
    assert edited["turns"][0]["step"] == drawn["turns"][0]["step"]
    assert edited["equal"] is None
