"""The two ways to start training, `torchrun -m dist_lm.train stage=code ...` and the launcher, lead to the same run.

The ranks of a run without the launcher cannot import Ray, and OMP_NUM_THREADS is set, which must not change a bit.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dist_lm.config.root import Config
from dist_lm.stages.registry import load_config
from dist_lm.storage.process import reserve_port
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.training import checkpoint_files
from dist_lm.training.checkpoint_tensors import stored_tensors
from tests.cluster import launched
from tests.cluster.launched import CODE_STEPS, DEADLINE_S, SETTINGS, finish, follow_on, ranks_on, steps_of, wait_until
from tests.cluster.loopback_ray import loopback_ray
from tests.cluster.test_rlhf_run import prepare as prepare_rlhf
from tests.cluster.test_rlhf_run import settings as rlhf_settings
from tests.cluster.test_rlhf_run import work_of
from tests.forked_run import run_forked
from tests.training_run import linked, numbers, prepare, train, write_untrained

pytestmark = pytest.mark.cluster
WITHOUT_RAY = Path(__file__).parent / "without_ray"
ONE_NODE = ("--standalone", "--nproc-per-node", "2")


def torchrun(options: tuple[str, ...], *arguments: str, **environ: str) -> subprocess.Popen:
    """Starts ranks without the launcher."""
    own = {"OMP_NUM_THREADS": "3", "PYTHONPATH": os.pathsep.join([str(WITHOUT_RAY), *sys.path[1:]])}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, "-m", "dist_lm.train", *arguments],
        env=os.environ | own | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def on_one_node(work: WorkDirectory, *overrides: str) -> subprocess.Popen:
    return torchrun(ONE_NODE, *SETTINGS, f"work_dir={work.path}", *overrides)


@contextmanager
def on_two_nodes(work: WorkDirectory, *overrides: str) -> Iterator[list[subprocess.Popen]]:
    """A torchrun for each node, both on this machine."""
    with reserve_port() as reserved, ExitStack() as stack:
        place = ("--master-addr", "127.0.0.1", "--master-port", str(reserved.getsockname()[1]))
        nodes = [
            torchrun(
                ("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "2", *place),
                *(*SETTINGS, f"work_dir={work.path}", *overrides),
            )
            for node in range(2)
        ]
        for node in nodes:
            stack.enter_context(launched.ending(node))
        yield nodes


def tensors(run: RunDirectory) -> dict[str, bytes]:
    """The bytes of each tensor in the last checkpoint, of the optimizer too."""
    newest = checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST)
    assert newest is not None
    return {name: tensor.read().tobytes() for name, tensor in stored_tensors(newest).items()}


def settings_of(run: RunDirectory) -> Config:
    """The recorded configuration, but for its work directory and the timeout of tests on busy machines."""
    config = load_config(run.config)
    cluster = replace(config.cluster, connect_timeout_s=20.0)
    stage = replace(config.stage, init_from=config.stage.init_from.replace(config.work_dir, "WORK"))
    return replace(config, work_dir="WORK", cluster=cluster, stage=stage)


def assert_same(run: RunDirectory, expected: RunDirectory) -> None:
    assert run.result.exists()
    found, wanted = tensors(run), tensors(expected)
    assert [name for name in wanted if found.get(name) != wanted[name]] == []
    assert len(found) == len(wanted) > 0
    assert numbers(run) == numbers(expected)


def kill(process: subprocess.Popen, run: RunDirectory) -> None:
    """What a power cut does."""
    ranks = ranks_on(run) or launched.family(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    launched.assert_gone(ranks)


@dataclass(frozen=True)
class WithoutLauncher:
    """A whole run without the launcher, during which a second command for the same run was given."""

    run: RunDirectory
    out: str
    second: tuple[int, str, str]  # exit code and output of the second command


@pytest.fixture(scope="module")
def without_launcher(undisturbed: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> WithoutLauncher:
    work = follow_on(undisturbed, tmp_path_factory.mktemp("without_launcher") / "work")
    run = work.run("code", "default")
    process = on_one_node(work, CODE_STEPS)
    with launched.ending(process):
        wait_until(lambda: bool(steps_of(run)), process, "the first step")
        ranks = launched.family(process)
        for rank in ranks:
            rank.suspend()
        second = finish(launched.start(work, CODE_STEPS))
        for rank in ranks:
            rank.resume()
        code, out, err = finish(process)
    assert code == 0, err
    return WithoutLauncher(run, out, second)


@pytest.mark.heavy
def test_with_and_without_the_launcher_the_run_has_the_same_bits(undisturbed, without_launcher):
    expected, run = undisturbed.run("code", "default"), without_launcher.run
    assert_same(run, expected)
    assert "code: step " in without_launcher.out, "no line of progress"
    assert "stage=code is done" in without_launcher.out
    # everything that only the launcher writes is named in docs/cluster.md
    assert not run.events.exists()
    assert not run.live.exists()
    assert not run.wandb.exists()
    assert settings_of(run) == settings_of(expected)


def test_a_second_command_for_the_same_run_is_refused(without_launcher):
    code, _, err = without_launcher.second
    assert code == 2
    assert "is in use by process" in err


@pytest.mark.bars  # both doors give the same bits, above
def test_a_run_killed_with_the_launcher_is_finished_without_it_and_the_reverse(undisturbed, tmp_path):
    expected = undisturbed.run("code", "default")
    every = ("stage.checkpoint_every=5", CODE_STEPS)

    work = follow_on(undisturbed, tmp_path / "torchrun first")
    run = work.run("code", "default")
    with launched.ending(on_one_node(work, *every)) as process:
        wait_until((run.checkpoints / "LATEST").exists, process, "a checkpoint")
        kill(process, run)
    assert not run.result.exists()
    code, _, err = finish(launched.start(work, *every))
    assert code == 0, err
    assert_same(run, expected)

    work = follow_on(undisturbed, tmp_path / "launcher first")
    run = work.run("code", "default")
    with launched.ending(launched.start(work, *every)) as process:
        wait_until((run.checkpoints / "LATEST").exists, process, "a checkpoint")
        kill(process, run)
    assert not run.result.exists()
    code, _, err = finish(on_one_node(work, *every))
    assert code == 0, err
    assert_same(run, expected)


@pytest.mark.bars
@pytest.mark.skipif(sys.platform != "linux", reason="other loopback addresses exist on Linux only")
def test_two_nodes_are_the_same_with_and_without_the_launcher(undisturbed, tmp_path):
    few = ("stage.steps=12",)
    work = follow_on(undisturbed, tmp_path / "launched")
    with loopback_ray(tmp_path, nodes=2) as ray:
        nodes = ("cluster.nodes=2", "cluster.ranks_per_node=2")
        code, _, err = finish(launched.start(work, *few, *ray.overrides(), *nodes))
        assert code == 0, err
    expected = work.run("code", "default")

    work = follow_on(undisturbed, tmp_path / "without launcher")
    run = work.run("code", "default")
    with on_two_nodes(work, *few) as processes:
        for process in processes:
            _, err = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, err
    assert json.loads(run.result.read_text())["ranks"] == 4
    assert_same(run, expected)


@pytest.mark.heavy
def test_a_refusal_of_rank_0_ends_all_ranks_with_one_line(undisturbed, tmp_path):
    work = follow_on(undisturbed, tmp_path)
    code, _, err = finish(on_one_node(work, "stage.learning_rate=1"))
    assert code != 0
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, err
    assert "stage.learning_rate=1: no such key" in said[0]
    first = err[err.index("Root Cause") :]
    assert re.search(r"exitcode +: 2 ", first), err
    # A rank that has not read the refusal yet is ended by torchrun.
    exits = [line.split()[2] for line in err.splitlines() if line.strip().startswith("exitcode")]
    assert set(exits) <= {"2", "-15"}, err
    assert not work.run("code", "default").config.exists()


FEW_ITERATIONS = ("stage.steps=2", "rlhf.held_out_prompts=0", "rlhf.pool.actors=0")


@pytest.fixture
def rlhf_work(tiny_work, tmp_path) -> WorkDirectory:
    started = linked(tiny_work, tmp_path / "started")
    write_untrained(started, "tools", 0)
    return work_of(started, tmp_path / "work")


@pytest.mark.heavy
def test_rlhf_generates_in_rank_0_without_ray(rlhf_work):
    """Neither the engine nor the functions of a reward need Ray."""
    run = prepare_rlhf(rlhf_work, *FEW_ITERATIONS)
    assert run_forked(run, 2, without=("ray",)) == 0, run.rank_log(0).read_text()
    assert json.loads(run.result.read_text())["steps"] == 2


@pytest.mark.bars
def test_rlhf_is_started_without_the_launcher(rlhf_work):
    code, out, err = finish(torchrun(ONE_NODE, *rlhf_settings(rlhf_work, *FEW_ITERATIONS)))
    assert code == 0, err
    assert json.loads(rlhf_work.run("rlhf", "default").result.read_text())["steps"] == 2
    assert "2 iterations on" in out


@pytest.mark.heavy
def test_a_run_directory_is_laid_out_again_for_another_number_of_ranks(tiny_work, tmp_path):
    run = prepare(linked(tiny_work, tmp_path / "work"), "default", "stage.steps=2")
    train(run, 2)
    text = run.config.read_text()
    assert "dp_shard: 2" in text
    run.result.unlink()
    run.config.write_text(text.replace("  steps: 2\n", "  steps: 3\n"))
    assert train(run, 1)["steps"] == 3
    assert "dp_shard: 1" in run.config.read_text()
