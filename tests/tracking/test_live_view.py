"""The live view: no line is too wide, the important rows stay, old values are marked; its curves."""

from dataclasses import replace
from itertools import chain, repeat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.tracking.live_drawing import ASCII, UNICODE, glyphs_for, sparkline
from dist_lm.tracking.live_state import (
    FIGURES,
    LIMIT,
    GangFacts,
    LiveState,
    RankPulse,
    Series,
    TrainingState,
    Work,
    shrunk,
)
from dist_lm.tracking.live_view import view_lines
from dist_lm.tracking.progress import TaskProgress
from dist_lm.tracking.registry import metric_of
from tests.tracking.shown import NOW, in_training, pipeline, training

GANG = GangFacts(("node-0", "node-1"), 2, "cpu", "dp_replicate=1 dp_shard=2 tp=2")


def shown(state: LiveState, width: int = 80, height: int = 24, glyphs=UNICODE) -> list[str]:
    return [line.plain for line in view_lines(state, NOW, width, height, glyphs)]


def row(lines: list[str], start: str) -> str:
    return next(line for line in lines if start in line.split()[:2])


def test_a_stage_in_training_shows_all_there_is_to_know() -> None:
    lines = shown(in_training())
    assert lines[0].startswith("reward  run default in work")
    assert lines[0].endswith("stage 4 of 7 · 12:22 min")
    assert row(lines, "tokenizer").startswith("✓ tokenizer")
    assert row(lines, "tokenizer").endswith("3.1 s")
    assert row(lines, "code").endswith("214/400  1:33 min left")
    assert "━━━" in row(lines, "code")
    assert "─" in row(lines, "code")
    assert row(lines, "tools").startswith("· tools")
    loss = row(lines, "loss")
    assert "2.028" in loss
    assert loss.index("█") < loss.index("▁")
    assert loss.endswith("from 7.852")
    assert "2.000 bits/byte @ 200 " in row(lines, "val")
    assert "7,004 tokens/s" in row(lines, "speed")
    assert row(lines, "speed").endswith("MFU 12.3%")
    assert "0.003" in row(lines, "lr")
    assert row(lines, "saved").split(maxsplit=1)[1] == "step 200, 42 s ago · best val at step 200"
    assert "1 node × 2 on cpu · in a step" in row(lines, "ranks")
    assert "20 s ago: checkpoint step_00000100" in row(lines, "warning")


@pytest.mark.parametrize("glyphs", [UNICODE, ASCII], ids=["unicode", "ascii"])
@pytest.mark.parametrize("width", [1, 12, 40, 79, 119, 300])
@pytest.mark.parametrize("height", [1, 2, 4, 9, 16, 23, 60])
def test_nothing_is_wider_or_higher_than_the_terminal(width: int, height: int, glyphs) -> None:
    counting = Work("tokenizing code", 9000, 101.0, done=8000, text=lambda: "8,000 documents (1,203/s)")
    for state in (in_training(nodes=64), in_training(), pipeline(), pipeline(counting), LiveState(0.0)):
        lines = view_lines(state, NOW, width, height, glyphs)
        assert len(lines) <= height
        assert all(line.cell_len <= width for line in lines)
        assert all("\n" not in line.plain for line in lines)


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("height", [1, 3, 6, 24])
def test_the_stage_under_way_and_its_progress_are_the_last_to_go(width: int, height: int) -> None:
    lines = shown(in_training(), width, height)
    assert "code" in " ".join(lines)
    assert ("214/400" if width > 40 else "54%") in row(lines, "code")
    assert "1:33 min" in row(lines, "code")
    if height >= 3:
        assert "loss" in " ".join(lines)
    if height >= 6:
        assert "3 done: tokenizer, shards" in " ".join(lines) or "✓ language" in " ".join(lines)


def test_ascii_is_used_where_the_encoding_has_nothing_else() -> None:
    assert glyphs_for("utf-8") is UNICODE
    for encoding in ("ascii", "latin-1", "cp1252", "no such encoding"):
        assert glyphs_for(encoding) is ASCII
    "".join(shown(in_training(nodes=64), 80, 40, ASCII)).encode("ascii")


