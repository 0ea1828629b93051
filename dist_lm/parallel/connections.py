"""Connections of a rank: gloo connects every two ranks of a group, so they grow with the ranks, and each takes one of
the files that a process may have open.
"""

import resource

from dist_lm.errors import ConfigError
from dist_lm.parallel.layout import Layout

OTHER_FILES = 512  # tars, logs and pipes of a rank, with room to spare


def connections_of(layout: Layout) -> int:
    """Returns how many connections of gloo a rank has. On GPUs it has them beside those of NCCL."""
    n_ranks = layout.world_size
    sizes = (layout.dp_replicate * layout.dp_shard, layout.dp_replicate, layout.dp_shard, layout.tp)
    # An axis of all ranks uses the first group. Saving of checkpoints has a group of its own, in a thread.
    of_axes = sum(size - 1 for size in sizes if size < n_ranks)
    return 2 * (n_ranks - 1) + of_axes


def allow_connections(layout: Layout) -> None:
    """Raises the limit of open files of this process if its connections need that.

    Raises:
        ConfigError: the limit may not be raised that far.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections_of(layout) + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{layout.world_size:,} ranks: a rank may have at most {hard:,} open files, expected {needed:,} for its "
            "connections: raise the hard limit of all nodes (ulimit -Hn; LimitNOFILE= of slurmd)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
