"""Boards follow from the registry: every metric is in one panel of its stage, and no panel shows another stage's."""

import re
from collections import Counter

import pytest

from dist_lm.errors import ConfigError
from dist_lm.tracking.dashboard import BOARDS, LOGARITHMIC, OVERVIEW, SHARED_PANELS, Panel, board_of, boards
from dist_lm.tracking.registry import MEASURED_STAGES, all_metrics, metric_of, metrics_of


def shows(panel: Panel, name: str) -> bool:
    """Whether the panel plots a metric of a run."""
    return bool(re.fullmatch(panel.pattern, name)) if panel.pattern else name in panel.names


def example(name: str) -> str:
    """A name of a family, as a metrics file may hold it."""
    return name.replace("{completions}", "4").replace("{", "some_").replace("}", "")


@pytest.mark.parametrize("stage", MEASURED_STAGES)
def test_every_metric_of_a_stage_is_in_exactly_one_panel(stage: str) -> None:
    board = board_of(stage)
    for metric in metrics_of(stage):
        name = example(metric.name)
        assert metric_of(name) == metric
        assert [panel.title for panel in board.panels if shows(panel, name)] != [], name
        assert len([panel for panel in board.panels if shows(panel, name)]) == 1, name


@pytest.mark.parametrize("name", BOARDS)
def test_panels_show_nothing_that_is_not_in_the_registry(name: str) -> None:
    board = board_of(name)
    expected = [metric for metric in all_metrics() if not board.stage or board.stage in metric.stages]
    for panel in board.panels:
        assert panel.metrics
        assert all(metric in expected for metric in panel.metrics)
        assert all(metric_of(plotted) in panel.metrics for plotted in panel.names)
    titles = Counter(panel.title for panel in board.panels)
    assert max(titles.values()) == 1


def test_what_belongs_together_and_what_is_logarithmic_exists() -> None:
    names = {metric.name for metric in all_metrics()}
    assert names >= {name for group in SHARED_PANELS.values() for name in group}
    assert names >= set(LOGARITHMIC)
    code = {panel.title: panel for panel in board_of("code").panels}
    assert code["Loss, trained and held out"].names == ("train/loss", "val/loss")
    assert code["Loss, trained and held out"].unit == "nats/target"
    assert code["train/grad_norm"].logarithmic
    assert not code["train/lr"].logarithmic


def test_loss_comes_first_and_speed_last() -> None:
    assert [section.name for section in board_of("code").sections][:3] == ["loss", "held-out", "code"]
    assert [section.name for section in board_of("rlhf").sections][-2:] == ["time", "system"]


def test_agents_have_a_section_of_their_own() -> None:
    """Finds figures of conversations that are spread over the board, or reasons that lack a panel."""
    agents = next(section for section in board_of("rlhf").sections if section.name == "agents")
    for name in (
        "rollout/turns",
        "rollout/tool_errors",
        "rollout/cut_turns",
        "rollout/invalid_timeout",
        "timing/model_s",
    ):
        assert any(shows(panel, name) for panel in agents.panels), name
    time = next(section for section in board_of("rlhf").sections if section.name == "time")
    assert any(shows(panel, "timing/rollout_s") for panel in time.panels)
    overview = next(section for section in board_of(OVERVIEW).sections if section.name == "agents")
    assert any(shows(panel, "rollout/invalid_crashed") for panel in overview.panels)


def test_the_overview_has_every_stage() -> None:
    shown = {stage for panel in board_of(OVERVIEW).panels for metric in panel.metrics for stage in metric.stages}
    assert shown == set(MEASURED_STAGES)
    assert [board.name for board in boards()] == [OVERVIEW, *MEASURED_STAGES]


def test_a_board_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="board=tokenizer: expected overview, language"):
        boards("tokenizer")
    assert boards("code") == (board_of("code"),)
