"""What a report is made of, without a browser: reading, thinning, pictures, differences, escaping, size."""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError
from dist_lm.parallel.layout import Layout, placements
from dist_lm.report.charts import charts_of, downsample, family, readable_title, still_values, trend_of
from dist_lm.report.conditions import differences, from_defaults
from dist_lm.report.facts import RunFacts, Series
from dist_lm.report.layout import kinds, mesh_picture, parameter_picture, rank_memory
from dist_lm.report.mixture import COLOURS, mixtures
from dist_lm.report.overview import card_of
from dist_lm.report.page import write_report
from dist_lm.report.read import read_facts, read_run, read_series
from dist_lm.report.timeline import timeline_of
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tracking.registry import all_metrics
from tests.report.made_runs import HOSTILE, STAGES, make_corpora, make_pipeline, make_run, write_lines

MODEL = ModelConfig("small", d_model=64, n_layers=2, n_heads=4, d_ff=96, max_seq_len=64, vocab_size=512)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> WorkDirectory:
    return make_pipeline(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def page(work) -> str:
    path, _ = write_report([work.path], None, None)
    return path.read_text(encoding="utf-8")


def series(values) -> Series:
    return Series(np.arange(len(values)), np.array(values, float))


@given(st.integers(0, 1000), st.integers(1, 3000), st.integers(8, 400))
def test_thinning_keeps_extremes_and_ends_and_invents_nothing(seed, count, most):
    whole = series(np.random.default_rng(seed).normal(0, 1, count))
    thin = downsample(whole, most)
    assert len(thin.steps) <= most
    assert (np.diff(thin.steps) > 0).all()
    assert (thin.values == whole.values[thin.steps]).all()
    assert thin.values.min() == whole.values.min()
    assert thin.values.max() == whole.values.max()
    assert {thin.steps[0], thin.steps[-1]} == {whole.steps[0], whole.steps[-1]}


def test_a_stretch_without_a_finite_value_stays_a_gap():
    values = np.ones(10_000)
    values[4000:6000] = np.nan
    thin = downsample(series(values), 100)
    inside = (thin.steps >= 4100) & (thin.steps < 5900)
    assert inside.any()
    assert np.isnan(thin.values[inside]).all()


def test_a_trend_is_the_mean_around_a_step_and_none_for_a_smooth_curve():
    noisy = 5 + np.tile([-1.0, 1.0], 2000)
    trend = trend_of(series(noisy))
    assert trend is not None
    assert np.abs(trend.values[5:-5] - 5).max() < 0.1
    assert trend_of(series(np.linspace(0, 1, 4000))) is None
    assert trend_of(series(noisy[:50])) is None


def test_of_several_values_of_a_step_the_newest_counts_and_null_is_a_gap(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 2, "time": 5.0, "train/loss": 3.0}, {"step": 1, "time": 4.0, "train/loss": None}]
    write_lines(path, [*lines, {"step": 2, "time": 6.0, "train/loss": 2.5}])
    found, clock = read_series(path)
    assert found["train/loss"].steps.tolist() == [1, 2]
    assert math.isnan(found["train/loss"].values[0])
    assert found["train/loss"].values[1] == 2.5
    assert clock.values.tolist() == [4.0, 5.0]


