"""Shell scripts and completions installed on this machine.

Only files that say they are bash or POSIX sh (first line, or the `.sh`/`.bash` suffix) and bash completions.
The walk is bounded, follows no links, and stays in places that packages fill: no home directories, no virtual
environments, and of `/etc` only what packages put there, since the rest, like `/usr/local/bin`, may hold a
machine's own settings and secrets.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.candidate import Candidate, read_file_document
from dist_lm.document import Document

ROOTS = (
    "/bin",
    "/sbin",
    "/usr/bin",
    "/usr/sbin",
    "/usr/lib",
    "/usr/libexec",
    "/usr/share",
    "/usr/local/Cellar",
    "/opt/homebrew/Cellar",
    "/etc/bash_completion.d",
    "/etc/init.d",
)
MAX_DEPTH = 8  # directories below a root
MAX_ENTRIES = 400_000  # names looked at in all; a larger installation is read up to here
SKIPPED_DIRECTORIES = {
    "__pycache__",
    "dist-packages",
    "icons",
    "locale",
    "man",
    "modules",
    "node_modules",
    "site-packages",
    "zoneinfo",
}
COMPLETION_DIRECTORIES = {"bash_completion.d", "bash-completion"}
SHEBANG = re.compile(rb"#!\s*(?:\S*/env\s+(?:-S\s+)?)?(?:\S*/)?(?:bash|dash|sh)(?:\s|$)")
# A script that starts as sh only to hand itself to another interpreter is that other language.
POLYGLOT = re.compile(
    r"^\s*(?:eval\s+'?\(?exec|exec|''':'|\"exec\")\s+\S*(?:perl|python|tclsh|wish|ruby|node|lua)", re.M
)


def read_bash(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Every shell script found, in the order of its path. `seed` is not used."""
    for path in shell_files([Path(root) for root in ROOTS]):
        candidate = read_file_document(path, source)
        if isinstance(candidate, Document) and POLYGLOT.search(candidate.text[:2000]):
            continue
        yield candidate


def shell_files(roots: list[Path]) -> list[Path]:
    """The shell scripts and completions under `roots`, sorted; links and missing roots are passed over."""
    found: set[Path] = set()
    seen = 0
    for root in sorted({root.resolve() for root in roots if root.is_dir()}):
        stack = [(root, 0)]
        while stack and seen < MAX_ENTRIES:
            directory, depth = stack.pop()
            for entry in _entries(directory):
                seen += 1
                if entry.is_symlink():
                    continue
                if entry.is_dir():
                    if depth < MAX_DEPTH and entry.name not in SKIPPED_DIRECTORIES:
                        stack.append((Path(entry.path), depth + 1))
                elif entry.is_file() and _is_shell(entry, directory):
                    found.add(Path(entry.path))
    return sorted(found)


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    """The entries of a directory by name; none where it may not be read or is a virtual environment."""
    try:
        with os.scandir(directory) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError:  # not ours to read
        return []
    return [] if any(entry.name == "pyvenv.cfg" for entry in entries) else entries


def _is_shell(entry: os.DirEntry[str], directory: Path) -> bool:
    suffix = Path(entry.name).suffix
    if suffix in (".sh", ".bash"):
        return True
    if not suffix and not COMPLETION_DIRECTORIES.isdisjoint(directory.parts):
        return True
    try:
        if suffix or not entry.stat().st_mode & 0o111:
            return False
        with Path(entry.path).open("rb") as file:
            return SHEBANG.match(file.readline(128)) is not None
    except OSError:  # what may not be read cannot say that it is shell
        return False
