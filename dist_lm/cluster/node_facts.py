"""What a node says about itself before ranks are started on it."""

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import dist_lm
from dist_lm.cluster.ranks import local_gpus


@dataclass(frozen=True)
class NodeFacts:
    """One node, as it sees itself."""

    host: str  # its name, in Slurm's words where there is Slurm
    time: float  # seconds since 1970, by its own clock
    sees_directory: bool  # the run directory is there, and it is the one the driver means
    free_bytes: Mapping[str, int]  # by directory: of the run, and of temporary files
    gpus: int
    code: str  # hash of the sources of dist_lm
    packages: Mapping[str, str]  # version of Python and of the packages dist_lm needs


SEEN_S = 5.0  # a network file system may take a moment to show a new file


def examine(directory: Path, mark: str) -> NodeFacts:
    """The facts of this node.

    Args:
        directory: of the run.
        mark: name of a file that the driver has put there; another disk may have a directory of the same name.
    """
    deadline = time.monotonic() + SEEN_S
    while not (sees := (directory / mark).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    here = [path for path in (directory, Path(tempfile.gettempdir())) if path.is_dir()]
    return NodeFacts(
        host=host_name(),
        time=time.time(),
        sees_directory=sees,
        free_bytes={str(path): shutil.disk_usage(path).free for path in here},
        gpus=local_gpus(),
        code=code_hash(),
        packages=package_versions(),
    )


def host_name() -> str:
    """The name of this node: Slurm's, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@cache
def code_hash() -> str:
    """A hash of every source file of dist_lm as it is installed here."""
    root = Path(dist_lm.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@cache
def package_versions() -> dict[str, str]:
    """Version of Python and of every package that dist_lm needs, by name."""
    found = {"python": platform.python_version()}
    for requirement in importlib.metadata.requires("dist_lm") or []:
        if "extra ==" not in requirement:
            name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
            found[name] = importlib.metadata.version(name)
    return found
