"""Boards on their way to wandb's server, where people look at them."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dist_lm.config.tracking import TrackingConfig
from dist_lm.errors import ConfigError, UserError
from dist_lm.tracking.dashboard.fixed_ids import replace_view
from dist_lm.tracking.dashboard.layout import Board
from dist_lm.tracking.dashboard.workspace import workspace_of
from dist_lm.tracking.wandb_run import wandb_mode

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


def push(
    boards: Sequence[Board], entity: str | None, project: str, environ: Mapping[str, str], say: Callable[[str], None]
) -> list[str]:
    """Save each board as a view of a project: a new one, or what was pushed before under the same name.

    Args:
        entity: user or team; None: that of the login.
        environ: where the login is looked up.
        say: is told of each view that is saved.

    Returns:
        The addresses.

    Raises:
        ConfigError: no login, or wandb-workspaces is not installed.
        UserError: the server cannot be reached, or refuses.
    """
    if wandb_mode(TrackingConfig(name="wandb"), environ) != "online":
        raise ConfigError(
            "dashboard push: no wandb login here: set WANDB_API_KEY or run `wandb login`; "
            "`dist-lm dashboard show` lists the panels without one"
        )
    made = [workspace_of(board, entity or "", project) for board in boards]
    with _in_one_line():
        import wandb

        owner = entity or wandb.Api().default_entity
        if not owner:
            raise ConfigError("dashboard push: the login has no default entity: give --entity NAME")
        addresses = []
        for board, workspace in zip(boards, made, strict=True):
            workspace.entity = owner
            if known := _at_server(workspace):
                replace_view(workspace, known)
            workspace.save()
            addresses.append(workspace.url)
            say(f"{board.name}: {workspace.url}")
    return addresses


def _at_server(workspace: "Workspace") -> "Workspace | None":
    """The workspace that the server has at this address; None where there is none yet."""
    from wandb_workspaces.workspaces import Workspace

    try:
        return Workspace.from_url(workspace.url)
    except ValueError as missing:
        if "not found" not in str(missing):
            raise
        return None


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Whatever wandb's client fails with is said in one line; it says little itself of what is going on."""
    silent, os.environ["WANDB_SILENT"] = os.environ.get("WANDB_SILENT"), "true"
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of a library with many layers, each with exceptions of its own
        words = " ".join(str(error).split())[:400]
        raise UserError(
            f"dashboard push: wandb refused or was not reached ({type(error).__name__}: {words})"
        ) from error
    finally:
        if silent is None:
            del os.environ["WANDB_SILENT"]
        else:
            os.environ["WANDB_SILENT"] = silent