def test_work_that_does_not_train_shows_too() -> None:
    state = pipeline(Work("tokenizing code", None, 101.0, text=lambda: "12,345 documents (1,203/s)"))
    state.over.append("tokenizing language: 1,234 documents (1,201/s)")
    lines = shown(state)
    assert "tokenizing code: 12,345 documents (1,203/s)" in row(lines, "code")
    assert any("✓" in line and "tokenizing language" in line for line in lines)
    counted = Work("generate", 2000, 100.0, done=500, text=lambda: "500/2,000 prompts  1,203 tokens/s")
    lines = shown(pipeline(counted))
    assert row(lines, "code").endswith("500/2,000  32:07 min left")
    assert any("1,203 tokens/s" in line for line in lines)


def test_the_bar_tells_the_time_left_of_its_own_work() -> None:
    """Would find a time left that counts what the stage did before, or tasks of an earlier command."""
    work = Work("compare of code", 4, NOW - 10, done=2)
    assert row(shown(pipeline(work)), "code").endswith("2/4  10 s left")

    clock = chain([NOW - 10], repeat(NOW))
    tasks = TaskProgress(work, {0: 900e6, 1: 100e6, 2: 300e6, 3: 300e6}, [0], lambda: next(clock))
    for number in (0, 1):
        tasks.ended(number)
    assert row(shown(pipeline(work)), "code").endswith("2/4  1:00 min left")
    assert "2 of 4 tasks  10 MB/s  1:00 min left" in " ".join(shown(pipeline(work)))


def test_before_the_first_step_the_view_says_what_is_waited_for() -> None:
    state = TrainingState(400)
    work = Work("code", 400, 101.0, training=state)
    assert "asking for nodes" in row(shown(pipeline(work)), "code")
    state.gang = training().gang
    assert "starting ranks" in row(shown(pipeline(work)), "code")
    assert "starting" in row(shown(pipeline()), "code")


def test_a_rank_that_is_silent_is_named() -> None:
    assert "rank 1 in a step, silent 45 s" in row(shown(in_training(silent_s=45.0), 120), "ranks")
    lines = shown(in_training(nodes=64), 120, 60)
    assert any("and 56 nodes more" in line for line in lines)


@pytest.mark.parametrize("width", [48, 60, 79, 100, 160])
def test_no_fact_of_the_ranks_is_cut_off_where_there_are_rows(width: int) -> None:
    state = in_training(silent_s=45.0)
    training = state.works[0].training
    assert training
    training.start(replace(GANG, attempt=3))
    training.hear([RankPulse(0, 214, "in a step", 45.0)], NOW)
    training.take({"step": 215, "time": 1108.0, "perf/memory_gib": 1.25})
    lines = shown(state, width, 40)
    first = next(place for place, line in enumerate(lines) if line.split()[:1] == ["ranks"])
    said = " ".join(line[12:] for line in lines[first : first + 5])
    for fact in ("2 nodes × 2 on cpu", "attempt 3", "rank 0 in a step, silent 45 s", "GiB a rank", GANG.layout):
        assert fact in said
    assert (GANG.layout in lines[first]) == (width >= 160)


def test_a_stage_that_ends_says_how_it_came_out() -> None:
    state = in_training()
    state.works[0].finish("step 400/400")
    state.close(state.works[0])
    state.done("code", NOW)
    assert row(shown(state), "code").split()[:5] == ["✓", "code", "val", "2.000", "bits/byte"]


def test_without_stages_the_work_is_a_line() -> None:
    state = LiveState(0.0)
    state.works.append(Work("playing a step of code [x]", None, NOW - 3))
    assert [line[2:].split("  ")[0] for line in shown(state)] == ["playing a step of code [x]"]


def test_late_figures_of_tasks_are_no_resumed_run() -> None:
    state = TrainingState(400)
    for step in (9, 10):
        assert state.take({"step": step, "time": float(step), "train/loss": 3.0})
    state.take({"step": 5, "time": 11.0, "eval/own_sql/pass@1": 0.5, "eval/own_sql/low": 0.4})
    assert (state.step, state.newest["train/loss"], state.series["train/loss"].count) == (10, (3.0, 10), 2)
    state.take({"step": 5, "time": 12.0, "train/loss": 3.0})
    assert state.step == 5


