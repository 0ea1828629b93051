"""Tests of Python run apart from the program: what they may do with its objects, and that no program passes them."""

import re
import shutil

import pytest

from dist_lm.sandbox.program import Limits, Program, Test, Verdict
from dist_lm.sandbox.sandbox import Sandbox

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
LIMITS = Limits(cpu_s=2, wall_s=60)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as one:
        yield one


def judged(sandbox: Sandbox, source: str, *codes: str, **parts: str) -> Verdict:
    return sandbox.run(Program("python", source, tuple(Test(code=code, **parts) for code in codes)), LIMITS)


LIBRARY = '''
import collections, contextlib, math, sys

count = 0
data = {"a": [1]}

class Empty(Exception):
    """Raised by an empty stack."""

class TooLow(ValueError):
    def __init__(self, value, least):
        super().__init__(f"{value} is below {least}")

Anything = Exception

class Hides:
    """Hides every error."""
    def __enter__(self): return self
    def __exit__(self, *_): return True

class Stack:
    """Last in, first out."""
    made = 0
    error = Exception
    def __init__(self, *items):
        self.items = list(items)
        Stack.made += 1
    def push(self, item):
        self.items.append(item)
        return self
    def pop(self):
        if not self.items:
            raise Empty("nothing is left")
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __getitem__(self, index): return self.items[index]
    def __setitem__(self, index, item): self.items[index] = item
    def __iter__(self): return iter(self.items)
    def __enter__(self): return self
    def __exit__(self, kind, error, trace): self.items.append(kind and kind.__name__); return kind is KeyError
    def __str__(self): return f"Stack of {len(self.items)}"
    @property
    def top(self): return self.items[-1]

class Node:
    def __init__(self, value, left=None, right=None):
        self.value, self.left, self.right = value, left, right

def height(node): return 0 if node is None else 1 + max(height(node.left), height(node.right))
def add(a, b=2, *rest, **named): return a + b + sum(rest) + sum(named.values())
def least(value): 
    if value < 3: raise TooLow(value, 3)
def bump():
    global count
    count += 1
def sort(items): items.sort()
def grow(table): table["new"] = table.pop("old"); table["rows"][0].append(9)
def same(items): return items
def squares(n):
    for i in range(n): yield i * i
def forever():
    i = 0
    while True: yield i; i += 1
def apply(f, *values): return [f(value) for value in values]
def make(n): return lambda x: x + n
def fold(f, items): return f(f(items[0], items[1]), items[2])
def first(items): return next(iter(items))
async def later(x): return x + 1
def divide(a, b): return a / b
def leave(): sys.exit(3)
Point = collections.namedtuple("Point", "x y")
def point(): return Point(1, 2)
def say(text): print(text); return len(text)
'''

