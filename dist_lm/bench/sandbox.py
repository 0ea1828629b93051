"""Runs of a small Python program with a test, or five: each in a new sandbox, or forked by a warm one.

Each core has a worker. Ceiling: a Python process for each core that only forks, and waits for its children.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from dist_lm.bench.case import Case, Comparison, GroupSize, configurations
from dist_lm.bench.rank import Trial
from dist_lm.config.root import Config
from dist_lm.parallel.mesh import World
from dist_lm.sandbox.pool import SandboxPool
from dist_lm.sandbox.program import Limits, Program, Test
from dist_lm.sandbox.sandbox import Sandbox
from dist_lm.storage.process import cores

WARM, COLD, FORK = "forked by a sandbox", "a new sandbox for each", "a fork and nothing else"
WARM_FIVE = "forked by a sandbox, five tests"
RUNS = 20  # programs of a step
PROGRAM = Program("python", "def add(a, b):\n    return a + b", (Test(code="assert add(2, 3) == 5"),))
PROGRAM_OF_FIVE = replace(PROGRAM, tests=PROGRAM.tests * 5)
LIMITS = Limits(cpu_s=5, wall_s=60)
_FORKS = """
import os, sys
for line in sys.stdin:
    for _ in range(int(line)):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
    print(flush=True)
"""


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns a case of one program, run in new and warm sandboxes; no key changes anything.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """
    return [
        Case(
            name=f"Python with a test, {cores()} workers",
            config=config,
            variants=dict.fromkeys((WARM, WARM_FIVE, COLD, FORK), GroupSize(1)),
            comparisons=[Comparison(variant=name, peer=COLD, ceiling=FORK) for name in (WARM, WARM_FIVE)],
            same_losses=frozenset(),
            amount=RUNS,
            unit="runs/s",
        )
        for config in configurations([["stage=language", "model=nano"]], overrides, quick)
    ]


def build(variant: str, config: Config, world: World) -> Trial:
    """Builds one variant; its processes end with this one."""
    # The programs are the same for every configuration.
    del config, world
    steps = {WARM: lambda: _warm(PROGRAM), WARM_FIVE: lambda: _warm(PROGRAM_OF_FIVE), COLD: _cold, FORK: _forks}
    return Trial(steps[variant](), losses=lambda: [0.0])


def _warm(program: Program) -> Callable[[], float]:
    """Returns a step that runs `program` RUNS times in warm sandboxes of a pool, which it starts and which ends with
    this process; a program that fails is an AssertionError."""
    # The pool ends with this process.
    pool = SandboxPool().__enter__()

    def step() -> float:
        verdicts = pool.run([program] * RUNS, LIMITS)
        assert all(verdict.outcome == "passed" for verdict in verdicts), verdicts
        return 0.0

    return step


def _cold() -> Callable[[], float]:
    """Returns a step that runs RUNS programs, each in a new sandbox, as many at a time as there are cores; a program
    that fails is an AssertionError."""
    threads = ThreadPoolExecutor(cores())

    def run(_: int) -> bool:
        with Sandbox() as sandbox:
            return sandbox.run(PROGRAM, LIMITS).outcome == "passed"

    def step() -> float:
        assert all(threads.map(run, range(RUNS))), "a sandbox failed"
        return 0.0

    return step


def _forks() -> Callable[[], float]:
    """Returns a step in which processes, one for each core, fork RUNS times altogether and wait for their children. The
    processes start now and end with this one."""
    # As many processes as the pool has workers.
    forkers = [
        subprocess.Popen([sys.executable, "-I", "-S", "-c", _FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(cores())
    ]

    def step() -> float:
        """Asks every process for its share of forks and waits for all; returns 0."""
        for process, count in zip(forkers, shares(RUNS, len(forkers)), strict=True):
            assert process.stdin
            process.stdin.write(f"{count}\n".encode())
            process.stdin.flush()
        for process in forkers:
            assert process.stdout
            process.stdout.readline()
        return 0.0

    return step


def shares(total: int, parts: int) -> list[int]:
    """Divides `total` into `parts` of the same size; the first ones are larger by one where it does not divide."""
    return [total // parts + (part < total % parts) for part in range(parts)]
