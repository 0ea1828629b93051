"""English prose that every Python carries: the topics of `help()`, docstrings of the standard library."""

import ast
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.candidate import Candidate, Rejected, read_text, text_hash
from dist_lm.data.sources.python import TOPICS, python_files, standard_library
from dist_lm.document import Document

MIN_DOCSTRING = 40  # characters; a shorter one is a label, not prose
MIN_DOCUMENT = 240  # characters
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def read_english(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """A document a topic, then a document a module and a class. `seed` is not used.

    The docstrings of a file are in the group of that file, so that none is held out from a model that trains
    on the file.
    """
    root = standard_library()
    if (root / TOPICS).is_file():
        yield from _topics(root / TOPICS, source)
    for path in python_files(root):
        if path == root / TOPICS:
            continue
        text = read_text(path, source)
        if isinstance(text, Rejected):
            yield text
            continue
        try:
            tree = _parse(text)
        except (SyntaxError, ValueError):  # ValueError: a NUL in the source
            yield Rejected(source.language, str(path), "unparsable")
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        group = text_hash(text)
        for name, prose in docstring_documents(tree, module):
            yield Document(prose, source.language, f"{path}:{name}", source.licence, group)


def docstring_documents(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """`(dotted name, text)` of the module with its functions, and of every class with its methods.

    The text reads as help does: a name, its docstring, the next name.
    """
    bodies: list[tuple[str, ast.Module | Definition]] = [(module, tree)]
    while bodies:
        name, node = bodies.pop(0)
        parts = [_docstring(node)]
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                bodies.append((f"{name}.{child.name}", child))
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = _docstring(child)
                if docstring:
                    parts.append(f"{child.name}({ast.unparse(child.args)})\n\n{docstring}")
        prose = "\n\n".join(part for part in parts if part)
        if len(prose) >= MIN_DOCUMENT:
            yield name, f"{name}\n\n{prose}\n"


def _docstring(node: ast.Module | Definition) -> str:
    """The cleaned docstring of a node, or nothing where it has none worth reading."""
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
    return text if len(text) >= MIN_DOCSTRING else ""


def _topics(path: Path, source: SourceConfig) -> Iterator[Candidate]:
    """The texts of `topics = {name: text, ...}`, read from the source without running it."""
    text = read_text(path, source)
    if isinstance(text, Rejected):
        yield text
        return
    for node in _parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            for name, prose in sorted(topics.items()):
                yield Document(prose, source.language, f"{path}:{name}", source.licence, text_hash(prose))


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in what we only read are not ours to report
        return ast.parse(text)