HOLDS = {
    "call": "assert add(1) == 3 and add(1, 2, 3, x=4) == 10 and apply(len, [1], 'ab') == [1, 2]",
    "in place": "items = [3, 1]\nassert sort(items) is None\nassert items == [1, 3]",
    "in place below": "t = {'old': 1, 'rows': [[1]]}\nrow = t['rows'][0]\ngrow(t)\n"
    "assert t == {'rows': [[1, 9]], 'new': 1} and row == [1, 9]",
    "same object": "items = [1]\nassert same(items) is items and same((1, items))[1] is items",
    "exception": "try:\n    divide(1, 0)\n    assert False\nexcept ZeroDivisionError as error:\n"
    "    assert str(error) == 'division by zero'",
    "exception of the program": "try:\n    Stack().pop()\n    raise AssertionError\nexcept Empty as error:\n"
    "    assert str(error) == 'nothing is left'",
    "exception by its base": "try:\n    least(1)\n    raise AssertionError\nexcept ValueError as error:\n"
    "    assert str(error) == '1 is below 3' and type(error).__name__ == 'TooLow'",
    "global": "bump()\nassert count == 1\nbump()\nassert count == 2",
    "class": "s = Stack(1)\ns.push(2).push([3])\nassert s.pop() == [3] and len(s) == 2 and s[0] == 1 and s.top == 2\n"
    "s[0] = 5\nassert [*s] == [5, 2] and 5 in s and 7 not in s and str(s) == 'Stack of 2' and Stack.made == 1\n"
    "s.name = 'x'\nassert s.name == 'x' and Stack.__doc__ == 'Last in, first out.' and not hasattr(s, 'nothing')",
    "context": "with Stack() as s:\n    assert s is s\n    raise KeyError(1)\nassert s.items == ['KeyError']",
    "handles go back": "tree = Node(1, Node(2), Node(3, Node(4)))\ntree.left.left = Node(5)\nassert height(tree) == 3\n"
    "assert tree.left.left.value == 5 and tree.right.right is None",
    "generator": "g = squares(4)\nassert next(g) == 0 and [*g] == [1, 4, 9]\n"
    "assert [x for _, x in zip(range(50), forever())] == [*range(50)]",
    "callback": "assert apply(lambda x: x * 2, 1, 2) == [2, 4] and apply(str, 1) == ['1']\n"
    "assert fold(lambda a, b: [*a, *b], [[1], [2], [3]]) == [1, 2, 3]",
    "callback that raises": "def f(x): raise KeyError(x)\ntry:\n    apply(f, 1)\n    raise AssertionError\n"
    "except KeyError as error:\n    assert error.args == (1,)",
    "callback that calls": "assert apply(lambda x: apply(lambda y: y + x, 1), 1, 2) == [[2], [3]]",
    "closure": "f = make(3)\nassert f(1) == 4 and make(1)(make(2)(3)) == 6",
    "iterator of the test": "assert first(iter([7])) == 7 and first(x for x in [8]) == 8",
    "async": "import asyncio\nassert asyncio.run(later(1)) == 2\nasync def f(): return await later(5)\n"
    "assert asyncio.run(f()) == 6",
    "named tuple": "assert point() == (1, 2) and point().x == 1 and point()._fields == ('x', 'y')",
    "annotation": "def f(x: int): return x\nassert f.__annotations__ == {'x': int} and add.__name__ == 'add'",
    "module that only the program imports": "assert math.isclose(divide(1, 3), 1 / 3) and sys.getsizeof(0) > 0",
    "names": "import math\nassert [x for x in apply(abs, -1)] == [1]\nassert (lambda: add(1))() == 3\n"
    "def check(candidate): assert candidate(1) == 3\ncheck(add)",
    "missing name": "try:\n    nothing\n    raise AssertionError\nexcept NameError:\n    pass",
    "exit": "try:\n    leave()\n    raise AssertionError\nexcept SystemExit as end:\n    assert end.code == 3",
    "names in a class": "class Calls:\n    two = add(0)\nassert Calls.two == 2",
    "threads": "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as pool:\n"
    "    assert [*pool.map(add, range(50))] == [*range(2, 52)]",
    "data": "assert data == {'a': [1]}",
    "context that hides": "with Hides():\n    raise ValueError\n    assert False\nwith Hides():\n    1 / 0\n"
    "reached = False\nwith Hides():\n    {}['a']\n    reached = True\nassert not reached\n"
    "def leave(): raise KeyError\nwith Hides():\n    leave()",
    "unittest": "import unittest\nclass TestAdd(unittest.TestCase):\n    def test_add(self):\n"
    "        self.assertEqual(add(1), 3)\n        with self.assertRaises(Empty): Stack().pop()\nunittest.main()",
}
FAILS = {
    "comparison": ("Stack() == Stack()", "a Stack of the program cannot be compared"),
    "truth": ("assert Stack(1)", "cannot be tested for truth"),
    "hash": ("{Stack()}", "cannot be hashed"),
    "type": ("isinstance(Stack(), list)", "cannot be tested for its type"),
    "class": ("isinstance(1, Stack)", "cannot be asked for its instances"),
    "caught": ("try:\n    Stack() == 1\nexcept BaseException:\n    pass", "cannot be compared"),
    "object of the test": ("class A: pass\nadd(A())", "a A of the test cannot be given to the program"),
    "deep": ("x = []\nfor _ in range(70): x = [x]\nsame(x)", "nested more than 64 deep"),
    "long": ("apply(lambda x: 'a' * 5_000_000, 1)", "more than 4194304 bytes"),
    "module": ("collections", "module collections, which the test itself does not import"),
    "wrong": ("assert add(1) == 4", "AssertionError"),
    "exit": ("leave()", ""),
    "comparison in a container": ("assert [Stack()] == [1]", "cannot be compared"),
    "arithmetic": ("assert abs(Stack() - 1) < 2", "TypeError"),
    "hidden assertion": ("with Hides():\n    assert add(1) == 4", "hides a failed assertion, or skips one"),
    "skipped assertion": ("with Hides():\n    divide(1, 0)\n    assert add(1) == 3", "or skips one"),
    "skipped in a loop": (
        "with Hides():\n    for n in (1, 0):\n        assert add(n)\n        divide(n, 0)",
        "skips one",
    ),
    "skipped below": ("def check():\n    n = divide(1, 0)\n    assert n\nwith Hides():\n    check()", "skips one"),
    "skipped check": ("def check(): assert 0\nwith Hides():\n    divide(1, 0)\n    check()", "skips one"),
    "skipped with other contexts": ("with Hides(), Hides():\n    divide(1, 0)\n    assert 0", "skips one"),
    "skipped by a context of the test": (
        "import contextlib\n@contextlib.contextmanager\ndef use():\n    with Hides():\n        yield\n"
        "with use():\n    divide(1, 0)\n    assert 0",
        "skips one",
    ),
    "skipped in a stack": (
        "import contextlib\nwith contextlib.ExitStack() as stack:\n    stack.enter_context(Hides())\n"
        "    divide(1, 0)\n    assert 0",
        "skips one",
    ),
    "alias": ("try:\n    add(1)\n    assert False\nexcept Anything:\n    pass", "is Exception or AssertionError"),
    "attribute": ("try:\n    assert False\nexcept Stack.error:\n    pass", "is Exception or AssertionError"),
    "unittest": (
        "import unittest\nclass TestAdd(unittest.TestCase):\n    def test_add(self): self.assertEqual(add(1), 4)\n"
        "unittest.main(exit=False)",
        "a test case of unittest failed, or none ran",
    ),
    "unittest without a case": ("import unittest\nunittest.main(exit=False)", "or none ran"),
}


