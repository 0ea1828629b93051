"""The command of a file of `dist-lm recipe new`, with preferences or a reward behind fine-tuning, to its end."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dist_lm.__main__ import recipe_new
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from tests.conftest import VOCAB_SIZE
from tests.interop.hf_models import our_model, small
from tests.patience import patient
from tests.stages.test_export import saved

pytestmark = [pytest.mark.cluster, pytest.mark.heavy, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
# The file says what is trained; these words say how little of it.
LITTLE = ("cluster.ranks_per_node=1", "tokenizer.workers=1", "stages.sft.steps=2", "stages.sft.answers.conversations=1")
LITTLE_RLHF = ("stage.steps=1", "rlhf.prompts=2", "rlhf.max_new_tokens=8", "rlhf.held_out_prompts=2")


@pytest.fixture
def folder(tiny_work: WorkDirectory, tmp_path: Path) -> Path:
    """A folder with a model of transformers, conversations, preferences, prompts and a reward function."""
    config = small("Llama", d_model=40, d_ff=80, max_seq_len=512, vocab_size=VOCAB_SIZE)
    saved(tmp_path / "model", our_model(config), tiny_work)
    numbers = range(120)
    questions = [f"What is {number} and {number}?" for number in numbers]
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": f"{2 * number}"}]
        for number, question in zip(numbers, questions, strict=True)
    ]
    pair = {"chosen": "Yes, this is so.", "rejected": "No."}
    for name, rows in {
        "chats": [{"messages": messages} for messages in turns],
        "pairs": [{"prompt": question, **pair} for question in questions],
        "prompts": [{"prompt": question, "answer": 2 * number} for number, question in enumerate(questions)],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(
        "def score(request, completion, row):\n    return float(str(row['answer']) in completion)\n"
    )
    return tmp_path


def launched(folder: Path, experiment: str, *overrides: str) -> WorkDirectory:
    """Runs the command that the experiment names; returns its work directory."""
    command = [sys.executable, "-m", "dist_lm.launch", "--config-dir", "lab", f"experiment={experiment}"]
    done = subprocess.run(
        [*command, *LITTLE, *overrides],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
        capture_output=True,
        text=True,
        timeout=patient(300),
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return WorkDirectory(folder / "work")


@pytest.mark.bars
def test_preferences_are_learned_behind_fine_tuning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds keys of the file that the ranks of stage preference refuse, which a plan does not meet."""
    monkeypatch.chdir(folder)
    out = folder / "lab/experiment/pairs.yaml"
    recipe_new("hf:model", ["chats.jsonl"], out, preferences=["pairs.jsonl"])
    work = launched(folder, "pairs", "stage.steps=2", "stage.global_batch=4")
    assert durable.read_json(work.run("sft", "pairs").result)["steps"] == 2
    assert durable.read_json(work.run("preference", "pairs").result)["steps"] == 2


def test_a_function_rewards_answers_behind_fine_tuning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds a group rlhf that does not fit the model or machine, and columns of prompts that no function sees."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    out = folder / "lab/experiment/scored.yaml"
    recipe_new("hf:model", ["chats.jsonl"], out, prompts=Path("prompts.jsonl"), reward="my_rewards:score")
    work = launched(folder, "scored", *LITTLE_RLHF)
    assert durable.read_json(work.run("sft", "scored").result)["steps"] == 2
    assert durable.read_json(work.run("rlhf", "scored").result)["steps"] == 1
