"""Programs and their verdicts, limits, what a broken sandbox says, and what is left when the harness is killed."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import pytest

from dist_lm.errors import ConfigError
from dist_lm.sandbox import sandbox as module
from dist_lm.sandbox.memory_group import MemoryGroup
from dist_lm.sandbox.pool import SandboxPool
from dist_lm.sandbox.program import Attempt, Limits, Program, Test, attempts_of, infrastructure_error, verdict_of
from dist_lm.sandbox.sandbox import Fences, Sandbox, SandboxError, fences
from dist_lm.storage.process import is_alive, title
from tests.patience import patient
from tests.sandbox.as_user import ROOT
from tests.sandbox.lost_server import kill_server
from tests.sandbox.test_memory_group import groups_of

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
DEADLINE_S = patient(60)
LIMITS = Limits(cpu_s=1, wall_s=60)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as one:
        yield one


CASES = {
    "asserts": ("python", "def f(x):\n    return x + 1", Test(code="assert f(1) == 2"), Test(code="assert f(1) == 3")),
    "input": ("python", "print(int(input()) * 2)", Test(stdin="4\n", stdout="8"), Test(stdin="x\n", stdout="8")),
    "exit_code": (
        "python",
        "import sys; print(1); sys.exit(int(input()))",
        Test(stdin="0", stdout="1"),
        Test(stdin="3"),
    ),
    "before": (
        "python",
        "g = f(2)",
        Test(before="def f(x): return x", code="assert g == 2"),
        Test(code="assert g == 2"),
    ),
    "lines": ("python", "print('a\\r\\nb c \\n\\n')", Test(stdout="a\nb c"), Test(stdout="a\nb\nc")),
    "other_line_ends": ("python", "print('a\\x0cb\\u2028c')", Test(stdout="a\x0cb\u2028c"), Test(stdout="a\nb\nc")),
    "annotations": (
        "python",
        "def f(x: int): pass",
        Test(code="assert f.__annotations__ == {'x': int}"),
        Test(code="def g(x: List): pass"),
    ),
    "syntax": ("python", "print(1)\n", Test(stdout="1\n\n"), Test(code="assert (")),
    "threads": (
        "python",
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.05), print(input()))).start()",
        Test(stdin="late", stdout="late"),
        Test(stdin="late", stdout="early"),
    ),
    "main": ("python", "if __name__ == '__main__':\n    print(exit)", Test(code="exit"), Test(stdout="")),
    "bash": ("bash", "f() { echo $(($1 + 1)); }", Test(code='[ "$(f 1)" = 2 ]'), Test(code='[ "$(f 1)" = 3 ]')),
    "bash_pipes": (
        "bash",
        "tr a-z A-Z | cat <(head -1)",
        Test(stdin="ab\nc\n", stdout="AB"),
        Test(stdin="b", stdout="AB"),
    ),
    "bash_strict": ("bash", "set -eu", Test(code="true"), Test(code="set -e; false; true")),
    "bash_exit_code": (
        "bash",
        "set -e\n[ -e none ] && cat none",
        Test(code="[ $? -eq 1 ]"),
        Test(code="[ $? -eq 0 ]"),
    ),
    "bash_quotes": ("bash", """x='it'"'"'s' # it's \\""", Test(code='[ "$x" = "it\'s" ]'), Test(code="[ $x = its ]")),
    "sql": (
        "sql",
        "select a, b / 2.0, null, x'61' from t order by a",
        Test(before="create table t (a, b); insert into t values (2, 5), (1, 2)", stdout="1|1.0||a\n2|2.5||a"),
        Test(before="create table t (a)"),
    ),
    "sql_as_the_shell_prints": (
        "sql",
        "select 1e20, -1e-5, 1e15, 1e14, 1 / 3.0, cast(5 as real), 9e999, 7, null, x'610062', 'a' || char(0) || 'b'",
        Test(stdout="1.0e+20|-1.0e-05|1.0e+15|100000000000000.0|0.333333333333333|5.0|Inf|7||a|a"),
        Test(stdout="1e+20|-1e-05|1e+15|100000000000000.0|0.333333333333333|5.0|inf|7||a\0b|a\0b"),
    ),
    "sql_code": (
        "sql",
        "create table u (a)",
        Test(code="select count(*) = 0 from u"),
        Test(code="select count(*) from u"),
    ),
    "sql_one_query": ("sql", "select 1", Test(code="select 1;; -- the end"), Test(code="select 1; select 1")),
}


