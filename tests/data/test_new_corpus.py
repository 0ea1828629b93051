"""`dist-lm data new`: the corpus file that it writes is one that a launch takes, for the data that is there."""

import csv
import gzip
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
import zstandard
from omegaconf import OmegaConf
from rich.console import Console

import dist_lm
from dist_lm.__main__ import data_new
from dist_lm.data.corpus_file import next_commands
from dist_lm.data.ingest import TextSplits
from dist_lm.data.new import Remedy, new_corpus
from dist_lm.data.propose import columns_of, propose
from dist_lm.errors import ArtefactError, ConfigError, UserError
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.conf_folders import choices

ROWS = [{"content": f"def f{i}():\n    return {i}\n" * 9, "lang": "Python", "license": "MIT"} for i in range(30)]
CHAT = {
    "messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three."}],
    "tools": [],
}
PROSE = "It rained all day, and nobody went out to see what the river had done to the bridge.\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    code = folder / "repo"
    code.mkdir(parents=True)
    for place in range(4):
        (code / f"m{place}.py").write_text(f"import m{place}\n\nx = {place}\n" * 5)
    (code / "logo.png").write_bytes(b"\x89PNG" * 50)
    (code / ".hidden.py").write_text("secret = 1\n")
    rows = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (folder / "rows.jsonl.zst").write_bytes(zstandard.compress(rows))
    (folder / "chat.jsonl.gz").write_bytes(gzip.compress(json.dumps(CHAT).encode() + b"\n"))
    with (folder / "notes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "body"], *([f"n{i}", f"{i} {PROSE}"] for i in range(20))])
    return folder


def written(data: Path, *names: str, **options) -> tuple[Path, str]:
    """The corpus file, and what is printed."""
    out = data.parent / "lab" / "corpus" / "ours.yaml"
    console = Console(record=True, width=100)
    new_corpus([str(data / name) for name in names], out, console, **{"sample_bytes": 1 << 20} | options)
    return out, console.export_text()


def test_a_corpus_file_is_one_that_a_launch_takes(data):
    out, text = written(data, "repo", "rows.jsonl.zst", "chat.jsonl.gz", "notes.csv")
    config = compose_config([f"hydra.searchpath=[{out.parent.parent}]", "corpus=ours", "stage=code"]).corpus
    assert {name: [one.reader for one in sources] for name, sources in config.corpora.items()} == {
        "language": ["csv"],
        "code": ["files", "jsonl"],
        "tools": ["messages"],
    }
    csv_source, rows = config.corpora["language"][0], config.corpora["code"][1]
    assert (csv_source.column, csv_source.id_column) == ("body", "id")
    assert (rows.column, rows.language_column, rows.licence_column) == ("content", "lang", "license")
    documents = [item.document for item in TextSplits(config, 0).screened("code")]
    assert {document.language for document in documents} == {"python"}
    assert len(documents) == 34
    assert "licences: MIT 30, not given 4" in text
    assert "val: about 1 of 34 documents (corpus.val_fraction=0.02)" in text
    assert "suffix .png" in text
    assert "suffix .png" in out.read_text()


@pytest.mark.heavy
def test_next_commands_compose(data):
    out, text = written(data, "repo", "notes.csv", "chat.jsonl.gz")
    commands = list(next_commands(out, ["language", "code", "tools"]))
    assert all(command in text for command in commands)
    for command in [*commands, *next_commands(out, ["code"]), *next_commands(out, ["tools"])]:
        folder, *overrides = command.split()[4:]
        compose_config([f"hydra.searchpath=[{folder}]", *overrides])


def test_conversations_alone_are_told_what_the_tokenizer_learns_from(data):
    out, text = written(data, "chat.jsonl.gz")
    assert "conversations alone: the tokenizer learns from them" in text
    assert "# conversations alone: the tokenizer learns from them" in out.read_text()
    assert "conversations alone" not in written(data, "chat.jsonl.gz", "notes.csv", force=True)[1]


def test_what_would_be_dropped_is_counted(data):
    (data / "again.jsonl").write_text("".join(json.dumps({"text": PROSE}) + "\n" for _ in range(4)))
    _, text = written(data, "again.jsonl")
    assert "would be dropped: duplicate 3" in text


def test_a_sample_is_called_one(data):
    _, text = written(data, "rows.jsonl.zst", sample_bytes=1000)
    assert "the first" in text


def test_a_place_without_data_says_what_is_there(data, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"pictures.*\.png: 1"):
        propose(str(tmp_path / "pictures"))
    with pytest.raises(ConfigError, match="no such file"):
        propose(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("others", [{}, {"README.txt": "about it"}, {"package.json": "{}"}])
def test_a_tar_of_source_files_is_called_one_with_the_way_out(tmp_path: Path, others: dict[str, str]) -> None:
    """Finds a tar of files that is called a table of numbers, or of which README.txt alone is read."""
    contents = {f"src/m{number}.py": f"x = {number}" for number in range(5)} | others
    write_tar(tmp_path / "code.tar.gz", contents)
    with pytest.raises(ConfigError, match=r"code.tar.gz: a tar of files \(.py: 5.*tar -xf.*column: py"):
        propose(str(tmp_path / "code.tar.gz"))


def test_samples_of_a_tar_without_text_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "cats.tar", {f"{number}.{suffix}": "x" for number in range(3) for suffix in ("jpg", "cls")})
    with pytest.raises(ConfigError, match=r"cats.tar: most of its first 3 samples have no text.*\.jpg: 3, \.cls: 3"):
        propose(str(tmp_path / "cats.tar"))


def write_tar(path: Path, contents: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, text in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))


