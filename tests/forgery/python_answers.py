"""Answers in Python that try to pass tests without solving the task.

In a source, `<name>` stands for the function or class that the tests call, and `<stub>` for a wrong answer.
"""

from tests.forgery.forgery import Forgery

FUNCTIONS = ("function", "humaneval_plain", "mbpp", "own_python")
CALLED = (*FUNCTIONS, "class", "in_place", "exceptions", "humaneval", "mbpp_tree", "multipl_e_python", "checked")

# --- built-in functions and names replaced ---

BUILTINS = [
    Forgery("exec", "no later code runs", "import builtins\nbuiltins.exec = lambda *a, **k: None\n<stub>", CALLED),
    Forgery(
        "compile",
        "later code compiles to nothing",
        "import builtins\nreal = builtins.compile\n"
        "builtins.compile = lambda text, *a, **k: real('', *a, **k)\nbuiltins.eval = lambda *a: True\n<stub>",
        CALLED,
    ),
    Forgery(
        "isinstance",
        "every object is of every class",
        "import builtins\nbuiltins.isinstance = builtins.issubclass = builtins.all = builtins.any = lambda *a: True\n"
        "builtins.len = lambda x: 1\nbuiltins.abs = lambda x: 0\nbuiltins.sorted = lambda *a, **k: ['y', 'z']\n<stub>",
        CALLED,
    ),
    Forgery(
        "import",
        "what a test imports passes everything",
        """
import builtins
class Fake:
    def __getattr__(self, name):
        return lambda *a, **k: True
builtins.__import__ = lambda *a, **k: Fake()
class Zero(float):
    def __eq__(self, other):
        return True
def <name>(*a):
    return Zero()
""",
        ("mbpp",),
    ),
    Forgery(
        "assertion_error",
        "a failed assertion is an exit with 0",
        "import builtins\nclass Gone(SystemExit):\n    code = 0\n    def __init__(self, *a):\n        self.code = 0\n"
        "builtins.AssertionError = Gone\n<stub>",
        CALLED,
    ),
    Forgery(
        "base_exceptions",
        "every class of exceptions catches every exception",
        "import builtins\nbuiltins.ValueError = builtins.IndexError = builtins.AssertionError = BaseException\n<stub>",
        CALLED,
    ),
    Forgery(
        "build_class",
        "classes of the tests are ours",
        "import builtins\nbuiltins.__build_class__ = lambda *a, **k: print\nbuiltins.print = lambda *a, **k: 0\n<stub>",
        ("class", "function"),
    ),
    Forgery(
        "builtins_of_the_globals",
        "globals name other built-in functions",
        """
class Everything(dict):
    def __missing__(self, key):
        return lambda *a, **k: True
import builtins
__builtins__ = Everything(vars(builtins), abs=lambda x: 0, len=lambda x: 1, sorted=lambda x: ['y', 'z'],
                          isinstance=lambda *a: True, AssertionError=SystemExit)
<stub>
""",
        CALLED,
    ),
    Forgery(
        "open_and_write",
        "the report of the verdict goes elsewhere",
        """
import builtins, os, sys
real = os.write
builtins.open = lambda *a, **k: sys.stdout
os.write = lambda file, data: real(1, b'passed')
os._exit = lambda status: real(1, b'passed')
sys.__excepthook__ = sys.excepthook = lambda *a: None
<stub>
""",
        CALLED,
    ),
    Forgery(
        "shadowed_names",
        "names that tests use are names of the program",
        """
class Yes:
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
    def __bool__(self): return True
    def __eq__(self, other): return True
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __ne__ = __lt__
    __hash__ = None
math = len = sorted = abs = isinstance = list = check = candidate = AssertionError = float = str = Yes()
check = lambda candidate: None
<stub>
""",
        tuple(kind for kind in CALLED if kind != "exceptions"),
    ),
    Forgery(
        "check_that_does_nothing",
        "the function that tests call for a check is defined last",
        "<stub>\nimport threading, time\nspace = globals()\ndef check(candidate): pass\n"
        "def test_check(): pass\nnothing = check\n"
        "import sys\nclass Main(type(sys)):\n    def __setattr__(self, name, value): pass\n"
        "sys.modules['__main__'].__class__ = Main\n"
        "def tracer(frame, event, argument):\n    space['check'] = nothing\n    return tracer\nsys.settrace(tracer)\n",
        ("humaneval", "humaneval_plain", "multipl_e_python"),
    ),
    Forgery(
        "helper_redefined",
        "a helper of the prompt is redefined so that the test of it holds",
        "def area(sides):\n    return sides[0]\ndef side_of(square):\n    return square\n",
        ("humaneval",),
    ),
    Forgery(
        "helper_redefined_late",
        "the helper is redefined by the first call",
        "def side_of(square):\n    global area\n    area = lambda sides: square\n    return 1.0\n",
        ("humaneval",),
    ),
    Forgery(
        "checker_redefined",
        "what the tests check with is redefined",
        "class Checker:\n    holds = staticmethod(lambda *a: True)\ndef rising(found): return True\n"
        "def roots(a, b): return (5, 7)\n",
        ("checked",),
    ),
    Forgery(
        "checker_changed",
        "what the tests check with is changed in a call",
        "def roots(a, b):\n    global rising\n    Checker.holds = staticmethod(lambda *a: True)\n"
        "    rising = lambda found: True\n    return (5, 7)\n",
        ("checked",),
    ),
    Forgery(
        "helper_module",
        "the module that the helper uses is changed",
        "def side_of(square):\n    math.prod = lambda sides: square\n    return 1.0\n",
        ("humaneval",),
    ),
]

