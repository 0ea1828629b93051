"""Stage rlhf as its users meet it: the same numbers whoever draws the rollouts, and after any kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dist_lm.config.pool import PUSH_AUTO, PUSH_DIRECT
from dist_lm.config.root import save_config
from dist_lm.dry_run.iterations import rlhf_memory
from dist_lm.generation.load import load_model
from dist_lm.model.size import parameter_shapes
from dist_lm.parallel.layout import Layout
from dist_lm.prepare.compose import compose_config
from dist_lm.report.page import write_report
from dist_lm.stages.registry import load_config
from dist_lm.stages.rlhf.config import RlhfRunConfig, rlhf_config
from dist_lm.stages.rlhf.models import VALUE
from dist_lm.stages.rlhf.stage import with_reward_run
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.training import checkpoint_files
from dist_lm.training.checkpoint_tensors import stored_tensors
from dist_lm.training.profile_summary import read_profile
from tests.cluster.launched import assert_gone, family, ranks_on, steps_of, wait_until
from tests.cluster.launched import finish as finish_launch
from tests.conftest import TINY_MODEL
from tests.forked_run import run_forked
from tests.training_run import DEADLINE_S, copy_until, linked, numbers, train, unwritten, write_untrained

pytestmark = pytest.mark.cluster

ITERATIONS = 6
SETTINGS = (
    "stage=rlhf",
    *TINY_MODEL,
    "stage.corpus=tools",
    f"stage.steps={ITERATIONS}",
    "stage.checkpoint_every=2",
    "stage.eval_every=3",
    "stage.keep_checkpoints=9",
    "cluster.connect_timeout_s=120",
    "rlhf.prompts=8",
    "rlhf.max_new_tokens=16",
    "rlhf.minibatches=2",
    "rlhf.epochs=2",
    "rlhf.held_out_prompts=8",
    "rlhf.table_rollouts=4",
    "rlhf.lr=1e-3",
    "rlhf.value_lr=1e-3",
    "rlhf.pool.cache_tokens=4096",
    "rlhf.pool.max_sequences=4",
    "rlhf.rewards.preference.weight=0",
    "rlhf.rewards={size: {kind: length, target: 6}, mine: {kind: function, "
    "function: tests.rlhf.toy_rewards:fails_on_a_fifth}}",
    "rlhf.max_failed_fraction=0.9",
)
PRETRAINING = (
    "rlhf.pretrain_coefficient=0.5",
    "rlhf.pretrain_mix={language: 0.25}",
    "rlhf.pretrain_sequences=4",
    "rlhf.pretrain_seq_len=32",
    "rlhf.stop_kl=1e-3",  # iterations have as many updates as they have
)


@pytest.fixture(scope="module")
def started_work(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> WorkDirectory:
    """A work directory with a tools checkpoint, from which all runs begin."""
    work = linked(tiny_work, tmp_path_factory.mktemp("started"))
    write_untrained(work, "tools", 0)
    return work


def work_of(started: WorkDirectory, directory: Path) -> WorkDirectory:
    work = linked(started, directory)
    (work.path / "runs").mkdir()
    (work.path / "runs" / "tools").symlink_to(started.path / "runs" / "tools")
    return work


def settings(work: WorkDirectory, *overrides: str) -> list[str]:
    start = work.run("tools", "default").path
    return [*SETTINGS, f"work_dir={work.path}", f"stage.init_from={start}", *overrides]


def prepare(work: WorkDirectory, *overrides: str) -> RunDirectory:
    config = compose_config(settings(work, *overrides))
    assert isinstance(config, RlhfRunConfig)
    run = work.run("rlhf", config.run_id)
    run.create()
    save_config(with_reward_run(config), run.config)
    return run


def launch(work: WorkDirectory, *overrides: str, path: Path | None = None) -> subprocess.Popen:
    """A launch; `path`: a folder in front of PYTHONPATH."""
    own = [str(path)] if path else []
    return subprocess.Popen(
        [sys.executable, "-m", "dist_lm.launch", *settings(work, *overrides)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*own, *sys.path])},
        start_new_session=True,
    )


def actors_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The actors of the pool, the one started last at the end."""
    found = []
    for candidate in family(process):
        try:
            if "PoolActor" in " ".join(candidate.cmdline()):
                found.append(candidate)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda actor: actor.create_time())


