"""Several data sets in one work directory, through the launcher: runs go on with theirs, and no command needs `rm`."""

import hashlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_lm.data.manifest import read_manifest
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from tests.conftest import TINY, tiny
from tests.patience import patient
from tests.training_run import write_untrained

pytestmark = [pytest.mark.cluster, pytest.mark.heavy]

DOCS = Path(__file__).parents[2] / "docs"
DEADLINE_S = patient(600)
SHORT = ("stage.steps=2", "stage.global_batch=4", "stage.micro_batch=2", "stage.warmup_steps=1")
WORDS = [f"{word}{number}" for word in ("return", "value", "self", "index") for number in range(50)]
RLHF = (
    *("stage.steps=1", "rlhf.prompts=4", "rlhf.max_new_tokens=8", "rlhf.minibatches=1", "rlhf.held_out_prompts=2"),
    *("rlhf.pool.cache_tokens=4096", "rlhf.pretrain_sequences=2", "rlhf.pretrain_seq_len=32"),
)


def launch(arguments: list[str], folder: Path) -> str:
    """Runs a command line of the launcher in `folder`, with one rank; returns what it prints."""
    environment = os.environ | {"PYTHONPATH": str(DOCS.parent)}
    command = [sys.executable, "-m", "dist_lm.launch", *arguments, "cluster.ranks_per_node=1", "tokenizer.workers=1"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def rows(path: Path, seed: int) -> Path:
    draw = random.Random(seed)
    texts = [f"row {seed} {number}: {' '.join(draw.choices(WORDS, k=30))}\n" for number in range(100)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_run_goes_on_with_its_data_set_after_a_second_one_was_built(work: WorkDirectory, tmp_path: Path) -> None:
    """Finds a run that continues on the newest data set, or that is refused because there is another one."""

    def arguments(data: Path, run_id: str, steps: int) -> list[str]:
        source = f"{{reader: jsonl, language: english, path: {data}}}"
        corpus = [f"corpus.corpora={{language: [{source}]}}", "corpus.val_fraction=0.2", "stage.init_from=none"]
        settings = [*TINY, *SHORT[1:], "stage.schedule=wsd", "stage.sampling.samples_per_prompt=0", *corpus]
        return ["stage=language", f"work_dir={work.path}", f"run_id={run_id}", f"stage.steps={steps}", *settings]

    ours, theirs = rows(tmp_path / "a.jsonl", 1), rows(tmp_path / "b.jsonl", 2)
    launch(arguments(ours, "one", 2), tmp_path)
    one = work.run("language", "one")
    before = hashes(one.corpus("language"))
    launch(arguments(theirs, "two", 2), tmp_path)
    two = work.run("language", "two")
    assert len({work.corpus("language"), one.corpus("language"), two.corpus("language")}) == 3

    # The command names the second data set: the run goes on with what it began with.
    folder = one.corpus("language")
    launch(arguments(theirs, "one", 3), tmp_path)
    assert durable.read_json(one.result)["steps"] == 3
    assert one.corpus("language") == folder
    assert hashes(one.corpus("language")) == before
    assert durable.read_json(one.corpora)["language"] == {
        **read_manifest(one.corpus("language")).content,
        "folder": one.corpus("language").name,
    }


def commands_of_the_docs() -> list[list[str]]:
    """The launches of the pages about data, rewards and RLHF that need neither a network nor actors."""
    lines = [
        line
        for page in ("data.md", "reward.md", "rlhf.md")
        for line in re.findall(r"^python -m dist_lm\.launch (.*)$", (DOCS / page).read_text(), re.MULTILINE)
    ]
    arguments = [shlex.split(line, comments=True) for line in lines]
    chosen = [one for one in arguments if not any(word in ("corpus=hub", "rlhf.pool.actors=2") for word in one)]
    assert len(chosen) >= 7, "the pages have other commands now"
    return chosen


@pytest.mark.bars
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(5))
def test_the_commands_of_the_docs_run_in_any_order(work: WorkDirectory, tmp_path: Path, seed: int) -> None:
    """Finds an order in which a command is refused until a folder is removed. Each command is a run of its own."""
    for number, stage in enumerate(("language", "code", "tools", "reward")):
        run = write_untrained(work, stage, seed=number)
    run.result.write_text(json.dumps({"normaliser": {"mean": 0.0, "std": 1.0}}))
    assert work.path == tmp_path / "work"

    # The corpus file of docs/data.md, over data of this test.
    (tmp_path / "lab/corpus").mkdir(parents=True)
    source = f"{{reader: jsonl, language: english, path: {rows(tmp_path / 'ours.jsonl', 3)}}}"
    (tmp_path / "lab/corpus/ours.yaml").write_text(f"name: ours\nval_fraction: 0.2\ncorpora:\n  code: [{source}]\n")

    commands = commands_of_the_docs()
    random.Random(seed).shuffle(commands)
    finished: dict[Path, dict[str, str]] = {}
    for number, command in enumerate(commands):
        stage = next(word.partition("=")[2] for word in command if word.startswith("stage="))
        given = {word.partition("=")[0] for word in command}
        added = [*tiny(stage), *(RLHF if stage == "rlhf" else SHORT), f"run_id=order{number}"]
        start = "code" if stage == "reward" else {"rlhf": "tools", "code": "language"}.get(stage, "")
        added += [f"stage.init_from=work/runs/{start}/default", "rlhf.reward_model=work/runs/reward/default"]
        if stage != "rlhf":
            added.pop()
        launch([*command, *(word for word in added if word.partition("=")[0] not in given)], tmp_path)

        # What is finished stays as it is.
        assert all(hashes(folder) == files for folder, files in finished.items())
        finished = {path.parent: hashes(path.parent) for path in work.path.glob("corpora/*/manifest.json")}
    shutil.rmtree(work.path)
