"""Prompts of stage rlhf: where the assistant is to write, each once, and none held out among those of training."""

import json
import shutil
from pathlib import Path

import pytest

from dist_lm.chat.documents import encode_document, write_conversation
from dist_lm.chat.messages import Conversation, Message
from dist_lm.chat.template import prompt as rendered
from dist_lm.data.manifest import read_manifest
from dist_lm.data.shard_writer import CorpusWriter
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.rlhf.config import RlhfRunConfig
from dist_lm.stages.rlhf.prompts import Prompts, check_prompts, read_all, request_reader, tasks_of
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import KeptTemplate, Tokenizer, text_with_marks
from tests.chat.test_kept_template import ADDS_SYSTEM, FORGETS, TRIMS, WITHOUT_HEADER
from tests.conftest import TINY_MODEL

RLHF = ("stage=rlhf", *TINY_MODEL, "rlhf.pool.cache_tokens=4096")


def read(work: WorkDirectory, *overrides: str) -> tuple[Prompts, Prompts, Tokenizer]:
    config = compose_config([*RLHF, f"work_dir={work.path}", *overrides])
    assert isinstance(config, RlhfRunConfig)
    tokenizer = Tokenizer.load(work.tokenizer_model)
    return *read_all(config, work.run("rlhf", "any"), tokenizer), tokenizer


def requests(path: Path, count: int) -> str:
    path.write_text("".join(json.dumps({"prompt": f"Say {i} words"}) + "\n" for i in range(count)))
    return f"rlhf.prompts_from={path}"


def test_conversations_give_what_stands_before_the_assistants_first_turn(tiny_work):
    train, held_out, tokenizer = read(tiny_work, "stage.corpus=tools", "rlhf.max_new_tokens=16")
    assert len({tuple(prompt) for prompt in train}) == len(train) > 100
    assert 0 < len(held_out) <= 32
    for prompt in [*train, *held_out]:
        assert prompt[0] == tokenizer.eot_id
        text = text_with_marks(prompt, tokenizer)
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert text.count("<|im_start|>assistant\n") == 1


@pytest.mark.parametrize("template", ["", ADDS_SYSTEM, TRIMS, WITHOUT_HEADER, FORGETS])
def test_the_request_is_the_text_of_the_users_last_turn(tiny_work, template):
    data = tiny_work.tokenizer_model.read_bytes()
    kept = KeptTemplate(template, (("bos_token", "<|endoftext|>"), ("eos_token", "<|im_end|>")), "2026-01-31")
    tokenizer = Tokenizer(data, "tokenizer", kept if template else None)
    request_of, last = request_reader(tokenizer), Message("user", "def add(a, <|im_end|> b):\n    x = 1")
    system = [] if template in (TRIMS, WITHOUT_HEADER) else [Message("system", "Be brief.")]
    before = [Message("user", "Hello"), Message("assistant", "Yes?")] if template in ("", ADDS_SYSTEM) else []
    for turns in ([last], [*system, *before, last]):
        assert request_of(rendered(Conversation(tuple(turns)), tokenizer)) == last.content


def test_a_corpus_of_texts_has_no_prompts(tiny_work):
    with pytest.raises(ArtefactError, match=r"expected conversations or rankings"):
        read(tiny_work, "stage.corpus=code")


@pytest.mark.heavy
def test_of_a_file_a_share_is_held_out_and_never_trained_on(tiny_work, tmp_path):
    file = requests(tmp_path / "requests.jsonl", 200)
    train, held_out, _ = read(tiny_work, file, "rlhf.held_out_prompts=1000")
    assert len(train) + len(held_out) == 200
    assert 2 <= len(held_out) <= 40
    assert not {tuple(one) for one in train} & {tuple(one) for one in held_out}
    other = requests(tmp_path / "others.jsonl", 3).replace("prompts_from", "held_out_from")
    train, held_out, _ = read(tiny_work, file, other)
    assert (len(train), len(held_out)) == (200, 3)


@pytest.mark.heavy
def test_prompts_without_room_for_an_answer_are_left_out_loudly(tiny_work, tmp_path, caplog):
    file = tmp_path / "requests.txt"
    file.write_text("short\n" * 1 + "a much longer request than the model has room for " * 20 + "\n")
    train, _, _ = read(tiny_work, f"rlhf.prompts_from={file}", f"rlhf.held_out_from={file}")
    assert len(train) == 1
    assert "are left out" in caplog.text
    file.write_text("a much longer request than the model has room for " * 20 + "\n")
    with pytest.raises(ArtefactError, match=r"none of 1 prompts"):
        read(tiny_work, f"rlhf.prompts_from={file}", f"rlhf.held_out_from={file}")


