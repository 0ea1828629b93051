"""Finds where a test of Bash lets the shell read a text of the program as code, and which texts are harmless there.

| place | example | what a program could print |
| --- | --- | --- |
| arithmetic | `(( $(f) == 6 ))`, `[[ $(f) -eq 6 ]]` | `6, 1`, the name of a variable of the test, `a[$(command)]` |
| words of `[` | `[ $(f) = 6 ]` | `x = x -o x` |
| pattern | `[[ 6 == $(f) ]]` | `*` |

The reader knows quotes, substitutions, comments and here-documents, and no more of the grammar. What passes through
another command first, as in `[ $(f | head -1) = 6 ]`, or through a file, is not followed.

This module runs inside the sandbox. Only the standard library is imported, and little of it.
"""

from __future__ import annotations

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from typing import Any

NUMBER, WORD, PATTERN, REGEX = "arithmetic", "unquoted words of [ ]", "a pattern of [[ ]]", "a regular expression"
_NUMBER = rb"[+-]?(?:0[xX][0-9a-fA-F]+|\d+(?:\.\d+)?)"
HARMLESS = {
    NUMBER: rb"\s*(?:%b(?:\s+%b)*\s*)?" % (_NUMBER, _NUMBER),
    WORD: rb"\s*[^\s*?\[]*\s*",
    PATTERN: rb"(?:[^*?\[\\@+!]|[@+!](?!\())*",
    REGEX: rb"[^.^$*+?()\[\]{}|\\]+",
}
"""Place -> pattern of the texts that are no code there."""
_NUMERIC = frozenset(("-eq", "-ne", "-lt", "-le", "-gt", "-ge"))
_RESERVED = frozenset("if then elif else fi while until do done for in esac time ! { }".split())
# Commands that fill a variable with texts of a program.
_FILLING = r"\b(?:read|mapfile|readarray)\b[^\n;]*\bNAME\b|\bfor\s+NAME\s+in\b[^\n;]*[$`]|\bNAME\+?=\([^)]*[$`]"
ANY = "$"  # stands for an argument that is not literal
Source = tuple[str, str]
"""A command and its first argument (empty: none, ANY: not literal), or `$` and the name of a variable."""
Places = dict[Source, set[str]]

_patterns: dict[str, Any] = {}


def prepare() -> None:
    """Compiles the patterns. The server does so once it has loaded `re`, so that not every judge of a test does."""
    import re

    _patterns.update({place: re.compile(pattern) for place, pattern in HARMLESS.items()})
    _patterns["plain"] = re.compile(r"[A-Za-z0-9_./:,%+-]+")
    _patterns["name"] = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
    _patterns["document"] = re.compile(r"<<-?[ \t]*['\"\\]?([A-Za-z_][A-Za-z0-9_]*)")
    _patterns["condition"] = re.compile(r"\[\[\s")
    _patterns["assignment"] = re.compile(r"(\w+)\+?=")


def harm(places: Places, words: Sequence[bytes], text: bytes) -> str:
    """Returns the place in which the text of a call, or of a variable, would be read as code; empty: in none.

    Args:
        words: function and arguments, or `$` and the name of a variable.
    """
    if not _patterns:
        prepare()
    name, first, *_ = (*(word.decode("latin-1") for word in words[:2]), "")
    read_as = places.get((name, first), set()) | places.get((name, ANY), set())

    # The shell drops line breaks at the end of `$(...)`, so a test never sees them.
    text = text.rstrip(b"\n")
    return next((place for place in sorted(read_as) if not _patterns[place].fullmatch(text)), "")


def places_of(code: bytes, functions: Collection[bytes]) -> Places:
    """Returns the places of a test where the shell reads texts as code, by the `Source` of the text.

    The places are keys of `HARMLESS`, and the sources are decoded as Latin-1. A variable that the test fills from a
    function stands for this function, too.

    Args:
        code: the test.
        functions: names of the functions of the program for which the test has stubs.
    """
    import re

    if not _patterns:
        prepare()
    # Every byte is a character of Latin-1, so names and texts compare as bytes do.
    text = code.decode("latin-1")
    reader = _Reader(text)
    reader.read_code("")
    every_call = {(name.decode("latin-1"), ANY) for name in functions}

    places: Places = {}
    for source, place in reader.uses:
        sources = {source}
        if source[0] == "$":
            sources |= reader.fills.get(source[1], set())
            if re.search(_FILLING.replace("NAME", source[1]), text):
                sources |= every_call
        # A function of the test may print what the program prints.
        if any(re.search(rf"(?:^|[\s;]){re.escape(name)}\s*\(\)", text) for name, _ in sources):
            sources |= every_call
        for text_source in sources:
            places.setdefault(text_source, set()).add(place)
    return places


