"""Clears away a private Ray, also when the launch that started it is killed: `... ray_reaper DIRECTORY`.

Ray's own processes follow a killed driver, but some of them take a minute, and the directory stays. This
process waits for the end of its standard input, which the launch holds open, then ends every process that has
a file open below the directory (all of Ray's log there), and removes the directory.
"""

import os
import shutil
import sys
from pathlib import Path

import psutil

from dist_lm.cluster import process

GRACE_S = 1.0


def users_of(directory: Path, spared: int) -> list[psutil.Process]:
    """The living processes that have a file open below `directory`, but for the one with the id `spared`."""
    found = []
    for candidate in psutil.process_iter():
        try:
            if candidate.pid not in (spared, os.getpid()) and any(
                directory in Path(file.path).parents for file in candidate.open_files()
            ):
                found.append(candidate)
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # gone meanwhile, or of another user: not ours
            continue
    return found


def main() -> None:
    """Wait, then clear away; exit code 1 if something could not be ended."""
    directory, launch = Path(sys.argv[1]), os.getppid()
    sys.stdin.buffer.read()
    left = process.end(lambda: users_of(directory, launch), GRACE_S)
    shutil.rmtree(directory)
    if left:
        sys.exit(f"Ray processes that SIGKILL does not end: {left}")


if __name__ == "__main__":
    main()
