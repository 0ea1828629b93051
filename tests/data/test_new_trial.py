"""`dist-lm data new` writes no file whose first command must fail: it tries the command, and says what would help."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from dist_lm.__main__ import data_new
from dist_lm.data.corpus_file import MODEL
from dist_lm.data.ingest import split_documents
from dist_lm.data.propose import preferences_in
from dist_lm.data.screening import IngestReport
from dist_lm.errors import ArtefactError, ConfigError, UserError
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


@pytest.mark.heavy
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


@pytest.mark.heavy
def test_corpora_of_later_commands_are_built_too(tmp_path: Path) -> None:
    """Fault: the first command read only the text, and the second one, on few source files, was refused."""
    code, prose = tmp_path / "code", tmp_path / "prose"
    code.mkdir()
    prose.mkdir()
    for n in range(25):
        names = [f"{WORDS[(n + i) % 10]}_{n}_{i}" for i in range(30)]
        (code / f"{n}.py").write_text("".join(f"def {name}(x):\n    return x + {n}\n\n\n" for name in names))
    for n in range(120):
        sentences = (
            f"The {WORDS[n % 10]} of {WORDS[i % 10]} number {n * i} stood near the {WORDS[n // 12]}." for i in range(20)
        )
        (prose / f"{n}.txt").write_text(" ".join(sentences))
    out = tmp_path / "lab" / "corpus" / "both.yaml"
    data_new([str(code), str(prose)], out)
    assert "\nval_fraction: " in out.read_text()
    line = next(line for line in out.read_text().splitlines() if "stage=code" in line)
    overrides = [*shlex.split(line)[6:], "stage.init_from=none"]
    assert try_command(out.parent.parent, overrides) is None


def asked(n: int) -> str:
    return f"Where is the {WORDS[n % 10]} of {WORDS[n // 10 % 10]}, number {n}?"


def turns(n: int, answer: str) -> list[dict]:
    return [{"role": "user", "content": asked(n)}, {"role": "assistant", "content": answer}]


def good(n: int) -> str:
    return f"By the {WORDS[n % 7]}, number {n}."


PREFERENCES = {
    "pairs": lambda n: {"prompt": asked(n), "chosen": good(n), "rejected": "No."},
    "turns": lambda n: {"chosen": turns(n, good(n)), "rejected": turns(n, "No.")},
    "ranked": lambda n: {"prompt": asked(n), "completions": [good(n), "No.", "Perhaps."], "ranks": [1, 3, 2]},
    "ultrafeedback": lambda n: {
        "instruction": asked(n),
        "completions": [{"response": good(n), "overall_score": 9.0}, {"response": "No.", "overall_score": 2.0}],
    },
    "labelled": lambda n: {"prompt": asked(n), "completion": good(n), "label": n % 2 == 0},
}


SLOW = ("turns", "ranked", "ultrafeedback")


@pytest.mark.heavy
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.bars] * (k in SLOW)) for k in PREFERENCES])
def test_preferences_get_the_reader_and_the_commands_that_learn_from_them(kind: str, tmp_path: Path) -> None:
    """They were refused with a page to read, and a command without a model has no tokenizer to begin with."""
    path, out = tmp_path / "rows.jsonl", tmp_path / "lab" / "corpus" / "ours.yaml"
    path.write_text("".join(json.dumps(PREFERENCES[kind](n)) + "\n" for n in range(60)))
    data_new([str(path)], out)
    overrides = overrides_of(out)
    config = compose_config([f"hydra.searchpath=[{out.parent.parent}]", *overrides[:-1]])
    (source,) = config.corpus.corpora["rankings"]
    assert (source.reader, source.path) == ("preferences", [str(path)])
    assert overrides[-1] == MODEL
    assert config.stage.name == "preference"
    has_reward = any("stage=reward" in line for line in out.read_text().splitlines())
    assert has_reward == (kind != "labelled")
    assert ("stage.preference.algorithm=kto" in overrides) == (kind == "labelled")
    assert try_command(out.parent.parent, overrides) is None


@pytest.mark.heavy
def test_preferences_in_columns_that_a_person_names(tmp_path: Path) -> None:
    """Fault: such a table was read as texts, and refused for too little text."""
    path, out = tmp_path / "rows.csv", tmp_path / "lab" / "corpus" / "ours.yaml"
    path.write_text("Asked,Better,Worse\n" + "".join(f'"{asked(n)}","{good(n)}",No.\n' for n in range(60)))
    with pytest.raises(ConfigError, match=r"--chosen-column Bettr: .*did you mean Better"):
        data_new([str(path)], out, prompt_column="Asked", chosen_column="Bettr", rejected_column="Worse")
    with pytest.raises(ConfigError, match="expected together"):
        data_new([str(path)], out, prompt_column="Asked", chosen_column="Better")
    data_new([str(path)], out, prompt_column="Asked", chosen_column="Better", rejected_column="Worse")
    config = compose_config([f"hydra.searchpath=[{out.parent.parent}]", *overrides_of(out)[:-1]])
    (source,) = config.corpus.corpora["rankings"]
    assert (source.prompt_column, source.chosen_column, source.rejected_column) == ("Asked", "Better", "Worse")


@pytest.mark.heavy
def test_preferences_that_a_command_cannot_use_are_refused_and_no_file_is_written(tmp_path: Path) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "lab" / "corpus" / "ours.yaml"
    rows = [{"prompt": asked(n), "chosen": good(n) + " q7z" * 9000, "rejected": "No."} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"longer than stage\.seq_len=\d+"):
        data_new([str(path)], out)
    assert not out.exists()


def test_a_quiz_with_answers_is_no_preference() -> None:
    quiz = {"question": "Where?", "answers": ["here", "there"], "text": "It is here."}
    assert preferences_in([quiz] * 3) == ""
    assert preferences_in([PREFERENCES["pairs"](1), PREFERENCES["pairs"](2), quiz]) == "pairs"


@pytest.mark.heavy
def test_conversations_that_begin_alike_are_refused_and_no_file_is_written(tmp_path: Path) -> None:
    path = chats(tmp_path, ["Tell me a story about the sea."] * 40)
    out = tmp_path / "lab" / "corpus" / "ours.yaml"
    with pytest.raises(ArtefactError, match="none of its 40 documents is held out: they begin with the same user turn"):
        data_new([str(path)], out)
    assert not out.exists()


@pytest.mark.heavy
def test_conversations_that_are_all_too_long_are_refused_with_the_key(tmp_path: Path) -> None:
    path = chats(tmp_path, [f"Question {n} of {WORDS[n % 10]}?" for n in range(60)], "{} " + "q7z " * 6000 + "{}")
    out = tmp_path / "lab" / "corpus" / "ours.yaml"
    with pytest.raises(UserError, match=r"longer than stage\.seq_len=\d+: raise it"):
        data_new([str(path)], out)
    assert not out.exists()
