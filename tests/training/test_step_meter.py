"""What is measured of a step: parts of its time, norms by group, the size of its update, stragglers, time left."""

import time

import pytest
import torch
import torch.distributed as dist

from dist_lm.config.stage import StageConfig
from dist_lm.model.size import GROUPS, group_of, parameter_shapes
from dist_lm.parallel.mesh import World
from dist_lm.prepare.compose import compose_config
from dist_lm.tracking.registry import metric_of
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.objective import next_token
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.step import accumulate_gradients, update
from dist_lm.training.step_meter import PARTS, Eta, StepMeter, UpdateSize, WallLaps, slowest_of, working_s
from dist_lm.training.trainer import DETAILED_EVERY, detailed_every, is_due
from tests.training.test_step import Toy, batch_of

BATCH = batch_of(slice(0, 8))


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(model, optimizer, laps=None):
    sums = accumulate_gradients(model, next_token(), [BATCH], laps=laps)
    return update(model, optimizer, sums, grad_clip=1.0, adds_sums=True, stop=StopRequest(), laps=laps)


def optimizer_of(model):
    return build_optimizer(model, StageConfig(name="test", lr=1e-2, weight_decay=0.1))


def test_measuring_changes_nothing():
    plain, measured = Toy(), Toy()
    optimizers = optimizer_of(plain), optimizer_of(measured)
    watched = UpdateSize(optimizers[1])
    for _ in range(3):
        watched.watch()
        one, other = step(plain, optimizers[0]), step(measured, optimizers[1], WallLaps())
        assert other.loss == pytest.approx(one.loss, rel=1e-6)
        assert watched.squares().all()
    for expected, found in zip(plain.parameters(), measured.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_norms_of_the_groups_are_those_of_torch_and_add_up():
    model = Toy()
    result = step(model, optimizer_of(model), WallLaps())
    other = Toy()
    loss = next_token()(other, BATCH)
    (loss.total / loss.count).backward()
    for group, parts in {"embedding": other.embedding, "norm": other.final_norm, "head": other.lm_head}.items():
        expected = torch.nn.utils.get_total_norm([p.grad for p in parts.parameters() if p.grad is not None])
        assert result.grad_norms[group] == pytest.approx(float(expected), rel=1e-5)
    assert sum(norm**2 for norm in result.grad_norms.values()) == pytest.approx(result.grad_norm**2)


@pytest.mark.parametrize("change", ["model.norm=rmsnorm", "model.ffn=swiglu", "model.head=scalar"])
def test_every_parameter_of_a_model_has_a_group(change):
    config = compose_config(["stage=language", "model=nano", "model.tie_embeddings=false", change])
    names = parameter_shapes(config.model)
    assert {group_of(name) for name in names} == set(GROUPS)
    assert group_of("blocks.0.attention_norm.bias") == "norm"
    assert group_of("blocks.0.feed_forward_norm.weight") == "norm"
    assert group_of("scalar_head.bias") == "head"
    with pytest.raises(ValueError, match=r"router\.weight"):
        group_of("router.weight")


def test_the_size_of_an_update_is_that_of_the_difference():
    model = Toy()
    optimizer = optimizer_of(model)
    update = UpdateSize(optimizer)
    step(model, optimizer)
    for _ in range(2):
        update.watch()
        before = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
        step(model, optimizer)
        after = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
        moved, size = update.squares().tolist()
        assert moved == pytest.approx(float((after - before).square().sum()), rel=1e-4)
        assert size == pytest.approx(float(after.square().sum()), rel=1e-6)


def test_a_step_that_is_skipped_or_not_watched_has_no_size():
    model = Toy()
    optimizer = optimizer_of(model)
    update = UpdateSize(optimizer)
    update.watch()
    assert update.squares().tolist() == [0, 0]  # nothing called the optimizer
    step(model, optimizer)
    assert update.squares().tolist() == [0, 0]


def test_the_parts_of_a_step_add_up_to_no_more_than_the_step():
    model, laps = Toy(), WallLaps()
    optimizer = optimizer_of(model)
    began = time.perf_counter()
    step(model, optimizer, laps)
    step(model, optimizer, laps)
    elapsed = time.perf_counter() - began
    parts = laps.take()
    assert parts.keys() == {"forward", "backward", "communication", "optimizer"}
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) <= elapsed
    assert laps.take() == {}


def test_a_line_has_means_since_the_one_before():
    model, world = Toy(), World(0, 1, 0, torch.device("cpu"))
    optimizer = optimizer_of(model)
    meter = StepMeter(world, optimizer, 9, [])
    for steps in ((1, 2), (3,)):
        for number in steps:
            meter.begin(detailed=number == steps[-1])
            meter.data_came()
            step(model, optimizer, meter.laps)
            meter.end(number, 100)
        line = meter.line() | meter.details()
        assert line["perf/tokens_per_s"] == pytest.approx(100 / line["perf/step_s"])
        parts = line["perf/data_wait_s"] + sum(line[f"perf/{part}_s"] for part in PARTS)
        assert 0 < parts <= line["perf/step_s"]
        assert (line["perf/slowest_rank"], line["perf/straggler_ratio"]) == (0, 1)
        assert 0 < line["train/update_ratio"] < 1
        assert all(metric_of(name) for name in line)


def test_waiting_is_no_work():
    began, worked = time.perf_counter(), working_s()
    time.sleep(0.2)  # what is tested: that it is left out, however long a core is not free afterwards
    waited = time.perf_counter() - began
    assert waited - (working_s() - worked) > 0.15
    until = time.thread_time() + 0.1
    worked = working_s()
    while time.thread_time() < until:
        pass
    assert working_s() - worked > 0.05


def test_the_slowest_rank_is_held_against_the_median_one():
    assert slowest_of([1.0, 1.0, 3.0, 1.0]) == (2, 3.0)
    assert slowest_of([2.0]) == (0, 1.0)
    assert slowest_of([0.0, 0.0]) == (0, 1.0)


def test_time_left_goes_by_the_steps_after_the_first():
    times = iter([100.0, 102.0, 106.0, 107.0])
    eta = Eta(10, clock=lambda: next(times))
    assert [eta.after(step) for step in (6, 7, 9, 10)] == [None, 6.0, 2.0, 0.0]


@pytest.mark.parametrize("log_every", [1, 3, 7, 10, 25])
def test_details_fall_on_lines_that_are_written(log_every):
    every = detailed_every(log_every)
    assert every >= DETAILED_EVERY
    assert is_due(every, log_every)
    assert every - log_every < DETAILED_EVERY
