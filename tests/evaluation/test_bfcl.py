"""The leaderboard's questions: read, converted, and scored by its own rules; on a handmade miniature of its data."""

import importlib.util
import json
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dist_lm import __main__ as program
from dist_lm.chat.messages import Call, Message
from dist_lm.chat.schema import check_tool, problems
from dist_lm.data.sources.reader import READERS
from dist_lm.errors import ArtefactError
from dist_lm.evaluation import bfcl_questions
from dist_lm.evaluation.bfcl import BfclResult, print_table
from dist_lm.evaluation.bfcl_questions import BfclQuestion, read_questions, schema_of
from dist_lm.evaluation.bfcl_score import is_right
from tests.training_run import linked, write_untrained

AREA = {
    "name": "geo.area",
    "description": "Area of a shape.",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "float", "description": "In m."},
            "unit": {"type": "string", "enum": ["m", "ft"], "default": "m", "optional": True},
            "corners": {"type": "tuple", "items": {"type": "integer"}},
            "style": {"type": "dict", "properties": {"type": {"type": "string"}}},
        },
        "required": ["base"],
    },
}
AREA_ANSWER = {
    "geo.area": {"base": [10, 10.5], "unit": ["", "m"], "corners": [[1, 2], ""], "style": [{"type": ["thin"]}, ""]}
}
SING = {"name": "sing", "description": "", "parameters": {"type": "dict", "properties": {"song": {"type": "any"}}}}


def sung(*songs: str) -> dict:
    return {"sing": {"song": list(songs)}}


def user(text: str) -> list:
    return [[{"role": "user", "content": text}]]


