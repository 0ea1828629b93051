"""`--cpu-times FILE` appends the CPU seconds of each test, its processes included: `sort -rn FILE` shows the dearest.

Wall clock depends on what else the machine does; CPU time hardly does. It sums up pytest, the processes that it waited
for, and living processes that inherited the mark in their environment, so that daemons of a Ray count too. The time of
an orphan that ends before the test does is lost.
"""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

MARK = "DIST_LM_CPU_TIMES"
TICKS = os.sysconf("SC_CLK_TCK")


class CpuTimes:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.mark = f"{os.getpid()}"
        os.environ[MARK] = self.mark

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        yield from self._measure(item, "setup")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        yield from self._measure(item, "call")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        yield from self._measure(item, "teardown")

    def _measure(self, item: pytest.Item, phase: str) -> Iterator[None]:
        before = self._total()
        try:
            return (yield)
        finally:
            with self.path.open("a") as lines:
                print(f"{self._total() - before:.2f}\t{phase}\t{item.nodeid}", file=lines)

    def _total(self) -> float:
        """CPU seconds of this process, of children that it waited for, and of marked processes that live."""
        own = resource.getrusage(resource.RUSAGE_SELF)
        waited = resource.getrusage(resource.RUSAGE_CHILDREN)
        return own.ru_utime + own.ru_stime + waited.ru_utime + waited.ru_stime + self._living()

    def _living(self) -> float:
        total = 0
        wanted = f"{MARK}={self.mark}".encode()
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) == os.getpid():
                continue
            try:
                if wanted not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended, or belongs to someone else
                continue
            # utime, stime, and the same of children that it waited for
            total += sum(int(field) for field in fields[11:15])
        return total / TICKS
