"""A run without the launcher: what rank 0 prepares, what it refuses, and how the other ranks hear of it."""

import io
import os
import re
import shlex
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_lm import train
from dist_lm.cluster.heartbeat import RememberedHeartbeat
from dist_lm.config.root import Config
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.parallel.layout import Layout
from dist_lm.prepare.compose import compose_config, overrides_of
from dist_lm.prepare.layout import with_layout
from dist_lm.prepare.run import Ranks, fit_to_ranks, launch_lock, rank_lock
from dist_lm.prepare.without_launcher import prepare_stage
from dist_lm.stages.registry import load_config
from dist_lm.stages.training.stage import training_stage
from dist_lm.storage import durable
from dist_lm.storage.lock import is_locked
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.metrics import MetricsWriter
from dist_lm.training.heartbeat import Phase, StopRequest
from tests.conftest import TINY
from tests.patience import patient
from tests.prepare.planned import make_run
from tests.training_run import linked

LANGUAGE = ("stage=language", *TINY, "stage.global_batch=4", "stage.micro_batch=2")
TWO = Ranks(nodes=1, per_node=2)


@pytest.fixture
def work(tiny_work: WorkDirectory, tmp_path: Path) -> WorkDirectory:
    return linked(tiny_work, tmp_path / "work")


def prepared(work: WorkDirectory, *overrides: str, ranks: Ranks = TWO) -> RunDirectory:
    """The run that rank 0 prepares; its locks are free again."""
    with ExitStack() as locks:
        run = prepare_stage([*overrides, f"work_dir={work.path}"], ranks, Console(io.StringIO()), StopRequest(), locks)
        assert run is not None
        return run


def refusal(work: WorkDirectory, *overrides: str, ranks: Ranks = TWO) -> str:
    with pytest.raises((ConfigError, ArtefactError)) as refused:
        prepared(work, *overrides, ranks=ranks)
    assert not list(work.path.glob("runs/*/*/config.yaml")), "a refused command has written a configuration"
    return str(refused.value)


# --- what is recorded ---


def in_folders(config: Config) -> Config:
    """With the folders of corpora that have no other beside them."""
    return replace(config, corpus=replace(config.corpus, folders={name: name for name in config.corpus_names}))


@pytest.mark.heavy
def test_the_configuration_is_recorded_as_the_launcher_records_it(work):
    run = prepared(work, *LANGUAGE)
    launched: Config = compose_config([*LANGUAGE, f"work_dir={work.path}", "cluster.ranks_per_node=2"])
    expected = with_layout(launched, ranks_per_node=2)
    recorded = load_config(run.config)
    assert recorded.parallel == expected.parallel
    assert recorded.cluster == expected.cluster
    assert recorded.stage.init_from == "none"
    assert recorded == in_folders(expected)
    assert Layout.recorded(recorded.parallel) == Layout(1, 2, 1)


@pytest.mark.heavy
def test_several_nodes_are_recorded_too(work):
    recorded = load_config(prepared(work, *LANGUAGE, "parallel.tp=2", ranks=Ranks(nodes=2, per_node=2)).config)
    assert (recorded.cluster.nodes, recorded.cluster.ranks_per_node) == (2, 2)
    assert Layout.recorded(recorded.parallel) == Layout(1, 2, 2)


@pytest.mark.heavy
def test_rank_0_holds_both_locks_of_its_run_until_it_ends(work):
    arguments = [*LANGUAGE, f"work_dir={work.path}"]
    with ExitStack() as locks:
        run = prepare_stage(arguments, TWO, Console(io.StringIO()), StopRequest(), locks)
        assert run is not None
        assert is_locked(run.launch_lock)
        assert is_locked(run.rank_lock)
        with pytest.raises(ArtefactError, match=f"is in use by process {os.getpid()} on"), launch_lock(run):
            pass
    with launch_lock(run), rank_lock(run, tell=lambda _: None, stopped=lambda: True):
        pass


@pytest.mark.heavy
def test_a_finished_run_has_nothing_left_to_train(work):
    make_run(work, "language", done=True)
    output = io.StringIO()
    with ExitStack() as locks:
        arguments = ["stage=language", *TINY, f"work_dir={work.path}"]
        assert prepare_stage(arguments, TWO, Console(output), StopRequest(), locks) is None
    assert "nothing is left to train" in output.getvalue()


