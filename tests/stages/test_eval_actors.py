"""Tasks answered beside training: by the weights of their step, whenever the answers come, and once after any kill."""

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.cluster.sandboxes import ClusterSandboxes, SandboxNode
from dist_lm.config.cluster import ClusterConfig
from dist_lm.evaluation.in_loop import loop_tasks
from dist_lm.generation.decoder import WeightStream
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.request import Answer, Refusal, Request
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.sandbox.pool import SandboxPool
from dist_lm.sandbox.program import Limits, Program, Verdict
from dist_lm.stages.training.eval_actors import BesideTraining
from dist_lm.stages.training.eval_tasks import BetweenSteps, Evaluated, weights_file
from dist_lm.storage.durable import json_lines
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.metrics import MetricsWriter, read_metrics
from dist_lm.training.heartbeat import Unheard
from tests.conftest import TINY, composed

SOON_S = 0.02
SETTINGS = ("stage=language", *TINY, "model.init_std=0.15", "stage.steps=8", "stage.eval_new_tokens=6")
FIGURES = {"eval/own_sql/pass@1", "eval/own_sql/low", "eval/own_sql/high"}


class Actors:
    """A pool of one engine in this process, which answers once `answering` is set."""

    def __init__(self, engine: Engine, answering: threading.Event, keep_going: Callable[[], bool]) -> None:
        self.versions = [engine.version]
        self._engine, self._answering, self._keep_going = engine, answering, keep_going

    def load_weights(self, weights: WeightStream, version: int) -> None:
        self._engine.load_weights(weights, version)
        self.versions.append(version)

    def generate(self, requests: Sequence[Request]) -> Iterator[Answer | Refusal]:
        while not self._answering.wait(SOON_S):
            if not self._keep_going():
                return
        for request in requests:
            self._engine.submit(request)
        yield from reversed(self._engine.run())

    def close(self) -> None:
        """It has no processes."""


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def parts(work: WorkDirectory) -> Iterator[Evaluated]:
    config = composed([*SETTINGS, "stage.eval_tasks={own_sql: 4}", f"work_dir={work.path}"])
    run, tokenizer = work.run("language", "beside"), Tokenizer.load(work.tokenizer_model)
    run.create()
    model = Transformer(config.model)
    initialise(model, 1)
    tasks = loop_tasks(config, run, tokenizer)
    few = replace(tasks, items={task: items[::12] for task, items in tasks.items.items()})
    world = World(0, 1, 0, torch.device("cpu"))
    with MetricsWriter(run.metrics) as metrics:
        yield Evaluated(config, run, world, tokenizer, model, few, metrics, Unheard())


class Machine:
    """Starts pools, and remembers them."""

    def __init__(self, parts: Evaluated) -> None:
        self._parts = parts
        self.answering = threading.Event()
        self.pools: list[Actors] = []

    def start(self, weights: WeightStream, version: int, keep_going: Callable[[], bool]) -> Actors:
        tokenizer, model = self._parts.tokenizer, self._parts.model.config
        engine = Engine(
            model,
            weights,
            eot_id=tokenizer.eot_id,
            vocabulary=tuple(tokenizer.vocabulary()),
            options=EngineOptions(cache_tokens=4096),
            version=version,
        )
        self.pools.append(Actors(engine, self.answering, keep_going))
        return self.pools[-1]


def records_of(run: RunDirectory, step: int) -> list[dict]:
    return list(json_lines(run.task_samples("own_sql", step)))


def lines_of(run: RunDirectory) -> list[tuple[int, set[str]]]:
    return [(line["step"], line.keys() - {"step", "time"}) for line in read_metrics(run.metrics)]