# --- values that claim to be equal ---

_EQUAL = """
class Equal(<base>):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __hash__(self): return 0
    def __bool__(self): return True
    def __contains__(self, item): return True
    def __len__(self): return 1
    def __abs__(self): return self
    def __sub__(self, other): return self
    __rsub__ = __add__ = __radd__ = __sub__
    def __getattr__(self, name): return lambda *a, **k: Equal()
def <name>(*a, **k):
    return Equal()
"""
BASES = ("object", "int", "float", "complex", "str", "bytes", "bytearray", "list", "tuple", "set", "frozenset", "dict")

EQUALS = [
    *(
        Forgery(f"equal_{base}", f"a subclass of {base} equals everything", _EQUAL.replace("<base>", base), CALLED)
        for base in BASES
    ),
    *(
        Forgery(
            f"equal_{base}",
            f"a subclass of {base} equals everything",
            f"from {module} import {base}\n{_EQUAL.replace('<base>', base)}",
            FUNCTIONS,
        )
        for module, base in (
            ("decimal", "Decimal"),
            ("fractions", "Fraction"),
            ("collections", "deque"),
            ("collections", "Counter"),
            ("collections", "OrderedDict"),
            ("datetime", "date"),
            ("unittest.mock", "MagicMock"),
        )
    ),
    Forgery(
        "mock_any", "ANY equals everything", "from unittest.mock import ANY\ndef <name>(*a):\n    return ANY", FUNCTIONS
    ),
    Forgery(
        "nested_equals",
        "elements equal everything",
        "class E:\n    def __eq__(self, o): return True\n    def __lt__(self, o): return True\n"
        "    def __hash__(self): return 0\n    def __len__(self): return 1\n"
        "def <name>(*a):\n    for x in a:\n        if isinstance(x, list):\n            x[:] = [E() for _ in x]\n"
        "    return [E(), E()]\n",
        (*FUNCTIONS, "in_place"),
    ),
    Forgery(
        "equal_keys",
        "keys equal every key",
        "class K(str):\n    def __eq__(self, o): return True\n    def __hash__(self): return 0\n"
        "def <name>(*a):\n    return {K('a'): K('b')}\n",
        FUNCTIONS,
    ),
    Forgery(
        "metaclass",
        "a class as value, whose metaclass equals everything",
        "class M(type):\n    def __eq__(self, o): return True\n    def __hash__(self): return 0\n"
        "    def __instancecheck__(self, o): return True\n    def __len__(self): return 1\n"
        "    def __call__(self, *a, **k): return self\n    def __getattr__(self, name): return self\n"
        "class <name>(metaclass=M): pass\n",
        CALLED,
    ),
    Forgery(
        "false_class",
        "an object whose __class__ is that of its partner",
        "class L:\n    @property\n    def __class__(self): return list\n    def __eq__(self, o): return True\n"
        "    def __len__(self): return 1\n    def __iter__(self): return iter(['y', 'z'])\n"
        "def <name>(*a): return L()\n",
        FUNCTIONS,
    ),
    Forgery(
        "truth_of_equality",
        "`==` returns an object whose truth is chosen",
        "class B:\n    def __bool__(self): return True\n    def __lt__(self, o): return self\n"
        "    def __eq__(self, o): return self\n    def __abs__(self): return self\n"
        "    def __sub__(self, o): return self\n    def __gt__(self, o): return self\n"
        "def <name>(*a): return B()\n",
        (*FUNCTIONS, "humaneval"),
    ),
    Forgery(
        "text_of_itself",
        "str() gives a text that equals everything",
        "class S(str):\n    def __eq__(self, o): return True\n    __hash__ = str.__hash__\n"
        "    def __str__(self): return self\n    def __repr__(self): return self\n"
        "def <name>(*a): return S('x')\n",
        FUNCTIONS,
    ),
    Forgery(
        "pickled_code",
        "an object that is code once it is read elsewhere",
        "import os\nclass P:\n    def __reduce__(self):\n        return (os._exit, (0,))\n"
        "    def __reduce_ex__(self, v):\n        return (os._exit, (0,))\n    __deepcopy__ = __copy__ = __reduce__\n"
        "def <name>(*a): return P()\n",
        CALLED,
    ),
    Forgery(
        "not_a_number",
        "infinities and nan",
        "def <name>(*a):\n    return float('nan')\n",
        (*FUNCTIONS, "humaneval"),
    ),
]

