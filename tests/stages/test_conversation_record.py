"""The record of conversations as `dist-lm replay` reads it: what is not the run's is named with the way out."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dist_lm.environments.protocol import Verdict
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.prepare.compose import compose_config
from dist_lm.rlhf.config import RewardPartConfig
from dist_lm.rlhf.environment_rollouts import file_name, settings_digest
from dist_lm.rlhf.episodes import Episode, EpisodeFile, Turn
from dist_lm.rlhf.rollouts import ShuffledPrompts
from dist_lm.rlhf.transcript import Sample
from dist_lm.stages.rlhf.config import RlhfRunConfig
from dist_lm.stages.rlhf.environment_tasks import read_tasks
from dist_lm.stages.rlhf.models import FROZEN, START, base_record
from dist_lm.stages.rlhf.record import recorded_run, remove_old_conversations
from dist_lm.stages.rlhf.replay import Chosen
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.training import checkpoint_files
from dist_lm.training.state import TrainState
from tests.conftest import TINY_MODEL

TASKS, PROMPTS, SAMPLES = 12, 2, 2


def configuration(folder: Path, *more: str) -> RlhfRunConfig:
    """Returns that of a run whose environment and tasks are files in `folder`."""
    (folder / "letters.py").write_text("class Letters:\n    pass\n")
    tasks = [json.dumps({"go": number}) for number in range(TASKS)]
    (folder / "tasks.jsonl").write_text("\n".join(tasks))
    (folder / "held_out.jsonl").write_text(tasks[0])
    config = compose_config(
        [
            *("stage=rlhf", *TINY_MODEL, "rlhf.reward_model=none", "stage.init_from=none", "device=cpu"),
            *(f"rlhf.prompts={PROMPTS}", f"rlhf.samples={SAMPLES}", "rlhf.max_new_tokens=8"),
            f"rlhf.environment={folder / 'letters.py'}:Letters",
            f"rlhf.prompts_from={folder / 'tasks.jsonl'}",
            f"rlhf.held_out_from={folder / 'held_out.jsonl'}",
            *more,
        ]
    )
    assert isinstance(config, RlhfRunConfig)
    return config


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> RlhfRunConfig:
    return configuration(tmp_path_factory.mktemp("tasks"), "rlhf.algorithm=grpo")


def settings_of(config: RlhfRunConfig) -> str:
    group = config.rlhf
    return settings_digest(group, config.seed, group.environment_limits.limits, group.environment)


def episode_of(config: RlhfRunConfig, position: int, sample: int, version: int) -> Episode:
    (task,) = ShuffledPrompts(read_tasks(config.rlhf)[0], config.seed)(position, 1)
    turns = (Turn(1, True, {"text": "a", "calls": [], "cut": None}, None),)
    reward = Verdict.of(float((position + sample) % 2))
    return Episode(
        *(position, sample, task.digest, version, reward, "", {"messages": []}, turns),
        samples=(Sample([1, 2], [False, True]),),
        logprobs=(-1.0,),
    )


def write(run: RunDirectory, config: RlhfRunConfig, position: int, version: int, prompts: int = PROMPTS) -> None:
    """Writes the conversations that are drawn together."""
    with EpisodeFile(run.conversations / file_name(position), settings_of(config)) as file:
        for index in range(prompts):
            for sample in range(SAMPLES):
                file.add(episode_of(config, position + index, sample, version))


@pytest.fixture
def run(composed: RlhfRunConfig, tmp_path: Path) -> RunDirectory:
    """A run with three iterations."""
    run = RunDirectory(tmp_path / "work" / "runs" / "rlhf" / "default")
    run.create()
    for iteration in range(3):
        write(run, composed, iteration * PROMPTS, iteration)
    return run


def test_iterations_are_those_of_the_run(composed, run):
    """Finds conversations of another iteration, and a last iteration that counts as finished while it is drawn."""
    path = run.conversations / file_name(2 * PROMPTS)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]) + '{"settings": "tor')
    iterations = [*recorded_run(run, composed).iterations()]
    assert [(i.number, i.version, len(i.episodes)) for i in iterations] == [(1, 0, 4), (2, 1, 4), (3, 2, 3)]
    assert [i.scored is None for i in iterations] == [False, False, True]
    (only,) = recorded_run(run, composed).iterations(2)
    assert (only.number, [(e.position, e.sample) for e in only.episodes]) == (2, [(2, 0), (2, 1), (3, 0), (3, 1)])
    assert [number for number, _ in Chosen(2, 3).rollouts_of(only)] == [3]
    with pytest.raises(ConfigError, match="--rollout=5: expected 1 to 4"):
        Chosen(2, 5).rollouts_of(only)
    with pytest.raises(ConfigError, match="--rollout=5: expected --iteration beside it"):
        Chosen(None, 5)
    with pytest.raises(ArtefactError, match="no conversations of iteration 9 are recorded"):
        next(recorded_run(run, composed).iterations(9))


def test_tasks_that_were_replaced_belong_to_their_iteration(tmp_path):
    """Finds borders of iterations that ignore the tasks drawn again, which the verdicts tell."""
    config = configuration(tmp_path, "rlhf.algorithm=dapo", "rlhf.sampling_rounds=2")
    run = RunDirectory(tmp_path / "work" / "runs" / "rlhf" / "again")
    run.create()
    # All groups of `episode_of` have a signal but those whose rewards are made equal here.
    for position, version, prompts in ((0, 0, 2), (2, 0, 1), (3, 1, 2)):
        write(run, config, position, version, prompts)
    path = run.conversations / file_name(0)
    path.unlink()
    with EpisodeFile(path, settings_of(config)) as file:
        for position in range(2):
            for sample in range(SAMPLES):
                episode = episode_of(config, position, sample, 0)
                file.add(replace(episode, verdict=Verdict.of(1.0)) if position == 1 else episode)

    first, second = recorded_run(run, config).iterations()
    assert [e.position for e in first.episodes] == [0, 0, 1, 1, 2, 2]
    assert first.scored is not None
    assert first.scored.rollouts.position_B.tolist() == [0, 0, 2, 2]
    assert [e.position for e in second.episodes] == [3, 3, 4, 4]
    assert second.version == 1


def write_checkpoint(folder: Path, step: int, position: int) -> Path:
    """Writes a checkpoint without tensors."""
    checkpoint = folder / checkpoint_files.step_name(step)
    checkpoint.mkdir(parents=True)
    checkpoint_files.write_state(checkpoint, TrainState(step, position=position), {})
    digest = durable.sha256_of(checkpoint / checkpoint_files.STATE)
    checkpoint_files.write_manifest(checkpoint, {checkpoint_files.STATE: digest})
    return checkpoint


def test_conversations_before_the_oldest_checkpoint_are_removed_and_the_others_keep_their_numbers(composed, run):
    """Finds conversations that are removed though a restart needs them, and iterations that count from a new first."""
    remove_old_conversations(run)
    assert len([*run.conversations.iterdir()]) == 3
    for step in (1, 2):
        write_checkpoint(run.checkpoints, step, step * PROMPTS)
    remove_old_conversations(run)
    assert [path.name for path in sorted(run.conversations.iterdir())] == [file_name(2), file_name(4)]
    config = replace(composed, rlhf=replace(composed.rlhf, keep_conversations=False))
    assert [(i.number, i.version) for i in recorded_run(run, config).iterations()] == [(2, 1), (3, 2)]
    with pytest.raises(ArtefactError, match="conversations of iteration 1 are missing"):
        list(recorded_run(run, composed).iterations())


def test_the_weights_that_a_run_began_with_are_those_that_its_checkpoints_name(composed, run, tmp_path):
    """Finds a replay with the newest weights of a run that has gone on since, and weights of another one."""
    started = tmp_path / "start" / "checkpoints"
    first, newer = write_checkpoint(started, 5, 0), write_checkpoint(started, 9, 0)
    config = replace(composed, stage=replace(composed.stage, init_from=str(started.parent)))
    record = recorded_run(run, config)
    assert record.weights_of(0) == newer

    checkpoint = write_checkpoint(run.checkpoints, 1, PROMPTS)
    names = {START: base_record(first)}
    checkpoint_files.attach(checkpoint, {FROZEN: json.dumps(names).encode()})
    assert record.weights_of(0) == first
    assert record.weights_of(1) == checkpoint
    assert record.weights_of(2) is None
    shutil.rmtree(first)
    assert record.weights_of(0) is None
    shutil.rmtree(started)
    assert record.weights_of(0) is None


def edited(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    """Returns what changes the lines of a file."""

    def edit(path: Path) -> None:
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edited(lambda lines: [lines[0], lines[1].replace("1", "2"), *lines[2:]]), r"line 2 is damaged .*from a copy"),
        (edited(lambda lines: ["[]\n", *lines]), r"line 1 is damaged .*replay other iterations by --iteration"),
        (edited(lambda lines: lines[:-1]), "1 of 4 conversations of iteration 2 are missing: restore"),
        (edited(lambda lines: [*lines, lines[0]]), "line 5 repeats the conversation of an earlier line"),
        (edited(lambda lines: [line.replace('"settings": "', '"settings": "0') for line in lines]), "other settings"),
        (lambda path: path.write_bytes((path.parent / file_name(0)).read_bytes()), "line 1 belongs to task 0, sample"),
        (lambda path: path.unlink(), "conversations of iteration 2 are missing: restore the file from a copy"),
    ],
)
def test_a_damaged_file_is_named_with_the_way_out(damage, message, composed, run):
    """Finds a traceback, or a record that is silently not compared."""
    path = run.conversations / file_name(PROMPTS)
    damage(path)
    with pytest.raises(ArtefactError, match=message) as error:
        list(recorded_run(run, composed).iterations())
    assert str(path) in str(error.value)
    # Others can be replayed all the same.
    assert next(recorded_run(run, composed).iterations(3)).number == 3


def test_conversations_of_other_weights_or_tasks_are_refused(composed, run):
    """Finds a record that is compared with the weights, or the tasks, of another iteration."""
    path = run.conversations / file_name(0)
    path.unlink()
    write(run, composed, 0, version=1)
    with pytest.raises(ArtefactError, match="line 1 was drawn by the weights after iteration 1, expected 0"):
        next(recorded_run(run, composed).iterations())

    record = recorded_run(run, composed)
    path.unlink()
    with EpisodeFile(path, settings_of(composed)) as file:
        file.add(replace(episode_of(composed, 0, 0, 0), task="another"))
    with pytest.raises(ArtefactError, match=r"line 1 has another task than .*tasks.jsonl: restore those tasks"):
        next(record.iterations())


def test_a_run_without_a_record_or_with_changed_files_is_refused(composed, run, tmp_path):
    """Finds a replay of plain rollouts that compares nothing, and one with other tasks."""
    rewards = {"size": RewardPartConfig(kind="length", target=4)}
    plain = replace(composed, rlhf=replace(composed.rlhf, environment="", prompts_from="", rewards=rewards))
    with pytest.raises(ArtefactError, match=r"without rlhf.environment keeps .* none as tokens"):
        recorded_run(run, plain)
    with pytest.raises(ArtefactError, match="no conversations are recorded there yet"):
        recorded_run(RunDirectory(tmp_path / "nothing"), composed)

    run.note_files(composed.noted_files)
    file = composed.rlhf.environment_file
    assert file is not None
    content = file.read_text()
    try:
        file.write_text(content + "\n")
        # Turns are drawn again without it.
        record = recorded_run(run, composed)
        with pytest.raises(ArtefactError, match=r"letters.py:Letters: has changed since .*restore it"):
            record.require_environment()
    finally:
        file.write_text(content)
    tasks = Path(composed.rlhf.prompts_from)
    content = tasks.read_text()
    try:
        tasks.write_text(content + "\n\n")
        with pytest.raises(ArtefactError, match=r"rlhf.prompts_from=.*has changed since"):
            recorded_run(run, composed)
    finally:
        tasks.write_text(content)
