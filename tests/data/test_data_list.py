"""`dist-lm data list`: every folder of corpora, and the runs that use it."""

import io
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from dist_lm.data.manifest import manifest_path, record_content, remote_path
from dist_lm.data.unfinished_builds import begin_pass
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.verbs.data_list import list_corpora, print_corpora
from tests.data.synthetic_corpus import documents, write


@pytest.fixture
def listed(work: WorkDirectory) -> WorkDirectory:
    """Corpora that are finished, unfinished, damaged and of others; two runs use some."""
    corpora = work.path / "corpora"
    write(corpora / "code-1a2b3c4d", documents([9] * 20), documents([9] * 5, 1))
    write(corpora / "prose", documents([9] * 20), documents([9] * 5, 1))
    manifest_path(corpora / "prose").write_text("{}")
    (corpora / "mine").mkdir()
    (corpora / "mine" / "notes.txt").write_text("mine")
    for run_id, folder in (("old", "code"), ("new", "code-1a2b3c4d")):
        run = work.run("code", run_id)
        run.create()
        record_content(run, ["code"], {"code": folder})
    return work


def printed(work: WorkDirectory, *, unused: bool = False, width: int = 200) -> str:
    output = io.StringIO()
    print_corpora(work, RichConsole(file=output, width=width), unused=unused)
    return output.getvalue()


def test_folders_are_listed_with_the_runs_that_use_them(listed: WorkDirectory) -> None:
    """Finds a folder that is left out, and one that is called unused although a run needs it."""
    states = {corpus.folder.name: (corpus.state, corpus.runs) for corpus in list_corpora(listed)}
    assert states == {
        "code": ("finished", ("code/old",)),
        "code-1a2b3c4d": ("finished", ("code/new",)),
        "language": ("finished", ()),
        "mine": ("of others", ()),
        "prose": ("damaged", ()),
        "tools": ("finished", ()),
    }
    lines = {line.split("│")[1].strip(): line for line in printed(listed).splitlines() if line.startswith("│")}
    assert set(states) == set(lines)
    assert "code/new" in lines["code-1a2b3c4d"]
    assert "no run" in lines["language"]


def test_an_attached_corpus_names_its_url(listed: WorkDirectory) -> None:
    """Finds an attached folder that nobody can tell from a local one, and a damaged record that ends the list."""
    corpora = listed.path / "corpora"
    durable.write_sealed(remote_path(corpora / "code"), {"url": "https://host/lab/code"})
    remote_path(corpora / "tools").write_text("{")
    assert "https://host/lab/code" in printed(listed)
    assert {corpus.folder.name: corpus.state for corpus in list_corpora(listed)}["tools"] == "damaged"


def test_an_unfinished_build_by_tasks_is_named(work: WorkDirectory, tmp_path: Path) -> None:
    """Finds a build under way that nobody sees, and a first one that is an error since there is no corpus yet."""
    for path in (work.path, tmp_path / "first"):
        (path / "builds" / "1a2b").mkdir(parents=True)
        begin_pass(path / "builds" / "1a2b", ["prose"], "survey", 7)
        assert "unfinished build of prose, 0 of 7 tasks of pass survey" in printed(WorkDirectory(path))


def test_a_narrow_terminal_shows_whole_names_of_folders(listed: WorkDirectory) -> None:
    """Finds a name cut to `code-...`, which `corpus.folders` would not take."""
    assert "code-1a2b3c4d" in printed(listed, width=80)


def test_a_narrow_terminal_has_every_value_on_a_line_of_its_own(listed: WorkDirectory) -> None:
    """Finds cells that are folded into columns of three characters."""
    lines = printed(listed, width=80).splitlines()
    start = lines.index("code-1a2b3c4d")
    assert lines[start + 1] == "  documents: 25"
    assert "  used by: code/new" in lines[start : lines.index("language")]


def test_a_work_directory_without_a_corpus_says_so(tmp_path: Path) -> None:
    """Finds an answer of no character, which looks like a failure."""
    (tmp_path / "corpora").mkdir()
    assert printed(WorkDirectory(tmp_path)) == f"no corpus in {tmp_path / 'corpora'}\n"


def test_only_unused_finished_corpora_have_a_command_that_removes_them(listed: WorkDirectory) -> None:
    """Finds a command that would remove what a run needs, what is being built, or files of others."""
    corpora = listed.path / "corpora"
    assert printed(listed, unused=True).split("\n")[:-1] == [
        f"rm -r {corpora / name}" for name in ("language", "tools")
    ]
    assert len(list(corpora.iterdir())) == 6  # nothing was removed


def test_a_folder_without_corpora_is_refused(work: WorkDirectory) -> None:
    with pytest.raises(ArtefactError, match=r"runs/corpora: there is no such folder; expected a work directory"):
        list_corpora(WorkDirectory(work.path / "runs"))
