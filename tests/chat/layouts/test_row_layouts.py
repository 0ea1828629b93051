"""Rows of every layout: their roles, ids and loss masks are those checked in, or the row is refused by name.

`expected.jsonl` has a line for each row of the files in `rows/`; what is learned stands in ⟦ ⟧ in its `text`.
"""

import json
import re
import time
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from dist_lm.chat.documents import read_conversation
from dist_lm.chat.layouts.registry import LAYOUTS, layout_of
from dist_lm.chat.messages import ChatError, Message, check_message
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.propose import propose
from dist_lm.data.sources.messages import read_messages
from dist_lm.data.sources.reader import Rejected
from dist_lm.errors import ConfigError, UserError
from dist_lm.tokenizer.symbols import SPECIAL_TOKENS
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.chat.layouts.read_rows import ROWS, byte_tokenizer, expected, outcomes, source_of
from tests.patience import patient

FILES = sorted(path.name for path in ROWS.iterdir())
EXPECTED = expected()
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
the_bar = pytest.param(200, marks=[pytest.mark.bars, pytest.mark.timeout(600)])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def messages_source(path: Path, **keys) -> SourceConfig:
    return SourceConfig("messages", "chat", path=str(path), **keys)


@pytest.mark.parametrize("name", FILES)
def test_rows_have_the_expected_ids_roles_and_masks(name: str, tokenizer: Tokenizer) -> None:
    # Files of refused rows alone are not described by `data new`: the next test.
    source = messages_source(ROWS / name) if name.startswith("refused") else source_of(ROWS / name)
    assert list(outcomes(source, tokenizer)) == EXPECTED[name]


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("refused")])
def test_expected_ids_and_masks_are_those_of_the_expected_text(name: str) -> None:
    """Says the same without our code: the text is what people read, the ids are what is compared."""
    marks = "|".join(map(re.escape, SPECIAL_TOKENS))
    byte_of = {character: number for number, character in enumerate(ALPHABET)}
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for row in (row for row in EXPECTED[name] if "text" in row):
        ids, spans = [], []
        for part in re.split(f"({marks}|[⟦⟧])", row["text"]):
            if part == "⟦":
                spans.append([len(ids)])
            elif part == "⟧":
                spans[-1].append(len(ids))
            elif part in SPECIAL_TOKENS:
                ids.append(len(ALPHABET) + SPECIAL_TOKENS.index(part))
            elif part:
                ids += [byte_of[character] for character in level.pre_tokenize_str(part)[0][0]]
        assert (ids, spans) == (row["ids"], row["learned"])


def test_every_layout_is_there_and_found_by_its_columns() -> None:
    recognised = set()
    for name in FILES:
        path = ROWS / name
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            continue
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        for row in rows:
            if layout := layout_of(row, "dialog" if "dialog" in row else ""):
                recognised.add(layout[0].name)
    assert recognised == {*LAYOUTS}
    assert {name.partition("_")[0].partition(".")[0] for name in FILES} >= {*LAYOUTS}


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"text": "a", "question": "b", "answer": "c"}, "completion"),
        ({"prompt": "a", "completion": "b", "label": True}, None),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, None),
        ({"conversation": "They talked."}, None),
        ({"turns": ["a", "b"]}, None),
        ({"text": '[{"role": "user", "content": "a"}]'}, None),
        ({"messages": [{"role": "user", "content": "a"}], "prompt": "a", "completion": "b"}, "openai"),
    ],
)
def test_a_row_is_recognised_by_columns_and_shapes(row: dict, layout: str | None) -> None:
    found = layout_of(row)
    assert (found and found[0].name) == layout


@pytest.mark.parametrize(
    ("name", "words"),
    [("refused_images.jsonl", "column image holds images"), ("refused_audio.jsonl", "column audios holds audio")],
)
def test_images_and_audio_are_refused_by_name_before_a_file_is_written(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        propose(str(ROWS / name))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"picture": {"bytes": b"\x89PNG\r\n", "path": "a.png"}, "text": "a cat"}], "picture holds images"),
        ([{"img": b"\xff\xd8\xff\xe0", "caption": "a cat"}], "img holds images"),
        ([{"sound": {"array": [0.1], "sampling_rate": 16000}, "text": "a bell"}], "sound holds audio"),
        ([{"x": 1.5, "y": 2, "embedding": [0.1, 0.2]}], "a table of numbers.*x .float., y .int., embedding .list."),
    ],
)
def test_tables_without_text_are_refused_by_name(rows: list[dict], words: str, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=words):
        propose(str(tmp_path / "a.parquet"))