CATEGORIES = {  # name -> (questions, answers)
    "simple_python": ([(user("Area?"), [AREA])], [[AREA_ANSWER]]),
    "parallel_multiple": ([(user("Both! " * 100), [AREA, SING])], [[sung("Waterloo"), AREA_ANSWER]]),
    "parallel": (
        [(user("Sing!"), [SING]), (user("More!"), [SING])],
        [[sung("A"), sung("B")], [sung("C", "c sharp")] * 2],
    ),
    "irrelevance": ([(user("Hello"), [SING, SING])], None),
    "live_relevance": (
        [
            (
                [[{"role": role, "content": text} for role, text in (("system", "Be."), ("user", "a"), ("user", "b"))]],
                [SING],
            )
        ],
        None,
    ),
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder of a package `bfcl_eval` that can be found."""
    data = tmp_path / "site" / "bfcl_eval" / "data"
    (data / "possible_answer").mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise ImportError('its requirements are not installed')\n")
    for category, (questions, answers) in CATEGORIES.items():
        name = f"BFCL_v4_{category}.json"
        rows = [{"id": f"{category}_{i}", "question": q, "function": f} for i, (q, f) in enumerate(questions)]
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        if answers:
            rows = [{"id": f"{category}_{i}", "ground_truth": one} for i, one in enumerate(answers)]
            (data / "possible_answer" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "bfcl_eval", raising=False)
    return data


def questions_by_id(data: Path) -> dict[str, BfclQuestion]:
    return {question.id: question for question in read_questions(data)}


def test_questions_are_conversations_that_can_be_asked(package):
    found = questions_by_id(package)
    assert [question.category for question in found.values()] == [
        *("simple_python", "parallel", "parallel", "parallel_multiple", "irrelevance", "live_relevance")
    ]
    assert [tool.name for tool in found["parallel_multiple_0"].asked.tools] == ["geo.area", "sing"]
    assert len(found["irrelevance_0"].asked.tools) == 1  # the same one twice
    assert found["live_relevance_0"].asked.messages == (Message("system", "Be."), Message("user", "a\nb"))
    for question in found.values():
        for tool in question.asked.tools:
            check_tool(tool)
    assert len(read_questions(package, limit=1)) == len(CATEGORIES)


def test_the_newest_version_of_a_category_is_read(package):
    (package / "BFCL_v10_irrelevance.json").write_text("")
    assert "irrelevance_0" not in questions_by_id(package)


def test_their_types_become_json_schema():
    schema = schema_of(AREA["parameters"])
    assert schema["type"] == "object"
    kinds = {name: part["type"] for name, part in schema["properties"].items()}
    assert kinds == {"base": "number", "unit": "string", "corners": "array", "style": "object"}
    assert schema["properties"]["style"]["properties"] == {"type": {"type": "string"}}  # an argument named type
    assert schema["properties"]["unit"] == {"type": "string", "enum": ["m", "ft"], "default": "m"}
    with pytest.raises(ValueError, match="'ArrayList' is not known"):
        schema_of({"type": "ArrayList"})


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ({"base": 10}, True),
        ({"base": 10.0, "unit": "M"}, True),
        ({"base": 10.5, "corners": [1, 2], "style": {"type": "Thin"}}, True),
        ({"base": "10"}, False),
        ({"base": 11}, False),
        ({"base": True}, False),
        ({}, False),
        ({"base": 10, "unit": "ft"}, False),
        ({"base": 10, "corners": [2, 1]}, False),
        ({"base": 10, "corners": ["1", "2"]}, False),
        ({"base": 10, "style": {"type": "thick"}}, False),
        ({"base": 10, "style": {}}, False),
        ({"base": 10, "height": 1}, False),
    ],
)
def test_a_call_is_right_by_their_rules(package, arguments, right):
    question = questions_by_id(package)["simple_python_0"]
    assert is_right(Message("assistant", calls=(Call("geo.area", arguments),)), question) is right
    assert not right or problems(Call("geo.area", {"base": 10}), question.asked.tools) == []


def test_several_calls_come_in_any_order_and_each_once(package):
    found = questions_by_id(package)
    area, song = Call("geo.area", {"base": 10}), Call("sing", {"song": "waterloo"})

    def right(question: str, *calls: Call) -> bool:
        return is_right(Message("assistant", calls=calls), found[question])

    assert right("parallel_multiple_0", area, song)
    assert right("parallel_multiple_0", song, area)
    assert not right("parallel_multiple_0", song)
    assert not right("parallel_multiple_0", song, song)
    assert not right("simple_python_0", area, area)
    assert right("parallel_1", Call("sing", {"song": "c"}), Call("sing", {"song": "C sharp"}))


def test_whether_there_is_a_call_is_all_that_counts_where_no_answer_is_known(package):
    found = questions_by_id(package)
    call, words = Message("assistant", calls=(Call("sing", {}),)), Message("assistant", "No.")
    assert [is_right(turn, found["irrelevance_0"]) for turn in (call, words, None)] == [False, True, True]
    assert [is_right(turn, found["live_relevance_0"]) for turn in (call, words, None)] == [True, False, False]


def call(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["dist-lm", "tools", "bfcl", *map(str, words)])
    try:
        program.main()
        code = 0
    except SystemExit as ending:
        code = ending.code
    return (code or 0, *capsys.readouterr())


@pytest.mark.heavy
def test_the_verb_asks_a_run_and_says_what_was_right(package, tiny_work, tmp_path, monkeypatch, capsys):
    run = write_untrained(linked(tiny_work, tmp_path / "work"), "code", seed=1)
    file = tmp_path / "answers.jsonl"
    options = ("--limit", 1, "--json", file, "--device", "cpu", "--tokenizer", tiny_work.tokenizer)
    code, out, errors = call(monkeypatch, capsys, run.path, *options)
    assert code == 0, errors
    lines = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert [line["category"] for line in lines] == list(dict.fromkeys(line["category"] for line in lines))
    assert {line["category"] for line in lines} == CATEGORIES.keys()
    assert all(category in out for category in CATEGORIES)
    assert next(line for line in lines if line["category"] == "parallel_multiple")["note"]  # longer than the context
    assert not any(line["right"] for line in lines if line["category"] in ("simple_python", "parallel"))


@pytest.mark.parametrize(("turns", "said"), [(0, True), (1, False), (10, False)])
def test_a_model_that_writes_hardly_any_turn_is_told_what_teaches_them(package, turns, said):
    question = questions_by_id(package)["simple_python_0"]
    results = [BfclResult(question, False, number < turns, "") for number in range(10)]
    output = StringIO()
    print_table("a run", [*results, BfclResult(question, False, False, "", "too long")], Console(file=output))
    assert (f"{turns} of 10 answers are whole turns: " in output.getvalue()) is said
    assert ("stage=tools" in output.getvalue()) is said


def test_a_missing_package_is_one_line_that_says_how_to_get_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, errors = call(monkeypatch, capsys, tmp_path)
    assert code == 2
    assert errors == "error: bfcl-eval is not installed: `pip install --no-deps bfcl-eval` brings its questions\n"


def test_a_file_that_cannot_be_written_is_found_before_anything_is_asked(monkeypatch, capsys, tmp_path):
    for file, words in ((tmp_path / "nowhere" / "answers.jsonl", "a folder that exists"), (tmp_path, "a file")):
        code, _, errors = call(monkeypatch, capsys, tmp_path, "--json", file)
        assert code == 2
        assert errors.startswith(f"error: --json {file}: ")
        assert f"expected {words}" in errors
        assert errors.count("\n") == 1


def test_another_layout_of_the_data_is_named(package):
    (package / "BFCL_v4_irrelevance.json").write_text('{"id": "irrelevance_0", "question": "?", "function": []}\n')
    with pytest.raises(ArtefactError, match="question irrelevance_0: unknown layout"):
        read_questions(package)
    with pytest.raises(ArtefactError, match="no questions of simple"):
        read_questions(package.parent)


def test_nothing_that_makes_training_data_reads_them():
    assert not any("bfcl" in reader for reader in READERS)
    root = Path(bfcl_questions.__file__).parents[1]
    files = [file for package in ("data", "tools", "tokenizer") for file in (root / package).rglob("*.py")]
    assert len(files) > 10
    for file in files:
        text = file.read_text()
        assert "bfcl_eval" not in text, file
        assert "dist_lm.evaluation" not in text, file
