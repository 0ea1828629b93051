"""A Jinja sandbox whose renderings end and whose values stay small, for templates of foreign models.

It counts the turns of loops, the calls of macros and the characters that are written, and measures values before they
are made, so that the same template is refused on every machine, however busy or large that is.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_STEPS = 1_000_000  # of a rendering; 1,000 turns that each look at all turns take as many
LONGEST, LARGEST = 10_000_000, 10**30  # a text or list, and a product
MOST_WRITTEN = 50_000_000  # characters of a rendering, those that macros and blocks return included
MOST_DIGITS = 10_000  # base x exponent of a power: above the digits that it has
WIDEST_INDENT = 100
SIZED = str | list | tuple | dict
TAKEN, WRITE, JOIN = "what it took", "write", "join texts"  # no template can name the first and last: they have spaces
STEP = "take a step"
PADS = frozenset(("center", "ljust", "rjust", "zfill", "batch", "slice"))  # a number is the size of what they make
INDENTS = frozenset(("expandtabs", "indent", "tojson"))  # a number is the width of each line
PARTS = frozenset(  # filters that look at a value, and make no text of it
    (
        *("abs", "attr", "batch", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items"),
        *("last", "length", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "round"),
        *("select", "selectattr", "slice", "sort", "sum", "unique"),
    )
)
WIDE = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(?:[0-9.]*\*|[0-9]*\.?[0-9]{5})")  # a field of % with a width of its own
WIDE_FIELD = re.compile(r"\{[^{}]*:[^{}]*(?:[0-9]{5}|\{)")  # the same of str.format, or a width that is an argument


@dataclass
class Taken:
    """What a rendering took so far."""

    steps: int = 0
    written: int = 0  # characters

    def write(self, characters: int) -> None:
        """Count characters."""
        self.written += characters
        if self.written > MOST_WRITTEN:
            raise jinja2.exceptions.SecurityError(f"it writes more than {MOST_WRITTEN:,} characters")


def characters(value: Any, known: dict[int, int] | None = None) -> int:
    """About the characters of a value as text. A list in many places of it is looked at once: sizes in `known`."""
    if not isinstance(value, SIZED) or isinstance(value, str):
        return len(value) if isinstance(value, str) else 1
    known = {} if known is None else known
    if id(value) not in known:
        parts = (*value, *value.values()) if isinstance(value, dict) else value
        known[id(value)] = len(value) + sum(characters(one, known) for one in parts)
    return known[id(value)]


def _require_small(size: float, what: str) -> None:
    if size > LONGEST:
        raise jinja2.exceptions.SecurityError(f"{what} makes a value that is too large")


@jinja2.pass_context
def _step(context: Context, text: int) -> None:
    """One more turn of a loop, or call of a macro; `text`: characters of the template in it."""
    taken = context.parent[TAKEN]
    taken.steps += 1
    if taken.steps > MOST_STEPS:
        raise jinja2.exceptions.SecurityError(f"it takes more than {MOST_STEPS:,} turns of loops and calls")
    taken.write(text)


@jinja2.pass_context
def _write(context: Context, value: Any) -> Any:
    """A value that is written."""
    context.parent[TAKEN].write(characters(value))
    return value


def _join(values: list[Any]) -> str:
    """`a ~ b`."""
    _require_small(sum(map(characters, values)), "~")
    return "".join(map(str, values))


class _Measured(NodeTransformer):
    """Lets filters see what `~` joins and what is written."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes), JOIN, node)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [one if isinstance(one, nodes.TemplateData) else _filtered(one, WRITE, node) for one in node.nodes]
        return node


