"""Files that two sides share: what arrives, and what a hostile side cannot do."""

import os
from pathlib import Path

import pytest

from dist_lm.sandbox.shared_files import MAX_FILE_BYTES, FailedError, Folder
from dist_lm.sandbox.values import MalformedError


@pytest.fixture
def judge(tmp_path: Path) -> Folder:
    (tmp_path / "judge").mkdir()
    return Folder(os.fsencode(tmp_path / "judge"), sends_links=True)


@pytest.fixture
def program(tmp_path: Path) -> Folder:
    (tmp_path / "program").mkdir()
    return Folder(os.fsencode(tmp_path / "program"), sends_links=False)


def place(folder: Folder) -> Path:
    return Path(os.fsdecode(folder.root))


def test_files_folders_rights_and_times_arrive_and_only_changes_travel(judge: Folder, program: Folder):
    (place(judge) / "a b").mkdir()
    file = place(judge) / "a b" / "run.sh"
    file.write_text("echo\n")
    file.chmod(0o750)
    os.utime(file, ns=(5_000_000_000, 5_000_000_000))
    program.apply(judge.changes())
    copy = place(program) / "a b" / "run.sh"
    assert (copy.read_text(), copy.stat().st_mode & 0o777, copy.stat().st_mtime) == ("echo\n", 0o750, 5.0)
    assert program.changes() == judge.changes() == []

    copy.unlink()
    (place(program) / "new").write_bytes(b"\0\xff")
    judge.apply(program.changes())
    assert sorted(path.name for path in place(judge).iterdir()) == ["a b", "new"]
    assert not file.exists()


def test_links_go_to_the_program_only(judge: Folder, program: Folder):
    (place(judge) / "link").symlink_to("nowhere")
    program.apply(judge.changes())
    assert (place(program) / "link").readlink() == Path("nowhere")
    (place(program) / "other").symlink_to("/")
    assert program.changes() == []
    with pytest.raises(MalformedError, match="a kind of file that is not shared"):
        judge.apply([(b"other", "link", 0, 0, b"/")])


def test_what_is_not_shared_is_not_sent_and_cannot_be_changed(judge: Folder, program: Folder):
    for name in ("in", "want"):
        (place(judge) / name).write_text(name)
    program.apply(judge.changes(lambda path: path == b"in"))
    assert [path.name for path in place(program).iterdir()] == ["in"]
    with pytest.raises(FailedError, match="the program changes want, which it was not given"):
        judge.apply([(b"want", "file", 0o600, 0, b"x")])
    with pytest.raises(FailedError, match="the program changes want"):
        judge.apply([(b"want", "none", 0, 0, b"")])
    assert (place(judge) / "want").read_text() == "want"


def test_a_folder_with_unshared_files_is_not_removed(judge: Folder):
    (place(judge) / "d").mkdir()
    judge.changes()
    (place(judge) / "d" / "want").write_text("")
    with pytest.raises(FailedError, match="the program changes d/want"):
        judge.apply([(b"d", "none", 0, 0, b"")])


@pytest.mark.parametrize("path", [b"", b"..", b"/etc/x", b"a/../../x", b"./x", b"a//b", b"a\0b"])
def test_no_path_leads_out(judge: Folder, path: bytes):
    with pytest.raises(MalformedError, match="leads out of the folder"):
        judge.apply([(path, "file", 0o600, 0, b"")])


def test_a_path_through_a_link_of_the_test_is_left_out(judge: Folder, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (place(judge) / "link").symlink_to(outside)
    judge.changes()
    judge.apply([(b"link/x", "file", 0o600, 0, b"")])
    assert not [*outside.iterdir()]


@pytest.mark.parametrize(
    "changes", [None, [1], [("a", "file", 0, 0, b"")], [(b"a", "file", 0, 0)], [(b"a", "pipe", 0, 0, b"")]]
)
def test_changes_of_another_form_are_refused(judge: Folder, changes):
    with pytest.raises(MalformedError):
        judge.apply(changes)


def test_too_much_fails(program: Folder):
    with (place(program) / "large").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(FailedError, match="bytes of files"):
        program.changes()


def test_pipes_are_not_shared(program: Folder):
    os.mkfifo(place(program) / "pipe")
    assert program.changes() == []