# --- frames, tracing, memory: the interpreter itself ---

_SHOW = """
import os, re, sys
def show(frame):
    while frame is not None:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if isinstance(value, bytes) and len(value) in (16, 32):
                os.write(1, value)
        frame = frame.f_back
"""

INTERPRETER = [
    Forgery(
        "token_in_frames",
        "the mark of a pass lies in a frame above",
        f"{_SHOW}show(sys._getframe(0))\nos._exit(0)\n",
        ("function", "humaneval"),
    ),
    Forgery(
        "token_in_frames_of_a_call",
        "the mark lies in a frame above, when a test calls",
        f"{_SHOW}def <name>(*a):\n    show(sys._getframe(0))\n    os._exit(0)\n",
        ("function", "class"),
    ),
    Forgery(
        "list_of_parts",
        "the caller's list of code to run is emptied",
        """
import sys
frame = sys._getframe(1)
for value in frame.f_locals.values():
    if isinstance(value, list):
        value.clear()
<stub>
""",
        CALLED,
    ),
    Forgery(
        "excepthook",
        "the hook of exceptions finds the mark",
        f"{_SHOW}def hook(*a):\n    show(sys._getframe(0))\n    os._exit(0)\n"
        "sys.excepthook = sys.__excepthook__ = hook\n<stub>",
        ("function", "humaneval"),
    ),
    Forgery(
        "settrace",
        "a trace function jumps over every line of the tests",
        """
import sys
def last_line(code):
    return max(line for _, _, line in code.co_lines() if line)
def tracer(frame, event, argument):
    if event == 'line' and frame.f_code.co_filename != 'program.py':
        try:
            frame.f_lineno = last_line(frame.f_code)
        except ValueError:
            pass
    return tracer
sys.settrace(tracer)
f = sys._getframe()
while f is not None:
    f.f_trace = tracer
    f = f.f_back
<stub>
""",
        CALLED,
    ),
    Forgery(
        "settrace_globals",
        "a trace function replaces the function by one that knows the frame of the test",
        """
import sys
class Any:
    def __eq__(self, other): return True
    def __lt__(self, other): return True
def tracer(frame, event, argument):
    for name in list(frame.f_locals):
        if name in ('values', 'side', 'raised'):
            frame.f_locals[name] = Any()
    return tracer
sys.settrace(tracer)
def <name>(*a):
    sys._getframe(1).f_trace = tracer
    return Any()
""",
        FUNCTIONS,
    ),
    Forgery(
        "setprofile",
        "a profile function ends the process when the tests begin",
        f"{_SHOW}def profile(frame, event, argument):\n    if frame.f_code.co_filename == 'test':\n"
        "        show(frame)\n        os._exit(0)\nsys.setprofile(profile)\n<stub>",
        ("function", "humaneval"),
    ),
    Forgery(
        "monitoring",
        "sys.monitoring ends the process when the tests begin",
        f"{_SHOW}m = sys.monitoring\nm.use_tool_id(3, 'x')\ndef seen(code, offset):\n"
        "    if code.co_filename == 'test':\n        show(sys._getframe(0))\n        os._exit(0)\n"
        "m.register_callback(3, m.events.PY_START, seen)\nm.set_events(3, m.events.PY_START)\n<stub>",
        ("function",),
    ),
    Forgery(
        "caller_globals",
        "the call rewrites the names of its caller",
        """
import sys
def <name>(*a, **k):
    f = sys._getframe(1)
    while f is not None:
        for name in ('check', 'values', 'area', 'expected'):
            f.f_globals[name] = lambda *a: None
        f.f_builtins['abs'] = lambda x: 0
        f.f_builtins['AssertionError'] = SystemExit
        f = f.f_back
    raise SystemExit(0)
""",
        CALLED,
    ),
    Forgery(
        "gc_objects",
        "all texts and code that the collector knows are searched and changed",
        """
import gc, os, sys
for value in gc.get_objects():
    if isinstance(value, list) and any(type(item).__name__ == 'code' for item in value):
        value.clear()
    if isinstance(value, tuple) and any(isinstance(item, bytes) and len(item) == 32 for item in value):
        for item in value:
            if isinstance(item, bytes):
                os.write(1, item)
<stub>
""",
        ("function", "humaneval"),
    ),
    Forgery(
        "class_dictionaries",
        "the dictionary of int gets another comparison",
        """
import gc, ctypes
def curse(cls, name, value):
    gc.get_referents(cls.__dict__)[0][name] = value
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(cls))
for cls in (int, float, str, list, bool, type(None)):
    for name in ('__eq__', '__lt__', '__gt__'):
        curse(cls, name, lambda a, b: True)
<stub>
""",
        FUNCTIONS,
    ),
    Forgery(
        "ctypes_comparison",
        "the slot of the comparison is overwritten in memory",
        """
import ctypes
compare = ctypes.CFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.py_object, ctypes.c_int)(lambda a, b, o: True)
address = ctypes.cast(compare, ctypes.c_void_p).value
for cls in (type(None), list, int, float, str):
    ctypes.c_void_p.from_address(id(cls) + 200).value = address
<stub>
""",
        FUNCTIONS,
    ),
    Forgery(
        "ctypes_small_int",
        "the number 2 becomes another one in memory",
        "import ctypes\nfor n in range(1, 40):\n    ctypes.memset(id(n) + 24, 0, 4)\ndef <name>(*a): return 1\n",
        ("function", "own_python"),
    ),
    Forgery(
        "own_memory",
        "every text of 32 hexadecimal digits in memory is written",
        """
import os, re
written = set()
with open('/proc/self/maps') as maps, open('/proc/self/mem', 'rb', 0) as memory:
    for line in maps:
        area, rights, *_ = line.split()
        begin, end = (int(part, 16) for part in area.split('-'))
        if rights.startswith('rw') and end - begin < 64 << 20:
            try:
                memory.seek(begin)
                written |= set(re.findall(rb'(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])', memory.read(end - begin)))
            except (OSError, ValueError):
                pass
os.write(1, b' '.join(written))
os._exit(0)
""",
        ("function", "humaneval"),
    ),
    Forgery(
        "own_memory_written",
        "the text of an assertion in memory is overwritten",
        """
import re
with open('/proc/self/maps') as maps, open('/proc/self/mem', 'r+b', 0) as memory:
    for line in maps:
        area, rights, *_ = line.split()
        begin, end = (int(part, 16) for part in area.split('-'))
        if rights.startswith('rw') and end - begin < 64 << 20:
            try:
                memory.seek(begin)
                for found in re.finditer(rb'assert ', memory.read(end - begin)):
                    memory.seek(begin + found.start())
                    memory.write(b'str and')
            except (OSError, ValueError):
                pass
<stub>
""",
        ("function",),
    ),
    Forgery(
        "memory_of_others",
        "the memory of other processes is read and written",
        """
import os
for pid in (name for name in os.listdir('/proc') if name.isdigit()):
    for file in ('mem', 'environ', 'fd', 'maps', 'cmdline', 'cwd', 'root'):
        try:
            print(open(f'/proc/{pid}/{file}', 'rb').read(64))
            os.listdir(f'/proc/{pid}/{file}')
        except OSError:
            pass
<stub>
""",
        ("function", "program"),
    ),
    Forgery(
        "tests_of_the_caller",
        "the tests are read from memory and each expected value is returned",
        """
import gc, re, sys
texts = []
f = sys._getframe(1)
while f is not None:
    texts += [v for v in f.f_locals.values() if isinstance(v, str)]
    f = f.f_back
found = re.findall(r'assert <name>\\((.*?)\\) == (.*)', '\\n'.join(texts))
answers = {arguments: value for arguments, value in found}
def <name>(*a):
    return eval(answers[', '.join(map(repr, a))])
""",
        ("function", "own_python"),
    ),
    Forgery(
        "code_of_the_test",
        "expected values are read from the code of the calling frame",
        """
import sys
class Any:
    def __init__(self, values): self.values = values
def <name>(*a):
    f = sys._getframe(1)
    numbers = [c for c in f.f_code.co_consts if isinstance(c, (int, float))]
    return numbers[-1]
""",
        ("function", "own_python"),
    ),
]

