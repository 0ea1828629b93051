"""Two pieces of work that do not need each other: one after the other, or each on half of a rank's threads.

Policy and critic see the same rollouts and share nothing. One small model keeps two threads busy badly, two models keep
one thread each busy well. For a rank by itself on a CPU: where ranks talk to each other, both would send at
the same time, and a GPU runs one after the other anyway.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from dist_lm.parallel.mesh import World

First = TypeVar("First")
Second = TypeVar("Second")


class Beside(Protocol):
    def __call__(self, first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]: ...


def one_after_other(first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
    """Both results, of the first one before the second begins."""
    return first(), second()


@contextmanager
def own_threads(world: World) -> Iterator[Beside]:
    """How this rank does two things: side by side where it is by itself on at least two threads of a CPU.

    An error of the first is raised, with a note of one of the second.
    """
    threads = torch.get_num_threads()
    if world.size > 1 or world.device.type != "cpu" or threads < 2:
        yield one_after_other
        return
    with ThreadPoolExecutor(1, "beside") as other:

        def beside(first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
            torch.set_num_threads(threads // 2)  # of both
            later = other.submit(second)
            try:
                found = first()
            except BaseException as error:
                if also := later.exception():
                    error.add_note(f"and beside it: {also!r}")
                raise
            finally:
                wait([later])  # nothing goes on behind an error of the first one
                torch.set_num_threads(threads)
            return found, later.result()

        yield beside