def test_figures_that_arrive_late_move_no_clock(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = [{"step": step, "time": 36.0 * step, "train/loss": 3.0} for step in range(100, 401, 100)]
    write_lines(path, [*steps, {"step": 100, "time": 14401.0, "eval/own_python/pass@1": 0.5}])
    found, clock = read_series(path)
    assert clock.values.tolist() == [3600.0, 7200.0, 10800.0, 14400.0]
    assert found["eval/own_python/pass@1"].steps.tolist() == [100]


@pytest.mark.parametrize("layout", [Layout(1, 1, 1), Layout(2, 2, 1), Layout(1, 4, 3), Layout(2, 1, 4)])
def test_every_rank_is_in_the_mesh_and_parts_cover_what_ranks_hold(layout):
    attempt = {"nodes": [{"host": "<b>a</b>"}], "ranks_per_node": layout.world_size}
    mesh = str(mesh_picture(layout, attempt))
    assert {int(rank) for rank in re.findall(r"<title>rank (\d+),", mesh)} == set(range(layout.world_size))
    assert "<b>" not in mesh
    for kind in kinds(MODEL, layout):
        titles = re.findall(r"<title>ranks? ([^<]*)</title>", str(parameter_picture(kind, layout)))
        held = [rank for title in titles for rank in expanded(title)]
        assert set(held) == set(range(layout.world_size)), kind
        assert len(held) == layout.world_size, "a rank holds one part"


def expanded(title: str) -> list[int]:
    ranges = [part.split("-") for part in title.split(", ")]
    return [rank for part in ranges for rank in range(int(part[0]), int(part[-1]) + 1)]


def test_kinds_hold_all_matrices():
    layout = Layout(1, 2, 2)
    large = sum(
        math.prod(placement.logical)
        for name, placement in placements(MODEL, layout).items()
        if len(placement.logical) > 1 and not name.endswith("_bias")
    )
    assert sum(kind.elements for kind in kinds(MODEL, layout)) == large


def test_a_layout_of_a_thousand_ranks_stays_a_small_picture():
    picture = mesh_picture(Layout(2, 64, 8), {"ranks_per_node": 8, "nodes": [{"host": str(n)} for n in range(128)]})
    assert len(picture) < 200_000


def test_differences_are_the_keys_that_differ_and_defaults_what_was_set():
    first = {"stage": {"name": "code", "lr": 1e-3, "steps": 10}, "run_id": "a"}
    second = {"stage": {"name": "code", "lr": 2e-3, "steps": 10, "new": True}, "run_id": "b"}
    rows = {row.key: row.values for row in differences([first, second])}
    assert rows == {"stage.lr": ("0.001", "0.002"), "stage.new": ("–", "true")}
    assert {row.key: row.values for row in from_defaults(first)}["stage.lr"] == ("0.0001", "0.001")


@pytest.mark.heavy
def test_a_work_directory_means_the_runs_of_its_newest_command(work):
    facts = read_facts([work.path])
    assert [run.stage for run in facts.runs] == list(STAGES)
    assert facts.works[0].pipeline["state"] == "done"
    assert read_facts([work.path / "runs"]).runs[0].label == "language"
    assert [run.label for run in read_facts([work.run("code", "default").path]).runs] == ["default"]


def test_what_is_no_run_is_refused_in_one_line(tmp_path, work):
    with pytest.raises(ArtefactError, match="nothing to report on; give a run"):
        read_facts([tmp_path])
    with pytest.raises(ArtefactError, match="run ids: default"):
        read_facts([work.path], "other")
    with pytest.raises(ArtefactError, match="--output"):
        write_report([work.path], tmp_path / "absent" / "report.html", None)
    with pytest.raises(ArtefactError, match="absent: does not exist; give a run"):
        write_report([tmp_path / "absent"], None, None)
    with pytest.raises(ArtefactError, match=r"config.yaml: not a directory; give a run"):
        write_report([work.run("code", "default").config], None, None)
    with pytest.raises(ArtefactError, match="--run-id other: selects a command of a work directory"):
        write_report([work.run("code", "default").path], tmp_path / "report.html", "other")


@pytest.mark.heavy
def test_a_command_without_a_run_does_not_hide_those_before_it(tmp_path):
    """A launch that failed before its first stage was the newest command: `report work` had nothing to report on."""
    work = make_pipeline(tmp_path, steps=10)
    failed = json.loads(work.pipeline("rlhf", "default").read_text()) | {"run_id": "lab", "state": "failed"}
    path = work.pipeline("rlhf", "lab")
    path.write_text(json.dumps(failed))
    os.utime(path, (4e9, 4e9))  # the newest
    assert {run.run_id for run in read_facts([work.path]).runs} == {"default"}
    with pytest.raises(ArtefactError, match=r"run_id=lab has no run of a stage yet; --run-id default has$"):
        read_facts([work.path], "lab")


@pytest.mark.heavy
def test_a_damaged_file_is_refused_by_its_path(tmp_path):
    work = make_pipeline(tmp_path, steps=10)
    run = work.run("code", "default")
    for path in (work.pipeline("rlhf", "default"), work.tokenizer_report, run.result, run.config):
        kept = path.read_bytes() if path.exists() else None
        path.write_text("a: [")
        with pytest.raises(ArtefactError, match=re.escape(str(path))):
            read_facts([work.path])
        path.unlink() if kept is None else path.write_bytes(kept)


@pytest.mark.parametrize("record", ["{}", "[1]", '{"run_id": "default"}', '{"stages": []}'])
def test_a_record_of_a_command_without_its_keys_is_refused_by_its_path(tmp_path, record):
    """Finds a KeyError in place of the file and the way out."""
    path = WorkDirectory(tmp_path).pipeline("rlhf", "default")
    path.parent.mkdir()
    path.write_text(record)
    with pytest.raises(ArtefactError, match=re.escape(f"{path}: not the record of a command; move it away")):
        read_facts([tmp_path])


@pytest.mark.parametrize("line", ['{"time": 1.0, "step": 3}', '{"event": "stopped"}', "[1]", "7"])
def test_a_line_that_is_no_event_is_refused_by_its_number_and_half_a_line_is_not(tmp_path, line):
    run = make_run(WorkDirectory(tmp_path), "code", steps=10)
    whole = run.events.read_text()
    run.events.write_text(f'{{"time": 1.0, "ev\n{whole}')
    assert len(read_run(run, "code").events) == whole.count("\n")
    run.events.write_text(f"{whole}{line}\n")
    place = f"{run.events}:{whole.count(chr(10)) + 1}: not an event: {line!r}; move the file away"
    with pytest.raises(ArtefactError, match=re.escape(place)):
        read_facts([run.path])


def test_what_a_stage_is_for_comes_first(tmp_path):
    run = make_run(WorkDirectory(tmp_path), "rlhf", "default", steps=20)
    measured = [{"step": step, "time": 2e9 + step, "rlhf/win_rate": 0.5 + step / 100} for step in (0, 20)]
    write_lines(run.metrics, [*map(json.loads, run.metrics.read_text().splitlines()), *measured])
    facts = read_run(run, "default")
    first = card_of(facts).figures[0]
    assert (first.name, first.value, first.before, first.at) == ("rlhf/win_rate", "0.7", "0.5", "")
    assert charts_of({"rlhf": [facts]}, [facts])[0].first[0].name == "rlhf/win_rate"


def test_attempts_failures_and_checkpoints_are_on_the_timeline(work):
    run = read_run(work.run("code", "default"), "code")
    timeline = timeline_of([run])
    assert timeline is not None
    kinds_of = [item.kind for item in timeline.lanes[0].items]
    assert kinds_of.count("attempt") == 2
    assert kinds_of.count("failed") == 1
    assert kinds_of.count("best") == 1
    assert all(0 <= item.start <= 100 and item.start + item.width <= 100.5 for item in timeline.lanes[0].items)


@pytest.mark.heavy
def test_a_family_of_metrics_is_one_chart_and_runs_that_are_compared_share_one(work, tmp_path):
    run = read_run(work.run("code", "default"), "first")
    chart = next(c for c in charts_of({"code": [run]}, [run])[0].charts if c.name == "val/bits_per_byte")
    assert [line.label for line in chart.lines] == ["all", "bash", "python", "sql"]
    second = read_run(make_run(WorkDirectory(tmp_path), "code", "second"), "second")
    charts = charts_of({"code": [run, second]}, [run, second])[0].charts
    loss = next(c for c in charts if c.name == "val/bits_per_byte_python")
    assert [line.label for line in loss.lines] == ["first", "second"]
    assert [line.colour for line in loss.lines] == [0, 1]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("val/bits_per_byte", "Bits per byte, validation"),
        ("train/grad_norm", "Gradient norm, training"),
        ("perf/tokens_per_s", "Tokens per second"),
        ("perf/memory_gib", "Memory"),
        ("rlhf/kl", "KL divergence (rlhf)"),
        ("unknown", "unknown"),
    ],
)
def test_titles_are_words(name, title):
    assert readable_title(name) == title


