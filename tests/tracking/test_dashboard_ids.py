"""The few fields of wandb-workspaces that are not its public interface: an upgrade that renames them fails here."""

import ast
import dataclasses
from pathlib import Path

import pytest

from dist_lm.errors import ConfigError
from dist_lm.tracking import dashboard_push
from dist_lm.tracking.dashboard import board_of
from dist_lm.tracking.dashboard_push import (
    PANEL_FIELDS,
    WORKSPACE_FIELDS,
    name_panel,
    name_view,
    replace_view,
    slug_of,
    workspace_of,
)

PRIVATE = {"name_panel", "name_view", "replace_view"}


def test_the_installed_package_still_has_them() -> None:
    reports = pytest.importorskip("wandb_workspaces.reports.v2.interface")
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    for made_of, names in ((reports.Panel, PANEL_FIELDS), (workspaces.Workspace, WORKSPACE_FIELDS)):
        assert {field.name for field in dataclasses.fields(made_of)} >= set(names), made_of


def test_ids_that_were_set_are_what_the_server_gets() -> None:
    pytest.importorskip("wandb_workspaces")
    made = workspace_of(board_of("code"), "e", "p")
    known = workspace_of(board_of("code"), "e", "p")
    known._internal_id = "view-1"
    replace_view(made, known)
    view = made._to_model()
    assert (view.name, view.id) == (f"nw-{slug_of(board_of('code'))}-v", "view-1")
    ids = [panel.id for section in view.spec.section.panel_bank_config.sections for panel in section.panels]
    assert len(set(ids)) == len(ids) == len(board_of("code").panels)
    again = workspace_of(board_of("code"), "e", "p")._to_model()
    assert again.spec == view.spec


def test_panels_are_logarithmic_where_the_board_says_so() -> None:
    """Finds a plot whose axis is always linear."""
    pytest.importorskip("wandb_workspaces")
    board = board_of("code")
    plots = [plot for section in workspace_of(board, "e", "p").sections for plot in section.panels]
    assert [bool(plot.log_y) for plot in plots] == [panel.logarithmic for panel in board.panels]
    assert any(panel.logarithmic for panel in board.panels)


@pytest.mark.parametrize("use", [lambda thing: name_panel(thing, "a"), lambda thing: name_view(thing, "a")])
def test_a_package_without_them_is_named_with_the_version_that_has_them(use) -> None:
    pytest.importorskip("wandb_workspaces")

    @dataclasses.dataclass
    class Renamed:
        other: str = ""

    with pytest.raises(ConfigError, match=r"Renamed has no field _.* pip install 'wandb-workspaces==\d"):
        use(Renamed())


def test_no_other_function_touches_a_private_name() -> None:
    tree = ast.parse(Path(dashboard_push.__file__).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert functions > PRIVATE
    for part in tree.body:
        if isinstance(part, ast.FunctionDef) and part.name in PRIVATE:
            continue
        for node in ast.walk(part):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                assert node.attr.startswith("__"), node.lineno
            if isinstance(node, ast.ImportFrom):
                names = [*f"{node.module}".split("."), *(alias.name for alias in node.names)]
                assert not [name for name in names if name.startswith("_") or name == "internal"], node.lineno
