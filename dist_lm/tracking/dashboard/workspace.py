"""A board as a workspace of wandb, with the same ids each time: pushed twice it is one view, not two."""

import hashlib
from typing import TYPE_CHECKING

from dist_lm.errors import ConfigError
from dist_lm.tracking.dashboard.fixed_ids import name_panel, name_view
from dist_lm.tracking.dashboard.layout import Board, Panel

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

PIP = "pip install 'dist_lm[dashboards]'"
COLUMNS, ROWS = 3, 4  # of a section, as far as it is seen without turning pages


def slug_of(board: Board) -> str:
    """What the address of its view ends with: 11 characters, as wandb's own."""
    return _id(board.name)[:11]


def view_name(board: Board) -> str:
    """The name under which the server keeps the view."""
    return f"nw-{slug_of(board)}-v"


def workspace_of(board: Board, entity: str, project: str) -> "Workspace":
    """The workspace, which nothing has been sent of.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as missing:
        raise ConfigError(f"dashboard push needs wandb-workspaces ({missing}): {PIP}") from missing

    def plot(panel: Panel) -> wr.LinePlot:
        made = wr.LinePlot(
            title=panel.title,
            x="Step",
            y=list(panel.names),
            metric_regex=panel.pattern or None,
            title_y=panel.unit or None,
            log_y=True if panel.logarithmic else None,
        )
        name_panel(made, _id(board.name, panel.title))
        return made

    layout = ws.SectionLayoutSettings(columns=COLUMNS, rows=ROWS)
    sections = [
        ws.Section(
            name=section.name,
            panels=[plot(panel) for panel in section.panels],
            is_open=section.is_open,
            layout_settings=layout,
        )
        for section in board.sections
    ]
    runs = ws.RunsetSettings(filters=f"JobType = '{board.stage}'") if board.stage else ws.RunsetSettings()
    made = ws.Workspace(
        entity=entity,
        project=project,
        name=board.title,
        sections=sections,
        runset_settings=runs,
        auto_generate_panels=False,
    )
    name_view(made, view_name(board))
    return made


def _id(*words: str) -> str:
    return hashlib.sha256("/".join(("dist_lm", *words)).encode()).hexdigest()
