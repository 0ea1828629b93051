#!/usr/bin/env python3
"""Measures what the small size of the tests notices: plants defects in dist_lm one at a time and runs tests.

    python tools/mutants.py                  60 mutants: the small size, then all other tests on what it missed
    python tools/mutants.py --list           only shows the mutants
    python tools/mutants.py --last 29        a part; mutants in the file of --out are not run again
    python tools/mutants.py --reach 1        only tests at most one import away from the mutated module

Mutants are drawn by a seed from all places where a comparison, a constant, an operator, the order of arguments or a
statement can be changed. Tests run in a copy of this checkout, those nearest to the mutated module first, until one
fails. A test that fails without the mutant too does not count. A mutant that makes tests hang counts as killed.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("dist_lm", "tests", "conf", "launch", "slurm", "docs", "tools", "pyproject.toml", "README.md", "CHANGELOG.md")
SIZES = {
    "small": "not heavy and not bars and not cuda",
    "rest": "heavy and not slurm and not bars and not cuda",
}
HANG_S = 1800.0
NO_TESTS = 5  # exit code of pytest

COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
}  # fmt: skip
OPERATORS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "*", ast.Div: "*", ast.Mod: "*"}


@dataclass(frozen=True)
class Mutant:
    """A replacement of bytes in one file."""

    file: str  # relative to the checkout
    line: int
    start: int  # byte offsets in the file
    stop: int
    new: str
    kind: str

    def source(self, old: bytes) -> bytes:
        return old[: self.start] + self.new.encode() + old[self.stop :]

    def describe(self, old: bytes) -> str:
        was = old[self.start : self.stop].decode()
        return f"{self.file}:{self.line} {self.kind}: {_short(was)} -> {_short(self.new)}"


def _short(code: str) -> str:
    return " ".join(code.split())[:60]


class Finder(ast.NodeVisitor):
    """Collects all mutants of a file."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file = file
        self.source = source
        self.mutants: list[Mutant] = []
        lengths = [len(line) for line in source.splitlines(keepends=True)]
        self.line_starts = [sum(lengths[:number]) for number in range(len(lengths))]

    def add(self, node: ast.expr | ast.stmt, new: str, kind: str) -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self.line_starts[node.lineno - 1] + node.col_offset
        stop = self.line_starts[node.end_lineno - 1] + node.end_col_offset
        self.mutants.append(Mutant(self.file, node.lineno, start, stop, new, kind))

    def text(self, node: ast.expr) -> str:
        return ast.unparse(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        operator = COMPARISONS[type(node.ops[0])]
        if len(node.ops) == 1:
            self.add(node, f"({self.text(node.left)} {operator} {self.text(node.comparators[0])})", "comparison")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        joint = " or " if isinstance(node.op, ast.And) else " and "
        self.add(node, "(" + joint.join(f"({self.text(value)})" for value in node.values) + ")", "and/or")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        # a | b of types and string formats are no arithmetic
        if type(node.op) in OPERATORS and not isinstance(node.left, ast.Constant | ast.JoinedStr):
            self.add(
                node, f"(({self.text(node.left)}) {OPERATORS[type(node.op)]} ({self.text(node.right)}))", "operator"
            )
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add(node, str(not node.value), "constant")
        elif isinstance(node.value, int):
            self.add(node, str(node.value + 1), "constant")
        elif isinstance(node.value, float):
            self.add(node, repr(2 * node.value + 1), "constant")

    def visit_Call(self, node: ast.Call) -> None:
        if len(node.args) >= 2 and not any(isinstance(argument, ast.Starred) for argument in node.args):
            swapped = ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
            self.add(node, ast.unparse(swapped), "arguments")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and not self.text(node.value).startswith(("log.", "super()")):
            self.add(node, "pass", "statement")
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add(node, "pass", "statement")
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)  # not the annotation

    def visit_Raise(self, node: ast.Raise) -> None:
        """Wording of errors is not mutated."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Wording is not mutated."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in self.text(node.test):
            self.generic_visit(node)


def all_mutants() -> list[Mutant]:
    """Every mutant of dist_lm, in the order of files and lines."""
    found: list[Mutant] = []
    for path in sorted((ROOT / "dist_lm").rglob("*.py")):
        source = path.read_bytes()
        finder = Finder(str(path.relative_to(ROOT)), source)
        finder.visit(ast.parse(source))
        found += sorted(finder.mutants, key=lambda mutant: (mutant.start, mutant.stop, mutant.new))
    return found


def drawn(seed: int, count: int) -> list[Mutant]:
    """Draws mutants: first a kind, as constants would outnumber all others, then a place."""
    dice = random.Random(seed)  # noqa: S311  no secret
    by_kind: dict[str, list[Mutant]] = {}
    for mutant in all_mutants():
        by_kind.setdefault(mutant.kind, []).append(mutant)
    kinds = sorted(by_kind)
    chosen: list[Mutant] = []
    while len(chosen) < count:
        mutant = dice.choice(by_kind[dice.choice(kinds)])
        if mutant not in chosen:
            chosen.append(mutant)
    return chosen


@cache
def imports_of(path: Path) -> frozenset[Path]:
    """Files of dist_lm and tests that a file imports, inside functions too."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in ("dist_lm", "tests"):
                place = ROOT.joinpath(*name.split("."))
                found |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}
    return frozenset(found)


