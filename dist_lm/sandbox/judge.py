"""The judge: runs the code of a test in a process of its own, which calls the program and never holds an object of it.

`JUDGES` has a function for each language; those of Bash and SQL are in modules of their own. A judge gets the test, the
socket to the program, and the descriptor of the verdict; it writes `PASSED` there once the test passed, and ends the
process. On the other end of the socket is `languages.RUN` of that language, which gets the socket as descriptor
`languages.CHANNEL`. Which bytes they exchange is theirs; what comes from the program is hostile. No process that a
program is forked from reads the `HIDDEN` parts of a test, so its memory does not hold them.

For Python, the globals of the test are the judge's own. `before` and `given`, the code that the task itself defines,
are executed in them first, so no answer can redefine what the test relies on. Any other name is asked from the program.
Values arrive as copies. For another object there is a proxy, which forwards calls, attributes, items, iteration,
length, text and `with`, and which cannot be compared, hashed, tested for truth or for its type: a test that does so
fails, whatever it catches. Nothing of a program may catch or hide an assertion of the test: neither its exception
classes nor its context managers.
"""

from __future__ import annotations

import builtins
import io
import os
import sys

from dist_lm.sandbox import bash, languages, sql
from dist_lm.sandbox.calls import GoneError, Peer, ProgramError, UncarriedError, program_operations
from dist_lm.sandbox.values import MalformedError, NotCarriedError, Reference

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

PASSED = b"passed"


class RefusedError(BaseException):
    """Raised in a test that asks what a judge does not answer. It fails the test even if the test catches it."""


