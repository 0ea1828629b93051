"""Generated Bash: scripts of functions and steps, in the style of one author.

The wheels of the default install contain three shell scripts, 5 kB in all, so the shell scripts of the quick start are
generated. Document i depends on (seed, i) alone. A document takes its pieces from bash_pieces.txt: either all from
those that are held out for val, or none of them, so val scripts are about subjects that no train script has. A test
reads the scripts with `bash -n`.
"""

import random
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TypeVar

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.reader import Candidate, reader, text_hash
from dist_lm.document import Document

DEFAULT_DOCUMENTS = 1000  # about 0.8 MB
HELD_OUT = 0.05  # share of the documents that use the pieces of val
HELD_OUT_EVERY = 7  # one piece in this number is held out for val
CHOICE = re.compile(r"‹([^‹›]*)›")  # innermost first: alternatives may contain words
VARIABLE = re.compile(r"\$([a-z_]\w*)")
SHEBANGS = ("#!/bin/bash", "#!/bin/bash", "#!/usr/bin/env bash", "#!/usr/bin/env bash", "#!/usr/bin/bash")
OPTIONS = ("", "set -e", "set -eu", "set -euo pipefail", "set -euo pipefail", "set -u", "set -o errexit -o nounset")
HEADS = ("NAME() {", "NAME() {", "function NAME() {", "function NAME {", "NAME ()\n{")


Piece = TypeVar("Piece")


@dataclass(frozen=True)
class Function:
    """A function of bash_pieces.txt, whose choices are still open."""

    names: str  # alternatives, separated by ¦
    does: str  # comment on the function
    call: str  # with NAME in place of the name
    body: str  # with NAME in place of the name