def test_titles_of_all_metrics_differ_within_a_stage():
    for stage in ("code", "tools", "reward", "rlhf", "preference", "generate"):
        names = {family(metric) for metric in all_metrics() if stage in metric.stages}
        assert len({readable_title(name) for name in names}) == len(names)


@pytest.mark.heavy
def test_a_chart_has_at_most_eight_lines_and_no_line_is_lost(tmp_path):
    run = make_run(WorkDirectory(tmp_path), "code", "default", steps=20)
    parts = [f"val/bits_per_byte_language{part:02}" for part in range(13)]
    lines = []
    for n in range(1, 9):
        values = {part: 9.0 + index - n for index, part in enumerate(parts)}
        lines.append({"step": n, "time": n, "val/bits_per_byte": 9 - n, **values})
    write_lines(run.metrics, lines)
    facts = read_run(run, "default")
    charts = [chart for chart in charts_of({"code": [facts]}, [facts])[0].charts if chart.name == "val/bits_per_byte"]
    assert [len(chart.lines) for chart in charts] == [8, 6]
    assert [chart.title for chart in charts] == [f"Bits per byte, validation ({n} of 2)" for n in (1, 2)]
    assert len({line.label for chart in charts for line in chart.lines}) == 14


@pytest.mark.heavy
def test_only_what_is_wrong_has_the_colour_of_a_warning(tmp_path):
    run = make_run(WorkDirectory(tmp_path), "code", "default", steps=20)
    lines = [{"step": n, "time": n, "train/loss": 1 / n, "train/skipped_steps": 0} for n in range(1, 5001)]
    write_lines(run.metrics, lines)
    page = write_report([run.path], None, None)[0].read_text(encoding="utf-8")
    assert '<p class="note">5,000 measured values' in page
    assert 'class="note warning"' not in page
    assert '<details class="group still">' in page


