"""Descriptors of a rank of a large job: so many that new ones lie beyond what select.select takes."""

import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

SELECTABLE = 1024  # descriptors that select.select takes


@contextmanager
def thousand_descriptors() -> Iterator[None]:
    """Opens descriptors until a new one is at least `SELECTABLE`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2 * SELECTABLE, hard), hard))
    with ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        descriptor = -1
        while descriptor < SELECTABLE - 1:
            descriptor = os.open(os.devnull, os.O_RDONLY)
            opened.callback(os.close, descriptor)
        yield
