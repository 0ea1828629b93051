"""Kinds of task that forgeries try to win without solving them, each with answers that do solve it.

A kind has a wrong answer too (`stub`), which a forgery may take as its body: it defines the function and fails every
test. `Kind.program` is what `TestsRule` asks of a task, so each kind is judged as a reward of kind `tests` judges it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dist_lm.evaluation.problems import Problem, humaneval, mbpp, multipl_e, own_problems
from dist_lm.sandbox.hidden import Hidden
from dist_lm.sandbox.program import Program
from dist_lm.sandbox.task import Task, task_of


@dataclass(frozen=True)
class Kind:
    """A task that is to be solved, or a problem of an evaluation."""

    language: str
    task: Task | Problem
    function: str  # name that the tests call; empty: they call none
    stub: str  # fails every test
    honest: tuple[str, ...]  # each passes all tests

    @property
    def hidden(self) -> Hidden | None:
        """Draws its hidden tests; None: it has none."""
        return self.task.hidden

    def program(self, answer: str) -> Program:
        """Returns the program of an answer, as a reward or an evaluation makes it."""
        if isinstance(self.task, Task):
            return self.task.program(answer)
        return self.task.answered(answer)


def asked(language: str, function: str, stub: str, honest: tuple[str, ...], tests: list[Any], before: str = "") -> Kind:
    """Returns a kind of the tests of a prompt file."""
    task = task_of({"language": language, "tests": tests, "before": before})
    return Kind(language, task, function, stub, honest)


def published(reader: Any, function: str, stub: str, honest: tuple[str, ...], line: dict[str, Any]) -> Kind:
    """Returns a kind of one line in the format of a published file, which `reader` reads."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "problems.jsonl")
        path.write_text(json.dumps(line), encoding="utf-8")
        [problem] = reader(path)
    return Kind(problem.language, problem, function, stub, honest)


def own(problem_id: str, stub: str) -> Kind:
    """Returns a kind of one of our own problems."""
    language, _, name = problem_id.partition("/")
    [problem] = [problem for problem in own_problems(language) if problem.id == problem_id]  # pyright: ignore
    function = "" if language == "sql" else name
    return Kind(language, problem, function, stub, (f"{problem.prompt}{problem.solution}",))


# --- Python ---