# --- what is refused ---


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("dry_run=true",), "dry_run=true: expected false"),
        (("cluster.nodes=2",), "cluster.nodes=2: expected 1, as torchrun was told (--nnodes)"),
        (("cluster.ranks_per_node=4",), "cluster.ranks_per_node=4: expected 2, as torchrun was told"),
        (("stage.global_batch=3",), "stage.global_batch=3: expected a multiple of the 2 data-parallel ranks"),
        (("stage.learning_rate=1",), "stage.learning_rate=1: no such key"),
        (("stages.code.lr=1",), "expected stages.NAME.KEY=value"),
        (
            ("stage.eval_tasks={own_python: 10}", "eval.pool.actors=1"),
            "eval.pool.actors=1: expected 0, as actors need Ray",
        ),
    ],
)
def test_a_command_that_cannot_run_is_refused_before_anything_is_written(work, overrides, said):
    assert said in refusal(work, *LANGUAGE, *overrides)


def test_a_stage_that_does_not_train_is_refused(work):
    assert "stage=tokenizer: expected a stage that trains on ranks" in refusal(
        work, "stage=tokenizer", "model.vocab_size=640"
    )


def test_actors_of_rlhf_are_refused_by_their_key(work):
    model = [override for override in TINY if not override.startswith("stage.")]
    reward = ("rlhf.reward_model=none", "rlhf.rewards={size: {kind: length, target: 6}}", "rlhf.max_new_tokens=16")
    said = refusal(work, "stage=rlhf", *model, "stage.corpus=tools", "stage.init_from=none", *reward)
    assert said.startswith("rlhf.pool.actors=1: expected 0, as actors need Ray, which only the launcher starts: ")
    assert "rlhf.pool.actors=0 generates in the process of the first rank; or give `python -m dist_lm.launch" in said


@pytest.mark.heavy
def test_other_settings_than_those_of_the_run_are_refused(work):
    make_run(work, "language", checkpoint=True)
    with pytest.raises(ConfigError, match=r"stage\.lr=0\.5 \(was "):
        prepared(work, "stage=language", *TINY, "stage.lr=0.5")


@pytest.mark.heavy
def test_a_missing_stage_is_refused_with_the_command_that_makes_it(work):
    command = ["stage=code", *TINY, f"work_dir={work.path}", "stages.language.steps=7", "stage.steps=9"]
    said = refusal(work, *command)
    assert said.startswith("stage=code needs language first: run `torchrun --nproc-per-node 2 -m dist_lm.train ")
    [given] = re.findall(r"`torchrun --nproc-per-node 2 -m dist_lm.train ([^`]*)`", said)
    run = prepared(work, *shlex.split(given))
    recorded = load_config(run.config)
    assert recorded.stage.steps == 7
    composed = compose_config([*overrides_of("language", "code", command), "cluster.ranks_per_node=2"])
    assert recorded == in_folders(with_layout(composed, 2))


@pytest.mark.heavy
def test_missing_corpora_are_made_by_the_launcher(tmp_path):
    said = refusal(WorkDirectory(tmp_path / "empty"), *LANGUAGE)
    assert said.startswith("stage=language needs tokenizer, shards first: run `python -m dist_lm.launch stage=shards ")
    assert "stage=tokenizer" not in said  # stage=shards builds it on the way


# --- a run directory and another number of ranks ---


@pytest.mark.heavy
def test_a_run_is_laid_out_again_for_another_number_of_ranks(work):
    run = prepared(work, *LANGUAGE)
    before = run.config.read_text()
    fit_to_ranks(run, TWO)
    assert run.config.read_text() == before
    fit_to_ranks(run, Ranks(nodes=1, per_node=4))
    recorded = load_config(run.config)
    assert Layout.recorded(recorded.parallel) == Layout(1, 4, 1)
    assert recorded.cluster.ranks_per_node == 4
    with pytest.raises(ConfigError, match=r"stage\.global_batch=4: expected a multiple of the 3 "):
        fit_to_ranks(run, Ranks(nodes=3, per_node=1))


