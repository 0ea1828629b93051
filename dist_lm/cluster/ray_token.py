"""The file that holds the token of a Ray cluster: there, and readable for its owner alone."""

from pathlib import Path

from dist_lm.cluster.ray_environment import ClusterError


def check_token_file(key: str, path: str) -> None:
    """Refuse a token file that is missing, empty, or that others can read.

    Args:
        key: where the path comes from, for the message.

    Raises:
        ClusterError: names key, path and way out; never the token.
    """
    file = Path(path)
    if not file.is_file():
        raise ClusterError(f"{key}={path}: no such file; it holds the token of the Ray cluster (mode 0600)")
    if file.stat().st_size == 0:
        raise ClusterError(f"{key}={path}: empty; it holds the token of the Ray cluster: write one into it")
    mode = file.stat().st_mode & 0o777
    if mode & 0o077:
        raise ClusterError(f"{key}={path}: mode {mode:04o} lets others read the token: `chmod 600 {path}`")
