"""Sessions of the sandbox: what stays from turn to turn, what ends with a turn, and what no code of a turn can do."""

import re
import shutil
import time
from collections.abc import Iterator

import pytest

from dist_lm.sandbox.program import Limits, Program
from dist_lm.sandbox.sandbox import Sandbox
from dist_lm.sandbox.session import MOST_CODE, Session, SessionPool, Turn
from tests.patience import patient
from tests.sandbox.escapes import ESCAPES, Escape
from tests.sandbox.greedy_programs import GREEDY
from tests.sandbox.lost_server import kill_server
from tests.sandbox.test_escapes import filled, outside

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
LIMITS = Limits(cpu_s=2.0, wall_s=patient(30))
IMPATIENT = Limits(cpu_s=0.3, wall_s=patient(30))
__all__ = ["outside"]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as one:
        yield one


@pytest.fixture
def python(sandbox: Sandbox) -> Iterator[Session]:
    session = Session(sandbox, "python", LIMITS)
    yield session
    session.close()


@pytest.fixture
def bash(sandbox: Sandbox) -> Iterator[Session]:
    session = Session(sandbox, "bash", LIMITS)
    yield session
    session.close()


def outputs(session: Session, *codes: str) -> list[str]:
    return [session.run(code).output for code in codes]


def test_variables_and_files_of_python_stay(python: Session):
    """Finds a session that is a new program for each turn."""
    turns = (
        "x = 2\ndef f(y):\n    return x + y",
        "f(3)",
        "x = 10",
        "f(3)",
        "open('a', 'w').write('hi')",
        "open('a').read()",
    )
    assert outputs(python, *turns) == ["", "5\n", "", "13\n", "2\n", "'hi'\n"]


def test_files_of_bash_stay_and_variables_do_not(bash: Session):
    """Finds a script whose `exit` or `cd` ends the session, or changes the next one."""
    turns = ("x=1; echo a > f; cd /; exit 3", 'pwd; cat f; echo "[$x]"')
    assert outputs(bash, *turns) == ["", "/tmp\na\n[]\n"]
    assert bash.run("exit 3").exit_code == 3


def test_output_and_errors_keep_their_order(python: Session):
    """Finds output that a buffer moves behind the errors."""
    code = "import sys\nprint(1)\nprint(2, file=sys.stderr)\nprint(3)\n1 / 0"
    assert re.fullmatch(r"1\n2\n3\nTraceback.*\n.*turn_1\.py.*\nZeroDivisionError: .*\n", python.run(code).output)


ENDS = {
    "raises": ("1 / 0", "ended", 1, False),
    "syntax": ("x = (", "ended", 1, False),
    "exits": ("raise SystemExit(4)", "ended", 4, False),
    "reads_its_input": ("input()", "ended", 1, False),
    "leaves": ("import os\nos._exit(3)", "ended", 3, True),
    "is_killed": ("import os\nos.kill(os.getpid(), 9)", "ended", -9, True),
    "computes": ("while True: pass", "timeout", -9, True),
    "prints": ("while True: print('x' * 1000)", "output", -9, True),
    "closes_the_channel": ("import os\nos.close(3)", "ended", None, True),
    "says_done_and_goes_on": ("import os\nos.write(3, b'\\0\\0\\0\\2\\0')\nwhile True: pass", "ended", 0, False),
    "says_that_later_turns_are_done": ("import os\nos.write(3, b'\\0\\0\\0\\3\\0' * 9) and None", "ended", 0, False),
    "writes_half_an_answer": ("import os\nos.write(3, b'\\0\\0') and None", None, None, None),
    "reads_the_next_turn": ("import os\nos.set_blocking(3, False)\nos.read(3, 1)", "ended", 1, False),
    "forks": ("import os\nos.fork()", "ended", 0, False),
    "forks_for_ever": ("import os\nwhile True:\n    os.fork()", None, None, None),
    "stops_itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout", -9, True),
}
"""Way -> (code, outcome, exit code, whether variables are lost); None: any."""
WAITING = ("stops_itself", "writes_half_an_answer")  # these end at the limit of wall seconds


@pytest.mark.parametrize("way", [*ENDS])
def test_a_turn_that_ends_badly_keeps_the_files_and_the_next_one_is_right(sandbox: Sandbox, way: str):
    """Finds code that ends the session, hides how it ended, or puts its answer in the place of the next one."""
    code, outcome, exit_code, is_fresh = ENDS[way]
    limits = Limits(cpu_s=0.3, wall_s=2.0 if way in WAITING else patient(30))
    session = Session(sandbox, "python", limits)
    assert session.run("x = 1\nopen('kept', 'w').write('y')").output == "1\n"

    turn = session.run(code)
    if outcome:
        assert (turn.outcome, turn.is_fresh) == (outcome, is_fresh), turn
        assert exit_code in (None, turn.exit_code), turn
    if way == "says_done_and_goes_on":
        assert session.run("0").outcome == "timeout"
    assert session.run("open('kept').read()").output == "'y'\n"
    session.close()
    assert sandbox.run(Program("python", "print(1)")).outcome == "passed"


def test_nothing_of_a_session_runs_between_turns(python: Session):
    """Finds code that computes while the model writes, or that leaves a process for the next turn."""
    python.run("import subprocess, threading, time\nchild = subprocess.Popen(['sleep', '60'])")
    assert python.run("child.poll()").output == "-9\n"
    python.run("def spin():\n    while True: pass\nthreading.Thread(target=spin, daemon=True).start()")
    before = float(python.run("time.process_time()").output)
    time.sleep(0.5)
    assert float(python.run("time.process_time()").output) - before < 0.4