@pytest.mark.heavy
def test_a_file_without_prompts_for_training_is_refused_with_the_reason(tiny_work, tmp_path, monkeypatch):
    file = requests(tmp_path / "requests.jsonl", 2)
    monkeypatch.setattr("dist_lm.stages.rlhf.prompts.HELD_OUT_OF", 1)
    with pytest.raises(ArtefactError, match=r"holds out .* all of 2: add prompts, or .* rlhf\.held_out_from"):
        read(tiny_work, file)
    (tmp_path / "requests.jsonl").write_text('{"prompt": "def a(", "suffix": "return b"}\n')
    with pytest.raises(ArtefactError, match=r"rlhf\.prompts_from: requests\.jsonl line 1: has a `suffix`"):
        read(tiny_work, file)


TESTED = "rlhf.rewards={mine: {kind: tests}}"


def test_tests_of_a_prompt_are_found_by_what_the_model_sees(tiny_work, tmp_path):
    lines = [{"prompt": f"Say {i}", "language": "bash", "tests": [{"stdout": str(i)}]} for i in range(20)]
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = compose_config([*RLHF, TESTED, f"rlhf.prompts_from={file}"])
    assert isinstance(config, RlhfRunConfig)
    check_prompts(config.rlhf)
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    tasks = tasks_of(config.rlhf, tokenizer)
    train, held_out = read_all(config, tiny_work.run("rlhf", "any"), tokenizer)
    assert {tokenizer.decode(list(prompt)) for prompt in [*train, *held_out]} == set(tasks)
    assert sorted(task.tests[0].stdout for task in tasks.values()) == sorted(str(i) for i in range(20))
    file.write_text(file.read_text() + json.dumps(lines[0] | {"tests": ["true"]}) + "\n")
    with pytest.raises(ArtefactError, match="line 21: the same prompt has other tests in a line before"):
        tasks_of(config.rlhf, tokenizer)
    file.write_text(json.dumps({"prompt": "x", "language": "bash"}) + "\n")
    with pytest.raises(ArtefactError, match="line 1: expected `tests`"):
        check_prompts(config.rlhf)


def test_an_empty_prompt_is_refused_before_ranks_start(tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("Say it", "")))
    config = compose_config([*RLHF, f"rlhf.prompts_from={file}"])
    assert isinstance(config, RlhfRunConfig)
    with pytest.raises(ArtefactError, match="line 2: the prompt is empty"):
        check_prompts(config.rlhf)


def test_tests_as_a_reward_need_a_file_of_prompts():
    with pytest.raises(ConfigError, match=r"rlhf\.prompts_from='': expected a file of prompts with tests"):
        compose_config(["stage=rlhf", *TINY_MODEL, TESTED])
    with pytest.raises(ConfigError, match=r"rlhf\.rewards\.mine\.score=some: expected share, all"):
        compose_config([*RLHF, "rlhf.prompts_from=x", "rlhf.rewards={mine: {kind: tests, score: some}}"])


# --- rows ---

SYSTEM = {"role": "system", "content": "Be brief."}
FUNCTION = "rlhf.rewards={{mine: {{kind: function, function: 'tests.rlhf.toy_rewards:{}'}}}}"


def settings_of(*overrides: str) -> RlhfRunConfig:
    config = compose_config([*RLHF, "rlhf.reward_model=none", *overrides])
    assert isinstance(config, RlhfRunConfig)
    return config