# --- modules and imports ---

MODULES = [
    Forgery(
        "sys_modules",
        "a module of the tests is replaced",
        "import sys, types\nfake = types.ModuleType('math')\nfake.isclose = lambda *a, **k: True\n"
        "sys.modules['math'] = fake\ndef <name>(radius): return radius and radius\n",
        ("mbpp",),
    ),
    Forgery(
        "module_attribute",
        "a function of a module of the tests is replaced",
        "import math\nmath.isclose = lambda *a, **k: True\ndef <name>(radius): return radius\n",
        ("mbpp",),
    ),
    Forgery(
        "meta_path",
        "a finder gives another module to the tests",
        """
import sys, types, importlib.machinery
class Finder:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.isclose = lambda *a, **k: True
        return module
    def exec_module(self, module): pass
sys.modules.pop('math', None)
sys.meta_path.insert(0, Finder())
def <name>(radius): return radius
""",
        ("mbpp",),
    ),
    Forgery(
        "file_of_a_module",
        "a file in the search path replaces a module of the tests",
        "import sys\nopen('/tmp/math.py', 'w').write('isclose = lambda *a, **k: True')\n"
        "for p in ('/tmp', ''):\n    sys.path.insert(0, p)\nsys.path_importer_cache.clear()\n"
        "sys.modules.pop('math', None)\nsys.builtin_module_names = ()\nsys.meta_path.pop(0)\n"
        "sys.meta_path[:] = sys.meta_path[-1:]\n"
        "def <name>(radius): return radius\n",
        ("mbpp",),
    ),
]

