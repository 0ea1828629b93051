"""Profiled steps: the numbers are those of a run without a profile, the trace holds the steps that were asked for."""

import gzip
import json
from typing import ClassVar

import pytest
import torch
from torch.profiler import ProfilerActivity

from dist_lm.errors import ConfigError
from dist_lm.prepare.compose import compose_config, overrides_of
from dist_lm.stages.continuing import FREE_KEYS, differing_keys
from dist_lm.training import step_profiler
from dist_lm.training.profile_summary import read_profile
from dist_lm.training.step_meter import WallLaps
from dist_lm.training.step_profiler import STEP, StepProfiler


def train(profiler: StepProfiler, steps: range, stopped: bool = False) -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    wall = WallLaps()
    with profiler:
        for completed in steps:
            profiler.reached(completed)
            laps = profiler.marked(wall)
            laps.start()
            loss = model(torch.full((4, 8), float(completed))).square().sum()
            laps.lap("forward")
            loss.backward()
            laps.lap("backward")
            optimizer.step()
            optimizer.zero_grad()
            laps.lap("optimizer")
            assert wall.take().keys() == {"forward", "backward", "optimizer"}
        if not stopped:
            profiler.reached(steps.stop)
    return model.weight.detach()


def steps_in(path) -> list[str]:
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return sorted(event["name"].removeprefix(STEP) for event in events if event["name"].startswith(STEP))


@pytest.mark.parametrize(
    ("asked", "steps", "found"),
    [
        ((2, 3), range(6), ["2", "3"]),
        ((1, 2), range(2), ["1", "2"]),  # all of the run
        ((3, 5), range(3, 6), ["4", "5"]),  # a run that continues
    ],
)
def test_the_steps_that_were_asked_for_are_traced_and_change_nothing(tmp_path, asked, steps, found):
    trace = tmp_path / "profile" / "trace.json.gz"
    plain = train(StepProfiler((98, 99), False, trace, tmp_path), steps)
    assert torch.equal(train(StepProfiler(asked, False, trace, tmp_path), steps), plain)
    assert steps_in(trace) == found
    profile = read_profile(trace)
    assert profile.steps == tuple(map(int, found))
    assert profile.parts.keys() == {"data", "forward", "backward", "optimizer", "rest"}
    assert sum(profile.parts.values()) <= profile.step
    assert profile.operators["aten::addmm"][0] == 1
    assert 0 < profile.compute < profile.step
    assert (profile.hidden, profile.exposed) == (0, 0)


def test_a_run_that_is_stopped_inside_the_window_writes_no_trace_and_says_so(tmp_path, caplog):
    train(StepProfiler((3, 9), False, tmp_path / "trace.json.gz", tmp_path), range(5), stopped=True)
    assert not list(tmp_path.iterdir())
    assert "no trace of profile.steps=[3,9]" in caplog.text


def test_a_gpu_also_leaves_a_memory_snapshot_of_these_steps(tmp_path, monkeypatch):
    calls, done = [], []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *_, **given: calls.append((given, done[:])))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append((path, done[:])))
    monkeypatch.setattr(step_profiler, "profile", FakeProfile)
    memory = tmp_path / "memory.pickle"
    with StepProfiler((3, 4), True, tmp_path / "trace.json.gz", memory) as profiler:
        for completed in range(6):
            profiler.reached(completed)
            done.append(completed + 1)
    started, dumped, stopped = calls
    assert started[0]["max_entries"] == step_profiler.MEMORY_EVENTS
    assert started[1] == [1, 2]
    assert dumped == (str(memory), [1, 2, 3, 4])
    assert stopped[0] == {"enabled": None}
    assert FakeProfile.activities == [ProfilerActivity.CPU, ProfilerActivity.CUDA]


class FakeProfile:
    """torch's profiler, without a GPU."""

    activities: ClassVar[list[ProfilerActivity]] = []

    def __init__(self, activities):
        FakeProfile.activities = activities

    def prepare_trace(self):
        pass

    start_trace = stop_trace = prepare_trace

    def export_chrome_trace(self, path):
        pass


@pytest.mark.parametrize(("asked", "steps"), [((8, 9), range(5)), ((2, 3), range(3, 6)), ((6, 7), range(5))])
def test_steps_that_do_not_come_leave_no_trace(tmp_path, asked, steps):
    train(StepProfiler(asked, False, tmp_path / "trace.json.gz", tmp_path), steps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", ["[3]", "[0,2]", "[4,4]", "[5,3]", "[1,2,3]", "[1,21]"])
def test_steps_that_no_run_has_are_refused(steps):
    with pytest.raises(ConfigError, match=r"profile\.steps"):
        compose_config(["stage=language", "model=nano", "stage.steps=20", f"profile.steps={steps}"])


@pytest.mark.heavy
def test_a_run_that_continues_may_profile_other_steps():
    old, new = (compose_config(["stage=language", "model=nano", f"profile.steps={steps}"]) for steps in ("[]", "[2,3]"))
    assert differing_keys(old, new, "", FREE_KEYS) == []
    assert differing_keys(old, new, "", ()) != []


def test_only_the_target_stage_is_profiled():
    overrides = ["profile.steps=[2,3]", "seed=1"]
    assert overrides_of("code", "code", overrides) == ["stage=code", *overrides]
    assert overrides_of("language", "code", overrides) == ["stage=language", "seed=1"]