def test_nothing_of_a_run_becomes_markup_or_loads_anything(page):
    assert HOSTILE not in page
    assert "&lt;/script&gt;&lt;script&gt;document.title" in page
    assert page.count("<script") == 3
    assert not re.findall(
        r"""(?:src|href)\s*=\s*["'](?!#|data:,)[^"']*""", re.sub(r"<script.*?</script>", "", page, flags=re.S)
    )
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert "unsafe" not in policy[1]
    assert policy[1].startswith("default-src &#39;none&#39;")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("state", "error", "said"), [("stopped", "by SIGINT", "stopped by SIGINT"), ("failed", "no luck", "no luck")]
)
def test_why_a_command_ended_is_a_whole_sentence(tmp_path, state, error, said):
    work = make_pipeline(tmp_path, steps=10)
    path = work.pipeline("rlhf", "default")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": state, "error": error}))
    page = write_report([work.path], None, None)[0].read_text(encoding="utf-8")
    assert f'<p class="error {state}">{said}</p>' in page


def test_no_secret_is_in_it(page):
    assert "hunter2" not in page


@pytest.mark.heavy
def test_a_name_of_a_run_cannot_end_the_data(tmp_path):
    run = make_run(WorkDirectory(tmp_path), "language", "default", steps=20)
    write_lines(run.metrics, [{"step": n, "time": n, f"val/loss_{HOSTILE}": n} for n in range(1, 9)])
    path, _ = write_report([run.path], None, None)
    page = path.read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="chart-data">(.*?)</script>', page, re.S)
    assert data
    assert HOSTILE in json.dumps(json.loads(data[1])["charts"][0]["lines"][0]["label"]).encode().decode(
        "unicode_escape"
    )
    assert page.count("<script") == 3