def change(model: Transformer) -> None:
    """A step of training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def test_answers_come_later_and_are_those_of_the_weights_of_their_step(parts: Evaluated):
    between = BetweenSteps(parts, 0)
    between.reached(4)
    expected = records_of(parts.run, 4)
    parts.run.task_samples("own_sql", 4).unlink()
    first = lines_of(parts.run)
    assert first == [(4, FIGURES | {"timing/eval_s"})]

    machine = Machine(parts)
    beside = BesideTraining(parts, machine.start, 0)  # type: ignore[arg-type]
    beside.reached(3)
    assert lines_of(parts.run) == first
    beside.reached(4)
    change(parts.model)
    beside.before_checkpoint()
    assert weights_file(parts.run, 4).exists()
    beside.reached(5)
    assert lines_of(parts.run) == [*first, (4, {"timing/eval_s"})]  # training did not wait for answers
    beside.reached(8)  # the last step
    machine.answering.set()
    beside.finish()
    beside.close()
    assert records_of(parts.run, 4) == expected
    assert records_of(parts.run, 8) != expected
    late = [(4, FIGURES), (8, FIGURES)]
    assert lines_of(parts.run) == [*first, (4, {"timing/eval_s"}), (8, {"timing/eval_s"}), *late]
    assert [pool.versions for pool in machine.pools] == [[4, 8]]
    assert not list(parts.run.evaluations.iterdir())


@pytest.mark.parametrize("actors", [True, False])
def test_after_a_kill_the_weights_of_the_step_are_evaluated(parts: Evaluated, actors: bool):
    BetweenSteps(parts, 0).reached(4)
    expected = records_of(parts.run, 4)
    parts.run.task_samples("own_sql", 4).unlink()
    parts.run.metrics.write_text("")
    machine = Machine(parts)
    beside = BesideTraining(parts, machine.start, 0)  # type: ignore[arg-type]
    beside.reached(4)
    beside.before_checkpoint()  # of step 5
    beside.close()  # no answer has come
    assert weights_file(parts.run, 4).exists()
    change(parts.model)
    (parts.run.evaluations / "step_00000004.tmp").touch()
    (parts.run.evaluations / "step_00000008.safetensors").touch()  # step 8 is trained again

    machine.answering.set()
    if actors:
        again = BesideTraining(parts, machine.start, 5)  # type: ignore[arg-type]
        again.finish()
        again.close()
    else:
        BetweenSteps(parts, 5)
    assert records_of(parts.run, 4) == expected
    assert [names & FIGURES for _, names in lines_of(parts.run) if names & FIGURES] == [FIGURES]
    assert not list(parts.run.evaluations.iterdir())


def test_figures_that_were_written_are_not_repeated(parts: Evaluated):
    machine = Machine(parts)
    machine.answering.set()
    beside = BesideTraining(parts, machine.start, 0)  # type: ignore[arg-type]
    beside.reached(4)
    beside.before_checkpoint()
    kept = weights_file(parts.run, 4).read_bytes()
    beside.finish()
    beside.close()
    weights_file(parts.run, 4).write_bytes(kept)  # killed before it was removed
    before = lines_of(parts.run)
    again = BesideTraining(parts, machine.start, 5)  # type: ignore[arg-type]
    again.finish()
    again.close()
    assert lines_of(parts.run) == before
    assert not list(parts.run.evaluations.iterdir())


def test_a_failure_of_the_actors_ends_the_run(parts: Evaluated):
    def start(weights: WeightStream, version: int, keep_going: Callable[[], bool]) -> Actors:
        raise RuntimeError("no actors")

    beside = BesideTraining(parts, start, 0)  # type: ignore[arg-type]
    beside.reached(4)
    with pytest.raises(RuntimeError, match="no actors"):
        beside.finish()
    beside.close()


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
def test_programs_of_answers_run_on_other_nodes_too(work: WorkDirectory, parts: Evaluated, monkeypatch):
    items = loop_tasks(composed([*SETTINGS, "stage.eval_tasks={own_bash: 4}"]), parts.run, parts.tokenizer).items
    few = replace(parts.tasks, every={"own_bash": 4}, items={task: own[::12] for task, own in items.items()})
    parts = replace(parts, tasks=few)
    BetweenSteps(parts, 0).reached(4)
    expected = list(json_lines(parts.run.task_samples("own_bash", 4)))
    ran, cluster = [], RayCluster("", ClusterConfig(name="local"))
    with SandboxPool(2) as pool:

        def run(program: Program, limits: Limits) -> Future[Verdict]:
            ran.append(program)
            return pool.submit(program, limits)

        def on_another_node(self: ClusterSandboxes) -> None:
            self._nodes[:] = [SandboxNode("another node", run, workers=2)]

        monkeypatch.setattr(RayCluster, "nodes", lambda self: ["this node", "another node"])
        monkeypatch.setattr(ClusterSandboxes, "_start_actors", on_another_node)
        machine = Machine(parts)
        machine.answering.set()
        beside = BesideTraining(replace(parts, cluster=cluster), machine.start, 0)  # type: ignore[arg-type]
        beside.reached(4)
        beside.finish()
        beside.close()
    assert len(ran) == len(expected)
    assert list(json_lines(parts.run.task_samples("own_bash", 4))) == expected
