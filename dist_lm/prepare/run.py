"""Locks a run and writes what its ranks read: for the launcher, and for ranks that torchrun starts without one.

A run has two locks. The launcher holds one while it starts ranks again and again, rank 0 holds the other while it
trains; without a launcher rank 0 holds both.

This module imports neither torch nor Hydra, because every rank imports it.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from dist_lm.config.evaluation import OWN_TASKS, OWN_TESTS
from dist_lm.config.root import Config, save_config
from dist_lm.errors import ConfigError
from dist_lm.parallel.layout import started_layout
from dist_lm.stages.registry import load_config
from dist_lm.storage.lock import OWN_JOB_S, locked
from dist_lm.storage.run_directory import RunDirectory

LAUNCH_WAIT_S = 1.0  # a process that only tests a lock holds it for a moment


@dataclass(frozen=True)
class Ranks:
    """The ranks that torchrun has started, the same number on each node."""

    nodes: int
    per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node

    @classmethod
    def started(cls, environ: Mapping[str, str]) -> "Ranks":
        """Returns the ranks that torchrun has started, by the variables that it sets for each of them.

        WORLD_SIZE must be there (KeyError). Without LOCAL_WORLD_SIZE all ranks are on one node.

        Raises:
            ConfigError: the nodes do not have the same number of ranks.
        """
        world_size = int(environ["WORLD_SIZE"])
        per_node = int(environ.get("LOCAL_WORLD_SIZE", world_size))
        nodes = int(environ.get("GROUP_WORLD_SIZE", world_size // per_node))
        if nodes * per_node != world_size:
            raise ConfigError(
                f"torchrun has started {world_size} ranks on {nodes} nodes, {per_node} of them on this one: expected "
                "the same --nproc-per-node on every node"
            )
        return cls(nodes, per_node)


def launch_lock(run: RunDirectory, job: str | None = None) -> AbstractContextManager[None]:
    """Returns the lock of the process that starts a run, for a `with` block, which waits `LAUNCH_WAIT_S` for it.

    Args:
        job: batch job of this process; an owner of the same job is waited for, `OWN_JOB_S` seconds.

    Raises:
        ArtefactError: another process holds it; the message names host and process.
    """
    return locked(run.launch_lock, job=job, wait_s=LAUNCH_WAIT_S)


def rank_lock(
    run: RunDirectory, tell: Callable[[str], object], stopped: Callable[[], bool]
) -> AbstractContextManager[None]:
    """Returns the lock of rank 0, for a `with` block.

    Ranks of a failed attempt take a moment to end, and their locks on NFS are released even later: the block waits for
    them, at most `OWN_JOB_S` seconds.

    Args:
        tell: called once with a line that says which ranks it waits for.
        stopped: asked while waiting; if it returns True the wait ends with the error below.

    Raises:
        ArtefactError: other ranks train this run and do not end; the message names host and process.
        OSError: the lock file cannot be opened.
    """

    def on_wait(owner: str) -> None:
        tell(f"waiting for the ranks of {owner}, which train {run.path}")

    return locked(run.rank_lock, wait_s=OWN_JOB_S, on_wait=on_wait, stopped=stopped)


def begin_attempt(config: Config, run: RunDirectory) -> None:
    """Writes what the ranks read: the configuration, the hashes of the files that must not change, and the version of
    the tests of our own problems. Removes `result.json`.

    Args:
        config: with a resolved layout (`dist_lm.prepare.layout.with_layout`).

    Raises:
        ArtefactError: the record of these hashes is damaged.
        OSError: a file cannot be read or written.
    """
    save_config(config, run.config)
    run.note_files(config.noted_files)
    if any(task in OWN_TASKS for task in config.stage.eval_tasks):
        run.note_tests(OWN_TESTS, OWN_TASKS)
    # A finished run may go on with more steps.
    run.result.unlink(missing_ok=True)


def fit_to_ranks(run: RunDirectory, ranks: Ranks) -> None:
    """Resolves the layout of a run again and rewrites its configuration file, unless it was started with as many ranks.

    The tensor-parallel size stays, and the other axes are resolved. A layout that no ranks were started with is only
    filled in.

    Raises:
        ConfigError: layout or batch do not fit the ranks, or this version does not accept the file; it is unchanged.
        OSError: the file cannot be read or written.
        ArtefactError: the file is missing, or is no configuration of a run.
    """
    config = load_config(run.config)
    layout = started_layout(config)
    if layout and layout.world_size == ranks.world_size:
        return

    # Imports Hydra, which ranks of the launcher need not.
    from dist_lm.prepare.layout import for_ranks

    save_config(for_ranks(config, ranks.nodes, ranks.per_node), run.config)