def test_archives_in_a_folder_are_named_with_the_way_out(data: Path) -> None:
    """Finds an archive in a folder that is left out without a word, and a hint for one that is read."""
    for name in ("b.7z", "c.rar"):
        (data / "repo" / name).write_bytes(b"anything")
    write_tar(data / "repo" / "d.tar.gz", {"m.py": "x = 1"})
    with zipfile.ZipFile(data / "repo" / "a.zip", "w") as packed:
        packed.writestr("in_zip.py", "x = 1")
    out, text = written(data, "repo")
    hint = next(line for line in text.splitlines() if "not opened" in line)
    assert "4 archives" in hint
    assert all(f"{suffix}: 1" in hint for suffix in (".zip", ".7z", ".rar", ".tar.gz"))
    assert f"{data}/repo/a.zip" in hint
    assert "unpack what should be read, or name the zip" in hint
    assert "not opened: 4 archives" in out.read_text()
    assert "not opened" not in written(data, "repo/a.zip", force=True)[1]


def test_a_zip_whose_rows_are_read_is_no_archive_left_out(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / "a.zip", "w") as packed:
        packed.writestr("a.jsonl", "".join(json.dumps({"text": PROSE}) + "\n" for _ in range(3)))
    (proposal,) = propose(str(tmp_path / "data"))
    assert not [note for note in proposal.notes if "not opened" in note]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.tar", "a.csv"])
def test_a_damaged_file_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b'"damaged')
    with pytest.raises(UserError, match=name) as refused:
        propose(str(tmp_path / name))
    assert "\n" not in str(refused.value)


def test_an_output_that_no_launch_would_find_is_refused(data):
    written(data, "notes.csv")
    with pytest.raises(ConfigError, match="--force"):
        written(data, "notes.csv")
    written(data, "notes.csv", force=True)
    with pytest.raises(ConfigError, match=r"DIR/corpus/NAME\.yaml"):
        new_corpus([str(data / "notes.csv")], data / "ours.yaml", Console(), sample_bytes=1)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a", "id": "x"}, ({"column": "text", "id_column": "id"}, False)),
        ({"prompt": "short", "story": "longer than the other"}, ({"column": "story"}, False)),
        ({"turns": [{"role": "user", "content": "a"}]}, ({"column": "turns"}, True)),
        ({"stars": 3}, ({}, False)),
    ],
)
def test_columns_are_guessed_from_rows(row, expected):
    assert columns_of([row]) == expected


HOSTILE = [
    "py\ncleaning: {secrets: false} #",
    "py\n    - {reader: 'my.mod:fn'} #",
    "py\r\nthon: x",
    "a\u2028name: b",
    "a\x85name: b",
    "# no",
    "a: 'b",
    '"',
    "[/red]",
    "1e3",
    "null",
    "!!python/object:x.y {}",
]