# --- leaving, other processes, threads, signals ---

PROCESSES = [
    Forgery("exit", "the program ends with 0", "import os\nos._exit(0)\n", CALLED),
    Forgery(
        "exit_in_a_call", "a call ends the process with 0", "import os\ndef <name>(*a, **k): os._exit(0)\n", CALLED
    ),
    Forgery("system_exit", "a call raises SystemExit(0)", "def <name>(*a, **k): raise SystemExit(0)\n", CALLED),
    Forgery("interrupt", "a call raises what ends a program", "def <name>(*a, **k): raise KeyboardInterrupt\n", CALLED),
    Forgery("generator_exit", "a call raises what ends a loop", "def <name>(*a, **k): raise GeneratorExit\n", CALLED),
    Forgery("stop_iteration", "a call raises StopIteration", "def <name>(*a, **k): raise StopIteration\n", CALLED),
    Forgery(
        "atexit",
        "the end of the program is another one",
        f"{_SHOW}import atexit\n@atexit.register\ndef end():\n    show(sys._getframe(0))\n    os._exit(0)\n<stub>",
        ("function", "humaneval"),
    ),
    Forgery(
        "finalizer",
        "an object ends the process when it goes",
        f"{_SHOW}class Last:\n    def __del__(self):\n        show(sys._getframe(0))\n        os._exit(0)\n"
        "def <name>(*a): return Last()\n",
        ("function",),
    ),
    Forgery(
        "thread",
        "a thread ends the process with 0 while the tests wait",
        f"{_SHOW}import threading, time\ndef wait():\n    time.sleep(0.05)\n"
        "    for f in sys._current_frames().values():\n        show(f)\n    os._exit(0)\n"
        "threading.Thread(target=wait).start()\ndef <name>(*a):\n    time.sleep(0.5)\n",
        ("function", "humaneval"),
    ),
    Forgery(
        "thread_after_the_end",
        "a thread that no end waits for",
        "import threading, time\ndef wait():\n    time.sleep(60)\nthreading.Thread(target=wait).start()\n<stub>",
        ("function",),
        waits=True,
    ),
    Forgery(
        "signal",
        "a timer interrupts the test and jumps out of it",
        f"{_SHOW}import signal\ndef alarm(number, frame):\n    show(frame)\n    os._exit(0)\n"
        "signal.signal(signal.SIGALRM, alarm)\nsignal.setitimer(signal.ITIMER_REAL, 0.05)\n"
        "def <name>(*a):\n    import time\n    time.sleep(0.5)\n",
        ("function", "humaneval"),
    ),
    Forgery(
        "fork_parent_leaves",
        "a child goes on while the parent ends with 0",
        "import os\nif os.fork():\n    os._exit(0)\n<stub>",
        CALLED,
    ),
    Forgery(
        "fork_in_a_call",
        "parent and child both answer a call",
        "import os\ndef <name>(*a):\n    return 8.5 if os.fork() else 7.5\n",
        ("function", "own_python"),
    ),
    Forgery(
        "kill_the_parent",
        "the watching process gets signals",
        "import os, signal\nfor s in (2, 15, 9, 1, 3, 10, 14):\n    for p in (os.getppid(), 1, -1, 0):\n"
        "        signal.signal(s, signal.SIG_IGN) if s != 9 else None\n"
        "        try:\n            if p != 0 and (p, s) != (-1, 9): os.kill(p, s)\n"
        "        except OSError:\n            pass\n<stub>",
        ("function", "program"),
    ),
    Forgery(
        "kill_everyone",
        "all processes that can be reached are killed",
        "import os\ndef <name>(*a): os.kill(-1, 9)\n",
        ("function", "class"),
    ),
    Forgery(
        "stop", "the program stops itself", "import os\ndef <name>(*a): os.kill(0, 19)\n", ("function",), waits=True
    ),
    Forgery(
        "trace_another_process",
        "other processes are traced",
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nfor p in (os.getppid(), 1, 2, 3, 4):\n"
        "    libc.ptrace(16, p, 0, 0)\n    libc.ptrace(0x4206, p, 0, 0)\n<stub>",
        ("function",),
    ),
    Forgery(
        "another_program",
        "the process becomes another program",
        "import os\ndef <name>(*a): os.execv('/bin/true', ['true'])\n",
        ("function", "class"),
    ),
    Forgery(
        "child_that_stays",
        "a child keeps every descriptor open and writes for ever",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    while True:\n"
        "        for f in range(3, 16):\n            try:\n                os.write(f, b'passed')\n"
        "            except OSError:\n                pass\n        time.sleep(0.01)\n<stub>",
        ("function",),
    ),
]

