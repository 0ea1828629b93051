"""Every escape fails: as root, as another user, and by namespaces alone where the kernel has no second fence."""

import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from dist_lm.sandbox.program import Limits, Program, Test, Verdict
from dist_lm.sandbox.sandbox import Sandbox, fences
from tests.patience import patient
from tests.sandbox.as_user import ROOT, ask, user_process
from tests.sandbox.escapes import ESCAPES, Escape
from tests.sandbox.greedy_programs import GREEDY

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
LIMITS = Limits(cpu_s=0.3, wall_s=patient(30), memory_bytes=128 << 20, tmp_bytes=8 << 20)
LABOURER = replace(LIMITS, cpu_s=2.0)  # comes to its limit of memory, files or processes also on a slow core
SLEEPER = replace(LIMITS, wall_s=1.0)
SPEAKER = replace(LIMITS, wall_s=min(patient(4.0), 12.0))  # says what is expected, then sleeps; bash forks for 15 s
WAYS = ("root", "user", "no_landlock", "namespaces")
TOKEN = "hf_a_token_of_the_user"
Run = Callable[[Program, Limits], Verdict]


@pytest.fixture(scope="module", params=WAYS)
def way(request) -> str:
    if request.param in ("root", "user") and (os.geteuid() == 0) != (request.param == "root") and os.geteuid() != 0:
        pytest.skip("needs root")
    return request.param


@pytest.fixture(scope="module")
def run(way: str, outside: dict, tmp_path_factory) -> Iterator[Run]:
    if way == "user" and os.geteuid() == 0:
        with user_process(tmp_path_factory.mktemp("mounts")) as process:
            yield lambda program, limits: ask(process, program, limits)
            assert process.stdin
            process.stdin.close()
        return
    available = fences()
    if way in ("no_landlock", "namespaces"):
        available = replace(available, landlock=0, seccomp=available.seccomp and way == "no_landlock")
    with Sandbox(_fences=available) as sandbox:
        yield sandbox.run


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Iterator[dict]:
    """What is there to be reached: a secret, sockets that listen, a process, a token in the environment."""
    folder = tmp_path_factory.mktemp("outside")
    folder.chmod(0o755)
    secret = folder / "secret"
    secret.write_text("secret")
    with ExitStack() as open_ones, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        tcp = open_ones.enter_context(socket.create_server(("127.0.0.1", 0)))
        unix = open_ones.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(f"{folder}/ray.sock")
        unix.listen()
        abstract = open_ones.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0dist_lm-test-{os.getpid()}")
        abstract.listen()
        yield {
            "secret": str(secret),
            "folder": str(folder),
            "checkout": str(ROOT),
            "prefix": sys.base_prefix,
            "home": str(Path.home()),
            "token": TOKEN,
            "tcp": tcp.getsockname()[1],
            "unix": f"{folder}/ray.sock",
            "abstract": f"dist_lm-test-{os.getpid()}",
            "outside": os.getpid(),
        }


def filled(source: str, outside: dict) -> str:
    for name, value in outside.items():
        source = source.replace(f"{{{name}}}", str(value))
    return source.replace("{{", "{").replace("}}", "}")


def named(escape: Escape):
    # bash tries to fork for all of its time; `fork_bomb` does the same in Python and ends at once.
    marks = pytest.mark.heavy if escape.name == "fork_bomb_bash" else ()
    return pytest.param(escape, id=escape.name, marks=marks)


@pytest.mark.parametrize("escape", map(named, [*GREEDY, *ESCAPES]))
def test_escape_fails(escape: Escape, way: str, run: Run, outside: dict):
    if way == "namespaces" and escape.only_seccomp:
        pytest.skip("without seccomp it happens, inside the sandbox")
    limits = LIMITS if escape.outcome == "timeout" else LABOURER
    if escape.outcome == "timeout" and "sleep" in escape.source:
        limits = SPEAKER if escape.says else SLEEPER
    verdict = run(Program(escape.language, filled(escape.source, outside)), limits)
    assert verdict.judged, "a program chose to have no verdict"
    assert verdict.outcome == escape.outcome, verdict
    assert verdict.passed == 0
    assert re.search(escape.says, verdict.output), verdict.output
    assert verdict.cpu_seconds < 2
    assert len(verdict.output) <= 2_000


def test_nothing_is_left_for_the_next_test_or_run(run: Run):
    leave = """
import os, time
open('/tmp/left', 'w').close()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
"""
    look = """
import os
print(os.listdir('/tmp'), [n for n in os.listdir('/proc') if n.isdigit()][1:] == [str(os.getpid())])
"""
    source = f"exec({leave!r} if input() == 'leave' else {look!r})"
    clean = Test(stdin="look", stdout="[] True")
    assert run(Program("python", source, (Test(stdin="leave"), clean)), LIMITS).results == (True, True)
    assert run(Program("python", source, (clean,)), LIMITS).results == (True,)

    empty = Test(code="import os\nassert not os.listdir('/tmp')")
    assert run(Program("python", "", (Test(code=leave), empty)), LIMITS).results == (True, True)
    assert run(Program("python", "", (empty,)), LIMITS).results == (True,)


@pytest.mark.parametrize(
    "source",
    ["import sys; sys.exit(0)", "import os; os._exit(0)", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"],
)
def test_a_program_that_leaves_passes_no_test(run: Run, source: str):
    assert run(Program("python", source, (Test(code="pass"),)), LIMITS).results == (False,)


@pytest.mark.parametrize("source", ["exit 0", "exec true", "set; exit 0", 'echo "$BASH_EXECUTION_STRING"; exit 0'])
def test_a_script_that_leaves_passes_no_test(run: Run, source: str):
    assert run(Program("bash", source, (Test(code="true"),)), LIMITS).results == (False,)


SWALLOWS_ALL = ("echo \\", "true ||", "true |", "echo '", "cat <<END", "{", "(", "if", "f() {", "x=$(")
LEAVES_THE_TEST = ("true &&", "false ||", "set -n", "exec >/dev/null", "trap 'exit 0' EXIT ERR")
ADD = Test(code='[ "$(add 2 3)" = 5 ]')


@pytest.mark.parametrize("end", [*SWALLOWS_ALL, *LEAVES_THE_TEST])
def test_no_end_of_a_script_passes_a_test_for_it(run: Run, end: str):
    assert run(Program("bash", f"subtract() {{ echo $(($1 - $2)); }}\n{end}", (ADD,)), LIMITS).results == (False,)


@pytest.mark.parametrize("end", SWALLOWS_ALL)
def test_a_script_that_does_not_end_passes_no_test(run: Run, end: str):
    assert run(Program("bash", f"add() {{ echo $(($1 + $2)); }}\n{end}", (ADD,)), LIMITS).results == (False,)