def rows_file(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


@pytest.mark.parametrize("value", HOSTILE)
def test_no_value_of_data_writes_configuration(data, value):
    column = f"{value} column"
    rows = [{"text": f"{i} {PROSE}", "language": value, "license": value, column: 1} for i in range(30)]
    rows_file(data, rows, "language.jsonl")
    rows_file(data, [{value: f"column {i} {PROSE}"} for i in range(30)], "column.jsonl")
    place = rows_file(data, [{"text": f"place {i} {PROSE}"} for i in range(30)], value.replace("/", "") + ".jsonl")
    (data / "repo" / f"m.{value.replace('/', '')}").write_bytes(b"")
    out, _ = written(data, "language.jsonl", "column.jsonl", place, "repo")
    config = yaml.safe_load(out.read_text(encoding="utf-8"))
    assert set(config) == {"name", "corpora"}
    sources = [source for corpus in config["corpora"].values() for source in corpus]
    assert sorted(source["reader"] for source in sources) == ["files", "jsonl", "jsonl", "jsonl"]
    assert [source["column"] for source in sources if source["path"].endswith("/column.jsonl")] == [value]
    assert str(data / place) in [source["path"] for source in sources]
    loaded = OmegaConf.to_container(OmegaConf.load(out), resolve=True)
    assert loaded == config


def test_a_file_that_would_be_read_otherwise_is_not_left_there(data, monkeypatch):
    monkeypatch.setattr("dist_lm.data.corpus_file.one_line", str)  # as if values went into comments as they are
    rows_file(data, [{"text": f"{i} {PROSE}", "language": HOSTILE[0]} for i in range(30)])
    with pytest.raises(ConfigError, match="not written"):
        written(data, "rows.jsonl")
    assert not list((data.parent / "lab").rglob("*.yaml"))


@pytest.mark.parametrize("name", ["${oc.env:HOME}", "${work_dir}"])
def test_a_name_that_the_configuration_would_replace_is_refused(data, name):
    rows_file(data, [{name: PROSE * 2}])
    with pytest.raises(ConfigError, match="rename"):
        written(data, "rows.jsonl")
    with pytest.raises(ConfigError, match="rename"):
        written(data, name)


@pytest.mark.parametrize(
    ("rows", "corpus", "language"),
    [
        ([{"text": row["content"]} for row in ROWS], "code", "code"),
        ([{"text": f"x{i} = {i}\nprint(x{i})", "path": f"src/m{i}.py"} for i in range(30)], "code", "python"),
        ([{"text": f"{i} {PROSE}" * 4, "language": "en"} for i in range(30)], "language", "text"),
        ([{"text": f"- a {i}\n  b\n  c\n", "lang": "pt-BR"} for i in range(30)], "language", "code"),
        ([{"text": row["content"], "lang": "C++"} for row in ROWS], "code", "code"),
        ([{"text": f"{i} {PROSE}", "language": "english" if i % 2 else None} for i in range(30)], "language", "text"),
    ],
)
def test_the_corpus_follows_the_text(data, rows, corpus, language):
    out, text = written(data, rows_file(data, rows))
    config = yaml.safe_load(out.read_text())["corpora"]
    assert list(config) == [corpus]
    assert config[corpus][0]["language"] == language
    assert "columns: column=text" in text
    assert "30" in text


@pytest.mark.parametrize("name", ["licenses", "licences", "max_stars_repo_licenses"])
def test_licences_in_lists_are_found(data, name):
    _, text = written(data, rows_file(data, [{"text": f"{i} {PROSE}", name: ["MIT"]} for i in range(30)]))
    assert "licences: MIT 30" in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", json.dumps({"prompt": "a", "chosen": 5, "rejected": [1]}), "chosen and rejected are"),
        ("a.jsonl", json.dumps({"completions": ["b", "c"], "judgements": [[0, 1]]}), "and judgements are"),
        ("a.jsonl", json.dumps({"prompt": "a", "solution": "b"}), "prompt, solution: only one"),
        ("a.jsonl", json.dumps({"problem": "a", "answer": "b"}), "problem, answer: only one"),
        ("a.jsonl", json.dumps({"data": [1], "n": 2}), r"columns there are data \(list\), n \(int\)"),
        ("a.jsonl", "<html>", "a.jsonl:1: broken JSON"),
        ("a.jsonl", "", "no rows"),
        ("a.csv", "url;text\nu;v\n", "';' in it"),
        ("a.csv", "3,this is some longer text 0\n4,more\n", "add a row of names"),
    ],
)
def test_data_that_one_column_does_not_hold_is_refused(data, name, content, words):
    (data / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        written(data, name)


def test_a_lesser_kind_that_no_column_holds_is_left_out_with_the_reason(data):
    """Such as the fixtures among source files; most of the data is never left out."""
    pair = json.dumps({"prompt": "a", "solution": "b"}) + "\n"
    (data / "repo" / "fixtures.jsonl").write_text(pair)
    out, text = written(data, "repo")
    assert "fixtures.jsonl: columns prompt, solution" in " ".join(out.read_text().split())
    assert "fixtures.jsonl" in text
    (data / "repo" / "fixtures.jsonl").write_text(pair * 1000)
    with pytest.raises(ConfigError, match="prompt, solution"):
        propose(str(data / "repo"))


def test_the_code_of_this_package_can_be_described():
    """It is the default of launch/smollm2.sh."""
    assert "files" in {one.source["reader"] for one in propose(str(Path(dist_lm.__file__).parent))}


def test_broken_rows_are_counted_and_the_file_accepts_them(data):
    (data / "some.jsonl").write_text("".join(json.dumps({"text": f"{i} {PROSE}"}) + "\n{\n" for i in range(20)))
    out, text = written(data, "some.jsonl")
    assert "broken_json 20" in text
    assert "50.0%" in text
    assert "some.jsonl:2: broken JSON" in text
    assert re.search(r"^max_bad_fraction: [\d.]+", out.read_text(), re.MULTILINE)
    config = compose_config([f"hydra.searchpath=[{out.parent.parent}]", "corpus=ours", "stage=shards"]).corpus
    assert len(list(TextSplits(config, 0).screened("language"))) == 20


def test_chats_in_several_formats_in_one_folder_are_one_source(data):
    """Two sources of the same folder read every row twice: the second one had duplicates alone."""
    folder = data / "chats"
    folder.mkdir()
    turns = [{"from": "human", "value": f"What is {PROSE}?"}, {"from": "gpt", "value": "It is so."}]
    (folder / "a.jsonl").write_text(
        "".join(
            json.dumps({"conversations": [*turns, {**turns[0], "value": f"And {i}?"}, turns[1]]}) + "\n"
            for i in range(9)
        )
    )
    (folder / "b.csv").write_text("question,answer\n" + "".join(f"Which is {i}?,{i}.\n" for i in range(9)))
    out, _ = written(data, "chats")
    assert out.read_text().count("reader: messages") == 1


def test_files_of_several_kinds_of_columns_are_to_be_given_separately(data):
    """Their rows were called broken, and the advice was to skip four of five of them."""
    kinds = data / "kinds"
    kinds.mkdir()
    (kinds / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} {PROSE}"}) + "\n" for i in range(5)))
    (kinds / "b.jsonl").write_text("".join(json.dumps({"story": f"{i} {PROSE}"}) + "\n" for i in range(20)))
    with pytest.raises(ConfigError, match=r"80.0% of the rows of .* have other columns, in .*b\.jsonl\. Give"):
        written(data, "kinds")

    _, text = written(data, "kinds/a.jsonl", "kinds/b.jsonl")
    assert "broken rows" not in text


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("corpus/local.yaml", "is a file of dist_lm"),
        ("corpus/null.yaml", "expected a name"),
        ("corpus/7.yaml", "expected a name"),
        ("corpus/a=b,c.yaml", "expected a name"),
        ("corpus/-x.yaml", "expected a name"),
        ("afile/corpus/x.yaml", "cannot be written"),
        ("/proc/corpus/x.yaml", "cannot be written"),
    ],
)
def test_an_impossible_output_is_refused_before_data_is_read(tmp_path, out, words):
    (tmp_path / "afile").write_text("")
    with pytest.raises(ConfigError, match=words):
        new_corpus(["/nowhere"], tmp_path / out, Console(), sample_bytes=1, reserved_names=choices("corpus"))