def test_nodes_of_different_sizes_are_refused():
    one_node = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1"}
    assert Ranks.started(one_node) == Ranks(nodes=1, per_node=4)
    assert Ranks.started(one_node | {"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}) == Ranks(nodes=2, per_node=4)
    assert Ranks.started({"WORLD_SIZE": "2"}) == Ranks(nodes=1, per_node=2)
    with pytest.raises(ConfigError, match="has started 5 ranks on 2 nodes, 4 of them on this one"):
        Ranks.started(one_node | {"WORLD_SIZE": "5", "GROUP_WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="has started 8 ranks on 3 nodes, 4 of them on this one"):
        Ranks.started(one_node | {"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "3"})


# --- the other ranks ---


@pytest.mark.parametrize(
    ("arguments", "is_run"),
    [(["stage=code"], False), (["stage=code", "seed=1"], False), (["work/runs/code/default"], True), (["a=b"], False)],
)
def test_a_command_line_is_told_from_a_run_directory(arguments, is_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.names_run(arguments) == is_run


def test_a_run_directory_with_a_sign_in_its_name_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lr=1").mkdir()
    assert train.names_run(["lr=1"])


class Store(dict[str, str]):
    """The store of torchrun, when rank 0 is done with it."""

    set = dict.__setitem__

    def get(self, key: str) -> str:  # type: ignore[override]
        return self[key]


def run_with_config(directory: Path) -> RunDirectory:
    run = RunDirectory(directory)
    run.create()
    run.config.write_text("stage: {name: language}\n")
    return run


def test_the_other_ranks_learn_the_run_of_rank_0(tmp_path):
    store, run = Store(), run_with_config(tmp_path)
    assert train.prepared_by_first_rank(store, 0, lambda: run) == run  # type: ignore[arg-type]
    assert train.prepared_by_first_rank(store, 1, pytest.fail) == run  # type: ignore[arg-type]


def test_the_other_ranks_leave_with_rank_0(tmp_path):
    store = Store()
    assert train.prepared_by_first_rank(store, 0, lambda: None) is None  # type: ignore[arg-type]
    assert train.prepared_by_first_rank(store, 1, pytest.fail) is None  # type: ignore[arg-type]
    store.set(train.PREPARED, '{"refused": true}')
    with pytest.raises(train.RefusedError):
        train.prepared_by_first_rank(store, 1, pytest.fail)  # type: ignore[arg-type]


def test_a_node_that_does_not_see_the_run_says_so(tmp_path, monkeypatch):
    run = run_with_config(tmp_path)
    train.await_config(run, durable.sha256_of(run.config))
    monkeypatch.setattr(train, "SEEN_S", 0.0)
    monkeypatch.setattr(train, "POLL_S", 0.0)
    with pytest.raises(ArtefactError, match="does not see what rank 0 has written: expected work_dir on a file system"):
        train.await_config(run, "0" * 64)


# --- what people see ---


def trained(work: WorkDirectory, terminal: train.Terminal) -> RunDirectory:
    """A run whose first step was written while rank 0 showed its progress."""
    run = prepared(work, *LANGUAGE)
    with train.progress_lines(load_config(run.config), run, terminal, RememberedHeartbeat()):
        writer = MetricsWriter(run.metrics)
        writer.write(1, {"train/loss": 3.25})
        writer.close()
    return run


@pytest.mark.heavy
def test_rank_0_prints_progress_and_what_a_stopped_run_continues_from(work, monkeypatch):
    monkeypatch.setattr(train, "PROGRESS_EVERY_S", 0.01)
    output, errors = io.StringIO(), io.StringIO()
    terminal = train.Terminal(output, errors)
    run = trained(work, terminal)
    assert re.search(r"language: step 1/\d+ .*3\.25", output.getvalue())
    train.print_result(training_stage("language"), load_config(run.config), run, terminal)
    assert "stopped; the same command continues from the start of the stage" in output.getvalue()
    terminal.tell("a line")
    assert errors.getvalue() == "a line\n"


@pytest.mark.heavy
def test_rank_0_says_what_it_does_while_it_makes_no_step(work, monkeypatch):
    """Finds torchrun silent for minutes while log-probabilities of the reference are computed."""
    monkeypatch.setattr(train, "PROGRESS_EVERY_S", 0.01)
    monkeypatch.setattr("dist_lm.cluster.heartbeat.SLOW_START_S", 0.1)
    output, heartbeat = io.StringIO(), RememberedHeartbeat()
    run = prepared(work, *LANGUAGE)
    with train.progress_lines(load_config(run.config), run, train.Terminal(output, io.StringIO()), heartbeat):
        deadline = time.monotonic() + patient(20)
        while output.getvalue().count("(50 %)") < 2 and time.monotonic() < deadline:
            heartbeat.beat(Phase.SCORING, 0, 0.5)
            time.sleep(0.01)
    lines = [line for line in output.getvalue().splitlines() if "(50 %)" in line]
    assert len(lines) >= 2
    assert re.match(r"no step after .*: rank 0 computing log-probabilities \(50 %\) for .*; log: ", lines[0])


@pytest.mark.heavy
def test_training_does_not_need_its_terminal(work, monkeypatch, caplog):
    """As in `torchrun ... | head`: the reader of standard output has left."""
    monkeypatch.setattr(train, "PROGRESS_EVERY_S", 0.01)
    reader, writer = os.pipe()
    os.close(reader)
    stream: Any = train.TerminalStream(writer)
    terminal = train.Terminal(stream, stream)
    run = trained(work, terminal)
    train.print_result(training_stage("language"), load_config(run.config), run, terminal)
    terminal.tell("a line")
    os.close(writer)
    assert caplog.text.count("the terminal is gone ([Errno 32] Broken pipe), it missed: ") == 1
