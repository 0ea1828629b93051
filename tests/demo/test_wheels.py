"""Text of installed wheels: pinned, checked against pip's records, and independent of host and Python version."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

import dist_lm
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.reader import Candidate, Rejected
from dist_lm.demo import wheels
from dist_lm.document import Document
from dist_lm.errors import ArtefactError
from tests.patience import patient

ROOT = Path(dist_lm.__file__).parents[1]
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
SOURCE = SourceConfig("demo", "text")
READERS = ("wheels:read_python", "wheels:read_english", "sql:read_sql", "bash:read_bash")
# prints a hash of all that the readers yield; if there are folders, every file outside them is out of reach
DIGESTS = """
import hashlib, importlib, json, os, sys
from dist_lm.config.corpus import SourceConfig

readers, folders = json.loads(sys.argv[1]), tuple(json.loads(sys.argv[2]))
functions = {}
for reader in readers:
    module, _, name = reader.partition(":")
    functions[reader] = getattr(importlib.import_module(f"dist_lm.demo.{module}"), name)

def refuse(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | os.PathLike):
        place = os.path.realpath(arguments[0])
        if not place.startswith(folders):
            raise AssertionError(f"{event} {place}: text of the host")

for read in functions.values():
    next(read(SourceConfig("demo", "text"), 0))  # imports what it needs
if folders:
    sys.addaudithook(refuse)
found = {}
for reader, read in functions.items():
    documents = [repr(one) for one in read(SourceConfig("demo", "text"), 0)]
    found[reader] = [len(documents), hashlib.sha256("\\n".join(documents).encode()).hexdigest()]
print(json.dumps(found))
"""


def digests(python: str, path: list[Path], folders: list[Path]) -> dict[str, list]:
    """What another process reads."""
    arguments = [json.dumps(READERS), json.dumps([str(folder) for folder in folders])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONHASHSEED": "random"}
    done = subprocess.run(
        [python, "-c", DIGESTS, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=patient(600),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def here() -> dict[str, list]:
    return digests(sys.executable, [ROOT], [])


@pytest.mark.heavy
def test_the_text_is_the_same_with_all_other_files_of_the_host_out_of_reach(here):
    folders = [SITE_PACKAGES.resolve(), Path(wheels.__file__).resolve().parent]
    assert digests(sys.executable, [ROOT], folders) == here
    assert all(count > 200 for count, _ in here.values())


def other_pythons() -> list[str]:
    own = sys.version_info[:2]
    names = [f"python3.{minor}" for minor in range(11, 20) if (3, minor) != own]
    return [path for name in names if (path := shutil.which(name, path="/usr/bin:/usr/local/bin"))]


@pytest.mark.heavy
@pytest.mark.skipif(not other_pythons(), reason="no other version of Python is installed")
def test_the_text_is_the_same_under_another_version_of_python(here, tmp_path):
    (tmp_path / "numpy.py").write_text("ndarray = object\n")  # the installed one is built for this version
    for python in other_pythons():
        assert digests(python, [tmp_path, ROOT, SITE_PACKAGES], []) == here, python


def test_the_wheels_are_those_that_the_constraints_pin():
    text = (ROOT / "launch" / "constraints.txt").read_text()
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", text, re.M))
    names = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pinned.items()}
    for wheel in wheels.WHEELS:
        assert names[wheel.name.lower()] == wheel.version, wheel.name


def test_the_wheels_are_dependencies_of_the_default_install():
    todo, found = ["dist_lm"], set()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            required = metadata.distribution(name).requires or []
            plain = [line for line in required if "extra ==" not in line and "sys_platform" not in line]
            names = [re.match(r"[\w.-]+", line) for line in plain]
            todo += [one.group() for one in names if one and installed(one.group())]
    assert {wheel.name.lower() for wheel in wheels.WHEELS} <= {name.lower() for name in found}


def installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def read(reader) -> list[Candidate]:
    return list(reader(SOURCE, 0))


@pytest.fixture(scope="module")
def documents() -> list[list[Document]]:
    """Python and English."""
    found = (read(wheels.read_python), read(wheels.read_english))
    return [[one for one in candidates if isinstance(one, Document)] for candidates in found]


def test_documents_have_the_licence_and_name_no_path_of_this_machine(documents):
    for part, least in zip(documents, (2_000_000, 1_500_000), strict=True):
        assert all(one.licence for one in part)
        assert not [one.source for one in part if str(SITE_PACKAGES) in one.source or one.source.startswith("/")]
        assert least < sum(len(one.text.encode()) for one in part) < 2 * least


def test_docstrings_are_in_the_group_of_their_file(documents):
    files, docstrings = documents
    group = {one.source: one.group for one in files}
    pairs = [(group[file], one.group) for one in docstrings if (file := one.source.rsplit(":", 1)[0]) in group]
    assert len(pairs) > 50
    assert all(module == docstring for module, docstring in pairs)


def test_an_edited_file_is_left_out_and_counted(monkeypatch, tmp_path):
    edited = wheels.wheel_files("code")[0]
    copy = tmp_path / "copy.py"
    copy.write_bytes(edited.path.read_bytes() + b"\n# edited\n")
    files = [wheels.WheelFile(edited.wheel, edited.name, copy, edited.sha256, edited.size)]
    monkeypatch.setattr(wheels, "wheel_files", lambda use: files)
    assert [one.reason for one in read(wheels.read_python) if isinstance(one, Rejected)] == ["edited"]


def test_another_version_is_read_but_counted_and_named(monkeypatch, caplog):
    other = wheels.Wheel("networkx", "1.0", "BSD", ("networkx/",))
    monkeypatch.setattr(wheels, "WHEELS", (other,))
    first, *rest = read(wheels.read_python)
    assert isinstance(first, Rejected)
    assert first.reason == "other_version"
    assert len(rest) > 100
    (warned,) = caplog.messages
    assert re.match(r"networkx [\d.]+ in place of 1\.0: the text differs", warned)


def test_a_missing_wheel_is_an_error_with_the_way_out(monkeypatch):
    monkeypatch.setattr(wheels, "WHEELS", (wheels.Wheel("no-such-wheel", "1.0", "", ("none/",)),))
    with pytest.raises(ArtefactError, match=r"no-such-wheel is not installed: pip install -c launch/constraints"):
        read(wheels.read_python)


def test_docstrings_become_prose_with_names():
    source = '''"""A module that says what it is for, at some length, so that it counts as prose here."""

def f(a, *, b=2):
    """Do something with a and b, and give back what is left over when it is done with them."""

class C(dict):
    """A class that keeps things in order, and knows more about them than it says in this place.

        Indented further.

    It ends after a paragraph that says where to look for the rest of what it does, and who asked for it.
    """

    def short(self):
        """Tiny."""

    async def g(self, *items, key=None, **rest) -> None:
        """Wait until every other one has come back, then go on as though nothing had happened in between."""
'''
    documents = dict(wheels.docstring_documents(ast.parse(source), "pkg.mod"))
    assert list(documents) == ["pkg.mod.C"]  # the module's own is below the length of a document
    assert documents["pkg.mod.C"].startswith("pkg.mod.C\n\nA class that keeps")
    assert "\n\n    Indented further." in documents["pkg.mod.C"]
    assert "g(self, *items, key, **rest)\n\nWait until" in documents["pkg.mod.C"]
    assert "Tiny" not in documents["pkg.mod.C"]