def test_a_run_that_failed_at_once_has_a_report(tmp_path):
    run = make_run(WorkDirectory(tmp_path), "code", "default", finished=False)
    for path in (run.metrics, run.events, *run.samples.iterdir()):
        path.unlink()
    page = write_report([run.path], None, None)[0].read_text(encoding="utf-8")
    assert "No step has been measured yet" in page
    assert "unfinished" in page


@pytest.mark.heavy
def test_a_long_run_with_many_metrics_stays_small(tmp_path):
    run = make_run(WorkDirectory(tmp_path), "code", "default", steps=20)
    count, names = 5_000, [f"train/grad_norm_{n}" for n in range(20)]
    values = np.random.default_rng(0).random((count, len(names))).tolist()
    write_lines(
        run.metrics, ({"step": n + 1, "time": n} | dict(zip(names, values[n], strict=True)) for n in range(count))
    )
    path, size = write_report([run.path], None, None)
    assert size < 1e6
    assert "5,000 measured values" in path.read_text(encoding="utf-8")


def test_what_makes_no_curve_is_said_in_words(work, tmp_path):
    run = make_run(WorkDirectory(tmp_path), "code", "default", steps=20)
    lines = [{"step": n, "time": n, "train/loss": 5 - n / 9, "train/skipped_steps": 0} for n in range(1, 9)]
    write_lines(run.metrics, [*lines, {"step": 8, "time": 8, "val/loss": 2.5, "val/loss_sql": 2.25}])
    facts = read_run(run, "default")
    charts = charts_of({"code": [facts]}, [facts])[0]
    assert [chart.name for chart in charts.charts] == ["train/loss"]
    assert {chart.name for chart in charts.still} == {"train/skipped_steps", "val/loss"}
    values = next(still_values(chart) for chart in charts.still if chart.name == "val/loss")
    assert [(one.label, one.value, one.when) for one in values] == [("all", "2.5", "step 8"), ("sql", "2.25", "step 8")]
    page = write_report([run.path], None, None)[0].read_text(encoding="utf-8")
    assert "2 metrics, measured once or constant" in page


@pytest.mark.parametrize(("muon", "moments"), [("0", 2), ("0.02", 1)])
def test_what_a_rank_holds_is_what_its_optimizer_keeps(tmp_path, muon, moments):
    overrides = [f"stage.muon.lr={muon}"]
    run = read_run(make_run(WorkDirectory(tmp_path), "code", "default", overrides=overrides), "code")
    assert run.model
    assert run.layout
    memory = rank_memory(run.model, run.layout, [run])
    assert [part.label for part in memory.parts] == ["weights", "gradients", "moments of the optimizer"]
    assert memory.parts[-1].start + memory.parts[-1].width == pytest.approx(100)
    weights, gradients, kept = (part.width for part in memory.parts)
    assert weights == gradients
    assert moments * weights <= kept + 1e-9 <= 2 * weights + 1e-9
    assert (kept == pytest.approx(2 * weights)) == (moments == 2)
    assert "Measured at most: 1.25 GiB" in memory.words