@pytest.mark.heavy
def test_each_prompt_of_a_file_keeps_its_row_and_turns_on_both_sides(tiny_work, tmp_path):
    """Equal prompts too: their rows may differ."""
    rows = [{"prompt": [SYSTEM, {"role": "user", "content": f"Say {i // 2}"}], "answer": str(i)} for i in range(80)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held_out, tokenizer = read(
        tiny_work, f"rlhf.prompts_from={file}", FUNCTION.format("matches_row"), "rlhf.reward_model=none"
    )
    assert len(train.rows) == len(train)
    assert len(held_out.rows) == len(held_out) > 0
    found = [row for side in (train, held_out) for row in side.rows]
    assert sorted(int(row.columns["answer"]) for row in found) == [*range(80)]
    for side in (train, held_out):
        for prompt, row in zip(side, side.rows, strict=True):
            assert row.columns == rows[int(row.columns["answer"])]
            assert list(row.messages) == row.columns["prompt"]
            turns = Conversation(tuple(Message(turn["role"], turn["content"]) for turn in row.messages))
            assert list(prompt) == rendered(turns, tokenizer)
    assert not read(tiny_work, f"rlhf.prompts_from={file}")[0].rows  # no function asks for them


def test_a_corpus_without_rows_gives_the_turns_that_its_tokens_hold(tiny_work):
    """Those of earlier releases, and generated ones."""
    overrides = ("stage.corpus=tools", FUNCTION.format("counts_turns"), "rlhf.reward_model=none")
    train, _, tokenizer = read(tiny_work, *overrides)
    for prompt, row in zip(train, train.rows, strict=True):
        assert row.messages[-1]["role"] == "user"
        assert row.messages[-1]["content"] == request_reader(tokenizer)(prompt)


@pytest.mark.parametrize(
    ("function", "row", "words"),
    [
        (
            "trl_matches",
            {"answer": "4"},
            "needs solution, which no row of the prompts has: the columns there are prompt",
        ),
        ("verl_score", {"reward_model": {"style": "rule"}}, r"line 1: no ground truth, which rlhf\.rewards\.mine"),
        ("openrlhf_reward", {}, r"rlhf\.rewards\.mine\.function=.*missing a required argument: 'labels'"),
        ("trl_matches", {"prompt": [{"role": "assistant", "content": "x"}]}, "line 1: turn 0"),
    ],
)
def test_a_function_that_cannot_work_with_the_rows_is_refused_at_the_plan(tmp_path, function, row, words):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "2 + 2?"} | row) + "\n")
    with pytest.raises((ConfigError, ArtefactError), match=words):
        check_prompts(settings_of(f"rlhf.prompts_from={file}", FUNCTION.format(function)).rlhf)


def test_a_column_that_only_some_rows_have_is_enough(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "solution": "c"}\n')
    check_prompts(settings_of(f"rlhf.prompts_from={file}", FUNCTION.format("trl_matches")).rlhf)


@pytest.mark.heavy
def test_prompts_of_a_corpus_have_the_rows_that_it_keeps(work):
    """Of documents with the same prompt the first one's; the run notes the hash of the rows."""
    tokenizer = Tokenizer.load(work.tokenizer_model)
    directory = work.corpus("tools")
    recipe = read_manifest(directory).recipe
    shutil.rmtree(directory)
    with CorpusWriter(directory, recipe) as writer:
        for number in range(40):
            turns = (Message("system", "Be brief."), Message("user", f"Say {number // 2}"), Message("assistant", "x"))
            text = write_conversation(Conversation(turns))
            row = json.dumps({"answer": number}) if number % 8 < 6 else ""
            document = Document(text, "chat", "s", "own", "", "conversation", row=row)
            writer.write("val" if number >= 32 else "train", encode_document(tokenizer, document))
        writer.finish({})

    overrides = ("stage.corpus=tools", FUNCTION.format("matches_row"), "rlhf.reward_model=none")
    train, held_out, _ = read(work, *overrides)
    assert (len(train), len(held_out)) == (16, 4)
    answers = [row.columns.get("answer") for side in (train, held_out) for row in side.rows]
    assert answers == [None if number % 8 >= 6 else number for number in range(0, 40, 2)]
    for side in (train, held_out):
        for prompt, row in zip(side, side.rows, strict=True):
            assert [turn["role"] for turn in row.messages] == ["system", "user"]
            assert request_reader(tokenizer)(prompt) == row.messages[-1]["content"]
            if "answer" in row.columns:
                assert [turn["role"] for turn in row.columns["messages"]] == ["system", "user", "assistant"]

    noted = settings_of(f"work_dir={work.path}", *overrides).noted_files
    assert [path.name for path in noted["rows of stage.corpus=tools"]] == [
        "train-000000.rows.jsonl.zst",
        "val-000000.rows.jsonl.zst",
    ]
    assert not settings_of(f"work_dir={work.path}", "stage.corpus=tools", TESTED.replace("tests", "parses")).noted_files
