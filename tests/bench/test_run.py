"""Rounds and records of a benchmark."""

import io
import json
from collections import Counter

import pytest
from rich.console import Console

from dist_lm.bench.case import Case, Comparison, GroupSize, records_of, spread, table_of, why_absent
from dist_lm.bench.progress import progress
from dist_lm.bench.run import LONGEST_ROUND, order_of_round, run_benchmark, seconds_per_step
from dist_lm.errors import ConfigError
from dist_lm.prepare.compose import compose_config

# --- rounds: every variant once in each, none always first, and as many steps as fill the time ---


WAYS = ["a", "b", "c"]


def test_every_way_takes_every_place_equally_often():
    rounds = [order_of_round(WAYS, index) for index in range(2 * len(WAYS))]
    assert all(sorted(order) == WAYS for order in rounds)
    for place in range(len(WAYS)):
        assert Counter(order[place] for order in rounds) == dict.fromkeys(WAYS, 2)


def test_a_benchmark_without_a_terminal_says_what_it_does_every_ten_seconds():
    """It printed nothing for ten minutes."""
    errors = io.StringIO()
    times = iter([0.0, *range(0, 65, 5)])
    with progress(Console(file=io.StringIO()), errors, lambda: next(times)) as say:
        for number in range(13):
            say(f"round {number}")
    assert errors.getvalue().splitlines() == [f"{10 * n:4} s  round {2 * n}" for n in range(7)]


def test_each_round_is_said():
    said: list[str] = []
    seconds_per_step(WAYS, 3, lambda variant, steps: 1.0, say=said.append)
    assert said == ["round 1 of 3", "round 2 of 3", "round 3 of 3"]


def test_ways_are_interleaved_and_a_figure_is_a_step():
    speed = {"a": 0.1, "b": 0.003, "c": 9.0}
    calls = []

    def time_steps(variant: str, steps: int) -> float:
        calls.append((variant, steps))
        return speed[variant] * steps

    seconds = seconds_per_step(WAYS, 4, time_steps, round_s=0.5)
    assert seconds == {variant: pytest.approx([speed[variant]] * 4) for variant in WAYS}
    timed = calls[len(WAYS) :]
    assert [variant for variant, _ in timed] == [
        variant for index in range(4) for variant in order_of_round(WAYS, index)
    ]
    assert dict(timed) == {"a": 5, "b": LONGEST_ROUND, "c": 1}


def test_spread_is_that_of_the_middle_half():
    assert spread([2.0]) == 0
    assert spread([3.0] * 5) == 0
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == pytest.approx(2 / 3)


# --- peers that cannot run ---


def test_a_missing_package_is_named():
    assert why_absent(["json", "not_there", "nor_this"]) == "not_there, nor_this not installed"
    assert why_absent(["json"]) is None


def test_an_installed_release_without_a_module_is_named_with_one_that_has_it(tmp_path, monkeypatch):
    made = tmp_path / "half_there" / "inner"
    made.mkdir(parents=True)
    for folder in (made, made.parent):
        (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "half_there-2.5.dist-info").mkdir()
    (tmp_path / "half_there-2.5.dist-info" / "METADATA").write_text("Name: half_there\nVersion: 2.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    known = {"half_there.inner": "half_there"}
    assert why_absent(["half_there"], known) is None
    for module in ("half_there.inner.gone", "half_there.gone", "half_there.gone.part"):
        reason = why_absent(["half_there"], known | {module: "half_there<2"})
        assert reason == f"half_there 2.5 has no {module} (half_there<2 has)"


# --- records: the keys that other programs read, what their numbers mean, and the table ---


KEYS = (
    *("bench", "case", "value", "unit", "peer", "peer_value", "ratio"),
    *("ceiling", "ceiling_fraction", "rounds", "spread"),
)
SECONDS = {"ours": [0.1, 0.2, 0.1], "theirs": [0.4, 0.4, 0.5], "bound": [0.05, 0.05, 0.05]}
FACTS = {"ours": {"peak MiB": 3.0}, "theirs": {"peak MiB": 4.0}, "bound": {}}


def records(*comparisons: Comparison):
    config = compose_config(["stage=language", "model=nano", "stage.global_batch=2", "stage.seq_len=50"])
    case = Case("toy", config, dict.fromkeys(SECONDS, GroupSize(1)), comparisons, frozenset())
    return records_of("test", case, SECONDS, FACTS)


def test_a_line_has_the_keys_and_the_ratio_is_of_the_medians():
    line = json.loads(records(Comparison("ours", peer="theirs", ceiling="bound"))[0].to_json())
    assert tuple(line) == KEYS
    assert (line["value"], line["peer_value"], line["ceiling"]) == pytest.approx((1000, 250, 2000))
    assert line["ratio"] == line["value"] / line["peer_value"]
    assert line["ceiling_fraction"] == line["value"] / line["ceiling"]
    assert (line["unit"], line["rounds"], line["peer"]) == ("tokens/s", 3, "theirs")


def test_a_peer_that_could_not_run_has_a_name_and_no_number():
    line = json.loads(records(Comparison("ours", peer_name="theirs: not installed"))[0].to_json())
    assert line["peer"] == "theirs: not installed"
    assert all(line[key] is None for key in ("peer_value", "ratio", "ceiling", "ceiling_fraction"))


def test_a_fact_is_compared_in_its_own_unit():
    record = records(Comparison("ours", peer="theirs", fact="peak MiB"))[0]
    assert (record.value, record.peer_value, record.ratio) == (3.0, 4.0, 0.75)
    assert (record.unit, record.rounds, record.spread) == ("MiB", 1, 0.0)
    assert record.case == "toy: ours, peak"


def test_the_table_shows_all_of_it_in_eighty_columns():
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table_of("Toy", records(Comparison("ours", peer="theirs", ceiling="bound"))))
    shown = console.export_text()
    for text in ("case", "value", "peer", "ratio", "ceiling", "spread", "1,000 tokens/s", "theirs", "4.00", "(50%)"):
        assert text in shown


def test_an_unknown_benchmark_is_told_every_name():
    with pytest.raises(ConfigError, match=r"^bench sandbx: expected one of tp, .*sandbox, learn, scaling$"):
        run_benchmark("sandbx", [], Console(file=io.StringIO()), quick=True, json_file=None)
