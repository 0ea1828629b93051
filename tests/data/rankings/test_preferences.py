"""Preferences in the layouts of TRL, OpenRLHF, LLaMA-Factory, axolotl and public data sets: one ranking a row."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_lm.chat.documents import read_ranking
from dist_lm.chat.messages import ChatError, Conversation, Message
from dist_lm.chat.ranking import MOST, Judgement, Ranking, check_ranking
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.preferences import ranking_of, read_preferences
from dist_lm.data.sources.reader import Rejected
from dist_lm.document import Document
from dist_lm.errors import ConfigError

SYSTEM, ASK = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
MORE = [ASK, GOOD, {"role": "user", "content": "Sure?"}]
USER = Conversation((Message("user", "2 + 2?"),))
SYSTEM_USER = Conversation((Message("system", "Be brief."), *USER.messages))
PAIR = Ranking(USER, ("4", "5"), (0, 1))


def test_columns_of_any_name_are_pairs(tmp_path: Path) -> None:
    """Finds a named column that is not read, or a row without it that is taken for another kind."""
    path = tmp_path / "rows.csv"
    path.write_text("Asked,Better,Worse,Ticket\n2 + 2?,4,5,a1\n")
    names: dict[str, Any] = {"prompt_column": "Asked", "chosen_column": "Better", "rejected_column": "Worse"}
    source = SourceConfig("preferences", "pairs", path=str(path), **names)
    (document,) = read_preferences(source, 0)
    assert isinstance(document, Document)
    assert read_ranking(document.text) == PAIR
    assert json.loads(document.row) == {"Ticket": "a1"}

    path.write_text("Asked,Better,chosen,rejected\n2 + 2?,4,4,5\n")
    (rejected,) = read_preferences(source, 0)
    assert isinstance(rejected, Rejected)
    assert rejected.error == "no column Worse (rejected_column); the columns there are Asked, Better, chosen, rejected"

    with pytest.raises(ConfigError, match="chosen_column and rejected_column together"):
        SourceConfig("preferences", "pairs", path=str(path), chosen_column="Better")


def read_row(row: dict[str, Any]) -> Ranking | str:
    ranking = ranking_of(row)
    if isinstance(ranking, Ranking):
        check_ranking(ranking)
    return ranking


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # TRL, standard and conversational, with the prompt and without
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, PAIR),
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, PAIR),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, PAIR),
        ({"chosen": json.dumps([ASK, GOOD]), "rejected": json.dumps([ASK, BAD])}, PAIR),
        # HuggingFaceH4/ultrafeedback_binarized: the prompt is the text of the only turn
        (
            {"prompt": "2 + 2?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "messages": [ASK, GOOD]}
            | {"score_chosen": 9.0, "score_rejected": 1.0},
            PAIR,
        ),
        # a system turn and turns before the last question
        ({"chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]}, Ranking(SYSTEM_USER, ("4", "5"), (0, 1))),
        (
            {"prompt": MORE, "chosen": "Yes.", "rejected": "No."},
            Ranking(
                Conversation((Message("user", "2 + 2?"), Message("assistant", "4"), Message("user", "Sure?"))),
                ("Yes.", "No."),
                (0, 1),
            ),
        ),
        # Intel/orca_dpo_pairs
        (
            {"system": "Be brief.", "question": "2 + 2?", "chosen": "4", "rejected": "5"},
            Ranking(SYSTEM_USER, ("4", "5"), (0, 1)),
        ),
        # LLaMA-Factory's Alpaca
        (
            {"instruction": "Add.", "input": "2, 2", "chosen": "4", "rejected": "5"},
            Ranking(Conversation((Message("user", "Add.\n2, 2"),)), ("4", "5"), (0, 1)),
        ),
        ({"instruction": "2 + 2?", "input": "", "chosen": "4", "rejected": "5"}, PAIR),
        # OpenRLHF: a margin
        (
            {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "margin": 1.5},
            Ranking(USER, ("4", "5"), (), (Judgement(0, 1, 1.5),)),
        ),
        # Anthropic/hh-rlhf, and with the prompt split off (Dahoas/full-hh-rlhf)
        (
            {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"},
            PAIR,
        ),
        ({"prompt": "\n\nHuman: 2 + 2?\n\nAssistant:", "chosen": " 4", "rejected": " 5"}, PAIR),
        # K answers
        (
            {"prompt": "2 + 2?", "completions": ["5", "4", "6"], "ranks": [1, 0, 1]},
            Ranking(USER, ("4", "5", "6"), (0, 1, 1)),
        ),
        ({"prompt": "2 + 2?", "responses": ["5", "4"], "scores": [0.1, 0.9]}, PAIR),
        ({"prompt": [ASK], "answers": [{"text": "5", "score": 1}, {"text": "4", "score": 7}]}, PAIR),
        ({"prompt": "2 + 2?", "completions": [[BAD], [GOOD]], "rewards": ["-1.5", "2"]}, PAIR),
        ({"prompt": "2 + 2?", "completions": ["4", "5", "x"], "scores": [1, 0, None]}, PAIR),
        ({"prompt": "2 + 2?", "completions": ["4", "5", "4"], "scores": [1, 0, 0.5]}, PAIR),
        (
            {"prompt": "2 + 2?", "completions": ["4", "5"], "judgements": [[0, 1, 0.5]]},
            Ranking(USER, ("4", "5"), (), (Judgement(0, 1, 0.5),)),
        ),
        # openbmb/UltraFeedback
        (
            {"instruction": "2 + 2?", "models": [], "completions": [
                {"response": "5", "overall_score": 2.0, "custom_system_prompt": "", "model": "a"},
                {"response": "4", "overall_score": 8.5, "custom_system_prompt": "", "model": "b"}]},
            Ranking(USER, ("5", "4"), (1, 0)),
        ),
        # TRL's unpaired preferences, for KTO
        ({"prompt": "2 + 2?", "completion": "4", "label": True}, Ranking(USER, ("4",), label=True)),
        ({"prompt": [ASK], "completion": [BAD], "label": False}, Ranking(USER, ("5",), label=False)),
        ({"prompt": "2 + 2?", "completion": "5", "label": "0"}, Ranking(USER, ("5",), label=False)),
        # nothing to learn
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "4"}, "tied"),
        ({"prompt": "2 + 2?", "completions": ["4", "5"], "scores": [1, 1]}, "tied"),
        ({"chosen": [ASK, GOOD], "rejected": [{"role": "user", "content": "3 + 3?"}, BAD]}, "differ_earlier"),
    ],
)  # fmt: skip
def test_a_row_of_each_layout(row, expected):
    assert read_row(row) == expected


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "output": "b"}, "no preference: .* the columns there are prompt, output"),
        ({"chosen": "4", "rejected": "5"}, "no prompt: expected one of prompt"),
        ({"prompt": "", "chosen": "4", "rejected": "5"}, "no prompt"),
        ({"prompt": "3?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "begin with other turns than the prompt"),
        ({"prompt": "a", "chosen": [ASK], "rejected": [ASK]}, "chosen: expected an answer of the assistant"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen: the answer is empty"),
        ({"question": "a", "query": "b", "chosen": "c", "rejected": "d"}, "question, query may all be the prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x"]}, "the column images is not read"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "large"}, "margin: 'large'; expected a number"),
        ({"prompt": "a", "completions": ["b", "c"]}, "no ranks or scores"),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": [1]}, "1 ranks or scores of 2 completions"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "label: 'good'; expected true or false"),
        ({"prompt": "a", "chosen": {"model": "x"}, "rejected": "b"}, "chosen: no text"),
    ],
)
def test_a_broken_row_says_what_is_wrong(row, words):
    with pytest.raises(ChatError, match=words):
        read_row(row)


def test_of_many_completions_the_best_the_worst_and_those_between_are_taken():
    scores = [*range(40)]
    random.Random(0).shuffle(scores)
    ranking = read_row({"prompt": "a", "completions": [str(score) for score in scores], "scores": scores})
    assert isinstance(ranking, Ranking)
    assert len(ranking.completions) == MOST
    assert (ranking.completions[0], ranking.completions[-1]) == ("39", "0")
    assert ranking.ranks == tuple(range(MOST))


ROWS = [
    {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "source": "math"},
    {"prompt": [ASK], "completion": [GOOD], "label": True},
    {"prompt": "3?", "completions": ["3", "4"], "scores": [1.0, 0.0]},
    {"prompt": "2 + 2?", "chosen": "4", "rejected": "4"},
    {"nothing": 1},
]


def source(path: Path, **keys: Any) -> SourceConfig:
    return SourceConfig(reader="preferences", path=str(path), language="people", licence="own", **keys)


def test_rows_of_several_kinds_may_be_in_one_file_and_are_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{\n")
    found = list(read_preferences(source(file), 0))
    documents = [one for one in found if isinstance(one, Document)]
    assert [read_ranking(one.text).label for one in documents] == [None, True, None]
    assert [json.loads(one.row) for one in documents] == [{"source": "math"}, {}, {"scores": [1.0, 0.0]}]
    rejected = [(one.reason, bool(one.error), one.source) for one in found if isinstance(one, Rejected)]
    assert rejected == [
        ("tied", False, f"{file}:4"),
        ("no_ranking", True, f"{file}:5"),
        ("broken_json", True, f"{file}:6"),
    ]
    with pytest.raises(ConfigError, match="rows=pair: expected one of"):
        next(read_preferences(source(file, rows="pair"), 0))
    first = next(read_preferences(source(file, rows="labelled"), 0))
    assert isinstance(first, Rejected)
    assert (
        first.error
        == "no completion and no label (rows=labelled); the columns there are prompt, chosen, rejected, source"
    )


def test_parquet_gives_the_same_rankings(tmp_path):
    rows = [{"chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD], "margin": None, "prompt": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (document,) = read_preferences(source(tmp_path / "rows.parquet"), 0)
    assert isinstance(document, Document)
    assert read_ranking(document.text) == Ranking(SYSTEM_USER, ("4", "5"), (0, 1))


def test_two_hundred_mutated_rows_are_rankings_or_named(tmp_path):
    """No row ends the reader, whatever its cells hold."""
    rng = random.Random(37)
    values = [
        *(None, "", "x", 0, -1.5, True, "[{", "\ud800", "\n\nHuman:", {}, {"role": "user"}, {"content": None}),
        *([], [None], [["a"]], [ASK], [{"role": "assistant"}], [{"from": "gpt", "value": "x"}]),
        [{"text": "a", "score": "b"}],
    ]
    seeds = [
        *ROWS[:3],
        {"instruction": "a", "completions": [{"response": "b", "overall_score": 1}]},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"context": [ASK], "response1": "4", "response2": "5", "overall_preference": -2},
    ]
    rows = []
    for _ in range(200):
        row = json.loads(json.dumps(rng.choice(seeds)))
        for name in rng.sample(sorted(row), rng.randint(1, len(row))):
            row[name] = rng.choice(values)
        rows.append(row)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(read_preferences(source(file), 0))
    assert len(found) == 200
    for one in found:
        if isinstance(one, Document):
            check_ranking(read_ranking(one.text))
        else:
            assert "\n" not in one.error
