"""tools/same_tree.py: what counts as the same file, and what does not."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from tests.patience import patient

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools/same_tree.py"
specification = importlib.util.spec_from_file_location("same_tree", TOOL)
assert specification
assert specification.loader
same_tree = importlib.util.module_from_spec(specification)
sys.modules["same_tree"] = same_tree
specification.loader.exec_module(same_tree)


def is_same(old: str, new: str, renamed: dict[str, str] | None = None, **options: object) -> bool:
    texts = dedent(old), dedent(new)
    return same_tree.first_difference(*texts, same_tree.Options(**options), renamed or {}) is None


SAME = {
    "comments, docstrings, blank lines": (
        'def f(a):\n    """Old."""\n    b = a\n    return b',
        '"""A module."""\n\ndef f(a):\n    """New."""\n    # why\n    b = a\n\n    return b',
    ),
    "locals, also in nested scopes": (
        """
        def f(a):
            found = [one for one in a if one]
            def g(): return found
            with open(a) as made, open(a) as other: found.append(made)
            try: import os.path as way
            except OSError as said: raise KeyError(said) from None
            return {k: v for k, v in g()}, lambda given: given, way, other
        """,
        """
        def f(a):
            kept = [x for x in a if x]
            def inner(): return kept
            with open(a) as source, open(a) as target: kept.append(source)
            try: import os.path as path
            except OSError as error: raise KeyError(error) from None
            return {name: size for name, size in inner()}, lambda text: text, path, target
        """,
    ),
    "nonlocal and match": (
        """
        def f(a):
            n = 0
            def g():
                nonlocal n
                n += 1
            match a:
                case [x, *y]: return x, y, g
                case {"k": z, **w}: return z, w
        """,
        """
        def f(a):
            count = 0
            def step():
                nonlocal count
                count += 1
            match a:
                case [head, *tail]: return head, tail, step
                case {"k": value, **rest}: return value, rest
        """,
    ),
    "arguments of private functions": (
        """
        def _f(a, *b, c): return a, b, c
        x = _f(1, c=2)
        class A:
            def _m(self, q): return q
            def n(self): return self._m(q=1)
        """,
        """
        def _f(u, *v, w): return u, v, w
        x = _f(1, w=2)
        class A:
            def _m(self, r): return r
            def n(self): return self._m(r=1)
        """,
    ),
    "starred arguments": ("def f(*a, **b): return a, b", "def f(*names, **options): return names, options"),
    "if in place of a conditional expression": (
        "def f(c, a, b):\n x = a if c else b\n a.y = 1 if not c else 2\n return x",
        "def f(c, a, b):\n if c:\n  x = a\n else:\n  x = b\n if c:\n  a.y = 2\n else:\n  a.y = 1\n return x",
    ),
    "a default and an if": (
        "def f(c, d):\n x = 1 if c else 2 if d else None\n return x",
        "def f(c, d):\n x = None\n if c:\n  x = 1\n elif d:\n  x = 2\n return x",
    ),
    "returns": (
        "def f(c, d):\n return 1 if c else 2 if d is not None else None",
        "def f(c, d):\n if c:\n  return 1\n if d is None:\n  return None\n return 2",
    ),
    "a missing return": ("def f(c):\n if c:\n  return 1", "def f(c):\n if not c:\n  return None\n return 1"),
    "early return": (
        "def f(c, d):\n if c and d is None:\n  print(c)\n  print(d)",
        "def f(c, d):\n if not c or d is not None:\n  return\n print(c)\n print(d)",
    ),
    "early continue": (
        "for i in range(3):\n if i:\n  print(i)\n  if i > 1:\n   print(1)\n  else:\n   print(2)",
        "for i in range(3):\n if not i:\n  continue\n print(i)\n if i > 1:\n  print(1)\n  continue\n print(2)",
    ),
    "else after raise": (
        "def f(c):\n if c:\n  raise KeyError\n else:\n  print(c)\n print(2)",
        "def f(c):\n if c:\n  raise KeyError\n print(c)\n print(2)",
    ),
    "one assignment a line": (
        "def f(a):\n x, y = a.b(), a.c()\n u, v = x, None\n p = q = 0\n return x, y, u, v, p, q",
        "def f(a):\n x = a.b()\n y = a.c()\n u = x\n v = None\n p = 0\n q = 0\n return x, y, u, v, p, q",
    ),
    "a name for a value": (
        "import json\ndef f(self, a, b):\n return self.g(a + b, json.dumps(a.b(1)))",
        "import json\ndef f(self, a, b):\n total = a + b\n return self.g(total, json.dumps(a.b(1)))",
    ),
    "a name for what is called first": (
        "import json\ndef f(a, b):\n if json.dumps(a.b(1)) and b: print(g(a).d)\n return g(2) if a else b",
        """
        import json
        def f(a, b):
            x = a.b(1)
            y = json.dumps(x)
            if y and b:
                z = g(a)
                print(z.d)
            if not a:
                return b
            u = g(2)
            return u
        """,
    ),
}
DIFFERENT = {
    "constants": ("x = 1", "x = 2"),
    "true is not one": ("x = 1", "x = True"),
    "names of the module": ("found = 1", "count = 1"),
    "attributes": ("def f(a): return a.b", "def f(a): return a.c"),
    "fields": ("class A:\n a: int = 1", "class A:\n b: int = 1"),
    "public arguments": ("def f(a): return a", "def f(b): return b"),
    "public methods of a private class": ("class _A:\n def f(self, a): pass", "class _A:\n def f(self, b): pass"),
    "keywords of others": ("g(a=1)", "g(b=1)"),
    "two locals exchanged": ("def f():\n a = 1\n b = 2\n return a", "def f():\n a = 1\n b = 2\n return b"),
    "two locals made one": ("def f():\n a = 1\n b = 2\n return a, b", "def f():\n a = 1\n a = 2\n return a, a"),
    "a local hides a global": ("def f():\n a = 1\n return len(a)", "def f():\n len = 1\n return len(len)"),
    "a comprehension hides an argument": (
        "def f(a): return [b for b in a for c in a]",
        "def f(a): return [a for a in a for c in a]",
    ),
    "nonlocal left out": (
        "def f():\n a = 0\n def g():\n  nonlocal a\n  a = 1\n g()\n return a",
        "def f():\n a = 0\n def g():\n  a = 1\n g()\n return a",
    ),
    "global": ("def f():\n global a\n a = 1", "def f():\n global b\n b = 1"),
    "one of two keywords": ("def _f(a): pass\n_f(a=1)", "def _f(b): pass\n_f(a=1)"),
    "arguments passed on": (
        "def _f(a): pass\npartial(_f, a=1)",
        "def _f(b): pass\npartial(_f, a=1)",
    ),
    "arguments in a dictionary": ("def _f(a): pass\n_f(**{'a': 1})", "def _f(b): pass\n_f(**{'a': 1})"),
    "arguments that a decorator reads": ("@fixture\ndef _f(a): pass", "@fixture\ndef _f(b): pass"),
    "names that are read": ("def f():\n a = 1\n return locals()", "def f():\n b = 1\n return locals()"),
    "names that are printed": ("def f():\n a = 1\n return f'{a=}'", "def f():\n b = 1\n return f'{b=}'"),
    "branches exchanged": ("def f(c): return 1 if c else 2", "def f(c):\n if c:\n  return 2\n return 1"),
    "a default that the condition reads": (
        "def f(x):\n x = 1 if x else None\n return x",
        "def f(x):\n x = None\n if x:\n  x = 1\n return x",
    ),
    "a default that is computed": (
        "def f(c):\n x = 1 if c else g()\n return x",
        "def f(c):\n x = g()\n if c:\n  x = 1\n return x",
    ),
    "a default that a handler sees": (
        "def f(c):\n try:\n  x = 1 if c() else None\n except E:\n  pass\n return x",
        "def f(c):\n try:\n  x = None\n  if c():\n   x = 1\n except E:\n  pass\n return x",
    ),
    "assignments that depend on each other": (
        "def f(a, b):\n a, b = b, a\n return a, b",
        "def f(a, b):\n a = b\n b = a\n return a, b",
    ),
    "assignments that a closure sees": (
        "def f():\n a = 1\n def g(): return a\n a, b = 2, g()\n return b",
        "def f():\n a = 1\n def g(): return a\n a = 2\n b = g()\n return b",
    ),
    "assignments to attributes": ("a.x, b = 1, a.y()", "a.x = 1\nb = a.y()"),
    "one list for two names": ("def f():\n a = b = []\n return a, b", "def f():\n a = []\n b = []\n return a, b"),
    "a name that makes a call earlier": (
        "def f(a): return g(a.b(), a.c())",
        "def f(a):\n x = a.c()\n return g(a.b(), x)",
    ),
    "a name that makes a call certain": ("def f(a): return a and g()", "def f(a):\n x = g()\n return a and x"),
    "a method read before a call": ("def f(a): return a.b(g(a))", "def f(a):\n x = g(a)\n return a.b(x)"),
    "a name in a loop": ("def f(a):\n while g(a): h()", "def f(a):\n x = g(a)\n while x: h()"),
    "a name in a comprehension": (
        "def f(a): return [g() for b in a]",
        "def f(a):\n x = g()\n return [x for b in a]",
    ),
    "a name in a function": ("def f(a): return lambda: g()", "def f(a):\n x = g()\n return lambda: x"),
    "order": ("def f():\n g()\n h()", "def f():\n h()\n g()"),
    "what follows an if": ("def f(c):\n if c:\n  g()\n h()", "def f(c):\n if c:\n  g()\n else:\n  h()"),
    "return out of a loop": ("for i in x:\n if i:\n  break\n g()", "for i in x:\n if i:\n  continue\n g()"),
}


@pytest.mark.parametrize("case", SAME)
def test_what_only_rewords_is_the_same(case):
    assert is_same(*SAME[case])
    assert is_same(*reversed(SAME[case]))


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_acts_differently_is_not(case):
    assert not is_same(*DIFFERENT[case])
    assert not is_same(*reversed(DIFFERENT[case]))


def test_other_renames_must_be_allowed():
    public = "def f(a): return a", "def f(b): return b"
    assert is_same(*public, keywords=frozenset({"c"}))
    assert not is_same(*public, keywords=frozenset({"a"}))
    private = "def _f(): return a._b\n_f()", "def _g(): return a._c\n_g()"
    assert not is_same(*private)
    assert is_same(*private, private=True)
    assert not is_same("a._b(a._c, a._b)", "a._x(a._y, a._y)", private=True)
    assert is_same("from a.b import f\nf(c=1)", "from a.d import g\ng(e=1)", {"a.b": "a.d", "f": "g", "c": "e"})


def test_changed_files_of_a_repository(tmp_path):
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=patient(60))

    def git(*arguments: str) -> None:
        assert run("git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments).returncode == 0

    (tmp_path / "one.py").write_text("def f():\n    a = 1\n    return a\n")
    (tmp_path / "two.py").write_text("x = 1\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "old")
    (tmp_path / "one.py").write_text("def f():\n    b = 1\n    return b\n")

    same = run(sys.executable, str(TOOL), "--git", "HEAD")
    assert (same.returncode, same.stdout) == (0, "same: one.py\n")
    (tmp_path / "two.py").write_text("# a comment\nx = 2\n")
    different = run(sys.executable, str(TOOL), "--git", "HEAD")
    assert different.returncode == 1
    assert "- HEAD:two.py:1: x = 1" in different.stdout
    assert "+ two.py:2: x = 2" in different.stdout
    assert run(sys.executable, str(TOOL), "--git", "HEAD", "one.py").returncode == 0
