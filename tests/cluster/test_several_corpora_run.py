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

from dist_lm.config.root import save_config
from dist_lm.data.manifest import read_manifest
from dist_lm.prepare.compose import compose_config
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


def run_command(words: list[str], folder: Path) -> str:
    """Runs a command in `folder`; returns what it prints."""
    environment = os.environ | {"PYTHONPATH": str(DOCS.parent)}
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def launch(arguments: list[str], folder: Path) -> str:
    """Runs a command line of the launcher in `folder`, with one rank; returns what it prints."""
    command = [sys.executable, "-m", "dist_lm.launch", *arguments, "cluster.ranks_per_node=1", "tokenizer.workers=1"]
    return run_command(command, folder)


def rows(path: Path, seed: int) -> Path:
    draw = random.Random(seed)
    texts = [f"row {seed} {number}: {' '.join(draw.choices(WORDS, k=30))}\n" for number in range(100)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def hashes(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file, but for the caches into which readers write checksums."""
    caches = {"train.index", "val.index"}
    files = [path for path in folder.iterdir() if path.name not in caches]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.bars  # test_several_corpora.py plans it
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


def lines_of_the_docs() -> list[list[str]]:
    """The shell lines of the pages about data, rewards and RLHF, as words, that need no network."""
    blocks = [
        block
        for page in ("data.md", "reward.md", "rlhf.md")
        for block in re.findall(r"^```bash\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    ]
    # The shell's $'...' is the only quotation of the pages that shlex does not know.
    texts = [re.sub(r"\$('[^']*')", r"\1", line) for block in blocks for line in block.splitlines()]
    lines = [words for text in texts if (words := shlex.split(text, comments=True)) and "corpus=hub" not in words]
    assert len(lines) >= 13, "the pages have other commands now"
    return lines


def settings_of(arguments: list[str], run_id: str) -> list[str]:
    """Words that make a launch of the docs a short run of its own, of the tiny model; the line's own words stay."""
    stage = next(word.partition("=")[2] for word in arguments if word.startswith("stage="))
    start = {"reward": "code", "rlhf": "tools", "code": "language"}[stage]
    settings = [*tiny(stage), *(RLHF if stage == "rlhf" else SHORT), f"run_id={run_id}"]
    settings.append(f"stage.init_from=work/runs/{start}/default")
    if stage == "rlhf":
        settings.append("rlhf.reward_model=work/runs/reward/default")
    if stage == "reward":  # rankings are longer than the sequences of other stages
        settings += ["stage.seq_len=256", "stage.reward.normaliser_new_tokens=8", "stages.rankings.samples.most=4"]
    names = {word.partition("=")[0] for word in arguments}
    return [word for word in settings if word.partition("=")[0] not in names]


@pytest.mark.bars
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(5))
def test_the_lines_of_the_docs_run_in_any_order(work: WorkDirectory, tmp_path: Path, seed: int) -> None:
    """Finds an order in which a line is refused until a folder is removed. Each launch is a run of its own.

    The work directory has what a quick start leaves, with models that were not trained.
    """
    for number, stage in enumerate(("language", "code", "tools", "reward")):
        run = write_untrained(work, stage, seed=number)
        save_config(compose_config([f"stage={stage}", *tiny(stage), f"work_dir={work.path}"]), run.config)
    run.result.write_text(json.dumps({"normaliser": {"mean": 0.0, "std": 1.0}}))
    assert work.path == tmp_path / "work"

    # The data of docs/data.md: a folder of sources, and lines with texts.
    shutil.copytree(DOCS.parent / "dist_lm" / "chat", tmp_path / "data/code/chat", ignore=lambda *_: ["__pycache__"])
    (tmp_path / "data/issues").mkdir()
    rows(tmp_path / "data/issues/a.jsonl", 3)
    lines = [
        [word.replace("/data/", f"{tmp_path}/data/").replace(".jsonl.zst", ".jsonl") for word in line]
        for line in lines_of_the_docs()
    ]

    # All other lines with corpus=ours need the file that this one writes.
    (new,) = [line for line in lines if line[:3] == ["dist-lm", "data", "new"]]
    order = [line for line in lines if line is not new]
    random.Random(seed).shuffle(order)
    finished: dict[Path, dict[str, str]] = {}
    for number, line in enumerate([new, *order]):
        if line[:3] == ["python", "-m", "dist_lm.launch"]:
            launch([*line[3:], *settings_of(line[3:], f"order{number}")], tmp_path)
        else:
            verb = line[1:] if line[0] == "dist-lm" else line[3:]
            run_command([sys.executable, "-m", "dist_lm", *verb], tmp_path)

        # What is finished stays as it is.
        assert all(hashes(folder) == files for folder, files in finished.items())
        finished = {path.parent: hashes(path.parent) for path in work.path.glob("corpora/*/manifest.json")}
    shutil.rmtree(work.path)