class Judge(Peer):
    """The judge's end of the socket to a program.

    Attributes:
        failure: why the test fails, whatever it goes on to do; empty: nothing so far.
        has_run: whether the code of the test came to its end.
        texts: name of a part of the test in tracebacks -> its code.
        names: the globals of the test.
    """

    def __init__(self, channel: int, entry: str) -> None:
        operations = program_operations({})
        super().__init__(channel, {name: self._only_for_own(operations[name]) for name in ("call", "next")})
        self.failure = ""
        self.has_run = False
        self.texts: dict[str, str] = {}
        self._has_begun = False
        self.names = Names(self, entry)

    def ask(self, operation: str, *operands: Any) -> Any:
        """Returns the program's answer to a question; waits for the program to run its source first.

        Raises:
            RefusedError: it has ended, or a value cannot travel; the test has failed then.
            Exception: whatever the program raised; StopIteration as a ProgramError, unless the test asks for an item.
        """
        self.begin()
        try:
            value = super().ask(operation, *operands)
        except (StopIteration, StopAsyncIteration):
            if operation == "next one":
                raise
            # In a test it would end a loop that counts what holds, as in `all(map(check, cases))`.
            raise ProgramError("the program raised StopIteration") from None
        except NotCarriedError as error:
            self.refuse(f"{error} cannot be given to the program")
        except UncarriedError as error:
            self.refuse(f"the program returned {error}, which does not reach the test")
        except GoneError as error:
            self.refuse(str(error))

        if _catches_assertions(value):
            self.refuse("a class of the program is Exception or AssertionError: it would catch what the test asserts")
        return value

    def _only_for_own(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        """Returns an operation that takes only functions and iterators which the test gave to the program; any other
        operand is a TypeError, of the program.

        Called on others, as on `type`, it would make objects in the judge that behave as the program likes.
        """

        def checked(value: Any, *operands: Any) -> Any:
            # Identity decides, because a value from the program may say that it equals anything.
            if id(value) not in self._number_of:
                raise TypeError("expected an object that the test gave to the program")
            return operation(value, *operands)

        return checked

    def begin(self) -> None:
        """Waits until the program has run its source, unless it has. Its functions and classes become names of the
        test, where the test has none of its own.

        Raises:
            RefusedError: it ended before.
        """
        if self._has_begun:
            return
        self._has_begun = True
        try:
            names = self.wait_for_names()
        except GoneError as error:
            self.refuse(str(error))
        for name, value in names.items():
            is_usable = type(name) is str and _is_shared(value) and not _catches_assertions(value)
            if is_usable and self.names.is_asked(name):
                self.names.setdefault(name, value)

    def refuse(self, reason: str) -> NoReturn:
        """Fails the test for good.

        Raises:
            RefusedError: always.
        """
        self.failure = self.failure or reason
        raise RefusedError(reason)

    def kind_of(self, value: Any) -> str:
        """Returns the kind of a reference to an object of the test: functions and iterators travel.

        Raises:
            NotCarriedError: any other object.
        """
        kind = super().kind_of(value)
        if kind in "fi":
            return kind
        raise NotCarriedError(f"a {type(value).__name__} of the test")

    def stand_in(self, reference: Reference) -> Any:
        """Returns what stands in the test for an object of the program: an exception class, an iterator, a coroutine,
        or a proxy that asks the program.

        Raises:
            MalformedError: a module that the test should import itself.
        """
        if reference.kind == "x":
            return self.exception_class(reference.names)
        if reference.kind == "i":
            return self.iterated(reference.number)
        if reference.kind == "w":
            return self._awaited(reference.number)
        if reference.kind == "m":
            raise MalformedError(f"module {reference.names[0]}, which the test itself does not import")
        kind = CallableProxy if reference.kind == "f" else Proxy
        proxy = object.__new__(kind)
        object.__setattr__(proxy, "_dist_lm_judge", self)
        object.__setattr__(proxy, "_dist_lm_type", reference.names[0])
        return proxy

    async def _awaited(self, number: int) -> Any:
        return self.ask("await", self._remote[number])

    def exception_class(self, names: tuple[str, ...]) -> type:
        """Returns the test's own exception class of that name; else one that stands for the program's."""
        # Not `self.names[...]`, which would ask the program for a name that the test lacks.
        test_class = dict.get(self.names, names[0])
        if issubclass(type(test_class), type) and issubclass(test_class, Exception):  # type: ignore[arg-type]
            return test_class  # type: ignore[return-value]
        return super().exception_class(names)


class Names(dict):
    """The globals of a test; a name that is missing is asked from the program.

    Args:
        entry: a built-in name that the program is asked for nevertheless, because it is to define it.
    """

    def __init__(self, judge: Judge, entry: str = "") -> None:
        super().__init__(__name__="__main__")
        self.code = ""  # the test's
        self._judge = judge
        self._entry = entry

    def is_asked(self, name: str) -> bool:
        """Returns whether the program is asked for a name, if the test does not define it."""
        is_ours = hasattr(builtins, name) and name != self._entry
        return not is_ours and not (name.startswith("__") and name.endswith("__")) and not self._is_module(name)

    def __missing__(self, name: str) -> Any:
        if self._is_module(name):
            return self.setdefault(name, __import__(name))
        if not self.is_asked(name):
            raise KeyError(name)
        self._judge.begin()
        if name in self:
            return self[name]
        try:
            value = self._judge.ask("name", name)
        except NameError:
            raise KeyError(name) from None
        if _is_shared(value):
            self[name] = value
        return value

    def _is_module(self, name: str) -> bool:
        """Whether the test uses a module of Python without importing it, as the program does; MBPP/596 is such a test.

        The test gets Python's own, whatever the program calls by that name.
        """
        if name not in sys.stdlib_module_names:
            return False
        import re

        return re.search(rf"\b{name}\.", self.code) is not None and not re.search(rf"\b{name}\s*\(", self.code)


def _is_shared(value: Any) -> bool:
    """Returns whether a value is no copy but stands for an object of the program."""
    return type(value) in (Proxy, CallableProxy) or issubclass(type(value), type)


def _catches_assertions(value: Any) -> bool:
    """Returns whether `except value` catches a failed assertion."""
    if type(value) is tuple:
        return any(map(_catches_assertions, value))
    return value is Exception or value is AssertionError


def _judge_of(proxy: Any) -> Judge:
    return object.__getattribute__(proxy, "_dist_lm_judge")


def _forwarded(operation: str) -> Any:
    return lambda proxy, *operands: _judge_of(proxy).ask(operation, proxy, *operands)


def _refused(what: str) -> Any:
    def refuse(proxy: Any, *_: object) -> NoReturn:
        type_name = object.__getattribute__(proxy, "_dist_lm_type")
        _judge_of(proxy).refuse(f"a {type_name} of the program cannot be {what} by a test")

    return refuse


class Proxy:
    """Stands in a test for an object of the program."""

    __slots__ = ("_dist_lm_judge", "_dist_lm_type")

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            _refused("tested for its type")(self)
        return _judge_of(self).ask("getattr", self, name)

    def __contains__(self, item: object) -> bool:
        return any(item == other for other in self)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        judge = _judge_of(self)
        is_hidden = judge.ask("exit", self, error) is True
        if is_hidden and error is not None and _skips_a_check(error, judge.texts):
            judge.refuse("a context manager of the program hides a failed assertion, or skips one")
        return is_hidden

    __setattr__, __delattr__ = _forwarded("setattr"), _forwarded("delattr")
    __getitem__, __setitem__, __delitem__ = _forwarded("getitem"), _forwarded("setitem"), _forwarded("delitem")
    __iter__, __next__, __len__ = _forwarded("iter"), _forwarded("next one"), _forwarded("len")
    __str__, __repr__, __dir__, __enter__ = (_forwarded(name) for name in ("str", "repr", "dir", "enter"))
    __eq__, __ne__, __lt__, __le__, __gt__, __ge__ = (_refused("compared") for _ in range(6))
    __hash__, __bool__ = _refused("hashed"), _refused("tested for truth")
    __instancecheck__, __subclasscheck__ = _refused("asked for its instances"), _refused("asked for its classes")


class CallableProxy(Proxy):
    """Stands in a test for a function, method or class of the program."""

    __slots__ = ()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        try:
            return _judge_of(self).ask("call", self, (*arguments, *named.values()), tuple(named))
        except StopIteration as error:
            # Inside of `map` it would end the loop of a test before its first comparison, and nothing would fail.
            raise RuntimeError("the program raised StopIteration") from error


def _skips_a_check(error: BaseException, texts: dict[str, str]) -> bool:
    """Returns whether an error that a context manager hides failed a check of the test, or kept one from being reached.

    A test of such a context manager raises on purpose: by `raise`, or in its last statement.

    Args:
        texts: name of a part of the test in tracebacks -> its code.
    """
    if issubclass(type(error), AssertionError):
        return True
    import ast

    trace = error.__traceback__
    scopes: Any = (ast.With, ast.AsyncWith)
    while trace:
        text = texts.get(trace.tb_frame.f_code.co_filename)
        if text and _leaves_a_check(ast.parse(text), trace.tb_lineno, scopes):
            return True
        trace = trace.tb_next
        # The function that the `with` statement called, or a `with` around it if a manager of the test uses this one.
        scopes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.With, ast.AsyncWith)
    return False