def distances(test: Path) -> dict[Path, int]:
    """Number of imports inside dist_lm from a test to each file; what tests share counts as part of the test."""
    reached: dict[Path, int] = {}
    queue = deque((file, 0) for file in (test, test.with_name("conftest.py")) if file.is_file())
    while queue:
        file, distance = queue.popleft()
        if reached.get(file, distance + 1) <= distance:
            continue
        reached[file] = distance
        inside = ROOT / "dist_lm" in file.parents
        for imported in imports_of(file):
            (queue.append if inside else queue.appendleft)((imported, distance + inside))
    return reached


def tests_by_distance(file: Path, reach: int) -> list[list[str]]:
    """Test files that reach a file of dist_lm, nearest first; those that mirror its folder come before all others."""
    mirrored = ROOT / "tests" / file.relative_to(ROOT / "dist_lm").parent
    if mirrored == ROOT / "tests":
        mirrored /= "launcher"  # files of dist_lm itself have no folder of their own
    groups: dict[int, list[str]] = {}
    for test in sorted((ROOT / "tests").rglob("test_*.py")):
        if "cuda" in test.parts or "slurm" in test.parts:
            continue
        distance = distances(test).get(file)
        if mirrored in test.parents:
            distance = -1
        if distance is not None and distance <= reach:
            groups.setdefault(distance, []).append(str(test.relative_to(ROOT)))
    return [groups[distance] for distance in sorted(groups)]


def run_tests(checkout: Path, tests: Sequence[str], marks: str, without: Sequence[str]) -> str | None:
    """The first test that fails, "hang" if they do not end; None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--durations=0", "-m", marks]
    command += ["-rfE", *(f"--deselect={name}" for name in without), *tests]
    environ = os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=checkout, env=environ, capture_output=True, text=True, check=False, timeout=HANG_S
        )
    except subprocess.TimeoutExpired:
        return "hang"
    if done.returncode in (0, NO_TESTS):
        return None
    failed = [line.split(" ", 1)[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return failed[0].split(" - ")[0] if failed else f"pytest ended with {done.returncode}"


def killer(mutated: Path, sound: Path, groups: Sequence[Sequence[str]], marks: str) -> str | None:
    """The test that fails with the mutant and passes without it; None: the mutant survives."""
    fails_anyway: list[str] = []
    for tests in groups:
        while name := run_tests(mutated, tests, marks, fails_anyway):
            if "::" not in name or run_tests(sound, [name], marks, []) is None:
                return name
            fails_anyway.append(name)
    return None


def copies(folder: Path) -> Iterator[Path]:
    """Two copies of this checkout: one to mutate, one that stays sound."""
    for name in ("mutated", "sound"):
        for part in COPIED:
            target = folder / name / part
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            copy(ROOT / part, target)
        yield folder / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=34)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant to run (default: %(default)s)")
    parser.add_argument("--last", type=int, help="number of the last one (default: all)")
    parser.add_argument("--reach", type=int, default=99, help="run tests at most so many imports away")
    parser.add_argument("--only-small", action="store_true", help="do not run the rest on survivors")
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--list", action="store_true", help="only show the mutants")
    options = parser.parse_args()

    mutants = drawn(options.seed, options.count)
    if options.list:
        for number, mutant in enumerate(mutants):
            print(number, mutant.describe((ROOT / mutant.file).read_bytes()))
        return

    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    finished = {record["number"] for record in done}
    with tempfile.TemporaryDirectory() as folder:
        mutated, sound = copies(Path(folder))
        for number in range(options.first, min(options.count - 1, options.last or options.count) + 1):
            if number in finished:
                continue
            mutant = mutants[number]
            source = (ROOT / mutant.file).read_bytes()
            (mutated / mutant.file).write_bytes(mutant.source(source))
            groups = tests_by_distance(ROOT / mutant.file, options.reach)
            record = asdict(mutant) | {"number": number, "small": killer(mutated, sound, groups, SIZES["small"])}
            if record["small"] is None and not options.only_small:
                record["rest"] = killer(mutated, sound, groups, SIZES["rest"])
            (mutated / mutant.file).write_bytes(source)
            done.append(record)
            with options.out.open("a") as lines:
                print(json.dumps(record), file=lines)
            print(number, mutant.describe(source), "|", record["small"] or record.get("rest") or "survives", flush=True)

    small = sum(record["small"] is not None for record in done)
    rest = sum(record.get("rest") is not None for record in done)
    print(f"{len(done)} mutants: the small size kills {small}, all tests {small + rest}; others survive")


if __name__ == "__main__":
    main()
