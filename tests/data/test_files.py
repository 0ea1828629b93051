"""Source files: languages, what is left out and why, and repositories that stay together."""

import os
from pathlib import Path

import pytest

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import inputs_of
from dist_lm.data.sources.files import read_files, shebang_language
from dist_lm.data.sources.reader import Rejected, text_hash
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def files(path: Path | str, **keys) -> SourceConfig:
    return SourceConfig("files", path=str(path), licence="MIT", **keys)


def documents(source: SourceConfig) -> list[Document]:
    return [one for one in read_files(source, 0) if isinstance(one, Document)]


@pytest.mark.parametrize(
    ("line", "language"),
    [
        (b"#!/usr/bin/env python3\n", "python"),
        (b"#! /usr/bin/env -S PYTHONPATH=x python3.11 -u\n", "python"),
        (b"#!/bin/sh -e\n", "bash"),
        (b"#!/opt/tools/perl5\n", "perl"),
        (b"#!/usr/bin/env unknown\n", ""),
        (b"#!", ""),
        (b"# text\n", ""),
    ],
)
def test_the_first_line_of_a_script_names_its_language(line, language):
    assert shebang_language(line) == language


def test_the_language_is_that_of_the_suffix_or_the_first_line_and_the_rest_is_left_out(tmp_path):
    write(
        tmp_path,
        {
            "A.PY": "print(1)\n",
            "b.rs": "fn main() {}\n",
            "c.txt": "words\n",
            "run": "#!/bin/bash\necho\n",
            "LICENSE": "terms\n",
            "d.png": b"\x89PNG",
            ".hidden/x.py": "no\n",
            "vendor/y.py": "no\n",
            "src/min.js": "no\n",
            "src/keep.js": "let a\n",
        },
    )
    source = files(tmp_path, exclude=["vendor/", "min.js"])
    assert [(Path(one.source).name, one.language, one.text) for one in documents(source)] == [
        ("A.PY", "python", "print(1)\n"),
        ("b.rs", "rust", "fn main() {}\n"),
        ("c.txt", "text", "words\n"),
        ("run", "bash", "#!/bin/bash\necho\n"),
        ("keep.js", "javascript", "let a\n"),
    ]
    assert {one.name.removeprefix(f"{tmp_path}/"): one.left_out for one in inputs_of(source).left_out} == {
        "LICENSE": "no known language",
        "d.png": "suffix .png",
        ".hidden/": "hidden",
        "vendor/": "exclude",
        "src/min.js": "exclude",
    }
    assert {one.language for one in documents(files(tmp_path, only=["rust", "python"]))} == {"rust", "python"}
    assert {one.language for one in documents(files(tmp_path, language="code"))} == {"code"}


def test_what_is_no_text_is_counted(tmp_path):
    write(tmp_path, {"a.c": b"caf\xe9\n", "b.c": b"\0\1", "c.c": "int c;\n", "d.c": b"\xef\xbb\xbfint d;\n"})
    rejected = [
        (Path(one.source).name, one.reason, one.error)
        for one in read_files(files(tmp_path), 0)
        if isinstance(one, Rejected)
    ]
    assert rejected == [("a.c", "invalid_utf8", ""), ("b.c", "binary", "")]
    assert [one.text for one in documents(files(tmp_path))] == ["int c;\n", "int d;\n"]


def test_files_of_a_repository_are_together_in_one_group(tmp_path):
    write(
        tmp_path,
        {
            **{f"{repo}/{name}.py": f"{repo} {name}" for repo in ("one", "two", "one/sub") for name in ("a", "z")},
            "one/.git/config": "",
            "two/.git/config": "",
            "one/sub/.git": "gitdir: ../../x\n",
            "p.py": "p",
            "q.py": "q",
        },
    )
    found = documents(files(tmp_path))
    assert [one.text for one in found] == ["one a", "one z", "one/sub a", "one/sub z", "p", "q", "two a", "two z"]
    groups = [one.group for one in found]
    assert groups[0] == groups[1]
    assert groups[2] == groups[3]
    assert groups[6] == groups[7]
    assert len(set(groups)) == 5
    alone = [one.group for one in documents(files(tmp_path / "two"))]
    assert alone[0] != alone[1]  # or none could be held out


def test_repositories_of_the_same_name_are_not_one_and_others_have_that_of_their_folder(tmp_path):
    names = ("me/repo", "you/repo", "we/it")
    write(tmp_path, {f"{name}/{file}": name + file for name in names for file in ("a.py", "z.py", ".git/config")})
    found = documents(files(tmp_path))
    assert [one.repository for one in found] == ["me/repo", "me/repo", "it", "it", "you/repo", "you/repo"]
    assert len({one.group for one in found}) == 3
    assert found[2].group == text_hash("repository it")  # as ever, or corpora built before would have other sides
    named = documents(SourceConfig("files", path=[str(tmp_path / "me"), str(tmp_path / "you/repo")]))
    whole = [str(tmp_path / name) for name in names[:2]]  # both would be `repo`
    assert [one.repository for one in named] == [whole[0], whole[0], whole[1], whole[1]]


