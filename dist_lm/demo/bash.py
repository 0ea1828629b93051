"""Generated Bash: scripts of functions and steps, in the style of one author.

The wheels of the default install hold three shell scripts, 5 kB in all, so the shell scripts of the quick start are
generated. Document i depends on (seed, i) alone. A document takes its pieces from bash_pieces.txt: all from those that
are held out for val, or none, so val scripts are about things that no train script does. A test reads the scripts with
`bash -n`.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TypeVar

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.reader import Candidate, reader, text_hash
from dist_lm.document import Document

DEFAULT_DOCUMENTS = 1000  # about 0.8 MB
HELD_OUT = 0.05  # share of documents from the pieces of val
EVERY = 7  # of so many pieces one is held out
CHOICE = re.compile(r"‹([^‹›]*)›")  # innermost first: alternatives may hold words
VARIABLE = re.compile(r"\$([a-z_]\w*)")
SHEBANGS = ("#!/bin/bash", "#!/bin/bash", "#!/usr/bin/env bash", "#!/usr/bin/env bash", "#!/usr/bin/bash")
OPTIONS = ("", "set -e", "set -eu", "set -euo pipefail", "set -euo pipefail", "set -u", "set -o errexit -o nounset")
HEADS = ("NAME() {", "NAME() {", "function NAME() {", "function NAME {", "NAME ()\n{")


Piece = TypeVar("Piece")


@dataclass(frozen=True)
class Function:
    """A function as bash_pieces.txt has it, with choices still open."""

    names: str
    does: str
    call: str
    body: str


@dataclass(frozen=True)
class Author:
    """The habits of one author, the same through a whole script."""

    shebang: str
    options: str
    head: str  # of a function
    indent: str
    braces: bool  # ${name} in place of $name
    comments: float  # share of functions and steps with a comment
    main: bool  # the steps are in a function `main`

    @classmethod
    def random(cls, rng: random.Random) -> "Author":
        return cls(
            shebang=rng.choice(SHEBANGS),
            options=rng.choice(OPTIONS),
            head=rng.choice(HEADS),
            indent=rng.choice(["  ", "  ", "    ", "    ", "\t"]),
            braces=rng.random() < 0.25,
            comments=rng.choice([0.2, 0.7, 1.0]),
            main=rng.random() < 0.25,
        )

    def written(self, text: str, depth: int = 0) -> str:
        """Lines with the author's indentation; a here-document keeps its own."""
        lines, inside = [], False
        for line in text.split("\n"):
            bare = line.lstrip(" ")
            if inside or not bare:
                lines.append(line)
            else:
                lines.append(self.indent * (depth + (len(line) - len(bare)) // 2) + bare)
            inside = (inside or line.endswith("<<END")) and line != "END"
        found = "\n".join(lines)
        return VARIABLE.sub(r"${\1}", found) if self.braces else found


@reader(seeded=True, revision=1)
def read_bash(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """`source.limit` documents (0: `DEFAULT_DOCUMENTS`)."""
    for i in range(source.limit or DEFAULT_DOCUMENTS):
        rng = random.Random(f"bash {seed} {i}")  # noqa: S311  (text, not secrets)
        held_out = rng.random() < HELD_OUT
        text = bash_document(rng, held_out)
        # a hash at the beginning of its range is in val, at the end in train
        group = ("0" * 8 if held_out else "f" * 8) + text_hash(text)[8:]
        yield Document(text, source.language, f"generated:bash:seed={seed}:{i}", source.licence, group)


def bash_document(rng: random.Random, held_out: bool) -> str:
    """A script: a comment, options, functions, and steps that call them.

    Args:
        held_out: from the pieces of val.
    """
    author = Author.random(rng)
    defined, calls, purposes = [], [], []
    for function in rng.sample(_side(functions(), held_out), rng.choice([0, 1, 1, 2, 2, 3, 4])):
        definition, call, purpose = _function(function, author, rng)
        defined.append(definition)
        calls.append(call)
        purposes.append(purpose)
    chosen = rng.sample(_side(steps(), held_out), rng.choice([1, 1, 2, 3]) if defined else rng.randint(2, 4))
    parts = [_step(step, author, rng) for step in chosen]
    for call in calls:
        parts.insert(rng.randint(0, len(parts)), call)
    purpose = purposes[0] if purposes else chosen[0].partition("\n")[0].removeprefix("# ")
    head = [author.shebang]
    if rng.random() < author.comments:
        head.append(f"# {_filled(purpose, rng, {})}")
    if author.options:
        head.append(author.options)
    if author.main and not any("<<END" in part or "getopts" in part for part in parts):
        body = "\n".join(author.indent + line if line else line for line in "\n".join(parts).split("\n"))
        parts = [f"{author.head.replace('NAME', 'main')}\n{body}\n}}", 'main "$@"']
    return "\n".join(head) + "\n\n" + "\n\n".join([*defined, *parts]) + "\n"


@cache
def functions() -> list[Function]:
    """All functions of bash_pieces.txt."""
    found = []
    for piece in _section("functions"):
        name, does, call, body = piece.split("\n", 3)
        found.append(
            Function(name.removeprefix("name: "), does.removeprefix("does: "), call.removeprefix("call: "), body)
        )
    return found


@cache
def steps() -> list[str]:
    """All steps of bash_pieces.txt, each with its comment in the first line."""
    return _section("steps")


@cache
def words() -> dict[str, list[str]]:
    """The word lists of bash_pieces.txt, by name."""
    lines = [line.split(": ", 1) for line in "\n".join(_section("words")).split("\n")]
    return {name: values.split("; ") for name, values in lines}


def _side(pieces: list[Piece], held_out: bool) -> list[Piece]:
    return [piece for number, piece in enumerate(pieces) if (number % EVERY == 0) == held_out]


def _section(name: str) -> list[str]:
    text = files(__package__ or "").joinpath("bash_pieces.txt").read_text(encoding="utf-8")
    section = text.partition(f"@ {name}\n")[2].partition("\n@ ")[0]
    return section.strip().split("\n\n")


def _function(function: Function, author: Author, rng: random.Random) -> tuple[str, str, str]:
    """`(definition, call, what it does)`."""
    bound: dict[str, str] = {}  # one piece says the same word each time
    name = rng.choice(function.names.split("¦"))
    does, call = _filled(function.does, rng, bound), _filled(function.call, rng, bound).replace("NAME", name)
    body = author.written(_filled(function.body, rng, bound).replace("NAME", name), depth=1)
    comment = f"# {does}\n" if rng.random() < author.comments else ""
    return f"{comment}{author.head.replace('NAME', name)}\n{body}\n}}", author.written(call), does


def _step(step: str, author: Author, rng: random.Random) -> str:
    comment, _, body = _filled(step, rng, {}).partition("\n")
    written = author.written(body)
    return f"{comment}\n{written}" if rng.random() < author.comments else written


def _filled(text: str, rng: random.Random, bound: dict[str, str]) -> str:
    """`text` with a word or an alternative for every ‹...›. `bound`: the words chosen before, by their name."""

    def chosen(match: re.Match[str]) -> str:
        inside = match.group(1)
        if "¦" in inside:
            return rng.choice(inside.split("¦"))
        if inside not in bound:
            bound[inside] = rng.choice(words()[inside.rstrip("0123456789")])
        return bound[inside]

    while CHOICE.search(text):
        text = CHOICE.sub(chosen, text)
    return text
