"""The same ids at every push: all that is used of wandb-workspaces beyond its public interface.

The package draws ids by lot when a view is made, and has no public way to choose them: two pushes of one board would be
two views, and every panel of the second would look new. An upgrade that renames these fields is noticed here, and by
`tests/tracking/dashboard/test_fixed_ids.py`.
"""

import dataclasses
from importlib.metadata import version
from typing import TYPE_CHECKING

from dist_lm.errors import ConfigError

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import Panel
    from wandb_workspaces.workspaces import Workspace

PACKAGE = "wandb-workspaces"
TESTED = "0.4.13"
PANEL_FIELDS = ("_id",)
WORKSPACE_FIELDS = ("_internal_name", "_internal_id")


def name_panel(panel: "Panel", name: str) -> None:
    """Give a panel its id, of 12 characters as the package's own.

    Raises:
        ConfigError: the package has no such field any more; so for all that follow.
    """
    _require(panel, PANEL_FIELDS)
    panel._id = name[:12]


def name_view(workspace: "Workspace", name: str) -> None:
    """Say under which name (`nw-SLUG-v`) the server keeps a workspace; the last part of its `url` is SLUG."""
    _require(workspace, WORKSPACE_FIELDS)
    workspace._internal_name = name


def replace_view(workspace: "Workspace", known: "Workspace") -> None:
    """Have `save` put a workspace in the place of one that the server has."""
    _require(workspace, WORKSPACE_FIELDS)
    workspace._internal_id = known._internal_id


def _require(thing: object, names: tuple[str, ...]) -> None:
    there = {field.name for field in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
    if gone := [name for name in names if name not in there]:
        raise ConfigError(
            f"{PACKAGE} {version(PACKAGE)}: {type(thing).__name__} has no field {', '.join(gone)}, by which dashboards "
            f"keep their ids; use the version that was tested: pip install '{PACKAGE}=={TESTED}'"
        )
