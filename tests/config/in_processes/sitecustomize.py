"""Imported by Python at the start of processes whose PYTHONPATH has this folder: notes which keys they read.

The first read of a configuration key in a process appends `CLASS KEY PLACE` to a file in the folder $DIST_LM_KEYS_READ.
Only programs read: checks of the configuration's own classes, copies, comparisons and written files do not count.
"""

import dataclasses
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

PACKAGES = ("dist_lm.config.", "dist_lm.stages.", "dist_lm.rlhf.")  # whose dataclasses are configuration
COPIERS = ("/dataclasses.py", "/omegaconf/", "/copy.py", "/pickle.py", "/inspect.py", "<string>")
CHECKS = ("__post_init__", "check_stage")

folder = os.environ.get("DIST_LM_KEYS_READ", "")
plain_dataclass: Any = dataclasses.dataclass
noted: set[tuple[type, str]] = set()
checking = threading.local()


def role() -> str:
    """The kind of this process."""
    if "RANK" in os.environ and "dist_lm.train" in sys.orig_argv:
        return "rank"
    return "launcher" if "dist_lm.launch" in sys.orig_argv else "other"


def note(owner: type, key: str) -> None:
    caller = sys._getframe(2)
    place = caller.f_code.co_filename
    if (owner, key) in noted or any(copier in place for copier in COPIERS):
        return
    noted.add((owner, key))

    # one write to a file opened for appending: it is there even if the process is killed
    line = f"{owner.__name__} {key} {place.rpartition('/dist_lm/')[2]}:{caller.f_lineno}\n"
    file = os.open(f"{folder}/{role()}-{os.getpid()}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())
    os.close(file)


def without_notes(check: Callable[..., None]) -> Callable[..., None]:
    """A check of a dataclass, whose reads are not noted."""

    def checked(self: object, *arguments: Any) -> None:
        checking.depth = getattr(checking, "depth", 0) + 1
        try:
            check(self, *arguments)
        finally:
            checking.depth -= 1

    return checked


def watched(owner: Any) -> Any:
    """A dataclass whose reads are noted."""
    keys = frozenset(field.name for field in dataclasses.fields(owner))

    def read(self: object, name: str) -> Any:
        if name in keys and not getattr(checking, "depth", 0):
            note(type(self), name)
        return object.__getattribute__(self, name)

    owner.__getattribute__ = read
    for name in CHECKS:
        if name in vars(owner):
            setattr(owner, name, without_notes(vars(owner)[name]))
    return owner


def dataclass(cls: Any = None, /, **options: Any) -> Any:
    def made(owner: Any) -> Any:
        result = plain_dataclass(owner, **options)
        is_configuration = owner.__module__.startswith(PACKAGES) and not options.get("frozen")
        return watched(result) if is_configuration else result

    return made if cls is None else made(cls)


if folder:
    dataclasses.dataclass = dataclass