@pytest.mark.parametrize("name", CASES)
def test_first_test_passes_and_second_fails(sandbox: Sandbox, name: str):
    language, source, *tests = CASES[name]
    verdict = sandbox.run(Program(language, source, tuple(tests)), LIMITS)
    assert verdict.results == (True, False), verdict
    assert verdict.outcome == "failed"
    assert (verdict.passed, verdict.total) == (1, 2)


def test_expected_output_stays_outside(sandbox: Sandbox):
    """Not even the memory of the interpreter holds it, whereas the input is there."""
    source = """
import gc, sys
frame, found = sys._getframe(), []
while frame:
    found.append(repr(frame.f_locals))
    frame = frame.f_back
print("the_answer" + "_is" in "".join(found), "the_question" + "_is" in "".join(found))
"""
    program = Program("python", source, (Test(stdin="the_question_is", stdout="the_answer_is"),))
    assert sandbox.run(program, LIMITS).stdout == ("False True\n",)


def test_limits_hold_for_all_tests_together(sandbox: Sandbox):
    loops = tuple(Test(code="while True: pass") for _ in range(5))
    verdict = sandbox.run(Program("python", "", (Test(), *loops)), replace(LIMITS, cpu_s=0.2))
    assert verdict.outcome == "timeout"
    assert verdict.results == (True, *(False,) * 5)
    assert verdict.cpu_seconds < 1


def test_memory_of_all_processes_is_limited(sandbox: Sandbox):
    """By a cgroup, where this process may make one."""
    if not fences().memory_group:
        pytest.skip("no cgroup here that this process may use")
    source = """
import os
(ready, is_ready), (done, is_done) = os.pipe(), os.pipe()
children = []
for _ in range(8):
    child = os.fork()
    if child == 0:
        os.close(is_done)
        x = bytearray(100 << 20)
        os.close(is_ready)
        os.read(done, 1)
        os._exit(0)
    children.append(child)
os.close(is_ready)
os.read(ready, 1)  # until each holds its memory, or has ended
os.close(is_done)
raise SystemExit(any(os.waitpid(child, 0)[1] for child in children))
"""
    limits = replace(LIMITS, cpu_s=10, memory_bytes=200 << 20)
    assert sandbox.run(Program("python", source), limits).outcome != "passed"
    assert sandbox.run(Program("python", source), replace(limits, memory_bytes=1 << 30)).outcome == "passed"


def test_same_verdict_whatever_the_environment_is(monkeypatch):
    source = """
import locale, random, time
print(list({"a", "b", "c", "d", "e", "f"}), random.random(), time.tzname, locale.getlocale(), hash("x"))
"""
    seen = set()
    for seed, zone in (("1", "America/Lima"), ("2", "Asia/Tokyo")):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        monkeypatch.setenv("TZ", zone)
        with Sandbox() as one:
            seen.add(one.run(Program("python", source), LIMITS).stdout)
    assert len(seen) == 1


# --- infrastructure ---


def test_a_server_that_is_killed_is_replaced_and_the_program_runs_again():
    with Sandbox() as one:
        assert one.run(Program("python", ""), LIMITS).outcome == "passed"
        killed = one._server
        kill_server(one)
        assert one.run(Program("python", "print(1)"), LIMITS).stdout == ("1\n",)
        assert one._server is not killed


