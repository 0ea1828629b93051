"""The sources of the running Python's standard library, read in place."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.candidate import Candidate, read_file_document

# Not the standard library itself, or text made to test parsers rather than to be read.
SKIPPED_DIRECTORIES = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "lib-dynload",
    "site-packages",
    "test",
    "tests",
}
TOPICS = Path("pydoc_data/topics.py")  # English inside string literals: the `english` reader's, below the library


def read_python(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Every module of the standard library, in the order of its path. `seed` is not used."""
    root = standard_library()
    for path in python_files(root):
        if path != root / TOPICS:
            yield read_file_document(path, source)


def standard_library() -> Path:
    """Where the running interpreter's standard library lies (of the base, inside a virtual environment)."""
    return Path(sysconfig.get_path("stdlib"))


def python_files(root: Path) -> list[Path]:
    """The `.py` files under `root`, sorted, without links, tests and installed packages."""
    found: list[Path] = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in SKIPPED_DIRECTORIES]
        paths = (Path(directory, name) for name in files if name.endswith(".py"))
        found.extend(path for path in paths if not path.is_symlink())
    return sorted(found)
