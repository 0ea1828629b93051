"""Starts a program of a user under limits: `python -I -S agent_start.py MEMORY PARENT PROGRAM ARGUMENTS...`.

A file of its own, without imports of ours: it runs before each conversation. It limits the memory of this process, ties
its life to its parent's, and becomes the program.
"""

import ctypes
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    memory_bytes, parent, *argv = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, hard))

    # A parent that is killed ends nobody itself.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
    os.execvp(argv[0], argv)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main()