def test_a_value_of_an_earlier_step_is_shown_with_that_step() -> None:
    state = TrainingState(400)
    now = dict.fromkeys((figure.metric for figure in FIGURES), 0.5) | {"perf/mfu": 0.25, "perf/memory_gib": 1.5}
    state.take({"step": 99, "time": 99.0} | now)
    state.take({"step": 100, "time": 100.0} | now)
    state.start(GANG)
    pipe = pipeline(Work("code", 400, 101.0, training=state))
    assert not any("@" in line for line in shown(pipe, 200, 40))
    state.take({"step": 101, "time": 101.0, "train/lr": 1e-3})
    lines = shown(pipe, 200, 40)
    for figure in FIGURES:
        one = next(line for line in lines if line.startswith(f"  {figure.label} "))
        assert ("@ 100" in one) == (figure.metric != "train/lr")
    assert row(lines, "speed").endswith("MFU 25% @ 100")
    assert any("1.50 GiB a rank @ 100" in line for line in lines)
    assert state.headline() == "wins 50% @ 100"
    state.take({"step": 102, "time": 102.0, "train/loss": None})
    assert "0.500 @ 100" in row(shown(pipe, 200, 40), "loss"), "a loss that is not finite leaves the old one, as old"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_curves_begin_in_one_column(width: int) -> None:
    lines = shown(in_training(), width, 40)
    starts = {min(place for place, one in enumerate(line) if one in UNICODE.ramp) for line in lines if "█" in line}
    assert len(starts) == 1


def test_lines_taken_back_do_not_bend_the_curves() -> None:
    state = training(upto=100)
    before = state.series["train/loss"].points()
    for step in range(1, 101):  # the file is read again
        state.take({"step": step, "time": 1000 + step / 2, "train/loss": before[step - 1]})
    assert state.series["train/loss"].points() == before
    assert "val/loss" not in state.newest, "what was measured after the step that the run went back to"


def test_every_figure_is_in_the_registry() -> None:
    for figure in FIGURES:
        metric = metric_of(figure.metric)
        assert metric.unit.startswith(figure.unit) or figure.unit in ("held out", "exact")


VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=600)


@settings(max_examples=30)
@given(VALUES)
def test_a_series_stays_small_and_keeps_the_mean(values: list[float]) -> None:
    series = Series()
    for value in values:
        series.add(value)
    points = series.points()
    assert len(points) <= LIMIT
    assert min(values) - 1e-6 <= min(points) <= max(points) <= max(values) + 1e-6
    assert series.first == values[0]


def test_a_long_series_keeps_its_shape() -> None:
    series = Series()
    for step in range(100_000):
        series.add(float(step))
    points = series.points()
    assert LIMIT // 2 <= len(points) <= LIMIT
    assert points == sorted(points)
    assert sum(points) / len(points) == pytest.approx(50_000, rel=0.02)


@settings(max_examples=30)
@given(VALUES, st.integers(1, 200))
def test_a_sparkline_is_never_wider_than_asked(values: list[float], width: int) -> None:
    for glyphs in (UNICODE, ASCII):
        line = sparkline(values, width, glyphs.ramp)
        assert len(line) == min(width, len(values))
        assert set(line) <= set(glyphs.ramp)


def test_lowest_and_highest_are_the_ends_of_the_ramp() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8, UNICODE.ramp) == UNICODE.ramp
    assert sparkline([10, 5], 8, UNICODE.ramp, floor=0) == "█▅"
    assert sparkline([3, 3, 3], 8, UNICODE.ramp) == UNICODE.ramp[4] * 3
    assert sparkline([], 8, UNICODE.ramp) == ""


def test_neighbours_are_put_together_evenly() -> None:
    assert shrunk([1, 3, 5, 7], 2) == [2, 6]
    assert shrunk([1, 2], 5) == [1, 2]
