"""Prompts from files: numbered, and one that cannot be read does not move the others."""

import json

import pytest

from dist_lm.data.prompts import count_prompts, find_prompts, read_prompts
from dist_lm.errors import ConfigError


def test_lines_are_numbered_over_files_and_broken_ones_say_why(tmp_path):
    lines = [
        json.dumps({"prompt": "a\nb", "id": "first"}),
        "",
        json.dumps({"prompt": "c"}),
        "{",
        json.dumps({"prompt": 3, "id": "x"}),
        json.dumps({"prompt": "\ud800", "id": 7}),
    ]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n')
    (tmp_path / "b.txt").write_bytes("  d \r\n\r\né".encode())
    files = find_prompts(str(tmp_path / "*"))
    found = list(read_prompts(files))
    assert [prompt.number for prompt in found] == list(range(8))
    assert [(p.id, p.text) for p in found if not p.error] == [("first", "a\nb"), (1, "c"), (6, "  d "), (7, "é")]
    broken = [prompt for prompt in found if prompt.error]
    words = ("not JSON", "expected an object with a text `prompt`", "lone surrogate", "not UTF-8")
    assert all(word in prompt.error for word, prompt in zip(words, broken, strict=True))
    assert [prompt.place for prompt in broken] == [f"a.jsonl line {number}" for number in (4, 5, 6, 7)]
    assert [prompt.line for prompt in broken] == [*lines[3:], '{"prompt": "\ufffd"}']


def write(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_ids_keep_their_type_and_other_fields_go_along(tmp_path):
    asked = {"prompt": "a", "id": 12, "answer": [1, {"x": None}], "index": 3}
    lines = write(tmp_path / "p.jsonl", asked, {"prompt": "", "id": "12b"}, {"prompt": "c", "id": None})
    first, second, third = read_prompts([lines])
    assert [first.id, second.id, third.id] == [12, "12b", 2]
    assert (first.extra, second.extra) == ({"answer": [1, {"x": None}], "index": 3}, {})
    assert (second.text, second.error) == ("", "")  # the beginning of a document
    assert count_prompts([lines])["prompts"] == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "x", "id": [1]}', "id is neither a text nor a whole number"),
        ('{"prompt": "x", "id": true}', "id is neither a text nor a whole number"),
        ('{"prompt": "x", "score": NaN}', "not JSON (NaN is no number)"),
        ('{"prompt": "x", "note": "\\ud800"}', "another field holds a lone surrogate"),
        ("[" * 100_000, "not JSON"),
        ('{"prompt": "x", "suffix": 3}', "suffix is no text"),
        ('{"prompt": "x", "suffix": "\\ud800"}', "suffix holds a lone surrogate"),
    ],
)
def test_a_line_that_cannot_be_used_is_kept_and_cut(tmp_path, line, words):
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n")
    (prompt,) = read_prompts([path])
    assert words in prompt.error
    assert prompt.line == line[:200]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            [{"prompt": "a", "id": "x"}, {"prompt": "b"}, {"prompt": "c", "id": "x"}],
            'id "x".*line 1 and .*line 3',
        ),
        ([{"prompt": "a", "id": "1"}, {"prompt": "b"}], r"id 1 occurs twice, p\.jsonl line 1 and p\.jsonl line 2"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}], 'id "1" occurs twice'),
        ([{"text": "a", "label": 1}], r"p\.jsonl line 1 has the keys text, label; expected `prompt`, and perhaps `id`"),
        ([], r"no prompts in p\.jsonl"),
    ],
)
def test_what_is_wrong_with_all_of_them_is_refused(tmp_path, values, words):
    with pytest.raises(ConfigError, match=f"^stage.prompts: .*{words}"):
        count_prompts([write(tmp_path / "p.jsonl", *values)])


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("", "expected a file or glob of"),
        ("nowhere/*.txt", r"nowhere/\*\.txt: no such file"),
        ("pyproject.toml", "neither .jsonl"),
    ],
)
def test_what_is_no_file_of_prompts_is_refused(where, words):
    with pytest.raises(ConfigError, match=f"^stage.prompts=.*{words}"):
        find_prompts(where)