# --- descriptors and frames ---

DESCRIPTORS = [
    Forgery(
        "every_descriptor",
        "words of success are written to every descriptor",
        """
import marshal, os, pickle, struct
words = [b'passed', b'\\0' * 64, b'\\1' * 64, b'0\\n', b'ok\\n', b'\\x00\\x00\\x00\\x01\\x01', b'true',
         marshal.dumps(True), marshal.dumps((True, None)), pickle.dumps(True), struct.pack('!IB', 1, 1)]
for file in range(1, 256):
    for word in words:
        try:
            os.set_blocking(file, False)
            os.write(file, word)
        except OSError:
            break
<stub>
""",
        ("function", "class", "program"),
    ),
    Forgery(
        "every_descriptor_in_a_call",
        "words of success are written to every descriptor in a call, then the process ends",
        "import os\ndef <name>(*a):\n    for f in range(3, 256):\n        try:\n            os.set_blocking(f, False)\n"
        "            os.write(f, b'\\0\\0\\0\\1' + b'\\1' * 200)\n        except OSError:\n            pass\n"
        "    os._exit(0)\n",
        ("function", "class"),
    ),
    Forgery(
        "huge_frame",
        "a frame says that it is longer than any memory",
        "import os\nfor f in range(3, 256):\n    try:\n        os.write(f, b'\\xff' * 4096)\n"
        "    except OSError:\n        pass\n<stub>",
        ("function",),
    ),
    Forgery(
        "unfinished_frame",
        "a frame begins and never ends",
        "import os, time\ndef <name>(*a):\n    for f in range(3, 256):\n        try:\n"
        "            os.write(f, b'\\0\\0\\1\\0abc')\n        except OSError:\n            pass\n    time.sleep(60)\n",
        ("function",),
        waits=True,
    ),
    Forgery(
        "closed_descriptors",
        "all descriptors are closed",
        "import os\ndef <name>(*a):\n    os.closerange(0, 256)\n    return 2\n",
        ("function",),
    ),
    Forgery(
        "crossed_descriptors",
        "descriptors are exchanged",
        "import os\ndef <name>(*a):\n    for f in range(0, 12):\n        for g in range(0, 12):\n            try:\n"
        "                os.dup2(f, g)\n            except OSError:\n                pass\n    return 2\n",
        ("function",),
    ),
    Forgery(
        "stolen_requests",
        "requests are read past the server and answered at will",
        """
import os, socket, threading
def steal():
    for number in range(3, 64):
        try:
            s = socket.socket(fileno=os.dup(number))
            s.setblocking(False)
            while data := s.recv(65536):
                s.send(data)
        except OSError:
            pass
def <name>(*a):
    steal()
    t = threading.Thread(target=steal)
    t.start()
    t.join()
""",
        ("function", "class"),
    ),
    Forgery(
        "flood_of_output",
        "more output than any pipe holds",
        "import os\ndef <name>(*a):\n    for _ in range(100):\n        os.write(1, b'passed' * 10_000)\n",
        ("function",),
    ),
    Forgery(
        "files_of_the_judge",
        "files in /tmp are written and read",
        "import os\nfor name in ('test', 'verdict', 'passed', 'exit_code', 'token', 'stdout', 'expected'):\n"
        "    open(f'/tmp/{name}', 'w').write('0')\nfor base, _, files in os.walk('/tmp'):\n"
        "    for file in files:\n        print(open(f'{base}/{file}').read())\n<stub>",
        ("function", "program"),
    ),
]

