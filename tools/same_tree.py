#!/usr/bin/env python3
"""Says whether two versions of a Python file have the same syntax tree, up to how it is worded.

    python tools/same_tree.py OLD.py NEW.py
    python tools/same_tree.py --git HEAD~1 [PATH ...]    changed files between a revision and the working tree

Exit code 0: the same. 1: the first difference of each file is printed with its lines. 2: a file cannot be read.

These may differ: comments, docstrings, blank lines, and
- names of locals: variables, loop and comprehension variables, `except ... as`, `with ... as`, captures of `match`,
  nested functions, imports inside functions, `*args`, `**kwargs`, and arguments of lambdas, nested and `_private`
  functions, also where calls pass them by keyword. Names of a module, attributes and arguments of public functions must
  stay;
- `if` in place of a conditional expression: `if c: x = a` `else: x = b`; `x = None` and then `if c: x = a`;
  `if c: return a` and then `return b`;
- the nesting of `if`: an early `return`, `continue` or `raise` in place of `else` or of an indented rest, and
  `if not c: b else: a` in place of `if c: a else: b`;
- `a, b = x, y` in place of two lines, where neither line can change what the other one reads;
- `name = x` and then `f(name)` in place of `f(x)`, if nothing else reads `name` and nothing that acts comes before it.

`--renamed OLD=NEW` (repeatable) declares a rename of a public name. `--private` lets names with an underscore change
consistently. `--arguments` lets arguments of public functions change that no call in the repository names.
"""

import argparse
import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
Scoped = Function | ast.Lambda | ast.ClassDef | Comprehension
OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
# Decorators that do not look at the argument names of their function.
PLAIN_DECORATORS = {
    "staticmethod",
    "classmethod",
    "property",
    "contextmanager",
    "cache",
    "lru_cache",
    "wraps",
    "setter",
    "override",
}
PASSES = 3  # a name that an `if` assigned can be replaced by its value only when that is one assignment
READS_LOCALS = {"locals", "vars", "eval", "exec", "dir"}


# --- Control flow: one form for what can be written in several ways -------------------------------------------------


def always_ends(block: Sequence[ast.stmt]) -> bool:
    """Whether control never reaches the end of `block`."""
    last = block[-1] if block else None
    if isinstance(last, ast.If):
        return always_ends(last.body) and always_ends(last.orelse)
    return isinstance(last, ast.Return | ast.Raise | ast.Continue | ast.Break)


def negated(test: ast.expr) -> ast.expr:
    """The opposite condition, with each `not` as far inside as it goes."""
    opposite: ast.expr
    match test:
        case ast.UnaryOp(op=ast.Not()):
            return simple_test(test.operand)
        case ast.BoolOp():
            operator = ast.Or() if isinstance(test.op, ast.And) else ast.And()
            opposite = ast.BoolOp(operator, [negated(operand) for operand in test.values])
        case ast.Compare(ops=[operator]) if type(operator) in OPPOSITES:
            opposite = ast.Compare(test.left, [OPPOSITES[type(operator)]()], test.comparators)
        case _:
            opposite = ast.UnaryOp(ast.Not(), test)
    return ast.copy_location(opposite, test)