@pytest.mark.parametrize("name", HOLDS)
def test_a_test_may(sandbox: Sandbox, name: str):
    verdict = judged(sandbox, LIBRARY, HOLDS[name])
    assert verdict.outcome == "passed", verdict.output


@pytest.mark.parametrize("name", FAILS)
def test_a_test_fails_by_name(sandbox: Sandbox, name: str):
    code, reason = FAILS[name]
    verdict = judged(sandbox, LIBRARY, code)
    assert verdict.outcome == "failed"
    assert reason in verdict.output


def test_output_of_program_and_test_are_both_there(sandbox: Sandbox):
    verdict = judged(sandbox, LIBRARY, "n = say('one')\nprint(n)")
    assert verdict.stdout == ("one\n3\n",)


def test_the_traceback_shows_the_program(sandbox: Sandbox):
    output = judged(sandbox, LIBRARY, "divide(1, 0)").output
    assert re.search(r'program.py", line \d+, in divide', output)
    assert "dist_lm" not in output


def test_what_the_task_defines_is_not_the_programs(sandbox: Sandbox):
    given = "def double(x):\n    return 2 * x\n"
    source = given + "def double(x):\n    return x\ndef half(x):\n    return x\n"
    code = "assert all(half(double(x)) == x for x in range(5))"
    assert judged(sandbox, source, code).outcome == "passed"
    assert judged(sandbox, source, code, given=given).outcome == "failed"


def test_a_built_in_name_is_the_programs_only_if_the_task_says_so(sandbox: Sandbox):
    source = "def sum(a, b):\n    return a + b\ndef len(x):\n    return 3"
    assert judged(sandbox, source, "assert sum(1, 2) == 3", entry="sum").outcome == "passed"
    assert judged(sandbox, source, "assert sum(1, 2) == 3").outcome == "failed"
    assert judged(sandbox, source, "assert len([]) == 3", entry="sum").outcome == "failed"


def test_classes_of_the_setup_are_shared_and_its_functions_are_the_judges(sandbox: Sandbox):
    before = """
class Node:
    def __init__(self, value, next=None):
        self.value, self.next = value, next
def listed(node):
    values = []
    while node is not None:
        values.append(node.value)
        node = node.next
    return values
print("once")
"""
    source = """
def reverse(node):
    last = None
    while node:
        node.next, last, node = last, node, node.next
    return last
"""
    code = "assert listed(reverse(Node(1, Node(2, Node(3))))) == [3, 2, 1]"
    verdict = judged(sandbox, source, code, before=before)
    assert verdict.outcome == "passed", verdict.output
    assert verdict.stdout == ("once\n",)
    forged = source + "\nlisted = lambda node: [3, 2, 1]\nreverse = lambda node: node"
    assert judged(sandbox, forged, code, before=before).outcome == "failed"


def test_tests_do_not_meet_each_other(sandbox: Sandbox):
    codes = (
        "import builtins, sys\nbuiltins.left = 1\nsys.setrecursionlimit(100)",
        "x = 1\nassert add(1) == 3",
        "import builtins, sys\nassert not hasattr(builtins, 'left')\nassert sys.getrecursionlimit() > 100",
        "assert 'x' not in globals()",
    )
    assert judged(sandbox, LIBRARY, *codes).results == (True,) * 4