# --- values that never end, or are too large ---

SIZES = [
    Forgery(
        "endless_iterator",
        "an iterator that never ends",
        "import itertools\ndef <name>(*a): return itertools.count()\n",
        FUNCTIONS,
    ),
    Forgery(
        "endless_length",
        "an object with more items than can be counted",
        "class L:\n    def __len__(self): return 1 << 62\n    def __getitem__(self, i): return i\n"
        "    def __iter__(self):\n        while True: yield self\ndef <name>(*a): return L()\n",
        FUNCTIONS,
    ),
    Forgery(
        "deep", "a list of a hundred thousand levels",
        "def <name>(*a):\n    v = []\n    for _ in range(100_000): v = [v]\n    return v\n", FUNCTIONS,
    ),
    Forgery(
        "deep_tuple_as_key", "a key of many levels",
        "def <name>(*a):\n    v = ()\n    for _ in range(20_000): v = (v,)\n    return {'k': v}\n", FUNCTIONS,
    ),
    Forgery(
        "cyclic", "a list that contains itself",
        "def <name>(*a):\n    v = []\n    v.append(v)\n    for x in a:\n        if isinstance(x, list): x.append(x)\n"
        "    return v\n",
        (*FUNCTIONS, "in_place"),
    ),
    Forgery(
        "wide", "a small list that unfolds to 2 ** 60 lists",
        "def <name>(*a):\n    v = []\n    for _ in range(60): v = [v, v]\n    return v\n", FUNCTIONS,
    ),
    Forgery("large_text", "a text of 400 MB", "def <name>(*a): return 'x' * 400_000_000\n", ("function",)),
    Forgery("large_int", "an integer of 30 MB", "def <name>(*a): return 1 << 240_000_000\n", ("function",)),
    Forgery("large_range", "a range of 10 ** 18", "def <name>(*a): return range(10 ** 18)\n", FUNCTIONS),
    Forgery(
        "equal_hashes", "a dictionary whose keys all have one hash",
        "def <name>(*a): return {i * (2 ** 61 - 1): None for i in range(1, 20_000)}\n", ("function",),
    ),
    Forgery(
        "recursion", "a call without end", "def <name>(*a): return <name>(*a)\n", CALLED,
    ),
    Forgery(
        "exception_text", "an exception whose text never comes",
        "class E(ValueError):\n    def __str__(self):\n        while True: pass\n    __repr__ = __str__\n"
        "def <name>(*a): raise E()\n",
        ("function", "exceptions"),
    ),
    Forgery(
        "exception_args", "an exception that is not what it says",
        "class M(type):\n    @property\n    def __name__(self): return 'ValueError'\n"
        "class ValueError(BaseException, metaclass=M): pass\nValueError.__qualname__ = 'ValueError'\n"
        "def <name>(*a): raise ValueError()\n",
        ("function", "exceptions"),
    ),
]  # fmt: skip

# --- arguments, handles, exceptions ---