def test_a_program_that_had_no_core_is_an_infrastructure_error():
    program = Program("python", "", (Test(), Test()))
    starved = Attempt(4, -9, False, 0.01, 4.0, "", "")
    fine = Attempt(0, 0, False, 0.01, 0.01, "", "")
    assert verdict_of(program, [fine, starved]).outcome == "infrastructure"
    assert verdict_of(program, [fine]).outcome == "infrastructure"
    assert verdict_of(program, [fine, fine]).outcome == "passed"


def test_an_answer_that_was_cut_off_is_refused():
    with pytest.raises(ValueError, match="no answer of a sandbox"):
        attempts_of(b"xx")


def test_without_bubblewrap_it_fails_closed_and_names_the_way_out(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    for make in (Sandbox, SandboxPool):
        fences.cache_clear()
        with (
            pytest.raises(SandboxError, match=r"bubblewrap is not installed.*apt-get install.*sandbox=trust_me"),
            make(),
        ):
            pass
    fences.cache_clear()


def test_trusted_programs_run_without_isolation_and_it_says_so(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    fences.cache_clear()
    try:
        assert "NO ISOLATION" in fences(trust_me=True).describe()
        with Sandbox(trust_me=True) as one:
            assert one.run(Program("python", "print(1)", (Test(stdout="1"),)), LIMITS).outcome == "passed"
            assert one.run(Program("bash", "echo x >left", (Test(code="ls left"),)), LIMITS).outcome == "passed"
            assert one.run(Program("bash", "ls", (Test(stdout=""),)), LIMITS).outcome == "passed"
            assert (
                one.run(Program("bash", "while :; do :; done & wait"), replace(LIMITS, cpu_s=0.1)).outcome == "timeout"
            )
    finally:
        fences.cache_clear()


@pytest.fixture
def failing_trials(monkeypatch) -> Iterator[Callable[[int, str], None]]:
    """(count, reason): the first trials of a sandbox end with an infrastructure error."""
    fences.cache_clear()
    run = Sandbox.run

    def fail(count: int, reason: str) -> None:
        left = [infrastructure_error(Program("python", ""), reason)] * count
        monkeypatch.setattr(Sandbox, "run", lambda *given: left.pop() if left else run(*given))

    yield fail
    fences.cache_clear()


BUSY = ["TimeoutError: timed out", "BlockingIOError: [Errno 11] Resource temporarily unavailable", ""]


@pytest.mark.parametrize("reason", BUSY)
def test_one_trial_that_fails_does_not_end_isolation(failing_trials, reason: str):
    failing_trials(1, reason)
    assert fences(trust_me=True).namespaces


@pytest.mark.parametrize("reason", BUSY)
def test_a_busy_machine_does_not_end_isolation(failing_trials, reason: str):
    failing_trials(module.TRIALS, reason)
    with pytest.raises(SandboxError, match="too busy to try out a sandbox"):
        fences(trust_me=True)
    assert fences(trust_me=True).namespaces


def test_trust_is_for_machines_that_refuse_a_sandbox(failing_trials):
    failing_trials(module.TRIALS, "OSError: the sandbox ended. bwrap: No permissions to create new namespace")
    assert not fences(trust_me=True).namespaces


def test_a_sandbox_that_lets_a_program_out_is_refused(monkeypatch):
    """The trial at the start finds it: here the root can be written to."""
    options_of = module._bubblewrap_options

    def writable(found: Fences) -> list[str]:
        options = options_of(found)
        place = options.index("--remount-ro")
        return options[:place] + options[place + 2 :]

    monkeypatch.setattr(module, "_bubblewrap_options", writable)
    fences.cache_clear()
    with pytest.raises(SandboxError, match="/ is writable"):
        fences()
    fences.cache_clear()


def test_what_it_can_enforce_is_one_line():
    line = Fences(True, False, 0, False, False).describe()
    fenced = "namespaces, own /tmp, no network, limits"
    assert line == f"sandbox: {fenced}, no Landlock in this kernel, no seccomp here, memory by process"


@pytest.mark.parametrize("wrong", [{"cpu_s": 0}, {"memory_bytes": -1}])
def test_a_limit_of_nothing_is_refused(wrong: dict):
    with pytest.raises(ConfigError, match="more than 0"):
        Limits(**wrong)


# --- pool ---


def test_pool_keeps_the_order_and_outlives_bombs():
    programs = [
        Program("python", f"print({i})" if i % 5 else "while True: pass", (Test(stdout=str(i)),)) for i in range(12)
    ]
    with SandboxPool(workers=3) as pool:
        verdicts = pool.run(programs, replace(LIMITS, cpu_s=0.1))
    assert [verdict.outcome for verdict in verdicts] == ["passed" if i % 5 else "timeout" for i in range(12)]


HARNESS = """
import os
from dist_lm.sandbox.pool import SandboxPool
from dist_lm.sandbox.program import Limits, Program
sleeper = Program("bash", "sleep 600 & setsid sleep 600 & sleep 600")
with SandboxPool(workers=2) as pool:
    for _ in range(2):
        pool.submit(sleeper, Limits(wall_s=600))
    input()
"""


def test_a_killed_harness_leaves_no_process():
    harness = subprocess.Popen([sys.executable, "-c", HARNESS], cwd=ROOT, stdin=subprocess.PIPE)
    below: list[psutil.Process] = []
    deadline = time.monotonic() + DEADLINE_S
    while sum(title(process) == "sleep 600" for process in below) < 6:
        assert time.monotonic() < deadline, below
        below = psutil.Process(harness.pid).children(recursive=True)
        time.sleep(0.05)
    harness.kill()
    harness.wait()
    _, left = psutil.wait_procs(below, timeout=DEADLINE_S)
    assert not [one for one in left if is_alive(one)]
    while fences().memory_group and groups_of(harness.pid):
        assert time.monotonic() < deadline
        MemoryGroup.make().remove()  # removes what others left


# --- the same verdict every time ---


def mixed_programs(count: int) -> list[Program]:
    """Programs of all languages that pass, fail, loop, and depend on order, randomness and locale."""
    kinds = [
        lambda i: Program("python", f"print(sorted({{{i}, 3, 7}})[0])", (Test(stdout=str(min(i, 3))),)),
        lambda i: Program("python", "import random\nprint(random.random() < 0.9)", (Test(stdout="True"),)),
        lambda i: Program("python", f"print(next(iter({{'a{i}', 'b{i}', 'c{i}'}})))", (Test(stdout=f"a{i}"),)),
        lambda i: Program(
            "python", f"def f(x): return x % {i + 2}", (Test(code="assert f(7) == 1"), Test(code="f(0)"))
        ),
        lambda i: Program("bash", f"printf '%s\\n' b A a{i} | sort | head -1", (Test(stdout="A"),)),
        lambda i: Program("bash", f"exit {i % 3}"),
        lambda i: Program("sql", f"select {i} % 3", (Test(stdout="1"), Test(stdout="0"))),
        lambda i: Program("python", f"x = bytearray({i % 2} * (10 << 30))"),
        lambda i: Program("python", "while True: pass" if i % 4 == 0 else "import os; os.fork()"),
        lambda i: Program(
            "python", f"def f(n): return f(n + 1)\ntry: f(0)\nexcept RecursionError: print({i})", (Test(stdout="8"),)
        ),
    ]
    return [kinds[i % len(kinds)](i) for i in range(count)]


def same_every_time(count: int, repeats: int) -> None:
    programs = mixed_programs(count)
    limits = Limits(cpu_s=0.2, wall_s=60)
    with SandboxPool(workers=2) as pool:
        seen = [[(v.outcome, v.results) for v in pool.run(programs, limits)] for _ in range(repeats)]
    assert {outcome for outcome, _ in seen[0]} == {"passed", "failed", "timeout", "memory"}
    assert all(one == seen[0] for one in seen)


def test_same_verdicts_every_time():
    same_every_time(20, 3)


@pytest.mark.bars
@pytest.mark.timeout(3600)
def test_200_programs_have_the_same_verdicts_50_times():
    same_every_time(200, 50)
