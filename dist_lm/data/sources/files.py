"""Source files and texts: a document a file, its language by suffix and shebang.

A folder with `.git` is a repository. If a source has several, the files of each stay next to each other and share a
group, so a repository is held out as a whole.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import Input, Inputs
from dist_lm.data.sources.opening import brief, open_content, scheme_of, unreadable
from dist_lm.data.sources.places import bare_name, base_of, list_files
from dist_lm.data.sources.reader import Candidate, Rejected, reader, text_hash
from dist_lm.document import Document
from dist_lm.errors import ArtefactError

LONGEST = 64 << 20  # bytes of a file, decompressed
SUFFIXES = {
    suffix: language
    for language, suffixes in {
        "ada": "adb ads",
        "assembly": "asm s",
        "awk": "awk",
        "bash": "sh bash bats",
        "batch": "bat cmd",
        "c": "c h",
        "clojure": "clj cljs cljc",
        "cmake": "cmake",
        "cpp": "cc cpp cxx hh hpp hxx ipp",
        "csharp": "cs",
        "css": "css scss sass less",
        "cuda": "cu cuh",
        "cython": "pyx pxd pxi",
        "dart": "dart",
        "elixir": "ex exs",
        "elm": "elm",
        "erlang": "erl hrl",
        "fortran": "f for f77 f90 f95 f03 f08",
        "fsharp": "fs fsi fsx",
        "glsl": "glsl vert frag",
        "go": "go",
        "graphql": "graphql gql",
        "groovy": "groovy gradle",
        "haskell": "hs lhs",
        "html": "html htm",
        "java": "java",
        "javascript": "js jsx mjs cjs",
        "julia": "jl",
        "kotlin": "kt kts",
        "latex": "tex sty cls bib",
        "lisp": "lisp lsp el scm rkt",
        "lua": "lua",
        "markdown": "md markdown",
        "matlab": "m",
        "nim": "nim",
        "nix": "nix",
        "objective_c": "mm",
        "ocaml": "ml mli",
        "pascal": "pas pp",
        "perl": "pl pm",
        "php": "php",
        "powershell": "ps1 psm1",
        "prolog": "pro",
        "protobuf": "proto",
        "python": "py pyi pyw",
        "r": "r",
        "restructuredtext": "rst",
        "ruby": "rb rake",
        "rust": "rs",
        "scala": "scala sc",
        "solidity": "sol",
        "sql": "sql",
        "swift": "swift",
        "tcl": "tcl",
        "terraform": "tf",
        "text": "txt text",
        "toml": "toml",
        "typescript": "ts tsx mts cts",
        "verilog": "v sv svh",
        "vhdl": "vhd vhdl",
        "vim": "vim",
        "vue": "vue",
        "yaml": "yaml yml",
        "zig": "zig",
    }.items()
    for suffix in suffixes.split()
}
NAMES = {"dockerfile": "dockerfile", "makefile": "makefile", "gnumakefile": "makefile", "cmakelists.txt": "cmake"}
INTERPRETERS = {"sh": "bash", "bash": "bash", "dash": "bash", "ksh": "bash", "zsh": "bash", "node": "javascript"}
INTERPRETERS |= {name: name for name in ("python", "perl", "ruby", "lua", "php", "awk", "tcl", "julia", "groovy")}
INTERPRETERS |= {"rscript": "r", "tclsh": "tcl", "gawk": "awk", "pwsh": "powershell"}
TEXT = "text"  # language of a file that was named, and has none


def language_of(name: str) -> str:
    """The language of a file by its name, else by its first line; empty if neither tells."""
    bare = bare_name(name)
    suffix = PurePosixPath(bare).suffix.removeprefix(".")
    if found := NAMES.get(bare) or SUFFIXES.get(suffix):
        return found
    if suffix or scheme_of(name):
        return ""
    with open_content(name) as file:
        return shebang_language(file.readline(256))


def shebang_language(line: bytes) -> str:
    """`python` of `#!/usr/bin/env -S python3 -u`; empty if the program is none that is known."""
    words = line[2:].decode(errors="replace").split() if line.startswith(b"#!") else []
    if words and words[0].endswith("/env"):
        words = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
    program = words[0].rpartition("/")[2].lower() if words else ""
    return INTERPRETERS.get(program) or INTERPRETERS.get(program.rstrip("0123456789."), "")


def list_source_files(source: SourceConfig) -> Inputs:
    """Files whose language is known; of `only`, if the source names some."""

    def rule(name: str) -> str:
        try:
            language = language_of(name)
        except OSError as error:
            raise ArtefactError(f"{name}: cannot be read: {brief(error)}") from error
        if not language:
            suffix = PurePosixPath(bare_name(name)).suffix
            return f"suffix {suffix}" if suffix else "no known language"
        return f"language {language}" if source.only and language not in map(str.lower, source.only) else ""

    rule.__doc__ = "source files, .txt or .md (plain, .gz or .zst)"
    return list_files(source, rule, hidden=(".",))


@reader(
    keys=("language", "licence", "path", "exclude", "only"),
    needs=("path",),
    inputs=list_source_files,
    advice="check path, exclude and only; every file is empty, binary or repeated",
)
def read_files(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Every file as a text. `source.language` replaces the languages of the files."""
    listing = list_source_files(source)
    for one, repository in by_repository(listing, source.path or []):
        language = source.language or language_of(one.name) or TEXT
        try:
            with open_content(one.name) as file:
                content = file.read(LONGEST + 1)
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{one.name}: cannot be read: {unreadable(error)}") from error
        text, problem = _text(content)
        if problem:
            yield Rejected(language, one.name, problem)
            continue
        group = text_hash(f"repository {repository}" if repository else text)
        yield Document(text, language, one.name, source.licence, group, repository=repository)