FUNCTION = asked(
    "python",
    "median",
    "def median(values):\n    return None\n",
    (
        "def median(values):\n    import statistics\n    return statistics.median(values)",
        "median = lambda values: (sorted(values)[len(values) // 2] + sorted(values)[(len(values) - 1) // 2]) / 2",
    ),
    [
        "assert median([3, 1, 2]) == 2",
        "assert median([4, 1, 3, 2]) == 2.5",
        "for result, expected in zip(map(median, ([7], [2, 4])), (7, 3)):\n    assert result == expected",
        "values = [9, 7, 30]\nassert abs(median(values) - 9) < 1e-9\nassert values == [9, 7, 30]",
    ],
)
CLASS = asked(
    "python",
    "Stack",
    "class Stack:\n    def push(self, item): pass\n    def pop(self): pass\n    def items(self): pass\n",
    (
        "class Stack:\n    def __init__(self, items=()):\n        self._items = list(items)\n"
        "    def push(self, item): self._items.append(item)\n    def pop(self): return self._items.pop()\n"
        "    def items(self): return self._items\n    def __len__(self): return len(self._items)\n",
    ),
    [
        "stack = Stack()\nstack.push(1)\nstack.push('b')\nassert stack.items() == [1, 'b']\nassert stack.pop() == 'b'",
        "stack = Stack([1, 2, 3])\nassert stack.pop() == 3\nassert len(stack) == 2",
        "stack = Stack()\nstack.push(4)\nassert stack.pop() == 4\ntry:\n    stack.pop()\nexcept IndexError:\n    pass\n"
        "else:\n    raise AssertionError('an empty stack has an item')",
    ],
)
IN_PLACE = asked(
    "python",
    "rotate",
    "def rotate(values, n):\n    return None\n",
    (
        "def rotate(values, n):\n    n %= len(values)\n    values[:] = values[-n:] + values[:-n]\n",
        "from collections import deque\ndef rotate(values, n):\n    d = deque(values)\n    d.rotate(n)\n"
        "    for i in range(len(values)):\n        values[i] = d[i]\n",
    ),
    [
        "values = [1, 2, 3, 4]\nassert rotate(values, 1) is None\nassert values == [4, 1, 2, 3]",
        "values = ['a', 'b', 'c']\nrotate(values, 4)\nassert values == ['c', 'a', 'b']",
    ],
)
EXCEPTIONS = asked(
    "python",
    "age_of",
    "def age_of(text):\n    return None\n",
    (
        "def age_of(text):\n    age = int(text)\n    if age < 0:\n        raise "
        "ValueError(f'{age} years')\n    return age",
        "class AgeError(ValueError):\n    pass\n\ndef age_of(text):\n    if not text.isdigit():\n"
        "        raise AgeError(text)\n    return int(text)",
    ),
    [
        "assert age_of('7') == 7\ntry:\n    age_of('-1')\nexcept ValueError:\n    pass\n"
        "else:\n    raise AssertionError('-1 is an age')",
        "for text in ('x', '-5', ''):\n    try:\n        age_of(text)\n        raised = False\n"
        "    except ValueError:\n        raised = True\n    assert raised, text\nassert age_of('40') == 40",
    ],
)
# The code before the tests defines what they check with.
CHECKED = asked(
    "python",
    "roots",
    "def roots(a, b):\n    return None\n",
    ("def roots(a, b):\n    return sorted((a, b))\n", "def roots(a, b):\n    return (a, b) if a < b else (b, a)\n"),
    [
        "assert Checker.holds(roots(3, 1), 3, 1)",
        "assert rising(roots(2, 2)) and Checker.holds(roots(2, 2), 2, 2)",
        "assert rising(roots(-1, -4)) and Checker.holds(roots(-1, -4), -1, -4)",
    ],
    before=(
        "class Checker:\n    @staticmethod\n    def holds(found, a, b):\n"
        "        return len(found) == 2 and all(x in (a, b) for x in found) and found[0] + found[1] == a + b\n"
        "def rising(found):\n    return found[0] <= found[1]\n"
    ),
)
PROGRAM = asked(
    "python",
    "",
    "print(end='')",
    ("import sys\nprint(sum(map(int, sys.stdin)))", "total = 0\nwhile True:\n    try:\n        total += int(input())\n"
     "    except EOFError:\n        break\nprint(total)\n"),
    [{"stdin": "3\n4\n", "stdout": "7"}, {"stdin": "10\n-4\n1\n", "stdout": "7"}, {"stdin": "", "stdout": "0"}],
)  # fmt: skip
CONTEXT = asked(
    "python",
    "Log",
    "class Log:\n    def __enter__(self): return self\n    def __exit__(self, *a): pass\n"
    "    def add(self, text): pass\n    def all(self): pass\n",
    (
        "class Log:\n    def __init__(self): self._lines = []\n    def __enter__(self): return self\n"
        "    def __exit__(self, kind, error, trace): return kind is KeyError\n"
        "    def add(self, text): self._lines.append(text)\n    def all(self): return self._lines\n",
    ),
    [
        "with Log() as log:\n    log.add('a')\n    assert log.all() == ['a']",
        "def check(log):\n    lines = log.all()\n    assert lines == ['b'], lines\n"
        "with Log() as log:\n    log.add('b')\n    check(log)",
        "with Log() as log:\n    log.add('c')\n    lines = log.all()\n    raise KeyError(lines)\nassert lines == ['c']",
    ],
)
OWN_EXCEPTION = asked(
    "python",
    "withdraw",
    "class Overdrawn(Exception):\n    pass\ndef withdraw(balance, amount):\n    return None\n",
    (
        "class Overdrawn(ValueError):\n    pass\ndef withdraw(balance, amount):\n    if amount > balance:\n"
        "        raise Overdrawn\n    return balance - amount\n",
        "Overdrawn = ValueError\ndef withdraw(balance, amount):\n    if amount > balance:\n"
        "        raise ValueError('too much')\n    return balance - amount\n",
    ),
    [
        "try:\n    withdraw(1, 2)\n    assert False, 'overdrawn'\nexcept Overdrawn:\n    pass",
        "for amount in (4, 5):\n    try:\n        withdraw(3, amount)\n        raise AssertionError(amount)\n"
        "    except Overdrawn:\n        continue\nassert withdraw(3, 1) == 2",
    ],
)
UNITTEST = asked(
    "python",
    "double",
    "def double(x):\n    return None\n",
    ("def double(x):\n    return 2 * x\n",),
    [
        "import unittest\nclass TestDouble(unittest.TestCase):\n    def test_numbers(self):\n"
        "        self.assertEqual(double(4), 8)\nunittest.main(argv=['test'], exit=False)",
        "from unittest import TestCase, main\nclass TestDouble(TestCase):\n    def test_texts(self):\n"
        "        for text in ('a', 'bc'):\n            with self.subTest(text=text):\n"
        "                self.assertEqual(double(text), text + text)\nif __name__ == '__main__':\n    main()",
        "import unittest\nclass TestDouble(unittest.TestCase):\n    def test_lists(self):\n"
        "        self.assertEqual(double([1]), [1, 1])\n"
        "unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(TestDouble))",
    ],
)
HUMANEVAL = published(
    humaneval,
    "side_of",
    "def side_of(square):\n    return None\n",
    ("    return square ** 0.5\n", "import math\ndef side_of(square):\n    return math.sqrt(square)\n"),
    {
        "task_id": "HumanEval/1",
        "prompt": (
            "import math\n\n\ndef area(sides: list) -> float:\n"
            '    """Multiply the two sides of a rectangle."""\n    return math.prod(sides)\n\n\n'
            'def side_of(square: float) -> float:\n    """Find the side of a square with this area.\n'
            '    >>> side_of(25.0)\n    5.0\n    """\n'
        ),
        "entry_point": "side_of",
        "canonical_solution": "    return math.sqrt(square)\n",
        "test": (
            "METADATA = {}\n\n\ndef check(candidate):\n    for square in (4.0, 30.25, 2.0):\n"
            "        side = candidate(square)\n        assert abs(area([side, side]) - square) < 1e-6\n"
            "        assert side > 0\n"
        ),
    },
)
HUMANEVAL_PLAIN = published(
    humaneval,
    "shorter",
    "def shorter(words, length):\n    return None\n",
    ("    return [word for word in words if len(word) < length]\n",),
    {
        "task_id": "HumanEval/2",
        "prompt": (
            "from typing import List\n\n\ndef shorter(words: List[str], length: int) -> List[str]:\n"
            '    """Keep the words that are shorter than length."""\n'
        ),
        "entry_point": "shorter",
        "canonical_solution": "    return [word for word in words if len(word) < length]\n",
        "test": (
            "METADATA = {'author': 'us'}\n\n\ndef check(candidate):\n"
            "    assert candidate(['a', 'bcd', 'ef'], 3) == ['a', 'ef'], 'mixed'\n"
            "    assert sorted(candidate(['z', 'y'], 2)) == ['y', 'z']\n"
            "    assert len(candidate(['abc'], 4)) == 1 and isinstance(candidate(['abc'], 4), list)\n"
        ),
    },
)
MBPP = published(
    mbpp,
    "circle_area",
    "def circle_area(radius):\n    return None\n",
    ("import math\ndef circle_area(radius):\n    return math.pi * radius ** 2\n",),
    {
        "task_id": 1,
        "text": "Write a function to find the area of a circle.",
        "code": "def circle_area(radius):\n    return 3.14159265 * radius * radius\n",
        "test_setup_code": "import math",
        "test_list": [
            "assert math.isclose(circle_area(2), 12.566, rel_tol=0.001)",
            "assert math.isclose(circle_area(1), 3.1416, rel_tol=0.001)",
            "assert circle_area(0) == 0",
        ],
        "challenge_test_list": [],
    },
)
# The function that is asked for has the name of a built-in one, as in MBPP/126.
MBPP_BUILTIN = published(
    mbpp,
    "sum",
    "def sum(a, b):\n    return None\n",
    ("def sum(a, b):\n    return a + b if a < b else a\n",),
    {
        "task_id": 2,
        "text": "Write a function sum that adds the larger one to the first number.",
        "code": "def sum(a, b):\n    return a + b if a < b else a\n",
        "test_setup_code": "",
        "test_list": ["assert sum(1, 2) == 3", "assert sum(5, 2) == 5"],
        "challenge_test_list": [],
    },
)
# The setup of the tests uses the program's class, as in MBPP/927.
MBPP_TREE = published(
    mbpp,
    "height",
    "class Node:\n    def __init__(self, value):\n        pass\ndef height(root):\n    return None\n",
    (
        "class Node:\n    def __init__(self, value):\n        self.value = value\n       "
        " self.left = self.right = None\n"
        "def height(root):\n    return 1 + max(height(root.left), height(root.right)) if root else 0\n",
    ),
    {
        "task_id": 3,
        "text": "Write a class Node and a function to find the height of a tree of nodes.",
        "code": "",
        "test_setup_code": (
            "root = Node(1)\nroot.left = Node(2)\nroot.left.right = Node(3)\nother = Node(1)\nother.right = Node(2)"
        ),
        "test_list": ["assert height(root) == 3", "assert height(root.left) == 2", "assert height(other) == 2"],
        "challenge_test_list": [],
    },
)
MULTIPL_E_PYTHON = published(
    multipl_e,
    "joined",
    "def joined(words):\n    return None\n",
    ("    return '-'.join(words)\n",),
    {
        "name": "HumanEval_1_joined",
        "language": "py",
        "prompt": 'def joined(words):\n    """Join the words by a minus sign."""\n',
        "tests": (
            "def check(candidate):\n    assert candidate(['a', 'b']) == 'a-b'\n    assert candidate([]) == ''\n\n"
            "def test_check():\n    check(joined)\n\ntest_check()\n"
        ),
        "stop_tokens": ["\ndef", "\n#", "\nif", "\nclass"],
    },
)
OWN_PYTHON = own("python/last", "def last(items):\n    return None\n")