def simple_test(test: ast.expr) -> ast.expr:
    """A condition of which only the truth counts, with each `not` as far inside as it goes."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return negated(test.operand)
    if isinstance(test, ast.BoolOp):
        return ast.copy_location(ast.BoolOp(test.op, [simple_test(operand) for operand in test.values]), test)
    return test


def is_negative(test: ast.expr) -> bool:
    """Whether the opposite condition is the simpler one. The answers for a condition and its opposite differ."""

    def weight(test: ast.expr) -> int:
        match test:
            case ast.UnaryOp(op=ast.Not()) | ast.Compare(ops=[ast.IsNot() | ast.NotIn() | ast.NotEq()]):
                return 1
            case ast.BoolOp():
                return sum(weight(operand) for operand in test.values)
        return 0

    ours, opposite = weight(test), weight(negated(test))
    if isinstance(test, ast.BoolOp) and ours == opposite:
        return isinstance(test.op, ast.Or)
    return opposite < ours


def conditional(test: ast.expr, body: ast.expr, orelse: ast.expr) -> ast.IfExp:
    """`body if test else orelse`, with the simpler one of the condition and its opposite."""
    test = simple_test(test)
    if is_negative(test):
        test, body, orelse = negated(test), orelse, body
    return ast.copy_location(ast.IfExp(test, body, orelse), test)


def branch(test: ast.expr, body: list[ast.stmt], orelse: list[ast.stmt]) -> ast.If:
    return ast.copy_location(ast.If(test, body, orelse), test)


def is_inert(expression: ast.expr) -> bool:
    """Whether an expression gives the same at every moment and changes nothing."""
    match expression:
        case ast.Constant() | ast.List(elts=[]) | ast.Tuple(elts=[]) | ast.Dict(keys=[]):
            return True
        case ast.UnaryOp():
            return is_inert(expression.operand)
    return False


def is_nothing(statement: ast.stmt) -> bool:
    """Docstrings, other strings and `...` that stand alone, and `pass`."""
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass) or is_constant


def names_in(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def evaluated_first(node: ast.AST | None) -> Iterator[ast.expr]:
    """The expressions that a statement or an expression always evaluates, in order: operands before the whole.

    It ends where evaluation depends on a value. Parts of a statement that come after its first expression are left out.
    """
    match node:
        case ast.Assign() | ast.AnnAssign() | ast.Return() | ast.Expr():
            yield from evaluated_first(node.value)
        case ast.AugAssign(target=ast.Name()):
            yield from evaluated_first(node.value)
        case ast.If() | ast.Assert():
            yield from evaluated_first(node.test)
        case ast.For():
            yield from evaluated_first(node.iter)
        case ast.With():
            yield from evaluated_first(node.items[0].context_expr)
        case ast.Raise():
            yield from evaluated_first(node.exc)
        case ast.Match():
            yield from evaluated_first(node.subject)
        case ast.IfExp():
            yield from evaluated_first(node.test)
            yield node
        case ast.BoolOp():
            yield from evaluated_first(node.values[0])
            yield node
        case ast.Compare():
            yield from evaluated_first(node.left)
            yield from evaluated_first(node.comparators[0])
            yield node
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            yield from evaluated_first(node.generators[0].iter)
            yield node
        case ast.Dict():
            for key, value in zip(node.keys, node.values, strict=True):
                yield from evaluated_first(key)
                yield from evaluated_first(value)
            yield node
        case ast.Lambda() | ast.NamedExpr():
            yield node
        case ast.keyword():
            yield from evaluated_first(node.value)
        case ast.expr():
            for child in ast.iter_child_nodes(node):
                yield from evaluated_first(child)
            yield node


def can_move_past(value: ast.expr, passed: Sequence[ast.expr], modules: set[str]) -> bool:
    """Whether `value` may be evaluated after the expressions `passed` instead of before them.

    Names and constants may be passed by everything, attributes of a module too, other attributes by what calls nothing.
    """
    acts = any(isinstance(part, ast.Call | ast.Await | ast.Yield | ast.YieldFrom) for part in ast.walk(value))
    for expression in passed:
        root = expression
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Constant) or (isinstance(root, ast.Name) and (root is expression or not acts)):
            continue
        if not isinstance(root, ast.Name) or root.id not in modules:
            return False
    return not any(isinstance(part, ast.NamedExpr) for part in ast.walk(value))


def unshared_locals(function: Function) -> set[str]:
    """Locals that no nested function sees, so that only the lines of `function` itself read and write them."""
    names = set(bound_names(function.body))
    for node in ast.walk(function):
        if node is not function and isinstance(node, Function | ast.Lambda | ast.ClassDef):
            names -= names_in(node)
        elif isinstance(node, ast.GeneratorExp):  # it may run later
            names -= names_in(node) - set(bound_names([generator.target for generator in node.generators]))
        elif isinstance(node, ast.Global | ast.Nonlocal):
            names -= set(node.names)
    return names


class OneForm(ast.NodeTransformer):
    """Brings each block of a module into the form that is compared."""

    def __init__(self) -> None:
        self.modules: set[str] = set()  # names that only `import` binds
        self.locals: set[str] = set()  # of the present function, without those shared with a nested one
        self.uses: Counter[str] = Counter()  # of names in the present function
        self.in_try = False  # a handler may see a variable between two assignments

    def visit_Module(self, node: ast.Module) -> ast.Module:
        imports = [part for part in node.body if isinstance(part, ast.Import)]
        imported = set(bound_names(imports))
        self.modules = imported - {n for part in ast.walk(node) if isinstance(part, ast.Global) for n in part.names}
        self.modules -= set(bound_names([part for part in node.body if part not in imports]))
        node.body = self.block(node.body)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        outer, self.locals = self.locals, set()
        self.visit_parts(node)
        node.body = self.block(node.body)
        self.locals = outer
        return node

    def visit_FunctionDef(self, node: Function) -> Function:
        outer_locals, outer_uses, outer_in_try = self.locals, self.uses, self.in_try
        self.locals, self.in_try = unshared_locals(node), False
        self.uses = Counter(part.id for part in ast.walk(node) if isinstance(part, ast.Name))
        self.visit_parts(node)
        node.body = self.block(node.body, ast.Return(ast.Constant(None)))
        self.locals, self.uses, self.in_try = outer_locals, outer_uses, outer_in_try
        return node

    def visit_For(self, node: ast.For | ast.AsyncFor | ast.While) -> ast.stmt:
        self.visit_parts(node)
        if isinstance(node, ast.While):
            node.test = simple_test(node.test)
        node.body = self.block(node.body, ast.Continue())
        node.orelse = self.block(node.orelse)
        return node

    def visit_Try(self, node: ast.Try) -> ast.stmt:
        outer_in_try, self.in_try = self.in_try, True
        node.body, node.orelse, node.finalbody = map(self.block, (node.body, node.orelse, node.finalbody))
        for handler in node.handlers:
            self.visit_parts(handler)
            handler.body = self.block(handler.body)
        self.in_try = outer_in_try
        return node

    def visit_With(self, node: ast.With | ast.AsyncWith | ast.match_case) -> ast.AST:
        self.visit_parts(node)
        node.body = self.block(node.body)
        return node

    visit_AsyncFunctionDef = visit_FunctionDef
    visit_AsyncFor = visit_While = visit_For
    visit_TryStar = visit_Try
    visit_AsyncWith = visit_match_case = visit_With

    def visit_If(self, node: ast.If) -> ast.stmt:
        node.test = simple_test(self.visit(node.test))
        node.body, node.orelse = self.block(node.body), self.block(node.orelse)
        return self.one_assignment(node, None) or node

    def visit_IfExp(self, node: ast.IfExp) -> ast.IfExp:
        self.generic_visit(node)
        return conditional(node.test, node.body, node.orelse)

    def visit_Return(self, node: ast.Return) -> ast.Return:
        self.generic_visit(node)
        node.value = node.value or ast.copy_location(ast.Constant(None), node)
        return node

    def visit_parts(self, node: ast.AST) -> None:
        """Visit the expressions of a compound statement, not its blocks."""
        for name, part in ast.iter_fields(node):
            if isinstance(part, ast.AST):
                setattr(node, name, self.visit(part))
            elif isinstance(part, list) and part and not isinstance(part[0], ast.stmt | ast.ExceptHandler):
                setattr(node, name, [self.visit(item) if isinstance(item, ast.AST) else item for item in part])

    def block(self, statements: Sequence[ast.stmt], tail: ast.stmt | None = None) -> list[ast.stmt]:
        """A block in its one form. `tail` is the statement that its end stands for, such as `continue` in a loop."""
        lines: list[ast.stmt] = []
        for statement in statements:
            if is_nothing(statement):
                continue
            for line in self.split(self.visit(statement)):
                default = lines[-1] if lines and isinstance(line, ast.If) else None
                if isinstance(default, ast.Assign) and (merged := self.one_assignment(line, default)):
                    lines[-1] = merged
                else:
                    lines.append(line)
        if tail is not None and not always_ends(lines):
            at = statements[-1]
            lines.append(ast.fix_missing_locations(ast.copy_location(deepcopy(tail), at)))
        return joined(self.inlined(lines))

    def inlined(self, lines: list[ast.stmt]) -> list[ast.stmt]:
        """A block without the names that only the next line uses, once."""
        block: list[ast.stmt] = []
        for line in reversed(lines):
            match line:
                case ast.Assign(targets=[ast.Name(id=name)]) if name in self.locals and self.uses[name] == 2 and block:
                    passed: list[ast.expr] = []
                    for expression in evaluated_first(block[0]):
                        if isinstance(expression, ast.Name) and expression.id == name:
                            if can_move_past(line.value, passed, self.modules - self.locals):
                                Replacement(expression, line.value).visit(block[0])
                                line = None
                            break
                        passed.append(expression)
            if line is not None:
                block.insert(0, line)
        return block

    def split(self, statement: ast.stmt) -> list[ast.stmt]:
        """`a, b = x, y` and `a = b = None` as an assignment a line, if no line changes what a later one reads."""
        if not isinstance(statement, ast.Assign):
            return [statement]
        first, *more = statement.targets
        if more and isinstance(statement.value, ast.Constant):
            lines = [ast.Assign([target], statement.value) for target in statement.targets]
            return [ast.copy_location(line, statement) for line in lines]
        if more or not isinstance(first, ast.Tuple | ast.List) or not isinstance(statement.value, ast.Tuple):
            return [statement]

        values, targets = statement.value.elts, first.elts
        if len(values) != len(targets) or any(isinstance(part, ast.Starred) for part in (*values, *targets)):
            return [statement]
        for index, target in enumerate(targets):
            later = values[index + 1 :]
            if not isinstance(target, ast.Name) or any(target.id in names_in(value) for value in later):
                return [statement]
            # any code may run in a later line: it must not see this one's variable
            hidden = target.id in self.locals and not self.in_try
            if not hidden and not all(isinstance(value, ast.Name) or is_inert(value) for value in later):
                return [statement]
        lines = [ast.copy_location(ast.Assign([t], v), t) for t, v in zip(targets, values, strict=True)]
        return [part for line in lines for part in self.split(line)]

    def one_assignment(self, node: ast.If, default: ast.Assign | None) -> ast.Assign | None:
        """An `if` whose branches only assign the same target, after a line that gives its `default`."""
        first = default or next((line for line in ast.walk(node) if isinstance(line, ast.Assign)), None)
        if first is None or len(first.targets) != 1:
            return None
        target = first.targets[0]
        if default is not None:
            hidden = isinstance(target, ast.Name) and target.id in self.locals and not self.in_try
            if not hidden or not is_inert(default.value) or target.id in names_in(node.test):
                return None

        def value_of(block: list[ast.stmt]) -> ast.expr | None:
            match block:
                case [] if default is not None:
                    return default.value
                case [ast.Assign(targets=[other], value=value)] if ast.dump(other) == ast.dump(target):
                    reads_default = default is not None and names_in(target) & names_in(value)
                    return None if reads_default else value
                case [ast.If()]:
                    # an `elif` comes after the default, too
                    if default is not None and names_in(target) & names_in(block[0].test):
                        return None
                    body, orelse = value_of(block[0].body), value_of(block[0].orelse)
                    return conditional(block[0].test, body, orelse) if body and orelse else None
            return None

        value = value_of([node])
        return ast.copy_location(ast.Assign([target], value), first) if value else None


class Replacement(ast.NodeTransformer):
    """Puts one expression in the place of another one."""

    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def joined(lines: Sequence[ast.stmt]) -> list[ast.stmt]:
    """A block whose `if` have taken in what follows them, as far as control flow depends on them."""
    block: list[ast.stmt] = []
    for line in reversed(lines):
        block = if_and_rest(line, block) if isinstance(line, ast.If) else [line, *block]
    return block


def if_and_rest(node: ast.If, rest: list[ast.stmt]) -> list[ast.stmt]:
    """An `if` and the rest of its block: a branch that ends comes first and needs no `else`."""
    test, body, orelse = node.test, node.body, node.orelse
    if not body or (orelse and always_ends(orelse) and not always_ends(body)):
        test, body, orelse = negated(test), orelse, body
    if not always_ends(body):
        # what a short rest does can be done in both branches
        match rest:
            case [ast.Continue() | ast.Break()] | [ast.Return(value=ast.Constant())]:
                rest, copied = [], rest
                body, orelse = joined([*body, *copied]), joined([*orelse, *deepcopy(copied)])
    if not always_ends(body):
        if is_negative(test) and orelse:
            test, body, orelse = negated(test), orelse, body
        return [branch(test, body, orelse), *rest]

    rest = joined([*orelse, *rest])
    if always_ends(rest) and is_negative(test):
        test, body, rest = negated(test), rest, body
    match body, rest:
        case [ast.Return(value=ast.expr() as yes)], [ast.Return(value=ast.expr() as no)]:
            return [ast.copy_location(ast.Return(conditional(test, yes, no)), body[0])]
    return [branch(test, body, []), *rest]


# --- Names: which are local, and to what ----------------------------------------------------------------------------


def nodes_of_scope(statements: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """The nodes of a scope, without the inside of nested scopes."""
    for node in statements:
        yield node
        if isinstance(node, Function | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, Comprehension):
            yield from (part for part in ast.walk(node) if isinstance(part, ast.NamedExpr))
            continue
        yield from nodes_of_scope(list(ast.iter_child_nodes(node)))


def bound_names(statements: Sequence[ast.AST]) -> Iterator[str]:
    """Names that the statements of a scope bind, each as often as they do."""
    for node in nodes_of_scope(statements):
        match node:
            case ast.Name(ctx=ast.Store() | ast.Del()):
                yield node.id
            case ast.NamedExpr():
                yield node.target.id
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.alias():
                yield node.asname or node.name.split(".")[0]
            case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar() if node.name:
                yield node.name
            case ast.MatchMapping() if node.rest:
                yield node.rest


@dataclass(eq=False)
class Scope:
    """A module, class, function, lambda or comprehension with the names that it binds."""

    node: ast.AST
    parent: "Scope | None"
    number: int
    names: set[str] = field(default_factory=set)
    globals: set[str] = field(default_factory=set)
    public: set[str] = field(default_factory=set)  # arguments whose names are compared
    functions: dict[str, Function] = field(default_factory=dict)  # names bound to one function and to nothing else
    numbers: dict[str, int] = field(default_factory=dict)  # of locals

    def owner(self, name: str) -> "Scope | None":
        """The scope whose variable `name` is; None for names of the module and for builtins."""
        scope: Scope | None = self
        while scope and scope.parent and name not in scope.globals:
            # functions do not see the names of the class around them
            if name in scope.names and (scope is self or not isinstance(scope.node, ast.ClassDef)):
                return scope
            scope = scope.parent
        return None

    def function(self, name: str) -> Function | None:
        """The function that `name` stands for, if it is bound once."""
        scope = self.owner(name)
        if scope is None:
            scope = self
            while scope.parent:
                scope = scope.parent
        return scope.functions.get(name)


@dataclass
class Options:
    """What else may differ."""

    private: bool = False
    keywords: frozenset[str] | None = None  # arguments that calls of the repository name, if all others may change


class Names:
    """Which arguments of a module's functions are local, which depends on who may pass them by keyword."""

    def __init__(self, module: ast.Module, options: Options) -> None:
        self.options = options
        self.keywords: set[str] = set()  # arguments named in calls of functions that are not of the module
        self.strings = {n.value for n in ast.walk(module) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        self.called = {node.func for node in ast.walk(module) if isinstance(node, ast.Call)}
        self.escaped: set[Function] = set()  # functions that are also passed on, so that others call them
        self.hidden: set[Function] = set()  # functions that no other module calls
        self.methods: dict[str, list[Function]] = {}
        self.public: dict[Function, frozenset[str]] = {}
        for node in ast.walk(module):
            if isinstance(node, Function):
                self.hidden |= {inner for inner in ast.walk(node) if isinstance(inner, Function) and inner is not node}
                if node.name.startswith("_") and not node.name.endswith("__"):
                    self.hidden.add(node)
            if isinstance(node, ast.ClassDef):
                # methods of a nested class have a protocol to keep to
                for method in node.body:
                    if isinstance(method, Function):
                        self.methods.setdefault(method.name, []).append(method)
        methods = {method for same_name in self.methods.values() for method in same_name}
        self.hidden -= {method for method in methods if not method.name.startswith("_") or method.name.endswith("__")}

    def method(self, name: str) -> Function | None:
        """The one method of that name in the module."""
        methods = self.methods.get(name, [])
        return methods[0] if len(methods) == 1 else None

    def public_arguments(self, function: Function) -> frozenset[str]:
        """Arguments of `function` whose names a caller may rely on."""
        names = {argument.arg for argument in named_arguments(function)}
        decorators = {decorator_name(decorator) for decorator in function.decorator_list}
        if decorators - PLAIN_DECORATORS:
            return frozenset(names)
        if function not in self.hidden:
            return frozenset(names if self.options.keywords is None else names & self.options.keywords)
        return frozenset(names & (self.keywords | self.strings) if function in self.escaped else ())


def named_arguments(function: Function | ast.Lambda) -> list[ast.arg]:
    """Arguments that can be passed by keyword."""
    return [*function.args.args, *function.args.kwonlyargs]


def all_arguments(function: Function | ast.Lambda) -> list[ast.arg]:
    starred = (function.args.vararg, function.args.kwarg)
    return [*function.args.posonlyargs, *named_arguments(function), *(argument for argument in starred if argument)]


def decorator_name(decorator: ast.expr) -> str:
    if isinstance(decorator, ast.Call):
        decorator = decorator.func
    return decorator.attr if isinstance(decorator, ast.Attribute) else getattr(decorator, "id", "")


class Tokens(ast.NodeVisitor):
    """A module as a sequence of (token, line). The locals of each scope are numbered in the order of their occurrence.

    It is made twice: only after a first pass does `names` know how each function is used.
    """

    def __init__(self, module: ast.Module, names: Names) -> None:
        self.names = names
        self.tokens: list[tuple[str, int]] = []
        self.line = 1
        self.scope_count = 0
        self.private_names: dict[str, int] = {}
        self.scope = self.opened(module, None, module.body, ())
        self.generic_visit(module)

    def opened(
        self, node: ast.AST, parent: Scope | None, body: Sequence[ast.AST], arguments: Sequence[ast.arg]
    ) -> Scope:
        self.scope_count += 1
        bound = [*bound_names(body), *(argument.arg for argument in arguments)]
        scope = Scope(node, parent, self.scope_count, set(bound))
        for part in nodes_of_scope(body):
            match part:
                case ast.Global():
                    scope.names -= set(part.names)
                    scope.globals |= set(part.names)
                case ast.Nonlocal():
                    scope.names -= set(part.names)
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    if bound.count(part.name) == 1:
                        scope.functions[part.name] = part
                    else:
                        self.names.escaped.add(part)
                case ast.Call(func=ast.Name(id=name)) if name in READS_LOCALS:
                    scope.public |= scope.names
        return scope

    def inside(self, scope: Scope, parts: Sequence[object], arguments: Sequence[ast.arg] = ()) -> None:
        """Emit what stands in a nested scope."""
        outer, self.scope = self.scope, scope
        for argument in arguments:
            self.emit_name(argument.arg)
        for part in parts:
            self.visit_field(part)
        self.scope = outer

    def emit(self, token: str) -> None:
        self.tokens.append((token, self.line))

    def emit_public(self, name: str) -> None:
        if self.names.options.private and name.startswith("_") and not name.startswith("__"):
            name = f"private {self.private_names.setdefault(name, len(self.private_names))}"
        self.emit(name)

    def emit_name(self, name: str) -> None:
        """A name where it is bound or used in the present scope."""
        owner = self.scope.owner(name)
        if owner is None or isinstance(owner.node, ast.ClassDef):
            self.emit_public(name)
        elif name in owner.public:
            self.emit(f"argument {name}")
        else:
            self.emit(f"local {owner.number}.{owner.numbers.setdefault(name, len(owner.numbers))}")

    def visit(self, node: ast.AST) -> None:
        self.line = getattr(node, "lineno", self.line)
        self.emit(type(node).__name__)
        super().visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        for _, part in ast.iter_fields(node):
            self.visit_field(part)

    def visit_field(self, part: object) -> None:
        if isinstance(part, list):
            self.emit("[")
            for item in part:
                self.visit_field(item)
            self.emit("]")
        elif isinstance(part, ast.AST):
            self.visit(part)
        else:
            self.emit(repr(part))

    def visit_Name(self, node: ast.Name) -> None:
        self.emit_name(node.id)
        function = self.scope.function(node.id)
        if function and node not in self.names.called:
            self.names.escaped.add(function)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.visit(node.value)
        self.emit_public(node.attr)
        if node not in self.names.called or not self.names.method(node.attr):
            self.names.escaped.update(self.names.methods.get(node.attr, ()))

    def visit_alias(self, node: ast.alias) -> None:
        self.emit_public(node.name)
        if node.asname or "." not in node.name:
            self.emit_name(node.asname or node.name)

    def visit_Global(self, node: ast.Global | ast.Nonlocal) -> None:
        for name in node.names:
            self.emit_name(name)

    def visit_MatchAs(self, node: ast.ExceptHandler | ast.MatchAs | ast.MatchStar | ast.MatchMapping) -> None:
        for name, part in ast.iter_fields(node):
            if name in ("name", "rest") and part is not None:
                self.emit_name(part)
            else:
                self.visit_field(part)

    visit_Nonlocal = visit_Global
    visit_ExceptHandler = visit_MatchStar = visit_MatchMapping = visit_MatchAs

    def visit_Call(self, node: ast.Call) -> None:
        function = None
        if isinstance(node.func, ast.Name):
            function = self.scope.function(node.func.id)
        elif isinstance(node.func, ast.Attribute):
            function = self.names.method(node.func.attr)
        arguments = [argument.arg for argument in named_arguments(function)] if function else []
        public = self.names.public.get(function, frozenset(arguments)) if function else frozenset()

        self.visit(node.func)
        self.visit_field(node.args)
        for keyword in node.keywords:
            if keyword.arg in arguments and keyword.arg not in public:
                self.emit(f"argument {arguments.index(keyword.arg)} of the function=")
            else:
                self.emit(f"{keyword.arg}=")
            if keyword.arg is None and function:
                self.names.escaped.add(function)  # the names are in a dictionary
            elif keyword.arg and keyword.arg not in arguments:
                self.names.keywords.add(keyword.arg)
            self.visit(keyword.value)
        self.emit("end of call")

    def visit_FunctionDef(self, node: Function) -> None:
        self.visit_field(node.decorator_list)
        self.emit_name(node.name)
        self.visit_field(node.returns)
        self.visit_arguments(node.args)
        scope = self.opened(node, self.scope, node.body, all_arguments(node))
        scope.public |= self.names.public.get(node, frozenset())
        self.inside(scope, node.body, all_arguments(node))

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit_arguments(node.args)
        self.inside(self.opened(node, self.scope, [node.body], all_arguments(node)), [node.body], all_arguments(node))

    def visit_arguments(self, node: ast.arguments) -> None:
        """The signature without the names of the arguments: defaults and annotations belong to the scope outside."""
        for part in (node.posonlyargs, node.args, node.kwonlyargs, [node.vararg], [node.kwarg]):
            self.visit_field([argument and (argument.annotation or "no annotation") for argument in part])
        self.visit_field(node.defaults)
        self.visit_field(node.kw_defaults)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.emit_name(node.name)
        self.visit_field(node.decorator_list)
        self.visit_field(node.bases)
        self.visit_field(node.keywords)
        self.inside(self.opened(node, self.scope, node.body, ()), node.body)

    def visit_ListComp(self, node: Comprehension) -> None:
        first = node.generators[0].iter
        self.visit(first)  # outside: it is evaluated before there is a variable
        scope = self.opened(node, self.scope, [generator.target for generator in node.generators], ())
        elements = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        for generator in node.generators:
            later = [generator.iter] if generator.iter is not first else []
            self.inside(scope, [*later, generator.target, generator.ifs, generator.is_async])
        self.inside(scope, elements)

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp


# --- Comparing files ------------------------------------------------------------------------------------------------


def tokens_of(text: str, options: Options, renamed: dict[str, str]) -> list[tuple[str, int]]:
    """The tokens of a file; `renamed` maps public names to their new ones.

    Raises:
        SyntaxError: `text` is no Python.
    """
    module = ast.parse(text)
    for node in ast.walk(module) if renamed else ():
        for name, part in ast.iter_fields(node):
            if isinstance(part, str) and not isinstance(node, ast.Constant):
                setattr(node, name, renamed.get(part, part))
    for _ in range(PASSES):
        module = OneForm().visit(module)
    names = Names(module, options)
    Tokens(module, names)
    names.public = {node: names.public_arguments(node) for node in ast.walk(module) if isinstance(node, Function)}
    return Tokens(module, names).tokens


def first_difference(old: str, new: str, options: Options, renamed: dict[str, str]) -> tuple[int, int] | None:
    """Line numbers in the old and the new text where their trees first differ; None if they do not."""
    old_tokens, new_tokens = tokens_of(old, options, renamed), tokens_of(new, options, {})
    for (old_token, old_line), (new_token, new_line) in zip(old_tokens, new_tokens, strict=False):
        if old_token != new_token:
            return old_line, new_line
    if len(old_tokens) != len(new_tokens):
        return len(old.splitlines()), len(new.splitlines())
    return None


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout


def changed_files(revision: str, paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names of Python files in `revision` and in the working tree, where they differ; empty: there is none."""
    fields = iter(git("diff", "--name-status", "-z", "-M", revision, "--", *paths).split("\0"))
    for status in fields:
        if not status:
            continue
        old = new = next(fields)
        if status.startswith("R"):
            new = next(fields)
        if new.endswith(".py"):
            yield "" if status == "A" else old, "" if status == "D" else new
    for new in git("ls-files", "--others", "--exclude-standard", "-z", "--", *paths).split("\0"):
        if new.endswith(".py"):
            yield "", new


def keywords_of_repository() -> frozenset[str]:
    """Arguments that any call in the Python files of this repository names."""
    keywords: set[str] = set()
    for name in git("ls-files", "-z", "*.py").split("\0"):
        if name and Path(name).exists():
            nodes = ast.walk(ast.parse(Path(name).read_text(encoding="utf-8")))
            keywords |= {node.arg for node in nodes if isinstance(node, ast.keyword) and node.arg}
    return frozenset(keywords)


def report(old_name: str, new_name: str, old: str, new: str, options: Options, renamed: dict[str, str]) -> bool:
    """Print the first difference, if there is one. Returns whether the files are the same."""
    difference = first_difference(old, new, options, renamed)
    if difference is None:
        print(f"same: {new_name}")
        return True
    for sign, name, text, line in (("-", old_name, old, difference[0]), ("+", new_name, new, difference[1])):
        lines = text.splitlines() or [""]
        print(f"{sign} {name}:{line}: {lines[min(line, len(lines)) - 1].strip()}")
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="OLD and NEW; with --git, what to look at")
    parser.add_argument("--git", metavar="REV", help="compare the working tree with this revision")
    parser.add_argument("--renamed", action="append", default=[], metavar="OLD=NEW", help="a public name that changed")
    parser.add_argument("--private", action="store_true", help="names with an underscore may change")
    parser.add_argument("--arguments", action="store_true", help="arguments that no call names may change")
    arguments = parser.parse_args()
    if not arguments.git and len(arguments.paths) != 2:
        parser.error("expected OLD and NEW, or --git REV")
    renamed = dict(rename.split("=", 1) for rename in arguments.renamed)
    options = Options(arguments.private, keywords_of_repository() if arguments.arguments else None)

    try:
        if not arguments.git:
            old_name, new_name = arguments.paths
            old, new = (Path(name).read_text(encoding="utf-8") for name in arguments.paths)
            return 0 if report(old_name, new_name, old, new, options, renamed) else 1
        same = True
        for old_name, new_name in changed_files(arguments.git, arguments.paths):
            if not old_name or not new_name:
                print(f"{'- gone' if old_name else '+ new'}: {old_name or new_name}")
                same = False
                continue
            old, new = git("show", f"{arguments.git}:./{old_name}"), Path(new_name).read_text(encoding="utf-8")
            same = report(f"{arguments.git}:{old_name}", new_name, old, new, options, renamed) and same
        return 0 if same else 1
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f"error: {error.stderr.strip()}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
