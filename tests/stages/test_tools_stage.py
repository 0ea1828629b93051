"""The table that stage tools ends with."""

from dist_lm.prepare.compose import compose_config
from dist_lm.stages.tools import STAGE, kind_of, print_calls
from dist_lm.storage.run_directory import RunDirectory

METRICS = {
    "val/loss": 1.0,
    "tools/parses": 0.98,
    "tools/parses_single": 0.991,
    "tools/args_exact_single": 0.4,
    "tools/irrelevance": 0.5,
    "tools/irrelevance_irrelevant": 0.5,
    "tools/parallel_exact": 0.25,
    "tools/false_refusals": 0.01,
    "tools/false_refusals_single": 0.01,
}


def table(result: dict) -> list[list[str]]:
    class Recorded:
        rows: list[list[str]] = []  # noqa: RUF012

        def table(self, title, columns, rows):
            self.rows = [list(columns), *map(list, rows)]

    recorded = Recorded()
    print_calls(result, recorded)  # type: ignore[arg-type]
    return recorded.rows


def test_each_kind_is_a_row_with_figures_before_and_after():
    before = {"tools/parses": 0.0, "tools/parses_single": 0.004, "tools/args_exact_single": 0.0}
    head, *rows = table({"metrics": METRICS, "before": before})
    assert head == ["conversations", "parses", "fits a tool", "names", "arguments", "whole turn", "no call"]
    assert rows == [
        ["all", "0 -> 98", "", "", "", "", "50"],
        ["irrelevant", "", "", "", "", "", "50"],
        ["single", "0 -> 99", "", "", "0 -> 40", "", ""],
    ]


def test_other_stages_have_no_such_table():
    assert table({"metrics": {"val/loss": 1.0, "code/parses_python": 0.5}}) == []
    assert list(STAGE.own_entries({"metrics": {"code/parses_python": 0.5}})) == []
    assert list(STAGE.own_entries({"metrics": METRICS})) == [("calls", "parallel exact 25%, false refusals 1%")]


def test_names_of_kinds():
    assert [kind_of(name) for name in ("tools/parses", "tools/parses_single", "code/parses_bash")] == ["", "single", ""]
    assert kind_of("tools/parallel_exact") == ""


def test_the_summary_names_the_samples_only_if_there_are_some(tmp_path):
    """Finds a summary that sends the reader to an empty folder, where nothing was asked."""
    run, config = RunDirectory(tmp_path), compose_config(["stage=tools", "tracking=none"])
    result = {"parameters": 9, "steps": 1, "tokens": 1, "ranks": 1, "checkpoint": "step_1", "metrics": {}}
    run.samples.mkdir()
    assert "samples" not in dict(STAGE.entries(config, run, result))
    (run.samples / "step_00000001.jsonl").write_text("{}\n")
    assert dict(STAGE.entries(config, run, result))["samples"] == str(run.samples)