def test_numbers_in_csv_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2.5\n3,\n")
    with pytest.raises(ConfigError, match="a table of numbers"):
        propose(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_of_any_name_hold_questions_and_answers(kind: str, tmp_path: Path) -> None:
    """Finds answers that are learned as plain text, columns that a parquet file is not asked for, and names that no
    file has."""
    path = tmp_path / f"faq.{kind}"
    if kind == "csv":
        path.write_text("Nr,Customer Question,Our Reply\n1,Is it open?,Until six.\n2,Where?,\n")
    else:
        columns = {"Nr": [1, 2], "Customer Question": ["Is it open?", "Where?"], "Our Reply": ["Until six.", None]}
        pq.write_table(pa.table(columns), path)

    (proposal,) = propose(str(path), "Customer Question", "Our Reply")
    assert proposal.conversations
    answered, unanswered = read_messages(proposal.typed(), 0)
    assert not isinstance(answered, Rejected)
    turns = [(message.role, message.content) for message in read_conversation(answered.text).messages]
    assert turns == [("user", "Is it open?"), ("assistant", "Until six.")]
    assert isinstance(unanswered, Rejected)

    with pytest.raises(ConfigError, match=r"--answer our_reply: .*did you mean Our Reply\?.*columns there are Nr"):
        propose(str(path), "Customer Question", "our_reply")
    with pytest.raises(ConfigError, match="both or none"):
        SourceConfig(reader="messages", language="chat", path=str(path), question_column="Customer Question")


TABLES = ("openai_tools.jsonl", "sharegpt_tools.jsonl", "alpaca_history.jsonl")


# A table gives all contents one type, so a text beside a list of blocks fits into it as JSON only.
@pytest.mark.parametrize(
    ("name", "as_text"),
    [*((name, False) for name in TABLES), *((name, True) for name in (*TABLES, "anthropic_tools.jsonl"))],
)
def test_parquet_gives_what_json_lines_give(name: str, as_text: bool, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A table fills keys that a turn lacks with nulls, and nested schemas are JSON texts in it."""
    rows = [json.loads(line) for line in (ROWS / name).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        for key, cell in row.items():
            if isinstance(cell, list) and (as_text or key == "tools"):
                row[key] = json.dumps(cell, ensure_ascii=False)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(outcomes(source_of(tmp_path / "a.parquet"), tokenizer)) == EXPECTED[name]


def test_thinking_is_learned_or_context_or_dropped(tokenizer: Tokenizer) -> None:
    path = ROWS / "openai_reasoning.jsonl"
    learned, context, dropped = (
        list(outcomes(source_of(path, thinking=key), tokenizer)) for key in ("learn", "context", "drop")
    )
    assert learned == EXPECTED[path.name]
    assert [row["ids"] for row in context] == [row["ids"] for row in learned]
    assert "<think>\n7 x 8 is 7 x 4 twice: 28 + 28.\n</think>\n\n⟦56<|im_end|>⟧" in context[0]["text"]
    assert "assistant\n⟦56<|im_end|>⟧" in dropped[0]["text"]
    with pytest.raises(ConfigError, match="thinking=keep: expected learn, context or drop"):
        messages_source(path, thinking="keep")


def test_answers_before_the_first_question_are_left_out_by_a_key(tokenizer: Tokenizer) -> None:
    path = ROWS / "refused_answers_first.jsonl"
    rows = list(outcomes(messages_source(path, opening_answers="drop"), tokenizer))
    assert [row["roles"] for row in rows] == [["user", "assistant"]] * 2
    assert rows[0]["text"].startswith("<|endoftext|><|im_start|>user\nDepth?<|im_end|>")
    plain = ROWS / "openai_system_middle.jsonl"
    assert list(outcomes(source_of(plain, opening_answers="drop"), tokenizer)) == EXPECTED[plain.name]
    with pytest.raises(ConfigError, match="opening_answers=keep: expected refuse or drop"):
        messages_source(path, opening_answers="keep")


def test_later_turns_of_the_system_stay_or_open_the_next_question_or_leave_the_row_out(tokenizer: Tokenizer) -> None:
    """Finds a text that is merged without the key, lost with it, or put behind the answer that it belongs to."""
    path = ROWS / "openai_system_middle.jsonl"
    assert next(outcomes(messages_source(path), tokenizer))["roles"][2] == "system"

    merged, between = outcomes(messages_source(path, later_system="user"), tokenizer)
    assert merged["roles"] == ["user", "assistant", "user", "assistant"]
    assert "<|im_start|>user\nFrom now on speak French.\n\nHello<|im_end|>" in merged["text"]
    # In the second row the system speaks between a question and its answer.
    assert re.match(r"turn 3 \(system\): .* needs a turn of the user behind it; .*drop_row", between["error"])

    rejected = list(read_messages(messages_source(path, later_system="drop_row"), 0))
    assert [(row.reason, row.error) for row in rejected if isinstance(row, Rejected)] == [("later_system", "")] * 2
    plain = ROWS / "openai_reasoning.jsonl"
    assert list(outcomes(source_of(plain, later_system="drop_row"), tokenizer)) == EXPECTED[plain.name]
    with pytest.raises(ConfigError, match="later_system=merge: expected user or drop_row"):
        messages_source(path, later_system="merge")


def test_a_row_without_a_layout_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"title": "a", "body": "b"}\n')
    (row,) = read_messages(messages_source(tmp_path / "a.jsonl"), 0)
    assert isinstance(row, Rejected)
    assert "expected messages of role and content" in row.error


@pytest.mark.parametrize(
    "bomb", ['[{"role": ' + "[" * 200_000, "[" * 200_000, '[{"from": "gpt", "value": "' + "\\ud800"]
)
def test_json_in_a_column_is_read_with_limits(bomb: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": bomb}) + "\n")
    (row,) = read_messages(messages_source(tmp_path / "a.jsonl"), 0)
    assert isinstance(row, Rejected)
    assert len(row.error.splitlines()) == 1


@pytest.mark.parametrize("text", ["<tool_call>" * 100_000, "<think>" + " \n" * 400_000, "<tool_call> " + " " * 800_000])
def test_marks_that_never_close_cost_no_more_than_their_length(text: str, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Go"}, {"from": "gpt", "value": text}, {"from": "tool", "value": text}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    started = time.perf_counter()
    list(read_messages(messages_source(tmp_path / "a.jsonl"), 0))
    assert time.perf_counter() - started < patient(10)


def mutated(content: bytes, random: Random) -> bytes:
    """A file with a part damaged, repeated, left out, or of another file's kind."""
    damaged = bytearray(content)
    for _ in range(random.randint(1, 4)):
        begin = random.randrange(len(damaged))
        end = min(len(damaged), begin + random.choice((1, 1, 2, 8, 60)))
        hostile = (b"", b"\xff\xfe", b"null", b"[" * 5000, b'{"role":', b'"', b"\n", b"\\ud800", b"1e999", b'"from"')
        damaged[begin:end] = random.choice((*hostile, bytes(damaged[end:begin:-1]), bytes(damaged[begin:end]) * 3))
    return bytes(damaged)


@pytest.mark.parametrize("count", [40, the_bar])
def test_damaged_files_end_in_one_line_or_in_whole_conversations(count: int, tmp_path: Path) -> None:
    random = Random(37)
    documents = 0
    for number in range(count):
        origin = ROWS / FILES[number % len(FILES)]
        path = tmp_path / f"{number}{origin.suffix}"
        path.write_bytes(mutated(origin.read_bytes(), random))
        problems = []
        try:
            propose(str(path))
        except UserError as error:
            problems.append(str(error))
        try:
            for candidate in read_messages(messages_source(path), 0):
                if isinstance(candidate, Rejected):
                    problems.append(candidate.error)
                else:
                    documents += 1
                    assert any(message.learn for message in read_conversation(candidate.text).messages)
        except UserError as error:
            problems.append(str(error))
        assert all(len(problem.splitlines()) <= 1 for problem in problems), problems
    assert documents


@pytest.mark.parametrize(
    "message", [Message("user", "x", thinking="y"), Message("assistant", "x", thinking="a</think>b")]
)
def test_thinking_where_it_cannot_be_is_refused(message: Message) -> None:

    with pytest.raises(ChatError, match="thinking"):
        check_message(message, "turn 0")