# --- Bash ---

BASH_FUNCTION = asked(
    "bash",
    "total",
    "total() { echo; }",
    (
        'total() {\n  local sum=0 n\n  for n in "$@"; do sum=$((sum + n)); done\n  echo $sum\n}',
        "total() (\n  IFS=+\n  echo $(($*))\n)",
    ),
    [
        '[ "$(total 1 2 3)" = 6 ]',
        'test "$(total 10 -4)" -eq 6',
        "[[ $(total 5 5) == 10 ]]",
        "diff <(total 7 8) <(echo 15) > /dev/null",
        'total 4 5 | grep -qx 9 && [ "$(total 20 1)" = 21 ]',
    ],
)
# The shell of these tests reads what the function prints: as arithmetic, as words, as a pattern.
BASH_NUMBER = asked(
    "bash",
    "total",
    "total() { echo; }",
    (
        "total() {\n  local sum=0 n\n  for n; do sum=$((sum + n)); done\n  printf ' %d\\n' $sum\n}",
        "total() { local IFS=+; echo $(($*)); }",
    ),
    [
        "(( $(total 1 2 3) == 6 ))",
        "[[ $(total 10 -4) -eq 6 ]]",
        'want=15 && sum="$(total 7 8)" && (( sum == want ))',
        '[[ "$(total 4 5)" -ge 9 && $(total 4 5) -lt 10 ]]',
        'candidate() { total "$@"; }\n[[ $(candidate 20 1) -eq 21 ]]',
    ],
)
BASH_WORDS = asked(
    "bash",
    "first_word",
    "first_word() { echo no; }",
    ("first_word() { echo ${1%% *}; }", "first_word() { set -- $1; printf %s $1; }"),
    [
        "[ $(first_word 'a b') = a ]",
        "test $(first_word 'cd e f') = cd",
        "got=$(first_word '6 7')\n[ $got -eq 6 ]",
        "if [ `first_word x` = x ]; then true; else false; fi",
    ],
)
BASH_PATTERN = asked(
    "bash",
    "upper",
    "upper() { echo; }",
    ('upper() { echo "${1^^}"; }', 'upper() { printf %s "$1" | tr a-z A-Z; }'),
    ["[[ ABC == $(upper abc) ]]", "want=X && got=$(upper x) && [[ $want = $got ]]", "[[ QR =~ $(upper qr) ]]"],
)
BASH_FILES = asked(
    "bash",
    "sort_file",
    'sort_file() { : > "$2"; }',
    ('sort_file() { sort "$1" > "$2"; }', 'sort_file() {\n  sort -o "$2" -- "$1"\n}'),
    [
        "cd /tmp && printf 'b\\na\\n' > in && sort_file in out && [ \"$(cat out)\" = $'a\\nb' ]",
        "mkdir -p /tmp/d && cd /tmp/d && printf '2\\n3\\n1\\n' > in && sort_file in out && "
        "printf '1\\n2\\n3\\n' > want && cmp -s out want && [ \"$(wc -l < in)\" -eq 3 ]",
        "cd /tmp\nprintf '9\\n8\\n' > in\nsort_file in out\nprintf '8\\n9\\n' > want\ndiff out want",
        "cd /tmp && printf 'd\\nc\\n' > in && printf 'c\\nd\\n' > want && sort_file in out && diff out want",
        "cd /tmp\nfile=/tmp/want\nprintf '5\\n4\\n' > in\nsort_file in out\nprintf '4\\n5\\n' > $file\ncmp out $file",
    ],
)
BASH_RUN = asked(
    "bash",
    "make_script",
    'make_script() { : > "$1"; chmod +x "$1"; }',
    ('make_script() { printf \'#!/bin/sh\\necho hello "$1"\\n\' > "$1"; chmod +x "$1"; }',),
    ["cd /tmp && make_script run && [ \"$(./run you)\" = 'hello you' ]"],
)
BASH_BEFORE = asked(
    "bash",
    "add_line",
    "add_line() { :; }",
    ('add_line() { echo "$1" >> list; }', "cd /tmp\nadd_line() { printf '%s\\n' \"$@\" >> /tmp/list; }"),
    ['add_line c && [ "$(tail -n 1 list)" = c ]', "add_line 'd e'\n[ \"$(cat list)\" = $'a\\nb\\nd e' ]"],
    before="cd /tmp && printf 'a\\nb\\n' > list",
)
BASH_PROGRAM = asked(
    "bash",
    "",
    ":",
    ("tr a-z A-Z", 'while read -r line; do echo "${line^^}"; done'),
    [{"stdin": "ab\nc\n", "stdout": "AB\nC\n"}, {"stdin": "x y\n", "stdout": "X Y"}],
)
MULTIPL_E_BASH = published(
    multipl_e,
    "double",
    "double() { echo; }",
    ("    echo $(($1 * 2))\n", "double() {\n    echo $(($1 + $1))\n}\n"),
    {
        "name": "HumanEval_2_double",
        "language": "sh",
        "prompt": "#!/bin/bash\n# Double a number.\n#\n# $1 is an integer\ndouble() {\n",
        "tests": (
            '}\n\ncandidate() {\n    double "$@"\n}\n\nset -e\nrun_test() {\n'
            '    [[ $(candidate "4") = "8" ]]\n    [[ $(candidate "-3") = "-6" ]]\n}\n\nrun_test\n'
        ),
        "stop_tokens": ["\n}"],
    },
)
OWN_BASH = own("bash/multiply", "multiply() { echo; }")
OWN_BASH_FILES = own("bash/rename", "rename() { :; }")