@dataclass(frozen=True)
class Author:
    """The habits of one author, which apply to all of a script."""

    shebang: str
    options: str
    head: str  # first line of a function
    indent: str
    braces: bool  # ${name} in place of $name
    comments: float  # share of functions and steps with a comment
    main: bool  # whether the steps are in a function `main`

    @classmethod
    def random(cls, rng: random.Random) -> "Author":
        """Returns an author with habits drawn from `rng`."""
        return cls(
            shebang=rng.choice(SHEBANGS),
            options=rng.choice(OPTIONS),
            head=rng.choice(HEADS),
            indent=rng.choice(["  ", "  ", "    ", "    ", "\t"]),
            braces=rng.random() < 0.25,
            comments=rng.choice([0.2, 0.7, 1.0]),
            main=rng.random() < 0.25,
        )

    def indented(self, text: str, depth: int = 0) -> str:
        """Returns lines with the author's indentation and style of variables; a here-document keeps its own.

        Args:
            text: indented by two spaces a level.
            depth: levels that are added.
        """
        lines: list[str] = []
        in_document = False
        for line in text.split("\n"):
            stripped = line.lstrip(" ")
            if in_document or not stripped:
                lines.append(line)
            else:
                lines.append(self.indent * (depth + (len(line) - len(stripped)) // 2) + stripped)

            # The closing END of a here-document must begin its line, so the document keeps its own indentation.
            in_document = (in_document or line.endswith("<<END")) and line != "END"

        indented_text = "\n".join(lines)
        if self.braces:
            return VARIABLE.sub(r"${\1}", indented_text)
        return indented_text


@reader(seeded=True, revision=1)
def read_bash(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Yields `source.limit` documents (0: `DEFAULT_DOCUMENTS`), each with the group that decides its split; none is
    rejected."""
    for i in range(source.limit or DEFAULT_DOCUMENTS):
        rng = random.Random(f"bash {seed} {i}")  # noqa: S311  (text, not secrets)
        held_out = rng.random() < HELD_OUT
        text = bash_document(rng, held_out)

        # Small hashes belong to val, large ones to train.
        group = ("0" * 8 if held_out else "f" * 8) + text_hash(text)[8:]
        yield Document(text, source.language, f"generated:bash:seed={seed}:{i}", source.licence, group)


def bash_document(rng: random.Random, held_out: bool) -> str:
    """Returns a script: a comment, options, functions, and steps that call them.

    Args:
        held_out: whether it consists of the pieces of val.
    """
    author = Author.random(rng)
    definitions: list[str] = []
    calls: list[str] = []
    purposes: list[str] = []
    for function in rng.sample(_of_split(functions(), held_out), rng.choice([0, 1, 1, 2, 2, 3, 4])):
        # Definition, call and purpose of a function go to three places of the script.
        definition, call, purpose = _function(function, author, rng)
        definitions.append(definition)
        calls.append(call)
        purposes.append(purpose)

    # A script without functions needs a few more steps.
    num_steps = rng.choice([1, 1, 2, 3]) if definitions else rng.randint(2, 4)
    chosen_steps = rng.sample(_of_split(steps(), held_out), num_steps)
    parts = [_step(step, author, rng) for step in chosen_steps]
    for call in calls:
        parts.insert(rng.randint(0, len(parts)), call)

    # The first function says what the script is for, or else the comment of the first step.
    purposes.append(chosen_steps[0].partition("\n")[0].removeprefix("# "))
    head = [author.shebang]
    if rng.random() < author.comments:
        head.append(f"# {_filled(purposes[0], rng, {})}")
    if author.options:
        head.append(author.options)

    # Here-documents must not be indented, and options are parsed at the top level.
    if author.main and not any("<<END" in part or "getopts" in part for part in parts):
        body = textwrap.indent("\n".join(parts), author.indent)
        parts = [f"{author.head.replace('NAME', 'main')}\n{body}\n}}", 'main "$@"']

    return "\n".join(head) + "\n\n" + "\n\n".join([*definitions, *parts]) + "\n"


@cache
def functions() -> list[Function]:
    """Returns all functions of bash_pieces.txt, in the order of the file; the file is read once in a process."""
    parsed = []
    for piece in _section("functions"):
        name, does, call, body = piece.split("\n", 3)
        parsed.append(
            Function(name.removeprefix("name: "), does.removeprefix("does: "), call.removeprefix("call: "), body)
        )
    return parsed


@cache
def steps() -> list[str]:
    """Returns all steps of bash_pieces.txt, each with its comment in the first line."""
    return _section("steps")


@cache
def words() -> dict[str, list[str]]:
    """Returns the word lists of bash_pieces.txt, by name."""
    lines = [line.split(": ", 1) for line in "\n".join(_section("words")).split("\n")]
    return {name: alternatives.split("; ") for name, alternatives in lines}


def _of_split(pieces: list[Piece], held_out: bool) -> list[Piece]:
    return [piece for index, piece in enumerate(pieces) if (index % HELD_OUT_EVERY == 0) == held_out]


def _section(name: str) -> list[str]:
    text = files(__package__ or "").joinpath("bash_pieces.txt").read_text(encoding="utf-8")
    section = text.partition(f"@ {name}\n")[2].partition("\n@ ")[0]
    return section.strip().split("\n\n")


def _function(function: Function, author: Author, rng: random.Random) -> tuple[str, str, str]:
    """Returns `(definition, call, comment)` of a function, with all choices made by `rng` and in the style of the
    author. The definition may begin with the comment, a line `# COMMENT`; the comment itself is returned without `#`.
    """
    # A word is chosen once for the full piece.
    bound: dict[str, str] = {}
    name = rng.choice(function.names.split("¦"))
    does = _filled(function.does, rng, bound)
    call = _filled(function.call, rng, bound).replace("NAME", name)
    body = author.indented(_filled(function.body, rng, bound).replace("NAME", name), depth=1)
    comment = ""
    if rng.random() < author.comments:
        comment = f"# {does}\n"
    return f"{comment}{author.head.replace('NAME', name)}\n{body}\n}}", author.indented(call), does


def _step(step: str, author: Author, rng: random.Random) -> str:
    comment, _, body = _filled(step, rng, {}).partition("\n")
    body_text = author.indented(body)
    if rng.random() < author.comments:
        return f"{comment}\n{body_text}"
    return body_text


def _filled(text: str, rng: random.Random, bound: dict[str, str]) -> str:
    """Returns `text` with a word or an alternative for every ‹...›.

    Args:
        bound: the words chosen before, by name: used again, and words chosen here are added.
    """

    def choose(match: re.Match[str]) -> str:
        choice = match.group(1)
        if "¦" in choice:
            return rng.choice(choice.split("¦"))
        if choice not in bound:
            bound[choice] = rng.choice(words()[choice.rstrip("0123456789")])
        return bound[choice]

    # An alternative may hold further choices.
    while CHOICE.search(text):
        text = CHOICE.sub(choose, text)
    return text
