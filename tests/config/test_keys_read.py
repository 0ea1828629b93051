"""A key that a command line can set is read: by a smoke run of its stage, or by a test that is named here.

Keys of the group `stage`, and of groups that one stage adds, must be read by that stage. All other groups describe the
model, the data and the machines of a whole pipeline: one of its stages must read them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from dist_lm.prepare.compose import own_groups
from dist_lm.rlhf.algorithms.registry import ALGORITHMS
from dist_lm.stages.registry import OWN, stage_named
from tests.config.keys_of_schemas import settable_keys
from tests.patience import patient

ROOT = Path(__file__).parents[2]
DEADLINE_S = patient(600)  # of a launch
# a run whose tasks actors answer
ASKED = (
    *("stage.init_from=WORK/runs/language/default", "stage.steps=2", "stage.warmup_steps=1"),
    *("stage.eval_tasks={own_sql: 0}", "stage.eval_new_tokens=4", "eval.pool.actors=1"),
)
# class -> those that its keys are copied to, and read from
COPIES = {
    "EvalPoolConfig": ("EvalPool",),
    "ModelConfig": ("AdaptedModelConfig",),
    "RlhfRunGroup": tuple(algorithm.Keys.__name__ for algorithm in ALGORITHMS.values()),
}
# launches in an empty work directory, one after the other; the first runs the eight stages of the pipeline
LAUNCHES = (
    ("stage=rlhf", "rlhf.pretrain_coefficient=0.1", "rlhf.pretrain_sequences=2"),
    ("stage=code", "run_id=dry", "dry_run=true", "parallel=auto"),
    ("stage=code", "run_id=asked", *ASKED),
    ("stage=sft", "stage.init_from=WORK/runs/code/default", "stage.steps=4", "stage.eval_every=2"),
    ("stage=preference", "stage.steps=4", "stage.eval_every=2"),
    ("stage=export",),
    ("stage=import", "stage.init_from=hf:WORK/exports/default-code"),
    ("stage=generate", "stage.prompts=WORK/prompts.jsonl", "stage.max_new_tokens=8"),
    ("stage=evaluate", "stage.tasks=[own_python,bits_per_byte]", "stage.max_new_tokens=8", "stage.documents=8"),
)
# a file of tests -> keys that they read and smoke runs do not; a dot at the end names all keys of a group
READ_BY: Mapping[str, tuple[str, ...]] = {
    "tests/launcher/test_restarts.py": ("cluster.stop_timeout_s",),
    "tests/stages/test_evaluate_models.py": ("eval.prompts", "eval.reward_model"),
    "tests/prepare/test_layout_of_command.py": ("hardware.",),
    "tests/rlhf/test_online_algorithms.py": ("rlhf.clip_high", "rlhf.overlong_tokens"),
    "tests/rlhf/test_rewards.py": ("rlhf.rewards.",),
    "tests/cluster/test_environment_run.py": ("rlhf.environment_limits.", "rlhf.environments_at_once"),
    "tests/stages/test_rlhf_reporter.py": ("stage.log_every",),
    "tests/training/test_optimizer.py": ("stage.decay", "stage.decay_share", "stage.decay_steps"),
    "tests/stages/test_eval_tasks.py": ("stage.eval_new_tokens",),
    "tests/data/test_phases.py": ("stage.phases.", "stage.max_epochs"),
    "tests/model/test_lora.py": ("stage.lora.",),
    "tests/rlhf/test_preference.py": ("stage.preference.",),
    "tests/stages/test_tokenizer_stage.py": ("tokenizer.chat_template",),
    "tests/tracking/test_wandb_run.py": ("tracking.",),
}


Reads = set[tuple[str, str]]  # (class, field)


@cache
def keys_of(stage: str) -> dict[str, tuple[type, str]]:
    """(class, field) of every key of a stage; the name of the stage itself is none."""
    keys = settable_keys(stage_named(stage).schema)
    return {key: (owner, name) for key, owner, name in keys if key != "stage.name"}


def groups_of(stage: str) -> tuple[str, ...]:
    """Beginnings of the keys that a stage must read itself."""
    return ("stage.", *(f"{group}." for group in own_groups(stage_named(stage).schema)))


def is_listed(key: str, listed: str) -> bool:
    return key == listed or (listed.endswith(".") and key.startswith(listed))


def is_read(owner: type, name: str, reads: Reads, bases: bool = False) -> bool:
    """Whether a field of a class was read; with `bases` also of a class that it inherits the field from."""
    classes = {owner.__name__, *COPIES.get(owner.__name__, ())}
    if bases:
        classes |= {base.__name__ for base in owner.__mro__}
    return any((one, name) in reads for one in classes)


def noted(folder: Path) -> dict[str, Reads]:
    """What processes have read, by their kind."""
    reads: dict[str, Reads] = {"launcher": set(), "rank": set(), "other": set()}
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            owner, name, _ = line.split(" ", 2)
            reads[file.name.partition("-")[0]].add((owner, name))
    return reads


def watching(folder: Path) -> dict[str, str]:
    """The environment of processes that note what they read."""
    places = (Path(__file__).parent / "in_processes", ROOT)
    return os.environ | {"DIST_LM_KEYS_READ": str(folder), "PYTHONPATH": os.pathsep.join(map(str, places))}


@pytest.fixture(scope="module")
def smoke_reads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reads]:
    folder = tmp_path_factory.mktemp("reads")
    work = tmp_path_factory.mktemp("smoke") / "work"
    work.mkdir()
    prompts = [json.dumps({"prompt": text}) for text in ("def add(a, b):", "import os")]
    (work / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    for launch in LAUNCHES:
        overrides = [text.replace("WORK", str(work)) for text in launch]
        command = [sys.executable, "-m", "dist_lm.launch", *overrides, "experiment=smoke", f"work_dir={work}"]
        done = subprocess.run(
            command, env=watching(folder), capture_output=True, text=True, timeout=patient(DEADLINE_S), check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return noted(folder)


@pytest.mark.cluster
@pytest.mark.bars
def test_every_key_is_read_or_listed(smoke_reads):
    reads: Reads = set().union(*smoke_reads.values())
    shared = {key for stage in OWN for key, (owner, name) in keys_of(stage).items() if is_read(owner, name, reads)}
    listed = [key for keys in READ_BY.values() for key in keys]
    unread = set()
    for stage in OWN:
        for key, (owner, name) in keys_of(stage).items():
            read = is_read(owner, name, reads) if key.startswith(groups_of(stage)) else key in shared
            if not read and not any(is_listed(key, one) for one in listed):
                unread.add(f"{stage}: {key}")
    assert unread == set()


@pytest.mark.cluster
@pytest.mark.bars
def test_every_kind_of_process_notes_what_it_reads(smoke_reads):
    """Otherwise a key could count as unread because its reader was not watched."""
    assert ("SampledStageConfig", "beta1") in smoke_reads["rank"]
    assert ("ClusterConfig", "max_restarts") in smoke_reads["launcher"]
    assert smoke_reads["other"]


@pytest.mark.bars
def test_listed_tests_read_the_keys_that_they_are_listed_for(tmp_path):
    """Every listed key is a key, and the tests of its file read it, or one of a group."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *READ_BY]
    done = subprocess.run(
        command, cwd=ROOT, env=watching(tmp_path), capture_output=True, text=True, timeout=patient(900), check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    reads: Reads = set().union(*noted(tmp_path).values())
    for listed in (key for keys in READ_BY.values() for key in keys):
        places = [place for stage in OWN for key, place in keys_of(stage).items() if is_listed(key, listed)]
        assert any(is_read(owner, name, reads, bases=True) for owner, name in places), listed