def _leaves_a_check(tree: Any, line: int, scopes: Any) -> bool:
    """Returns whether an error in a line leaves an assertion, or a call that may be a check, unreached in the same
    scope.

    True for a line of an assertion itself; False inside a `raise` statement, or outside all scopes. In a loop the whole
    loop counts, because a next pass is left out too.

    Args:
        tree: the parsed module.
        line: number of the line, from 1.
        scopes: classes of nodes that open a scope.
    """
    import ast

    nodes: list[Any] = [node for node in ast.walk(tree) if hasattr(node, "lineno")]
    around = [node for node in nodes if node.lineno <= line <= node.end_lineno]
    if any(isinstance(node, ast.Raise) for node in around):
        return False
    if any(isinstance(node, ast.Assert) for node in around):
        return True

    scope = next((node for node in around if isinstance(node, scopes)), None)
    if scope is None:
        return False
    # In a loop, what stands before the line is left out the next time.
    loops = [node.lineno for node in around if isinstance(node, (ast.For, ast.While)) and node.lineno > scope.lineno]
    first = min(loops, default=line + 1)
    checks = [node for node in nodes if isinstance(node, (ast.Assert, ast.Call)) and node not in around]
    return any(first <= node.lineno <= scope.end_lineno for node in checks)


class _TestModule(type(sys)):
    """`__main__` of a test, where unittest looks for test cases. It shows what the test defines itself."""

    def __init__(self, names: Names) -> None:
        super().__init__("__main__")
        self._names = names

    def __dir__(self) -> list[str]:
        return [name for name, value in self._names.items() if type(value) not in (Proxy, CallableProxy)]

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise AttributeError(name)
        return self._names[name]


def _heed_unittest(judge: Judge) -> None:
    """Makes the test fail if a test case of unittest fails, or none runs: unittest itself may only print that.

    Patches `unittest.TestResult`, which then sets `judge.failure`; replaces `__main__`, where unittest looks for test
    cases, by the names of the test; and lets `unittest.main` return instead of exiting.
    """
    import unittest
    from functools import partial

    result: Any = unittest.TestResult

    def heed(name: str, fails: Callable[..., bool]) -> None:
        original = getattr(result, name)

        def noted(self: Any, *details: Any) -> Any:
            if fails(self, *details):
                judge.failure = judge.failure or "a test case of unittest failed, or none ran"
            return original(self, *details)

        setattr(result, name, noted)

    for name in ("addError", "addFailure", "addUnexpectedSuccess"):
        heed(name, lambda *_: True)
    heed("addSubTest", lambda *details: details[-1] is not None)
    heed("stopTestRun", lambda self: self.testsRun == 0)
    sys.modules["__main__"] = _TestModule(judge.names)
    unittest.main = partial(unittest.main, exit=False)  # the end of the code is the end of the test