def by_repository(listing: Inputs, places: Sequence[str]) -> list[tuple[Input, str]]:
    """The files that are taken, each with the name of its repository; those of a repository together.

    A file outside of repositories has the name "", and so has every file where there is only one repository: it could
    not be split otherwise.

    Args:
        places: that were listed. Repositories whose last folders have the same name are told apart by the path below.
    """
    roots = {
        one.name.partition("/.git/")[0] if "/.git/" in one.name else one.name.removesuffix("/.git")
        for one in listing.left_out
        if "/.git/" in one.name or one.name.endswith("/.git")
    }
    together: dict[str, list[Input]] = {}
    for one in listing.taken:
        root = _root_of(one.name, roots) if len(roots) > 1 else ""
        together.setdefault(root or one.name, []).append(one)
    names = _names_of(roots, places)
    return [(one, names.get(root, "")) for root, ones in together.items() for one in ones]


def _names_of(roots: set[str], places: Sequence[str]) -> dict[str, str]:
    """Root -> name: the last folder. Roots that share it have the path below a place, or else the whole path."""
    names = {root: PurePosixPath(root).name for root in roots}
    for name_of in (lambda root: _below(root, places), str):
        counts = Counter(names.values())
        names = {root: name if counts[name] == 1 else name_of(root) for root, name in names.items()}
    return names


def _below(root: str, places: Sequence[str]) -> str:
    """The path of a repository below the innermost of `places`; its last folder if it is below none."""
    for base in sorted(map(base_of, places), key=len, reverse=True):
        if root != base and root.startswith(base and base + "/"):
            return root.removeprefix(base + "/")
    return PurePosixPath(root).name


def _root_of(name: str, roots: set[str]) -> str:
    """The innermost of `roots` that holds the file."""
    while name:
        name = name.rpartition("/")[0]
        if name in roots:
            return name
    return ""


def _text(content: bytes) -> tuple[str, str]:
    """The text of a file, or why it has none."""
    if len(content) > LONGEST:
        return "", "too_long"
    if b"\0" in content[:8192]:
        return "", "binary"
    try:
        return content.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        return "", "invalid_utf8"