def test_a_glob_knows_repositories_and_patterns_see_the_path_below_its_first_part(tmp_path):
    repositories = {f"d/{name}/{file}": name + file for name in ("r", "s") for file in ("src/a.py", "b.py", ".git/x")}
    write(tmp_path, {**repositories, "d/r/vendor/v.py": "v", "d/vendor/w.py": "w", "d/c.py": "c"})
    everything = documents(files(f"{tmp_path}/d/**/*.py", exclude=["vendor/", "/c.py", "/b.py"]))
    assert [(Path(one.source).name, one.repository) for one in everything] == [
        *[("b.py", "r"), ("a.py", "r"), ("b.py", "s"), ("a.py", "s")]
    ]
    folders = documents(files(f"{tmp_path}/d/*", exclude=["vendor/", "src/"]))
    assert [(Path(one.source).name, one.repository) for one in folders] == [("c.py", ""), ("b.py", "r"), ("b.py", "s")]
    anchored = documents(files(f"{tmp_path}/d/*", exclude=["/vendor/", "/src/"]))  # below each folder that it matched
    assert [one.source for one in anchored] == [one.source for one in folders]
    parts = documents(files(f"{tmp_path}/d/*/src"))
    assert [one.repository for one in parts] == ["r", "s"]


def test_a_glob_takes_what_it_matches_and_a_file_is_read_once(tmp_path):
    write(tmp_path, {"a.py": "a", "b.weird": "b", "d/c.py": "c"})
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    (tmp_path / "broken.py").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.py")
    source = files(f"{tmp_path}/*")
    assert [(one.text, one.language) for one in documents(source)] == [("a", "python"), ("b", "text"), ("c", "python")]
    assert [one.left_out for one in inputs_of(source).left_out] == [
        "broken link",
        "read already (linked or named twice)",
        "no regular file",
    ]
    assert [one.text for one in documents(SourceConfig("files", path=[f"{tmp_path}/a.py", f"{tmp_path}/*.py"]))] == [
        "a"
    ]


def test_links_to_nothing_and_pipes_of_a_folder_are_left_out_whatever_their_suffix(tmp_path):
    """Their first line would tell the language of a name without suffix: there is none, and a pipe never answers."""
    write(tmp_path, {"a.py": "a", "run": "#!/bin/sh\n"})
    (tmp_path / "current").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    source = files(tmp_path)
    assert [one.language for one in documents(source)] == ["python", "bash"]
    assert {Path(one.name).name: one.left_out for one in inputs_of(source).left_out} == {
        "current": "broken link",
        "loop": "broken link",
        "pipe": "no regular file",
    }


def test_names_with_magic_letters_are_names(tmp_path):
    write(tmp_path / "[d]", {"a[1].py": "a"})
    assert [one.text for one in documents(files(tmp_path / "[d]" / "a[1].py"))] == ["a"]
    assert [one.text for one in documents(files(tmp_path / "[d]"))] == ["a"]


def test_a_name_that_is_not_utf8_is_left_out(tmp_path):
    write(tmp_path, {"a.py": "a"})
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.py")).write_text("b")
    for place in (tmp_path, tmp_path / "*.py"):
        source = files(place)
        assert [one.text for one in documents(source)] == ["a"]
        assert [one.to_json() for one in inputs_of(source).left_out] == [
            {"name": f"{tmp_path}/caf\\udce9.py", "left_out": "name is not UTF-8"}
        ]


def test_a_pattern_that_is_none_is_refused_by_its_key(tmp_path):
    with pytest.raises(ConfigError, match=r"exclude=\['!'\]: expected patterns as in .gitignore"):
        inputs_of(files(tmp_path, exclude=["!"]))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nowhere", "path=.*nowhere: no such file, folder or URL"),
        ("*.py", r"path=.*\*.py: no such file"),
        ("d", r"nothing to read there: expected source files, .txt or .md .*1 left out \(suffix .png: 1\)"),
        ("ftp://h/x", "expected a local path, or a URL of http, https, s3, gs"),
    ],
)
def test_nothing_to_read_is_one_line(tmp_path, place, words):
    write(tmp_path, {"d/a.png": "x"})
    with pytest.raises(ConfigError, match=words) as refused:
        inputs_of(files(place if "://" in place else tmp_path / place))
    assert "\n" not in str(refused.value)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    write(tmp_path, {"a.py": "a", "d/b.py": "b"})
    scandir = os.scandir

    def refuse(folder: str):
        if str(folder).endswith("/d"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ArtefactError, match=r"cannot be listed: PermissionError.*/d"):
        inputs_of(files(tmp_path))


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(name: str, random_access: bool = False):
        raise PermissionError(13, "Permission denied", name)

    write(tmp_path, {"a.py": "a"})
    monkeypatch.setattr("dist_lm.data.sources.snapshot.open_raw", refuse)
    with pytest.raises(ArtefactError, match=r"a\.py: cannot be read: PermissionError: .*denied: '.*a\.py'$"):
        documents(files(tmp_path))
