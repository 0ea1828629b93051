"""Reads source files and texts: each file is a document, and its suffix or shebang gives the language. A notebook is a
text in the language of its kernel.

A folder with `.git` is a repository. If a source has several, the files of each stay next to each other and share a
group, so a repository is held out as a whole.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import Input, Inputs
from dist_lm.data.sources import notebook
from dist_lm.data.sources.failures import brief, unreadable
from dist_lm.data.sources.listing import bare_name, base_of, list_files
from dist_lm.data.sources.opening import compressed_without_suffix, open_content, scheme_of
from dist_lm.data.sources.reader import Candidate, Rejected, reader, text_hash
from dist_lm.data.sources.snapshot import Snapshot
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, UserError
from dist_lm.sandbox import limited

LONGEST = 64 << 20  # bytes of a file, decompressed
FIRST_LINE = 256  # bytes of a file in which a shebang is looked for
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
        "python": "py pyi pyw ipynb",
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
KERNELS = {"c++": "cpp", "c#": "csharp", "f#": "fsharp", "octave": "matlab", "scheme": "lisp", "racket": "lisp"}
TEXT = "text"  # language of a file that a source names although its language is unknown


def language_of(name: str) -> str:
    """Returns the language of a file by its name, else by its first line; empty if neither tells.

    Only a local file without a suffix is opened.

    Raises:
        OSError: the first line cannot be read.
        ConfigError: the scheme of a URL is not supported.
    """
    if language := _language_by_name(name):
        return language
    if not _may_have_shebang(name):
        return ""
    with open_content(name) as file:
        return shebang_language(file.readline(FIRST_LINE))


def _may_have_shebang(name: str) -> bool:
    # Only of local files without a suffix: a request for every remote file would be too slow.
    return not PurePosixPath(bare_name(name)).suffix and not scheme_of(name)


def _language_by_name(name: str) -> str:
    bare = bare_name(name)
    return NAMES.get(bare) or SUFFIXES.get(PurePosixPath(bare).suffix.removeprefix("."), "")


def shebang_language(line: bytes) -> str:
    """Returns the language of a first line, such as `python` for `#!/usr/bin/env -S python3 -u`.

    Empty without a shebang or for an unknown program.
    """
    if not line.startswith(b"#!"):
        return ""
    words = line[2:].decode(errors="replace").split()
    if words and words[0].endswith("/env"):
        words = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
    if not words:
        return ""
    program = words[0].rpartition("/")[2].lower()
    return INTERPRETERS.get(program) or INTERPRETERS.get(program.rstrip("0123456789."), "")


def list_source_files(source: SourceConfig) -> Inputs:
    """Returns the files of a source; taken are those whose language is known, and among `only` if the source names
    some.

    Files that a path names itself are taken whatever their language. Local files without a suffix are opened. A zip is
    read if a path names or matches it; in a folder it is left out, because repositories have zips for their tests.

    Raises:
        ConfigError, ArtefactError: as `list_files`; or ArtefactError: a file without a suffix cannot be read.
    """

    # `list_files` puts the docstring of `rule` into its messages. That is a text for users, so it is assigned below.
    def rule(name: str) -> str:
        try:
            language = language_of(name)
        except OSError as error:
            raise ArtefactError(f"{name}: cannot be read: {brief(error)}") from error
        if not language:
            suffix = PurePosixPath(bare_name(name)).suffix
            return f"suffix {suffix}" if suffix else "no known language"
        if source.only and language not in map(str.lower, source.only):
            return f"language {language}"
        return ""

    rule.__doc__ = "source files, .txt or .md (plain, .gz, .zst, .xz or .bz2)"
    return list_files(source, rule, hidden=(".",), of_rows=False)


@reader(
    keys=("language", "licence", "path", "exclude", "only"),
    needs=("path",),
    inputs=list_source_files,
    takes_files=True,
    advice="check path, exclude and only; no file has text of its own",
)
def read_files(source: SourceConfig, seed: int, files: Snapshot | None = None) -> Iterator[Candidate]:
    """Yields every file as a text, or `Rejected`: too_long, compressed, binary, invalid_utf8, broken_notebook, or
    other_language for a notebook that is in none of `source.only`.

    `source.language` replaces the languages of the files; a file of unknown language that a path names is `text`.
    `seed` is not used.

    Raises:
        ConfigError: as `list_source_files`.
        ArtefactError: a file cannot be listed or read.
    """
    files = files or Snapshot.of(source)
    for file, repository in by_repository(files.listing, source.path or []):
        try:
            with files.reading(file) as reading, reading.open_content(may_grow=True) as opened:
                content = opened.read(LONGEST + 1)  # one byte more tells a file that is too long
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{file.name}: cannot be read: {unreadable(error)}") from error

        # A file that the source names is read even if its language is unknown.
        language = source.language or _language_by_name(file.name)
        if not language and _may_have_shebang(file.name):
            language = shebang_language(content[:FIRST_LINE].partition(b"\n")[0])
        language = language or TEXT
        text, problem = _text(content)
        if is_notebook(file.name) and not problem:
            text, notebook_language, problem = _notebook(content)
            language = source.language or notebook_language
            if not problem and source.only and language not in map(str.lower, source.only):
                yield Rejected("others", file.name, "other_language")
                continue
        if problem:
            yield Rejected(language, file.name, problem)
            continue
        # Files of a repository share a group, so that all of them are in one split.
        group = text_hash(f"repository {repository}" if repository else text)
        yield Document(text, language, file.name, source.licence, group, repository=repository)


def by_repository(listing: Inputs, paths: Sequence[str]) -> list[tuple[Input, str]]:
    """Pairs the files that are taken with the names of their repositories; files of a repository are neighbours.

    A file outside of repositories has the name "", and so has every file if there is only one repository: it could
    not be split otherwise.

    Args:
        listing: with the `.git` that it left out, by which repositories are found.
        paths: those of the source. Repositories whose last folders have the same name are named by the path below.
    """
    # The listing names `.git` among the hidden files: as a folder, or in a worktree as a file.
    roots = set()
    for file in listing.left_out:
        if "/.git/" in file.name:
            roots.add(file.name.partition("/.git/")[0])
        elif file.name.endswith("/.git"):
            roots.add(file.name.removesuffix("/.git"))

    # A repository comes where its first file is; a file outside of repositories is a group of its own.
    files_by_root: dict[str, list[Input]] = {}
    for file in listing.taken:
        root = _root_of(file.name, roots) if len(roots) > 1 else ""
        files_by_root.setdefault(root or file.name, []).append(file)
    names = _names_of(roots, paths)
    return [(file, names.get(root, "")) for root, files in files_by_root.items() for file in files]


def _names_of(roots: set[str], paths: Sequence[str]) -> dict[str, str]:
    """Returns the names of repositories: root -> its last folder, or the path below one of `paths`, or the whole path.

    The first of these three that no other repository has is the name.
    """
    names = {root: PurePosixPath(root).name for root in roots}
    for longer_name in (lambda root: _below(root, paths), str):
        roots_named = Counter(names.values())
        names |= {root: longer_name(root) for root, name in names.items() if roots_named[name] > 1}
    return names


def _below(root: str, paths: Sequence[str]) -> str:
    """Returns the path of a repository below the innermost of `paths`; its last folder if it is below none."""
    for base in sorted(map(base_of, paths), key=len, reverse=True):
        if root != base and root.startswith(base and base + "/"):
            return root.removeprefix(base + "/")
    return PurePosixPath(root).name


def _root_of(name: str, roots: set[str]) -> str:
    """Returns the innermost of `roots` that holds the file; empty if none does."""
    while name:
        name = name.rpartition("/")[0]
        if name in roots:
            return name
    return ""


def is_notebook(name: str) -> bool:
    """Tells whether a name is that of a Jupyter notebook, plain or compressed."""
    return bare_name(name).endswith(notebook.SUFFIX)


def _notebook(content: bytes) -> tuple[str, str, str]:
    """Returns (text, language, reason) of a notebook: an empty reason, or no text and the reason `broken_notebook`. A
    kernel of an unknown language gives plain text.
    """
    # JSON takes many times its size in memory, so it is parsed with limits.
    try:
        text, kernel = limited.call(notebook.notebook_text, content)
        text.encode()  # JSON can spell lone surrogates, which are no text
    except (limited.LimitError, notebook.NotebookError, UnicodeEncodeError):
        return "", notebook.DEFAULT, "broken_notebook"
    if kernel in notebook.IPYTHON:
        return text, "python", ""
    languages = {*SUFFIXES.values()}
    language = KERNELS.get(kernel, kernel)
    return text, language if language in languages else TEXT, ""


def _text(content: bytes) -> tuple[str, str]:
    """Returns the text of a file and an empty reason, or an empty text and why it is dropped.

    The reasons are too_long, compressed (without the suffix of its compression), binary (a NUL in the first 8,192
    bytes) and invalid_utf8. A byte order mark is left out.
    """
    if len(content) > LONGEST:
        return "", "too_long"
    if compressed_without_suffix(content):
        return "", "compressed"
    # A NUL is in no source text, and early in nearly every binary file.
    if b"\0" in content[:8192]:
        return "", "binary"
    try:
        return content.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        return "", "invalid_utf8"