# --- SQL ---

_PEOPLE = "CREATE TABLE people (name TEXT, age INTEGER, city TEXT);\nINSERT INTO people VALUES "
_ORDERS = "CREATE TABLE orders (id INTEGER PRIMARY KEY, person TEXT, amount INTEGER);\nINSERT INTO orders VALUES "
SQL_QUERY = asked(
    "sql",
    "",
    "SELECT NULL",
    (
        "SELECT name FROM people WHERE city IS NULL ORDER BY name",
        "WITH homeless AS (SELECT * FROM people WHERE ifnull(city, '') = '')\nSELECT name FROM homeless ORDER BY 1;",
        "CREATE VIEW homeless AS SELECT name FROM people WHERE city IS NULL;\nSELECT * FROM homeless ORDER BY name;",
    ),
    [
        {"before": f"{_PEOPLE}('Di', 19, NULL), ('Ann', 34, 'Oslo')", "stdout": "Di"},
        {"before": f"{_PEOPLE}('Max', 31, NULL), ('Abe', 35, NULL), ('Ben', 61, 'Bern')", "stdout": "Abe\nMax"},
    ],
)
SQL_WRITES = asked(
    "sql",
    "",
    "SELECT 1",
    (
        "UPDATE orders SET amount = 2 * amount WHERE person = 'Ann'",
        "CREATE TABLE doubled AS SELECT id FROM orders WHERE person = 'Ann';\n"
        "UPDATE orders SET amount = amount + amount WHERE id IN (SELECT id FROM doubled);\nDROP TABLE doubled;",
    ),
    [
        {
            "before": f"{_ORDERS}(1, 'Ann', 3), (2, 'Bo', 4)",
            "code": "SELECT group_concat(amount) = '6,4' FROM (SELECT amount FROM orders ORDER BY id)",
        },
        {
            "before": f"{_ORDERS}(1, 'Cy', 5), (2, 'Ann', 7), (3, 'Ann', 1)",
            "code": "SELECT group_concat(amount) = '5,14,2' FROM (SELECT amount FROM orders ORDER BY id)",
        },
    ],
)
SQL_TABLE = asked(
    "sql",
    "",
    "CREATE TABLE sums (person TEXT, total INTEGER)",
    (
        "CREATE TABLE sums AS SELECT person, sum(amount) AS total FROM orders GROUP BY person",
        "CREATE VIEW sums (person, total) AS SELECT person, sum(amount) FROM orders GROUP BY 1",
    ),
    [
        {
            "before": f"{_ORDERS}(1, 'Ann', 3), (2, 'Bo', 4), (3, 'Ann', 1)",
            "code": "SELECT count(*) = (SELECT count(DISTINCT person) FROM orders) "
            "AND sum(total) = (SELECT sum(amount) FROM orders) FROM sums",
        },
        {
            "before": f"{_ORDERS}(1, 'Cy', 5)",
            "code": "SELECT max(total) = (SELECT max(amount) FROM orders) AND count(*) = 1 FROM sums",
        },
    ],
)
SQL_COPY = asked(
    "sql",
    "",
    "SELECT 1",
    ("INSERT INTO archive SELECT * FROM orders", "INSERT INTO archive (id, person, amount) SELECT * FROM orders;"),
    [
        {
            "before": f"CREATE TABLE archive (id, person, amount);\n{_ORDERS}(1, 'Ann', 3), (2, 'Bo', 4)",
            "code": "SELECT count(*) = (SELECT count(*) FROM orders) FROM archive",
            "writes": writes,
        }
        for writes in ("archive", "archive, other")
    ],
)
OWN_SQL = own("sql/no_city", "SELECT NULL")