def _filtered(value: nodes.Expr, name: str, near: nodes.Node) -> nodes.Filter:
    found = nodes.Filter(value, name, [], [], None, None)
    found.set_lineno(near.lineno)
    found.environment = value.environment = near.environment
    return found


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """The environment of foreign templates. A rendering has a variable `TAKEN`."""

    intercepted_binops = frozenset(("+", "%", "*", "**"))

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.globals.pop("lipsum")  # random text of any length
        for name, function in tuple(self.filters.items()):
            self.add_filter(name, function)
        self.filters |= {STEP: _step, WRITE: _write, JOIN: _join}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Offer a filter, whose arguments and result are measured."""
        skipped = hasattr(function, "jinja_pass_arg")

        @functools.wraps(function)
        def measured(*args: Any, **named: Any) -> Any:
            value, *others = args[skipped:]
            if name == "join" and not isinstance(value, SIZED):
                value = _taken_from(value)
            if name not in PARTS:
                _require_small(characters(value), name)
            _check(name, value, (*others, *named.values()))
            return _result(function(*args[:skipped], value, *others, **named), name)

        self.filters[name] = measured

    def call(__self, __context: Context, __obj: Any, *args: Any, **named: Any) -> Any:  # noqa: N805
        """Call a function or a method."""
        name, of = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        if isinstance(of, str):
            if name == "join" and args and not isinstance(args[0], SIZED):
                args = (_taken_from(args[0]), *args[1:])
            _check(name, of, (*args, *named.values()))
        return _result(super().call(__context, __obj, *args, **named), name)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` of the sandbox, whose fields and arguments are measured."""
        found = super().wrap_str_format(value)
        if found is None:
            return None
        template, bounded = value.__self__, found

        def measured(*args: Any, **named: Any) -> str:
            if WIDE_FIELD.search(template.replace("{{", "")):
                raise jinja2.exceptions.SecurityError("format makes a value that is too large")
            _require_small(template.count("{") * characters([args, named]), "format")
            return bounded(*args, **named)

        return measured

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sized = [isinstance(one, str | list | tuple) for one in (left, right)]
        if operator == "+":
            _require_small(len(left) + len(right) if all(sized) else 0, operator)
        elif operator == "%":
            _check("format", left, (right,)) if isinstance(left, str) else None
        else:
            size = math.prod(_size(one) for one in (left, right))
            if size > (LONGEST if any(sized) else LARGEST) or (operator == "**" and size > MOST_DIGITS):
                raise jinja2.exceptions.SecurityError(f"{operator} makes a value that is too large")
        return super().call_binop(context, operator, left, right)

    def counted(self, source: str) -> nodes.Template:
        """The template with a `_step` in each loop and macro, as a filter: the sandbox does not check those again."""
        tree = _Measured().visit(self.parse(source))
        for block in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            text = sum(len(one.data) for one in block.find_all(nodes.TemplateData))
            block.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(text), STEP, block)).set_lineno(block.lineno))
        return tree


def _size(value: Any) -> float:
    if isinstance(value, str | list | tuple):
        return len(value)
    return abs(value) if isinstance(value, int | float) else 1


def _taken_from(values: Iterable[Any]) -> list[Any]:
    """The values of an iterator, as many as a text may hold."""
    found, size = list[Any](), 0
    for value in values:
        size += characters(value)
        _require_small(size, "join")
        found.append(value)
    return found


def _check(name: str, value: Any, others: tuple[Any, ...]) -> None:
    """Refuse a filter or a method of texts by what it would make of `value`."""
    numbers = [one for one in others if isinstance(one, int)]
    if name in PADS:
        _require_small(max(numbers, default=0), name)
    elif name in INDENTS:
        width = max(numbers, default=0)
        lines = value.count("\n") + value.count("\t") + 1 if isinstance(value, str) else characters(value)
        _require_small(width * lines if width <= WIDEST_INDENT else math.inf, name)
    elif name == "replace" and len(others) > 1:
        old, new = map(str, others[:2])
        text = str(value)
        _require_small(len(text) + text.count(old) * len(new), name)
    elif name == "join":
        between = [len(one) for one in (value, *others[:1]) if isinstance(one, SIZED)]
        _require_small(characters([value, others]) + (math.prod(between) if len(between) > 1 else 0), name)
    elif name == "format":
        if isinstance(value, str) and WIDE.search(value):
            raise jinja2.exceptions.SecurityError(f"{name} makes a value that is too large")
        _require_small(str(value).count("%") * characters(others), name)


def _result(value: Any, name: str) -> Any:
    _require_small(len(value) if isinstance(value, str | list | tuple) else 0, name)
    return value