def judge_python(test: dict[str, str], channel: int, verdict: int) -> int:
    """Judges a test of Python, which passes if its code comes to its end and raises nothing; returns the exit code of
    the judge.

    0: it passed; then PASSED is written to `verdict` and the program is told. Else the reason, or the traceback, is on
    standard error. The state of the interpreter (`sys`, `random`) changes; descriptors stay open.

    Args:
        channel: socket to the program.
        verdict: descriptor of a pipe.
    """
    judge = Judge(channel, test["entry"])
    names = judge.names
    names.code = test["code"]
    languages.prepare_python()

    def run() -> None:
        parts = ((test["before"], "before"), (test["given"], "given"), (test["code"], "test"))
        compiled = [compile(text, name, "exec", dont_inherit=True) for text, name in parts if text]
        judge.texts = {name: text for text, name in parts if text}
        *setup, code = compiled
        # Importing unittest takes long, so only tests that use it pay for it.
        if _UNITTEST in test["code"]:
            _heed_unittest(judge)

        if setup:
            stdout = sys.stdout
            sys.stdout = io.StringIO()  # the program prints the same
            for part in setup:
                exec(part, names)
            sys.stdout = stdout
            # The program gets only instances of its own classes. A class that the test never calls, it keeps.
            for name in [name for name, value in names.items() if _is_class_of_setup(value)]:
                if f"{name}(" in test["code"]:
                    del names[name]

        # The program runs to its end first, as a module does that a test imports.
        judge.begin()
        exec(code, names)
        judge.has_run = True

    status = languages.run_python(run)
    if judge.failure:
        os.write(2, f"{judge.failure}\n".encode(errors="replace"))
        return 1
    if status == 0 and judge.has_run:  # SystemExit gives 0, too, and a program can raise it
        judge.end()
        os.write(verdict, PASSED)
        return 0
    return status or 1


def _python(test: dict[str, str], channel: int, verdict: int) -> NoReturn:
    os._exit(judge_python(test, channel, verdict))


_UNITTEST = "unittest"
_ONLY_AST = 0x400  # PyCF_ONLY_AST; the module `ast` takes long to import
_REACHING = frozenset(
    ("exec", "eval", "compile", "setattr", "delattr", "globals", "vars", "open", "input", "breakpoint", "exit", "quit")
)


def leaves_nothing(language: str, test: dict[str, str]) -> bool:
    """Returns whether the code of a test leaves the interpreter as it was, so that the next one may run in the same.

    Such code is of Python, consists of plain statements, stores nothing but names, and uses no module; the test has no
    other code (`before`, `given`). False if the code cannot be compiled.
    """
    if language != "python" or test["before"] or test["given"] or _UNITTEST in test["code"]:
        return False
    try:
        # The tree tells the statements; the code tells names and inner functions without a walk over the tree.
        statements = compile(test["code"], "test", "exec", _ONLY_AST, dont_inherit=True).body  # type: ignore[attr-defined]
        code = compile(test["code"], "test", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False

    used = {*code.co_names}
    is_plain = all(type(statement).__name__ in ("Assert", "Assign", "Expr") for statement in statements)
    targets = [t for s in statements if type(s).__name__ == "Assign" for t in s.targets]
    # Names that an inner function uses are not among those of the code around it.
    has_inner = any(type(constant) is type(code) for constant in code.co_consts)
    return (
        is_plain
        and not has_inner
        and all(type(target).__name__ == "Name" for target in targets)
        and not any(name in _REACHING or name in sys.stdlib_module_names or name[:2] == "__" for name in used)
    )


def _is_class_of_setup(value: Any) -> bool:
    """Returns whether a name of the setup is a class whose instances are the program's: it is asked for it instead."""
    if not issubclass(type(value), type):  # `isinstance` would ask a proxy
        return False
    return value.__module__ == "__main__" and not issubclass(value, BaseException)


JUDGES: dict[str, Callable[[dict[str, str], int, int], NoReturn]] = {
    "python": _python,
    "bash": bash.judge,
    "sql": sql.judge,
}
"""Language -> function of (test, socket, descriptor of the verdict) that judges a test and ends the process."""