def test_a_file_that_no_setting_helps_is_not_written(data, tmp_path):
    """Finds a file that is written after the last try without what that one asked for."""
    out = tmp_path / "lab" / "corpus" / "ours.yaml"
    commands = []

    def never_enough(folder: Path, overrides: Sequence[str]) -> Remedy:
        commands.append(list(overrides))
        return Remedy(f"try {len(commands)}", overrides=(f"model.n_layers={len(commands)}",))

    with pytest.raises(ArtefactError, match=r"^no settings were found .*: try \d+$"):
        new_corpus([str(data / "repo")], out, Console(), sample_bytes=1 << 20, trial=never_enough)
    assert not out.exists()
    assert [len(overrides) for overrides in commands] == sorted({len(overrides) for overrides in commands})


def test_the_verb_knows_the_names_of_dist_lm(data):
    with pytest.raises(ConfigError, match="is a file of dist_lm"):
        data_new([str(data / "repo")], data / "corpus" / "hub.yaml")


def test_an_empty_place_is_refused(data):
    with pytest.raises(ConfigError, match="it is empty"):
        new_corpus([""], data / "corpus" / "x.yaml", Console(), sample_bytes=1)


@pytest.mark.parametrize("corpora", [["language", "tools"], ["code", "tools"], ["language", "code"]])
def test_commands_for_some_corpora_compose(tmp_path, corpora):
    out = tmp_path / "corpus" / "some.yaml"
    out.parent.mkdir()
    out.write_text(yaml.safe_dump({"corpora": {name: [{"reader": "tools", "language": "x"}] for name in corpora}}))
    for command in next_commands(out, corpora):
        folder, *overrides = command.split()[4:]
        config = compose_config([f"hydra.searchpath=[{folder}]", *overrides])
        assert set(config.corpus_names) <= {*corpora}