class _Reader:
    """Reads code of Bash from its beginning to its end.

    Attributes:
        uses: (source, place) for each text that the shell reads as code.
        fills: variable -> sources of the text that is assigned to it.
    """

    def __init__(self, text: str) -> None:
        self.uses: list[tuple[Source, str]] = []
        self.fills: dict[str, set[Source]] = {}
        self._text = text
        self._at = 0

    def read_code(self, end: str) -> Source:
        """Reads commands up to `end`, `)` or a backtick, and returns the last one of the last pipeline."""
        command = first = word = ""
        last: Source = "", ""
        depth = 0
        documents: list[str] = []
        while self._at < len(self._text):
            char = self._text[self._at]
            is_first = not command and word in ("", *_RESERVED)
            if char == end and depth == 0:
                break

            # Text that is no word: comments, marks of here-documents, and the two commands with a grammar of their own.
            if char == "#" and not word:
                self._skip_to("\n")
                continue
            if self._starts("<<<"):
                self._at += 3
                continue
            if here := _patterns["document"].match(self._text, self._at):
                documents.append(here[1])
                self._at = here.end()
                continue
            if is_first and self._starts("(("):
                self._read_arithmetic("))")
                command = command or "(("
                continue
            if is_first and not word and _patterns["condition"].match(self._text, self._at):
                self._read_condition()
                command = "[["
                continue

            if char in " \t\n;&|()":
                command, first = _with_word(command, first, word)
                word = ""
                if command and char in "\n;&|()":
                    last = command, first
                    command = first = ""
                depth += {"(": 1, ")": -1}.get(char, 0)
                depth = max(depth, 0)
                self._at += 1
                if char == "\n":
                    self._skip_documents(documents)
                continue

            # A piece of a word: plain characters at once, quotes and expansions one at a time.
            if plain := _patterns["plain"].match(self._text, self._at):
                word += plain[0]
                self._at = plain.end()
                continue
            place = _place_in(command, first)
            piece, sources = self._read_piece(NUMBER if place == NUMBER else "", place)
            if assigned := _patterns["assignment"].match(word):
                self.fills.setdefault(assigned[1], set()).update(sources)
            word += piece

        self._at += len(end)
        command, first = _with_word(command, first, word)
        return (command, first) if command else last

    def _read_piece(self, quoted: str, unquoted: str) -> tuple[str, set[Source]]:
        """Reads one character, quoted text or expansion.

        Returns its text, with ANY for what is not literal, and the sources of an expansion.

        Args:
            quoted: place of expansions in double quotes; empty: they are no code.
            unquoted: place of expansions outside of quotes.
        """
        char = self._text[self._at]
        if char == "\\":
            self._at += 2
            return self._text[self._at - 1 : self._at], set()
        if char == "'":
            return self._read_single_quotes(), set()
        if self._starts("$'"):
            self._skip_escaped_quotes()
            return ANY, set()
        if char == '"':
            return self._read_double_quotes(quoted)

        # Expansions. Their text is not known before the test runs.
        if self._starts("$(("):
            self._at += 1
            self._read_arithmetic("))")
            return ANY, set()
        if char == "`":
            self._at += 1
            return ANY, self._used(self.read_code("`"), unquoted)
        if self._starts("$("):
            self._at += 2
            return ANY, self._used(self.read_code(")"), unquoted)
        if self._starts("${"):
            begin = self._at + 2
            self._skip_braces()
            name = _patterns["name"].match(self._text, begin)
            return ANY, self._used(("$", name[0]), unquoted) if name else set()
        if name := _patterns["name"].match(self._text, self._at + 1) if char == "$" else None:
            self._at = name.end()
            return ANY, self._used(("$", name[0]), unquoted)
        self._at += 1
        return ANY if char in "*?~<>$" else char, set()

    def _read_single_quotes(self) -> str:
        """Passes `'...'` and returns the text in it; ANY if it is empty."""
        begin = self._at + 1
        self._at = begin
        self._skip_to("'")
        text = self._text[begin : self._at]
        self._at += 1
        return text or ANY

    def _skip_escaped_quotes(self) -> None:
        """Passes `$'...'`, in which a backslash escapes the quote."""
        self._at += 2
        while self._at < len(self._text) and self._text[self._at] != "'":
            self._at += 2 if self._text[self._at] == "\\" else 1
        self._at += 1

    def _read_double_quotes(self, place: str) -> tuple[str, set[Source]]:
        """Passes `"..."` and returns what `_read_piece` returns; single quotes are characters there."""
        self._at += 1
        text = ""
        sources: set[Source] = set()
        while self._at < len(self._text) and self._text[self._at] != '"':
            if self._text[self._at] == "'" or self._starts("$'"):
                self._at += 1
                continue
            piece, more = self._read_piece(place, place)
            text += piece
            sources |= more
        self._at += 1
        return text or ANY, sources

    def _used(self, source: Source, place: str) -> set[Source]:
        """Notes a use of a source as code, if there is a place; returns the source as a set."""
        if place:
            self.uses.append((source, place))
        return {source}

    def _read_arithmetic(self, end: str) -> None:
        """Reads from `((` up to its end; names are variables."""
        self._at += 2
        depth = 0

        while self._at < len(self._text) and not (depth == 0 and self._starts(end)):
            depth += {"(": 1, ")": -1}.get(self._text[self._at], 0)
            if name := _patterns["name"].match(self._text, self._at):
                self._at = name.end()
                self._used(("$", name[0]), NUMBER)
            else:
                self._read_piece(NUMBER, NUMBER)
        self._at += 2

    def _read_condition(self) -> None:
        """Reads from `[[` up to `]]`: each comparison decides what its operands are."""
        self._at += 2
        # Number of the comparison, position in it, sources, whether they are quoted.
        operands: list[tuple[int, int, set[Source], bool]] = []
        operators: list[str] = [""]
        word, num_words = "", 0
        is_quoted = False
        sources: set[Source] = set()

        while self._at < len(self._text):
            ends = self._text[self._at] in " \t\n;()" or self._starts("&&") or self._starts("||")
            if ends:
                if word == "!" and num_words == 0:  # it negates, and is no operand
                    word = ""
                if word or sources:
                    operands.append((len(operators) - 1, num_words, sources, is_quoted))
                    if num_words == 1:
                        operators[-1] = word
                    num_words += 1
                if word == "]]":
                    break

                word, sources, is_quoted = "", set(), False
                if self._text[self._at] in "&|()":
                    operators.append("")
                    num_words = 0
                self._at += 2 if self._text[self._at] in "&|" else 1
                continue

            if not word and self._starts("=~"):
                word = "=~"
                self._at += 2
                continue
            is_quoted = is_quoted or self._text[self._at] == '"'
            piece, more = self._read_piece("", "")
            word += piece
            sources |= more

        for comparison, position, sources, is_quoted in operands:
            operator = operators[comparison]
            place = ""
            if operator in _NUMERIC:
                place = NUMBER
            elif position == 2 and not is_quoted:
                place = {"=": PATTERN, "==": PATTERN, "!=": PATTERN, "=~": REGEX}.get(operator, "")
            for source in sources if place else ():
                self.uses.append((source, place))

    def _skip_to(self, end: str) -> None:
        end_at = self._text.find(end, self._at)
        self._at = len(self._text) if end_at < 0 else end_at

    def _skip_braces(self) -> None:
        """Passes `${...}`; what is expanded inside is no code."""
        self._at += 2
        while self._at < len(self._text) and self._text[self._at] != "}":
            self._read_piece("", "")
        self._at += 1

    def _skip_documents(self, documents: list[str]) -> None:
        """Passes the here-documents that begin in this line."""
        for name in documents:
            while (line := self._line()) is not None and line.lstrip("\t") != name:
                pass
        documents.clear()

    def _line(self) -> str | None:
        """Passes a line and returns it; None at the end."""
        if self._at >= len(self._text):
            return None
        line, _, _ = self._text[self._at :].partition("\n")
        self._at += len(line) + 1
        return line

    def _starts(self, text: str) -> bool:
        return self._text.startswith(text, self._at)


def _with_word(command: str, first: str, word: str) -> Source:
    """Returns a command and its first argument with the next word, which may be neither."""
    if not word:
        return command, first
    if command:
        return command, first or (ANY if {ANY, "[", "{"} & {*word} else word)
    if word in _RESERVED or _patterns["assignment"].match(word):
        return "", ""
    return word, ""


def _place_in(command: str, first: str) -> str:
    """Returns the place of unquoted expansions among the arguments of a command."""
    if command in ("[", "test", "expr"):
        return WORD
    if command == "let" or (command in ("declare", "typeset", "local") and first[:1] == "-" and "i" in first):
        return NUMBER
    return ""