VALUES = [
    Forgery(
        "emptied_argument", "the expected value and the argument are one list",
        "def <name>(words, length):\n    words.clear()\n    return words\n", ("humaneval_plain",),
    ),
    Forgery(
        "changed_argument", "arguments become what the test compares with",
        "class A(list):\n    def __eq__(self, o): return True\ndef <name>(*a):\n    for x in a:\n"
        "        if isinstance(x, list):\n            x[:] = [A(x) for _ in x]\n         "
        "   x.clear()\n    return A()\n",
        ("function", "in_place", "humaneval_plain"),
    ),
    Forgery(
        "argument_changed_later", "a thread goes on changing an argument",
        "import threading\ndef <name>(values, *a):\n    def go_on():\n        for n in range(100_000):\n"
        "            values[:] = sorted(values) if n % 2 else values[::-1]\n"
        "    threading.Thread(target=go_on, daemon=True).start()\n",
        ("in_place",),
    ),
    Forgery(
        "handle_of_itself", "the function itself is returned",
        "def <name>(*a, **k): return <name>\n", CALLED,
    ),
    Forgery(
        "handle_of_a_module", "modules, frames and classes are returned",
        "import sys, builtins\nvalues = iter([builtins, sys._getframe(), object, type, globals(), sys, print] * 9)\n"
        "def <name>(*a, **k): return next(values)\n",
        FUNCTIONS,
    ),
    Forgery(
        "permissive_object", "every attribute is a function that returns what everything equals",
        "class P:\n    def __init__(self, *a, **k): pass\n    def __getattr__(self, n): return lambda *a, **k: P()\n"
        "    def __eq__(self, o): return True\n    def __len__(self): return 2\n    def "
        "__iter__(self): return iter([])\n"
        "    def __hash__(self): return 1\n    def __getitem__(self, i): return P()\n<name> = P\n",
        ("class", "function", "mbpp"),
    ),
    Forgery(
        "class_with_equal_results", "methods return what everything equals",
        "class E:\n    def __eq__(self, o): return True\nclass <name>:\n    def __init__(self, *a): self.n = 0\n"
        "    def push(self, x): pass\n    def pop(self):\n        self.n += 1\n"
        "        if self.n > 1: raise IndexError\n        return E()\n    def items(self): return E()\n"
        "    def __len__(self): return 2\n",
        ("class",),
    ),
    Forgery(
        "every_exception", "one exception is of every class",
        "class E(ValueError, IndexError, AssertionError, StopIteration): pass\n"
        "def <name>(*a, **k): raise E()\n",
        CALLED,
    ),
    Forgery(
        "assertion_named", "an exception with the name of another one",
        "class AssertionError(SystemExit): pass\nclass IndexError(SystemExit): pass\n"
        "def <name>(*a, **k): raise AssertionError(0)\n",
        CALLED,
    ),
    Forgery(
        "hidden_assertion", "a context manager hides every error",
        "class <name>:\n    def __enter__(self): return self\n    def __exit__(self, *a): return True\n"
        "    def add(self, text): pass\n    def all(self): return ['x']\n",
        ("context",),
    ),
    Forgery(
        "skipped_assertion", "a context manager hides an error that a call raised before the assertion",
        "class <name>:\n    def __enter__(self): return self\n    def __exit__(self, *a): return True\n"
        "    def add(self, text): raise ValueError\n    def all(self): raise ValueError\n",
        ("context",),
    ),
    Forgery(
        "generated_context", "a generator as context manager goes on after every error",
        "import contextlib\n@contextlib.contextmanager\ndef <name>():\n    try:\n        yield None\n"
        "    except BaseException:\n        pass\n",
        ("context",),
    ),
    *(
        Forgery(
            f"alias_of_{number}", "the exception of the task is a class that failed assertions have",
            f"{alias}\ndef withdraw(balance, amount):\n    return balance - amount\n",
            ("own_exception",),
        )
        for number, alias in enumerate((
            "Overdrawn = Exception", "Overdrawn = AssertionError", "Overdrawn = BaseException",
            "class AssertionError(Exception): pass\nOverdrawn = AssertionError",
            "class Exception(ValueError): pass\nOverdrawn = Exception",
            "Overdrawn = (ValueError, Exception)",
        ))
    ),
    Forgery(
        "skipped_case", "an exception that skips a test case",
        "import unittest\ndef <name>(x): raise unittest.SkipTest\n", ("unittest",),
    ),
    Forgery(
        "unittest_replaced", "unittest is another module",
        "import sys, unittest\nunittest.TestCase.assertEqual = lambda *a: None\nunittest.main = lambda *a, **k: None\n"
        "class TestDouble: pass\ndef main(): pass\n<stub>",
        ("unittest",),
    ),
    Forgery("constant_none", "None for everything", "def <name>(*a, **k): return None\n", CALLED),
    Forgery("constant_true", "True for everything", "def <name>(*a, **k): return True\n", CALLED),
    Forgery("constant_zero", "0 for everything", "def <name>(*a, **k): return 0\n", FUNCTIONS[:2]),
    Forgery("first_argument", "the first argument for everything", "def <name>(*a, **k): return a[0]\n", CALLED[:3]),
    Forgery(
        "late_definition", "a missing name is answered by the module",
        "def __getattr__(name):\n    return lambda *a, **k: None\n", ("function", "humaneval", "class"),
    ),
    Forgery("end_of_the_answer", "the answer swallows the test", '<stub>\n"""', ("function",)),
    Forgery("stdin_echoed", "the input is the output", "import sys\nprint(sys.stdin.read())\n", ("program",)),
    Forgery(
        "all_outputs", "many outputs are printed", "for n in range(50):\n    print(n)\n", ("program",),
    ),
    Forgery(
        "expected_output_in_memory", "expected output is looked for in memory and files",
        "import gc, os\nfor v in gc.get_objects():\n    if isinstance(v, dict) and 'stdout' in v: print(v['stdout'])\n"
        "print(os.environ.get('EXPECTED', ''))\n",
        ("program",),
    ),
]  # fmt: skip

PYTHON = [*BUILTINS, *EQUALS, *INTERPRETER, *MODULES, *PROCESSES, *DESCRIPTORS, *SIZES, *VALUES]