KINDS = {
    "function": FUNCTION,
    "class": CLASS,
    "in_place": IN_PLACE,
    "exceptions": EXCEPTIONS,
    "checked": CHECKED,
    "context": CONTEXT,
    "own_exception": OWN_EXCEPTION,
    "unittest": UNITTEST,
    "program": PROGRAM,
    "humaneval": HUMANEVAL,
    "humaneval_plain": HUMANEVAL_PLAIN,
    "mbpp": MBPP,
    "mbpp_builtin": MBPP_BUILTIN,
    "mbpp_tree": MBPP_TREE,
    "multipl_e_python": MULTIPL_E_PYTHON,
    "own_python": OWN_PYTHON,
    "bash_function": BASH_FUNCTION,
    "bash_number": BASH_NUMBER,
    "bash_words": BASH_WORDS,
    "bash_pattern": BASH_PATTERN,
    "bash_files": BASH_FILES,
    "bash_run": BASH_RUN,
    "bash_before": BASH_BEFORE,
    "bash_program": BASH_PROGRAM,
    "multipl_e_bash": MULTIPL_E_BASH,
    "own_bash": OWN_BASH,
    "own_bash_files": OWN_BASH_FILES,
    "sql_query": SQL_QUERY,
    "sql_writes": SQL_WRITES,
    "sql_table": SQL_TABLE,
    "sql_copy": SQL_COPY,
    "own_sql": OWN_SQL,
}
