"""Every verb checks the paths that it writes to before it does anything else."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import pytest
import typer

from dist_lm.__main__ import app
from dist_lm.data.new import new_corpus
from dist_lm.errors import ConfigError, UserError
from dist_lm.storage import durable
from dist_lm.tracking.readable import OutputConsole

# Verb and parameter that writes -> the words of a command whose output is taken, and whose inputs are missing.
WRITES = {
    ("data new", "out"): ["nowhere", "--out", "lab/corpus/taken.yaml"],
    ("recipe new", "out"): ["hf:nowhere", "--data", "nowhere", "--out", "lab/experiment/taken.yaml"],
    ("export", "folder"): ["nowhere", "taken"],
    ("import", "name"): ["nowhere", "taken"],
    ("checkpoint consolidate", "output"): ["nowhere", "--output", "taken.safetensors"],
    ("report", "output"): ["nowhere", "--output", "taken"],
    ("lm-eval", "output"): ["nowhere", "--tasks", "x", "--output", "taken"],
    ("lm-eval", "samples"): ["nowhere", "--tasks", "x", "--samples", "taken"],
    ("tools bfcl", "json"): ["nowhere", "--json", "taken"],
    ("bench", "json"): ["data", "nowhere=1", "--json", "taken"],
    ("bench", "curves"): ["learn", "nowhere=1", "--curves", "taken.safetensors"],
    ("gpu check", "output"): ["--only", "nowhere", "--output", "taken.safetensors"],
}
# Parameters that hold a path or a name, and that a verb only reads. The page of `--table` must be there.
READS = {
    *("path", "paths", "corpus", "work", "inputs", "data", "model", "preferences", "prompts", "tokenizer", "base"),
    *("source", "work_dir", "runs", "run", "offline", "include_path", "tools", "constraint", "table", "board", "json"),
    *("edit_file", "documents", "cache"),  # a cache is shared
}


def verbs_in(group: typer.Typer, words: str = "") -> dict[str, Callable[..., object]]:
    """Returns the function of each verb, by its words."""
    verbs: dict[str, Callable[..., object]] = {}
    for command in group.registered_commands:
        assert command.name
        assert command.callback
        verbs[f"{words} {command.name}".strip()] = command.callback
    for inner in group.registered_groups:
        assert inner.typer_instance
        verbs |= verbs_in(inner.typer_instance, f"{words} {inner.name}".strip())
    return verbs


def test_every_path_of_every_verb_is_known_to_be_read_or_written() -> None:
    """Finds a new verb or option that writes, and that no test here calls."""
    verbs = verbs_in(app)
    assert {verb for verb, _ in WRITES} <= verbs.keys()
    paths = {
        (verb, name)
        for verb, function in verbs.items()
        for name, hint in get_type_hints(function, include_extras=True).items()
        if "pathlib" in str(hint) or "ArgumentInfo" in str(hint)
    }
    assert {parameter for parameter in paths if parameter not in WRITES and parameter[1] not in READS} == {
        ("bench", "name"),
        ("bench", "overrides"),
        ("data attach", "name"),
        ("data attach", "url"),
        ("data step", "step"),
        ("data where", "text"),
    }
    assert {parameter for parameter in paths if parameter[1] == "json"} <= WRITES.keys()


@pytest.fixture
def taken(tmp_path: Path) -> Path:
    """A folder where each output of the table is taken by a file or a folder of somebody else."""
    for name in ("lab/corpus/taken.yaml", "lab/experiment/taken.yaml", "taken.safetensors", "taken/mine.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "work" / "runs" / "import" / "taken").mkdir(parents=True)
    return tmp_path


REFUSALS = """
import json, sys
from dist_lm.__main__ import app
from dist_lm.errors import UserError
said = []
for words in json.loads(sys.argv[1]):
    try:
        app(words, standalone_mode=False)
        said.append(["no error", []])
    except UserError as error:
        said.append([str(error), [name for name in ("torch", "pyarrow", "lm_eval") if name in sys.modules]])
print(json.dumps(said))
"""


@pytest.mark.heavy
def test_an_output_that_is_taken_is_refused_before_inputs_are_looked_for_and_torch_is_imported(taken: Path) -> None:
    """Finds a verb that works, or imports, before it says that its output is in the way."""
    words = [[*verb.split(), *arguments] for (verb, _), arguments in WRITES.items()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = subprocess.run(
        [sys.executable, "-c", REFUSALS, json.dumps(words)], cwd=taken, env=environment, capture_output=True, text=True
    )
    assert program.returncode == 0, program.stderr
    for parameter, (error, heavy) in zip(WRITES, json.loads(program.stdout), strict=True):
        assert "taken" in error, (parameter, error)
        assert "nowhere" not in error, (parameter, error)
        assert not heavy, (parameter, heavy)
    for name in ("taken/mine.txt", "taken.safetensors", "lab/corpus/taken.yaml", "lab/experiment/taken.yaml"):
        assert (taken / name).read_text() == "mine"


@pytest.mark.parametrize("place", ["missing/report.html", "taken.safetensors/report.html"])
def test_a_place_where_nothing_can_be_written_is_refused(taken: Path, place: str) -> None:
    with pytest.raises(UserError, match=r"--output .*report.html: cannot be written: expected a folder that exists"):
        app(["report", "nowhere", "--output", str(taken / place)], standalone_mode=False)


@pytest.mark.parametrize("name", ["corpus", "model"])
def test_files_that_come_with_an_experiment_are_checked_too(tmp_path: Path, name: str) -> None:
    """Finds a file of a model that is replaced, or a corpus file that is found after the model was read."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "ours.yaml").write_text("mine")
    words = ["recipe", "new", "runs/nowhere", "--data", "nowhere", "--out", str(tmp_path / "experiment" / "ours.yaml")]
    with pytest.raises(ConfigError, match=rf"comes with .*{name}/ours.yaml: there is such a file.*--force"):
        app(words, standalone_mode=False)
    assert (tmp_path / name / "ours.yaml").read_text() == "mine"


def test_a_file_that_appears_while_data_is_read_is_left_as_it_is(tmp_path: Path) -> None:
    """Finds a check at the begin alone: of two commands with one --out, the slower one would replace the file."""
    (tmp_path / "a.txt").write_text("It rained all day. " * 9)
    out = tmp_path / "lab" / "corpus" / "ours.yaml"

    def other_command(folder: Path, overrides: object) -> None:
        out.parent.mkdir(parents=True)
        out.write_text("theirs")

    with pytest.raises(ConfigError, match="another process has written this file"):
        new_corpus([str(tmp_path / "a.txt")], out, OutputConsole(), sample_bytes=1 << 20, trial=other_command)
    assert out.read_text() == "theirs"
    assert [path.name for path in out.parent.iterdir()] == ["ours.yaml"]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_file_replaces_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool) -> None:
    """Also on a file system without hard links."""

    def refused(*_: object) -> None:
        raise PermissionError("no links here")

    if not has_links:
        monkeypatch.setattr(os, "link", refused)
    durable.write_new_text(tmp_path / "a", "first")
    with pytest.raises(FileExistsError):
        durable.write_new_text(tmp_path / "a", "second")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "first")]