def test_the_memory_of_a_program_does_not_hold_its_tests(sandbox: Sandbox):
    """It searches for a text with a mark behind it; the text alone is in its memory because it searches for it."""
    source = """
def search(parts):
    text = "_".join(parts).encode()
    count = 0
    for line in open("/proc/self/maps"):
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if "rw" in line.split()[1]:
            with open("/proc/self/mem", "rb", 0) as memory:
                memory.seek(begin)
                count += sum(part[:1] == b"#" for part in memory.read(end - begin).split(text)[1:])
    return count
"""
    hidden = "assert search(['a', 'text', 'of', 'the', 'test']) == 0  # a_text_of_the_test#"
    for test in (Test(code=hidden), Test(code=hidden, given="x = 1"), Test(code="assert 1", given=hidden)):
        assert sandbox.run(Program("python", source, (Test(), test)), LIMITS).outcome == "passed"
    shown = "shown = '_'.join(['a', 'text', 'of', 'the', 'test']) + '#'"
    assert judged(sandbox, source + shown, hidden).outcome == "failed"


def test_a_program_cannot_see_its_judge(sandbox: Sandbox):
    source = """
import os
def others():
    return [name for name in os.listdir("/proc") if name.isdigit() and int(name) not in (1, os.getpid())]
"""
    assert judged(sandbox, source, "assert others() == [], others()").outcome == "passed"


FORGERIES = {
    "exec": "import builtins\nbuiltins.exec = lambda *a, **k: None",
    "equal": "class E:\n    def __eq__(self, o): return True\n    __ne__ = __bool__ = __eq__\ndef f(x): return E()",
    "equal number": "class E(int):\n    def __eq__(self, o): return True\n    def __hash__(self): return 4\n"
    "def f(x): return E(0)",
    "exit": "import os\ndef f(x): os._exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "written verdict": "import os\nfor n in range(3, 64):\n    try: os.write(n, b'passed')\n    except OSError: pass",
    "written end": "import os\ndef f(x): os.write(3, b'\\0\\0\\0\\1.'); return 0",
    "answers": "import os\ndef f(x):\n    for _ in range(9): os.write(3, b'\\0\\0\\0\\5vi\\1\\1\\0')\n    return 0",
    "closed": "import os\ndef f(x): os.close(3)",
    "garbage": "import os\ndef f(x): os.write(3, b'\\xff' * 1000)",
    "a long frame": "import os\ndef f(x): os.write(3, b'\\x7f\\xff\\xff\\xff'); os.write(3, b'v' * 9_000_000)",
    "patched answers": "import gc\nfor o in gc.get_objects():\n    if type(o).__name__ == 'Peer': o.last_error = None\n"
    "def f(x): return 0",
    "no function": "f = 4",
    "metaclass": "import os, sys\ndef f(x):\n    return type",
    "not implemented": "def f(x): return NotImplemented",
    "thread": "import os, threading\nthreading.Thread(target=lambda: os._exit(0)).start()\ndef f(x): return 0",
    "fork": "import os\ndef f(x):\n    os.fork()\n    return 0",
    "child": "import os, time\nif os.fork() == 0:\n    time.sleep(30)\n    os._exit(0)\ndef f(x): os._exit(0)",
    "raised assertion": "def f(x): raise AssertionError",
    "stop": "def f(x): raise StopIteration",
    "interrupt": "def f(x): raise KeyboardInterrupt",
    "exit of the judge": "def f(x): raise SystemExit(0)",
    "exit by a name": "class SystemExit(Exception): pass\ndef f(x): raise SystemExit(0)",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_fails(sandbox: Sandbox, name: str):
    for code in (
        "assert f(1) == 4",
        "assert all(map(lambda x: f(x) == 4, [1]))",
        "def check(g):\n    assert g(1) == 4\n    assert not g(2) != 8\ncheck(f)",
    ):
        verdict = judged(sandbox, FORGERIES[name], code)
        assert verdict.outcome == "failed", verdict


def test_a_program_calls_only_functions_that_the_test_gave_it(sandbox: Sandbox):
    """Else it would make a class in the judge that equals everything."""
    source = """
import gc
def f(x):
    peer = next(o for o in gc.get_objects() if type(o).__name__ == "Peer")
    always = lambda *_: True
    kind = peer.ask("call", type, ("Kind", (type,), {"__eq__": always, "__hash__": None}), ())
    return peer.ask("call", kind, ("Equal", (), {}), ())
"""
    verdict = judged(sandbox, source, "assert f(1) == 4")
    assert verdict.outcome == "failed"
    assert "expected an object that the test gave to the program" in verdict.output


def test_a_judge_that_is_kept_busy_is_a_timeout_of_the_program(sandbox: Sandbox):
    """Numbers with the same hash make a set slow."""
    source = "def f(n): return [i * (2**61 - 1) for i in range(n)]"
    limits = Limits(cpu_s=0.5, wall_s=60)
    program = Program("python", source, (Test(code="assert len(set(f(30_000))) == 1"), Test(code="assert f(0) == []")))
    verdict = sandbox.run(program, limits)
    assert verdict.outcome == "timeout"
    assert verdict.cpu_seconds < 5
