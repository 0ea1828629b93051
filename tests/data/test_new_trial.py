"""`dist-lm data new` writes no file whose first command must fail: it tries the command, and says what would help."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from dist_lm.__main__ import data_new
from dist_lm.data.ingest import split_documents
from dist_lm.data.screening import IngestReport
from dist_lm.errors import ArtefactError, UserError
from dist_lm.prepare.compose import compose_config
from dist_lm.verbs.data_trial import try_command

WORDS = ["river", "bridge", "harbour", "tide", "lantern", "winter", "letter", "garden", "engine", "market"]


def chats(folder: Path, questions: Sequence[str], answer: str = "It is number {}, said the {}.") -> Path:
    path = folder / "chats.jsonl"
    rows = [
        {
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer.format(n, WORDS[n % 10])},
            ]
        }
        for n, question in enumerate(questions)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def overrides_of(out: Path) -> list[str]:
    """Those of the first command that the file lists."""
    line = next(line for line in out.read_text().splitlines() if line.startswith("#   python -m dist_lm.launch"))
    return shlex.split(line)[6:]


def test_a_file_of_few_conversations_is_one_whose_first_command_runs(tmp_path: Path) -> None:
    """Their text fills no vocabulary of the default size, and two per cent of them are none."""
    path = chats(tmp_path, [f"Where is the {WORDS[n % 10]} of {WORDS[n // 10]}?" for n in range(24)])
    out = tmp_path / "lab" / "corpus" / "ours.yaml"
    data_new([str(path)], out)
    overrides = overrides_of(out)
    assert any(override.startswith("model.vocab_size=") for override in overrides)
    assert try_command(out.parent.parent, overrides) is None
    config = compose_config([f"hydra.searchpath=[{out.parent.parent}]", *overrides])
    splits = {split for split, _, _ in split_documents(config.corpus, "tools", 0, IngestReport())}
    assert splits == {"train", "val"}


def test_conversations_that_begin_alike_are_refused_and_no_file_is_written(tmp_path: Path) -> None:
    path = chats(tmp_path, ["Tell me a story about the sea."] * 40)
    out = tmp_path / "lab" / "corpus" / "ours.yaml"
    with pytest.raises(ArtefactError, match="none of its 40 documents is held out: they begin with the same user turn"):
        data_new([str(path)], out)
    assert not out.exists()


def test_conversations_that_are_all_too_long_are_refused_with_the_key(tmp_path: Path) -> None:
    path = chats(tmp_path, [f"Question {n} of {WORDS[n % 10]}?" for n in range(60)], "{} " + "q7z " * 6000 + "{}")
    out = tmp_path / "lab" / "corpus" / "ours.yaml"
    with pytest.raises(UserError, match=r"longer than stage\.seq_len=\d+: raise it"):
        data_new([str(path)], out)
    assert not out.exists()