@pytest.mark.parametrize(
    ("pretrain_mix", "read"), [(None, {"tools", "code"}), ({"language": 0.2}, {"tools", "code", "language"})]
)
def test_a_run_reads_the_mix_of_its_pretraining_text(pretrain_mix, read):
    """Finds a report without the corpora of rlhf.pretrain_mix, and one that fails for a run without it."""
    rlhf = {"pretrain_coefficient": 0.1, "pretrain_corpus": "code", "pretrain_mix": pretrain_mix}
    config = {"stage": {"corpus": "tools"}, "rlhf": rlhf}
    nothing = Series(np.zeros(0, int), np.zeros(0))
    run = RunFacts(
        Path("run"), "rlhf", "rlhf", "run", "finished", config, {}, None, None, {}, nothing, {}, (), {}, (), None
    )
    assert run.corpora == read


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("stage", "overrides", "read"),
    [
        ("language", [], ["language"]),
        ("code", ["stage.mix={tools: 0.2}"], ["code", "tools"]),
        ("code", ["stage.phases=[{until: 5, mix: {code: 1}}, {mix: {tools: 1}}]"], ["code", "tools"]),
        (
            "rlhf",
            ["stage.corpus=tools", "rlhf.pretrain_coefficient=0.1", "rlhf.pretrain_corpus=code"],
            ["code", "tools"],
        ),
        ("rlhf", ["rlhf.prompts_from=prompts.txt", "stage.corpus=tools"], []),
    ],
)
def test_only_corpora_that_the_run_read_are_listed(tmp_path, stage, overrides, read):
    work = make_pipeline(tmp_path, steps=10)
    run = make_run(work, stage, "other", steps=10, overrides=overrides)
    facts = read_facts([run.path])
    assert list(facts.works[0].corpora) == read
    page = write_report([run.path], None, None)[0].read_text(encoding="utf-8")
    assert [name for name in ("code", "language", "tools") if f'<th scope="row">{name}</th>' in page] == read
    assert ("These runs read no corpora" in page) == (not read)


@pytest.mark.heavy
def test_the_mixture_of_a_run_with_phases_is_that_of_all_its_steps(tmp_path):
    """Finds a bar that shows the last phase, the share that weights would have without passes, or no bar."""
    work = make_pipeline(tmp_path, steps=10)
    kinds = {f"kind_{number}": 200 for number in range(2)}
    make_corpora(work, {"tools": kinds})
    phases = "stage.phases=[{until: 5, mix: {code: 3, language: 1}}, {mix: {code: 1, tools: 1 epoch}}]"
    run = make_run(work, "code", "phased", steps=10, overrides=[phases, "stage.global_batch=4", "stage.seq_len=100"])
    facts = read_facts([run.path])
    (bar,) = mixtures(facts.runs, facts.works)
    width_of = {share.label: share.width for share in bar.shares}
    assert width_of["kind_0"] == width_of["kind_1"] == pytest.approx(100 * 200 / 4000)
    assert sum(width_of.values()) == pytest.approx(100)
    n_language = 100 * 5 * 4 * 100 / 4 / 4000
    corpora = facts.works[0].corpora
    assert sum(width_of[name] for name in corpora["language"].splits["train"].languages) == pytest.approx(n_language)


@pytest.mark.heavy
def test_every_slice_of_a_mixture_has_a_colour_of_its_own_and_the_smallest_share_one(tmp_path):
    work = make_pipeline(tmp_path, steps=10)
    kinds = {f"tools_{number}": 10_000 * (number + 1) for number in range(9)}
    make_corpora(work, {"tools": kinds})
    overrides = ["stage.mix={code: 0.3, language: 0.1}"]
    run = make_run(work, "tools", "many", steps=10, overrides=overrides)
    facts = read_facts([work.run("code", "default").path, run.path])
    few, many = (mixture.shares for mixture in mixtures(facts.runs, facts.works))
    for shares in (few, many):
        assert len({share.colour for share in shares}) == len(shares) <= COLOURS
        assert shares[-1].start + shares[-1].width == pytest.approx(100)
    colour_of = {share.label: share.colour for share in many}
    assert [colour_of[share.label] for share in few[:2]] == [share.colour for share in few[:2]], "python and bash"
    assert many[-1].label == "6 others"
    assert all(name in many[-1].words for name in list(kinds)[:5])
    assert sum(share.width for share in many[:-1]) > 2 * many[-1].width