def kill_in_turn(process: subprocess.Popen, run: RunDirectory, kills: int, every: int) -> None:
    """Kills a rank and an actor in turn, one every so many iterations, and waits until the launch has succeeded."""
    try:
        for kill in range(kills):
            goal = every * kill + 1
            wait_until(lambda goal=goal: max(steps_of(run), default=0) >= goal, process, f"iteration {goal}")
            wait_until(lambda: actors_of(process) and ranks_on(run), process, "an actor and a rank")
            victim = actors_of(process)[-1] if kill % 2 else ranks_on(run)[-1]
            os.kill(victim.pid, signal.SIGKILL)
            assert_gone([victim])
        _, err = process.communicate(timeout=DEADLINE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err


@pytest.fixture(scope="module")
def reference(started_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """One rank whose own engine draws the rollouts, never disturbed."""
    run = prepare(work_of(started_work, tmp_path_factory.mktemp("reference")))
    train(run, ranks=1)
    return run


def test_completions_on_which_a_function_fails_are_left_out_and_counted(reference):
    lines = [line for line in numbers(reference).values() if "rlhf/left_out" in line]
    assert len(lines) == ITERATIONS
    for line in lines:
        assert line["rlhf/left_out"] == line["rlhf/failed_mine"] / 8
        assert line["rlhf/failed_size"] == 0
    assert sum(line["rlhf/failed_mine"] for line in lines) > 0


def test_every_iteration_is_reported_and_rollouts_are_shown(reference):
    found = numbers(reference)
    assert found.keys() == set(range(ITERATIONS + 1))
    expected = {"rlhf/reward_mean", "rlhf/kl", "rlhf/entropy", "rlhf/ratio_mean", "rlhf/clip_frac", "rollout/staleness"}
    assert all(expected <= found[step].keys() for step in range(1, ITERATIONS + 1))
    for step in (0, ITERATIONS):
        assert 0 <= found[step]["rlhf/win_rate"] <= 1
    lines = (reference.samples / f"step_{ITERATIONS:08d}.jsonl").read_bytes().splitlines()
    rewards = [json.loads(line)["reward"] for line in lines]
    assert len(rewards) == 4
    assert rewards == sorted(rewards, reverse=True)
    assert json.loads(lines[0])["parts"].keys() == {"size", "mine"}
    result = json.loads(reference.result.read_text())
    assert result["metrics"]["rlhf/reward_mean"] == found[ITERATIONS]["rlhf/reward_mean"]
    assert result["prompts"] == 8 * ITERATIONS


def test_a_run_writes_every_metric_of_its_stage(reference):
    assert unwritten(reference, "rlhf") == set()


def test_the_policy_is_loaded_like_any_model(reference):
    loaded = load_model(reference.path)
    assert loaded.config.head == "tokens"
    assert loaded.weights.keys() == parameter_shapes(loaded.config).keys()


GONE_ON_WITH = {
    "synchronous": (),
    "drawn ahead": ("rlhf.max_staleness=1",),
    "with text": PRETRAINING,
    "with text, drawn ahead": (*PRETRAINING, "rlhf.max_staleness=1"),
}
GRPO = ("rlhf.algorithm=grpo", "rlhf.value_lr=null", "rlhf.prompts=4", "rlhf.samples=2")
OF_SETS = (*GRPO, "rlhf.top_k=50", "rlhf.top_p=0.9", "rlhf.max_staleness=1")


@pytest.mark.heavy
@pytest.mark.parametrize(
    "overrides",
    [
        # both together go through all that each alone goes through
        pytest.param(overrides, id=name, marks=pytest.mark.bars if name in ("drawn ahead", "with text") else ())
        for name, overrides in GONE_ON_WITH.items()
    ],
)
def test_a_run_that_goes_on_from_a_checkpoint_ends_bit_identical(started_work, reference, tmp_path, overrides):
    expected = reference
    if overrides:
        expected = prepare(work_of(started_work, tmp_path / "whole"), *overrides)
        train(expected, ranks=1)
        assert numbers(expected) != numbers(reference)
    run = work_of(started_work, tmp_path / "resumed").run("rlhf", "default")
    copy_until(expected, run, step=2)
    train(run, ranks=1)
    assert numbers(run) == numbers(expected)


@pytest.fixture(scope="module")
def grpo_of_sets(started_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """GRPO with filters of sampling, whose rollouts are drawn ahead."""
    run = prepare(work_of(started_work, tmp_path_factory.mktemp("grpo")), *OF_SETS)
    train(run, ranks=1)
    return run


@pytest.mark.heavy
def test_sampling_sets_are_checkpointed_with_the_rollouts_drawn_ahead(started_work, grpo_of_sets, tmp_path):
    found = numbers(grpo_of_sets)
    assert all(found[step]["rollout/set_bytes"] > 0 for step in range(1, ITERATIONS + 1))
    assert found[1]["rlhf/ratio_mean"] == pytest.approx(1, abs=1e-2)
    run = work_of(started_work, tmp_path / "resumed").run("rlhf", "default")
    copy_until(grpo_of_sets, run, step=2)
    train(run, ranks=1)
    assert numbers(run) == found


@pytest.mark.heavy
def test_without_a_critic_nothing_of_one_is_saved_planned_for_or_reported(grpo_of_sets, reference, tmp_path):
    planned = {}
    for run, expected in ((reference, True), (grpo_of_sets, False)):
        names = stored_tensors(checkpoint_files.find_checkpoint(run.path))
        assert any(name.startswith(VALUE) for name in names) == expected
        written = set().union(*numbers(run).values(), json.loads(run.result.read_text())["metrics"])
        assert any("value" in name for name in written) == expected
        write_report([run.path], tmp_path / "report.html", None)
        page = (tmp_path / "report.html").read_text()
        assert ("rlhf/value_loss" in page) == expected
        assert ("critic" in page) == expected
        config = rlhf_config(load_config(run.config))
        planned[expected] = rlhf_memory(config, Layout(1, 1, 1)), config.trained_models
    with_critic, without = planned[True], planned[False]
    assert without[0].models * 3 == with_critic[0].models * 2  # policy and reference
    assert without[0].optimizer * 2 == with_critic[0].optimizer
    assert (with_critic[1], without[1]) == (2, 1)


@pytest.mark.heavy
def test_a_damaged_state_is_passed_over_loudly(started_work, reference, tmp_path):
    run = work_of(started_work, tmp_path).run("rlhf", "default")
    shutil.copytree(reference.path, run.path)
    run.result.unlink()
    newest = checkpoint_files.steps_in(run.checkpoints)[-1]
    (newest / "stage" / "rlhf.json").write_text("{}")
    train(run, ranks=1)
    assert "stage/rlhf.json has 2 bytes" in run.warnings.read_text()
    assert numbers(run) == numbers(reference)


@pytest.mark.bars  # tests/rlhf/test_online_layouts.py: two ranks change nothing
def test_two_ranks_agree_with_one(started_work, tmp_path):
    found = {}
    short = ("stage.steps=2", "stage.eval_every=2", "profile.steps=[1,2]", "stage.log_every=5")
    for ranks in (1, 2):
        run = prepare(work_of(started_work, tmp_path / str(ranks)), *PRETRAINING, *short)
        assert train(run, ranks=ranks)["first"]["rlhf/reward_mean"] == numbers(run)[1]["rlhf/reward_mean"]
        assert [read_profile(trace).steps for trace in run.traces().values()] == [(1, 2)] * ranks
        found[ranks] = numbers(run)[1]
    names = ("score_mean", "reward_mean", "entropy", "new_tokens_mean", "return_mean", "truncated_rate")
    for name in (*names, "pretrain_loss", "policy_grad_norm"):
        assert found[2][f"rlhf/{name}"] == pytest.approx(found[1][f"rlhf/{name}"], rel=1e-5, abs=1e-6), name


@pytest.mark.bars
def test_a_launched_run_learns_pretraining_text_beside_the_reward(started_work, reference, tmp_path):
    work = work_of(started_work, tmp_path)
    code, out, err = finish_launch(launch(work, *PRETRAINING, "rlhf.max_staleness=1"))
    assert code == 0, err
    assert "loss on pretraining text, nats per token" in out
    found = numbers(work.run("rlhf", "default"))
    losses = [found[step]["rlhf/pretrain_loss"] for step in range(1, ITERATIONS + 1)]
    assert losses[-1] < losses[0]
    assert not any("rlhf/pretrain_loss" in line for line in numbers(reference).values())


@pytest.mark.heavy
def test_pretraining_text_that_does_not_divide_over_the_ranks_is_refused_by_its_key(started_work, tmp_path):
    run = prepare(work_of(started_work, tmp_path), *PRETRAINING, "rlhf.pretrain_sequences=3")
    assert run_forked(run, 2) != 0
    message = "rlhf.pretrain_sequences=3: expected a multiple of the 2 data-parallel ranks, such as 2 or 4"
    assert message in run.rank_log(0).read_text()


@pytest.mark.heavy
def test_a_pool_that_finds_no_room_is_refused_before_anything_starts(started_work, tmp_path):
    code, _, err = finish_launch(launch(work_of(started_work, tmp_path), "rlhf.pool.actors=1000"))
    assert code == 2
    assert err.startswith("error: rlhf.pool.actors=1000: ")
    assert "rlhf.pool.actors=0 generates in the process of the first rank" in err


@pytest.mark.heavy
def test_an_actor_draws_what_an_engine_in_the_rank_draws(started_work, reference, tmp_path):
    work = work_of(started_work, tmp_path)
    code, out, err = finish_launch(launch(work))
    assert code == 0, err
    assert numbers(work.run("rlhf", "default")) == numbers(reference)
    assert "wins against the reference" in out


FORM = {"type": "object", "properties": {"x": {"enum": ["up", "down", "back"]}, "y": {"type": "integer"}}}


@pytest.mark.bars  # test_constrained_rollouts.py resumes one in the test's process
@pytest.mark.parametrize("kind", ["schema", "calls"])
def test_a_constrained_run_is_the_same_by_actors_and_after_a_resume(started_work, tmp_path, kind):
    """Finds actors without grammars, a learner that follows others, and records that a checkpoint loses."""
    form = tmp_path / "form.json"
    form.write_text(json.dumps({"json_schema": FORM}))
    constraint = "calls" if kind == "calls" else str(form)
    one_update = ("rlhf.epochs=1", "rlhf.minibatches=1")
    overrides = (*GRPO, *one_update, "rlhf.max_staleness=1", f"rlhf.constraint={constraint}")
    expected = prepare(work_of(started_work, tmp_path / "whole"), *overrides)
    train(expected, ranks=1)
    found = numbers(expected)
    iterations = range(1, ITERATIONS + 1)
    assert [found[step]["rlhf/ratio_mean"] for step in iterations] == pytest.approx([1] * ITERATIONS, abs=1e-6)
    assert all("rollout/forced_rate" in found[step] for step in iterations)
    assert found[1]["rollout/logprob_gap"] < 1e-5
    assert all("rollout/set_bytes" not in line for line in found.values())

    resumed = work_of(started_work, tmp_path / "resumed").run("rlhf", "default")
    copy_until(expected, resumed, step=2)
    train(resumed, ranks=1)
    assert numbers(resumed) == found

    work = work_of(started_work, tmp_path / "launched")
    code, _, err = finish_launch(launch(work, *overrides))
    assert code == 0, err
    assert numbers(work.run("rlhf", "default")) == found


@pytest.mark.bars  # the sets of top-k and top-p reach ranks by the same way
def test_two_ranks_agree_with_one_under_a_constraint(started_work, tmp_path):
    """Finds a rank that follows the grammars of rollouts that are not its own."""
    form = tmp_path / "form.json"
    form.write_text(json.dumps({"json_schema": FORM}))
    found = {}
    for ranks in (1, 2):
        overrides = (*GRPO, f"rlhf.constraint={form}", "stage.steps=2", "stage.eval_every=2")
        run = prepare(work_of(started_work, tmp_path / str(ranks)), *overrides)
        train(run, ranks=ranks)
        found[ranks] = numbers(run)[1]
    assert found[1]["rlhf/policy_grad_norm"] > 0
    for name in ("score_mean", "reward_mean", "entropy", "new_tokens_mean", "ratio_mean", "policy_grad_norm"):
        assert found[2][f"rlhf/{name}"] == pytest.approx(found[1][f"rlhf/{name}"], rel=1e-5, abs=1e-6), name


def undisturbed_and_other(started_work, tmp_path, *steps: str) -> tuple[RunDirectory, WorkDirectory]:
    """A run that was left alone, and a work directory for another one."""
    expected = prepare(work_of(started_work, tmp_path / "undisturbed"), *steps)
    train(expected, ranks=1)
    return expected, work_of(started_work, tmp_path / "disturbed")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [pytest.param(2, marks=pytest.mark.heavy), pytest.param(10, marks=pytest.mark.bars)])
@pytest.mark.parametrize(
    "algorithm",
    [pytest.param((), marks=pytest.mark.bars), GRPO, pytest.param(OF_SETS, marks=pytest.mark.bars)],
    ids=["ppo", "grpo", "grpo of sets"],
)
def test_kills_of_actors_and_ranks_change_no_number(started_work, tmp_path, algorithm, kills):
    steps = (f"stage.steps={12 * kills}", "stage.eval_every=0", f"cluster.max_restarts={kills}", *algorithm)
    expected, work = undisturbed_and_other(started_work, tmp_path, *steps)
    run = work.run("rlhf", "default")
    process = launch(work, *steps)
    kill_in_turn(process, run, kills, every=4)
    assert numbers(run) == numbers(expected)
    events = [json.loads(line) for line in run.events.read_bytes().splitlines()]
    assert sum(event["event"] == "failed" for event in events) >= kills // 2


@pytest.mark.bars  # test_weight_push.py kills actors amid a push
@pytest.mark.parametrize("push", [PUSH_AUTO, PUSH_DIRECT])
def test_kills_in_the_middle_of_a_push_of_weights_change_no_number(started_work, tmp_path, push):
    steps = ("rlhf.rewards={mine: {kind: length, target: 6}}", "stage.eval_every=0")
    expected, work = undisturbed_and_other(started_work, tmp_path, *steps)
    run = work.run("rlhf", "default")
    process = launch(work, *steps, f"rlhf.pool.push={push}", path=Path(__file__).parent / "in_ranks")
    try:
        _, err = process.communicate(timeout=DEADLINE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    assert {path.name for path in run.path.glob("killed_*")} == {"killed_actor", "killed_rank"}
    log = (run.logs / "rank_00000.log").read_text()
    assert ("ipc of weights 2" in log) == (push == PUSH_DIRECT)
    assert numbers(run) == numbers(expected)


@pytest.mark.bars  # test_launch_run.py kills the one of a training stage
def test_a_killed_launcher_takes_all_with_it_and_the_same_command_goes_on(started_work, reference, tmp_path):
    work = work_of(started_work, tmp_path)
    run = work.run("rlhf", "default")
    process = launch(work)
    wait_until(lambda: max(steps_of(run), default=0) >= 3, process, "iteration 3")
    started = family(process)
    process.kill()
    process.communicate()
    assert_gone(started)
    code, _, err = finish_launch(launch(work))
    assert code == 0, err
    assert numbers(run) == numbers(reference)
