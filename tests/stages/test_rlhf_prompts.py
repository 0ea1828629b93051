"""Prompts of stage rlhf: where the assistant is to write, each once, and none held out among those of training."""

import json
from pathlib import Path

import pytest

from dist_lm.errors import ArtefactError
from dist_lm.evaluation.tool_questions import shown
from dist_lm.launcher.compose import compose_config
from dist_lm.stages.rlhf import RlhfRunConfig
from dist_lm.stages.rlhf_prompts import Prompts, read_all
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.conftest import TINY


def read(work: WorkDirectory, *overrides: str) -> tuple[Prompts, Prompts, Tokenizer]:
    config = compose_config(["stage=rlhf", *TINY, "rlhf.pool.cache_tokens=4096", f"work_dir={work.path}", *overrides])
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
        text = shown(prompt, tokenizer)
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert text.count("<|im_start|>assistant\n") == 1


def test_a_corpus_of_texts_has_no_prompts(tiny_work):
    with pytest.raises(ArtefactError, match=r"expected conversations or rankings"):
        read(tiny_work, "stage.corpus=code")


def test_of_a_file_a_share_is_held_out_and_never_trained_on(tiny_work, tmp_path):
    file = requests(tmp_path / "requests.jsonl", 200)
    train, held_out, _ = read(tiny_work, file, "rlhf.held_out_prompts=1000")
    assert len(train) + len(held_out) == 200
    assert 2 <= len(held_out) <= 40
    assert not {tuple(one) for one in train} & {tuple(one) for one in held_out}
    other = requests(tmp_path / "others.jsonl", 3).replace("prompts_from", "held_out_from")
    train, held_out, _ = read(tiny_work, file, other)
    assert (len(train), len(held_out)) == (200, 3)


def test_prompts_without_room_for_an_answer_are_left_out_loudly(tiny_work, tmp_path, caplog):
    file = tmp_path / "requests.txt"
    file.write_text("short\n" * 1 + "a much longer request than the model has room for " * 20 + "\n")
    train, _, _ = read(tiny_work, f"rlhf.prompts_from={file}", f"rlhf.held_out_from={file}")
    assert len(train) == 1
    assert "are left out" in caplog.text
    file.write_text("a much longer request than the model has room for " * 20 + "\n")
    with pytest.raises(ArtefactError, match=r"none of 1 prompts"):
        read(tiny_work, f"rlhf.prompts_from={file}", f"rlhf.held_out_from={file}")