def test_all_turns_share_their_cpu_seconds(sandbox: Sandbox):
    """Finds a session that uses its limit anew in each turn, for ever."""
    session = Session(sandbox, "python", IMPATIENT, cpu_s=0.5)
    outcomes = [session.run("while True: pass").outcome for _ in range(3)]
    assert outcomes == ["timeout"] * 3
    assert session.run("1").outcome == "timeout"
    session.close()


TURNS = (
    "import os, random, sys, time",
    "random.random(), hash('a'), {c for c in 'dist_lm'}",
    "os.getpid(), os.listdir('.'), sorted(os.environ), time.tzname",
    "import subprocess\nsubprocess.run('echo $$; ls -a; exit 3', shell=True).returncode",
    "1 / 0",
    "os._exit(5)",
    "import random, os\nrandom.random(), os.getpid()",
    "while True: pass",
    "print('x' * 10**7)",
    "open('a', 'w').write('b'), __name__",
)


def test_equal_turns_give_equal_output_in_a_new_and_in_a_used_sandbox(sandbox: Sandbox):
    """Finds output that depends on what ran before, so that a replayed conversation would differ."""

    def run(place: Sandbox) -> list[Turn]:
        session = Session(place, "python", IMPATIENT)
        turns = [session.run(code) for code in TURNS]
        session.close()
        return turns

    first, second = run(sandbox), run(sandbox)
    with Sandbox() as new:
        assert first == second == run(new)
    assert {turn.outcome for turn in first} == {"ended", "timeout", "output"}


def test_a_session_sees_nothing_of_the_one_before(sandbox: Sandbox):
    """Finds files, processes or memory of another conversation."""
    first = Session(sandbox, "python", LIMITS)
    first.run("secret = 'dist_lm_' + 'secret'\nopen('left', 'w').write(secret)\nimport os\nos.setsid\n# a rare_word")
    first.close()
    second = Session(sandbox, "python", LIMITS)
    look = """
import os, re
word = re.compile(b"rare[_]word")  # does not match itself
held = 0
for line in open("/proc/self/maps"):
    begin, end = (int(part, 16) for part in line.split()[0].split("-"))
    if "r" in line.split()[1] and end - begin < 1 << 27:
        with open("/proc/self/mem", "rb") as memory:
            try:
                memory.seek(begin)
                held += len(word.findall(memory.read(end - begin)))
            except (OSError, ValueError, OverflowError):
                pass
print(os.listdir("/tmp"), len([n for n in os.listdir("/proc") if n.isdigit()]), held)
"""
    assert second.run(look).output == "[] 2 0\n"
    second.close()


def test_a_session_whose_sandbox_ends_is_lost_and_goes_on_empty(sandbox: Sandbox, python: Session):
    """Finds a failure of the sandbox that a program could use to have no verdict, on a machine in order."""
    python.run("x = 1")
    kill_server(sandbox)
    assert python.run("x").outcome == "lost"
    assert "NameError" in python.run("x").output


@pytest.mark.parametrize("code", ["x" * (MOST_CODE + 1), "print(1)\0"])
def test_code_that_no_session_takes_is_an_answer_not_an_error(python: Session, code: str):
    """Finds a turn of the model that raises in the caller."""
    assert "is refused" in python.run(code).output
    assert python.run("2").output == "2\n"


def test_sessions_of_a_pool_go_on_side_by_side():
    """Finds a pool that mixes up sessions, or lets a sleeping one stop the others."""
    with SessionPool(workers=3) as pool:
        slow = pool.begin("bash", LIMITS)
        sleeping = slow.run("sleep 3; echo slow")
        sessions = [pool.begin("python", LIMITS) for _ in range(4)]
        for number, session in enumerate(sessions):
            session.run(f"x = {number}").result()
        assert [session.run("x").result().output for session in sessions] == ["0\n", "1\n", "2\n", "3\n"]
        for session in sessions:
            session.close()
        assert sleeping.result().output == "slow\n"


@pytest.mark.heavy
@pytest.mark.parametrize("escape", [*GREEDY, *ESCAPES], ids=lambda escape: escape.name)
def test_escape_fails_in_a_session(sandbox: Sandbox, outside: dict, escape: Escape):
    """Finds a fence that programs with tests have and sessions lack."""
    if escape.language == "sql":
        pytest.skip("there are no sessions of SQL")
    wall_s = 1.0 if escape.outcome == "timeout" and "sleep" in escape.source else patient(30)
    cpu_s = 0.3 if escape.outcome == "timeout" else 2.0
    limits = Limits(cpu_s=cpu_s, wall_s=wall_s, memory_bytes=128 << 20, tmp_bytes=8 << 20)
    session = Session(sandbox, escape.language, limits)  # pyright: ignore[reportArgumentType]
    # The interpreter of a session has a fourth file, as programs with a judge have.
    source = filled(escape.source, outside).replace("[0, 1, 2]", "[0, 1, 2, 3]")
    turn = session.run(source)
    assert not turn.is_right
    assert turn.outcome == ("ended" if escape.outcome in ("failed", "memory") else escape.outcome), turn
    if escape.outcome != "timeout":
        assert re.search(escape.says, turn.output), turn.output

    assert session.run("echo $((1 + 1))" if escape.language == "bash" else "1 + 1").output == "2\n"
    session.close()
