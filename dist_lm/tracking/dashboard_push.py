"""Saves dashboards as views of a wandb project, with the same ids every time: a second push replaces the first.

wandb-workspaces has no public way to choose ids. `name_panel`, `name_view` and `replace_view` are the only functions
that touch its private fields; tests/tracking/test_dashboard_ids.py notices an upgrade that renames them.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from dist_lm.config.root import TrackingConfig
from dist_lm.errors import ConfigError, UserError
from dist_lm.tracking.dashboard import Board, Panel
from dist_lm.tracking.wandb_login import wandb_mode

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces.workspaces import Workspace

PACKAGE = "wandb-workspaces"
TESTED = "0.4.13"
PIP = "pip install 'dist_lm[dashboards]'"
PANEL_FIELDS = ("_id",)
WORKSPACE_FIELDS = ("_internal_name", "_internal_id")
COLUMNS, ROWS = 3, 4  # panels of a section on one page


def push(
    boards: Sequence[Board], entity: str | None, project: str, environ: Mapping[str, str], say: Callable[[str], None]
) -> list[str]:
    """Saves each board as a view of a project at wandb's server and replaces the view of an earlier push.

    Args:
        entity: user or team in wandb; None: the default of the login.
        environ: holds the login.
        say: called with a line for each saved view.

    Returns:
        The address of each view, in the order of `boards`.

    Raises:
        ConfigError: no login or, without `entity`, no default one; wandb-workspaces is not installed, or it is a
            version with other fields.
        UserError: the server is unreachable or refuses; boards before that one are saved.
    """
    if wandb_mode(TrackingConfig(name="wandb"), environ) != "online":
        raise ConfigError(
            "dashboard push: no wandb login here: set WANDB_API_KEY or run `wandb login`; "
            "`dist-lm dashboard show` lists the panels without one"
        )

    # Building them needs no network, so a missing package is reported before wandb is asked.
    workspaces = [workspace_of(board, entity or "", project) for board in boards]

    with _in_one_line():
        import wandb

        owner = entity or wandb.Api().default_entity
        if not owner:
            raise ConfigError("dashboard push: the login has no default entity: give --entity NAME")

        addresses = []
        for board, workspace in zip(boards, workspaces, strict=True):
            workspace.entity = owner
            if saved_before := _at_server(workspace):
                replace_view(workspace, saved_before)
            workspace.save()
            addresses.append(workspace.url)
            say(f"{board.name}: {workspace.url}")

    return addresses


def workspace_of(board: Board, entity: str, project: str) -> "Workspace":
    """Returns a board as a workspace that has not been sent yet.

    Raises:
        ConfigError: wandb-workspaces is not installed, or it is a version with other fields.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as missing:
        raise ConfigError(f"dashboard push needs wandb-workspaces ({missing}): {PIP}") from missing

    def plot(panel: Panel) -> wr.LinePlot:
        """Returns the panel as a line plot over steps, with an id that follows from board and title."""
        line_plot = wr.LinePlot(
            title=panel.title,
            x="Step",
            y=list(panel.names),
            metric_regex=panel.pattern or None,
            title_y=panel.unit or None,
            log_y=panel.logarithmic or None,
        )

        name_panel(line_plot, _id(board.name, panel.title))
        return line_plot

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

    runs = ws.RunsetSettings()
    if board.stage:
        runs = ws.RunsetSettings(filters=f"JobType = '{board.stage}'")
    workspace = ws.Workspace(
        entity=entity,
        project=project,
        name=board.title,
        sections=sections,
        runset_settings=runs,
        auto_generate_panels=False,
    )
    # The id follows from the name, so that a second push finds the first one's view.
    name_view(workspace, f"nw-{slug_of(board)}-v")
    return workspace


def slug_of(board: Board) -> str:
    """Returns the last part of the view's address: 11 characters, as in wandb's own addresses."""
    return _id(board.name)[:11]


def _id(*words: str) -> str:
    return hashlib.sha256("/".join(("dist_lm", *words)).encode()).hexdigest()


def name_panel(panel: "wr.LinePlot", name: str) -> None:
    """Sets the id of a panel (12 characters, as in the package).

    Raises:
        ConfigError: the installed package has no such field; also raised by the two functions below.
    """
    _require(panel, PANEL_FIELDS)
    panel._id = name[:12]


def name_view(workspace: "Workspace", name: str) -> None:
    """Sets the name of a view at the server, `nw-SLUG-v`; the workspace's `url` ends with SLUG."""
    _require(workspace, WORKSPACE_FIELDS)
    workspace._internal_name = name


def replace_view(workspace: "Workspace", saved: "Workspace") -> None:
    """Makes `save` replace the view `saved` of the server."""
    _require(workspace, WORKSPACE_FIELDS)
    workspace._internal_id = saved._internal_id


def _require(instance: object, names: tuple[str, ...]) -> None:
    """Refuses a version of the package whose class of `instance` lacks one of these fields.

    Raises:
        ConfigError: names the fields and the tested version.
    """
    # Another version of the package may have renamed the fields: ids set on other names would be ignored.
    fields = getattr(instance, "__dataclass_fields__", {})
    if missing := [name for name in names if name not in fields]:
        raise ConfigError(
            f"{PACKAGE} {version(PACKAGE)}: {type(instance).__name__} has no field {', '.join(missing)}, which keeps "
            f"the ids of dashboards; use the tested version: pip install '{PACKAGE}=={TESTED}'"
        )


def _at_server(workspace: "Workspace") -> "Workspace | None":
    """Returns the workspace that the server has at this address; None if it has none.

    Raises:
        ValueError: wandb's, for any other refusal; errors of its client pass, too.
    """
    from wandb_workspaces.workspaces import Workspace

    try:
        return Workspace.from_url(workspace.url)
    except ValueError as missing:
        if "not found" not in str(missing):
            raise
        return None


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Silences wandb's client inside the block, by WANDB_SILENT, and turns its errors into one line.

    Raises:
        UserError: any exception of the block; one that is a UserError already passes unchanged.
    """
    silent = os.environ.get("WANDB_SILENT")
    os.environ["WANDB_SILENT"] = "true"

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client's layers raise exceptions of many types
        words = " ".join(str(error).split())[:400]
        raise UserError(
            f"dashboard push: wandb refused or was not reached ({type(error).__name__}: {words})"
        ) from error
    finally:
        if silent is None:
            del os.environ["WANDB_SILENT"]
        else:
            os.environ["WANDB_SILENT"] = silent
