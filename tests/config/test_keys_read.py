"""A key that a command line can set is read: by a smoke run of its stage, or by the test that is named here.

Keys of the group `stage`, and of groups that one stage adds, must be read by that stage. All other groups describe the
model, the data and the machines of a whole pipeline: one of its stages must read them.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from dist_lm.prepare.compose import own_groups
from dist_lm.stages.registry import OWN, stage_named
from tests.config.keys_of_schemas import settable_keys

ROOT = Path(__file__).parents[2]
DEADLINE_S = 1500
# classes that copy all keys of another one, and are read in its place
COPIES = {"EvalPoolConfig": "EvalPool", "ModelConfig": "AdaptedModelConfig"}
# launches in an empty work directory, one after the other; the first runs the eight stages of the pipeline
LAUNCHES = (
    ("stage=rlhf",),
    ("stage=preference",),
    ("stage=export",),
    ("stage=import", "stage.init_from=hf:WORK/exports/default-code"),
    ("stage=generate", "stage.prompts=WORK/prompts.jsonl", "stage.max_new_tokens=8"),
    ("stage=evaluate", "stage.tasks=[own_python,bits_per_byte]", "stage.max_new_tokens=8", "stage.documents=8"),
)
# key, or beginning of keys that ends in a dot -> a test that reads it; smoke runs do not
READ_BY: Mapping[str, str] = {}


@cache
def keys_of(stage: str) -> dict[str, tuple[str, str]]:
    """(class, field) of every key of a stage; the name of the stage itself is none."""
    keys = settable_keys(stage_named(stage).schema)
    return {key: (owner.__name__, name) for key, owner, name in keys if key != "stage.name"}


def groups_of(stage: str) -> tuple[str, ...]:
    """Beginnings of the keys that a stage must read itself."""
    return ("stage.", *(f"{group}." for group in own_groups(stage_named(stage).schema)))


def is_listed(key: str) -> bool:
    """Whether `READ_BY` has the key, or a beginning of it."""
    return any(key == listed or (listed.endswith(".") and key.startswith(listed)) for listed in READ_BY)


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[tuple[str, str]]]:
    """The (class, field) that smoke runs read, by the kind of process."""
    folder = tmp_path_factory.mktemp("reads")
    work = tmp_path_factory.mktemp("smoke") / "work"
    work.mkdir()
    (work / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("def add(", "import")))
    places = (Path(__file__).parent / "in_processes", ROOT)
    environment = os.environ | {"DIST_LM_KEYS_READ": str(folder), "PYTHONPATH": os.pathsep.join(map(str, places))}
    for launch in LAUNCHES:
        overrides = [text.replace("WORK", str(work)) for text in launch]
        command = [sys.executable, "-m", "dist_lm.launch", *overrides, "experiment=smoke", f"work_dir={work}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    found: dict[str, set[tuple[str, str]]] = {"launcher": set(), "rank": set(), "actor": set()}
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            owner, name, _ = line.split(" ", 2)
            found[file.name.partition("-")[0]].add((owner, name))
    return found


@pytest.mark.cluster
@pytest.mark.heavy
@pytest.mark.timeout(len(LAUNCHES) * DEADLINE_S)
def test_every_key_is_read(reads):
    everything = set().union(*reads.values())

    def is_read(owner: str, name: str) -> bool:
        return bool({(owner, name), (COPIES.get(owner, owner), name)} & everything)

    shared = {key for stage in OWN for key, place in keys_of(stage).items() if is_read(*place)}
    unread = {
        f"{stage}: {key}"
        for stage in OWN
        for key, place in keys_of(stage).items()
        if not (is_read(*place) if key.startswith(groups_of(stage)) else key in shared) and not is_listed(key)
    }
    assert unread == set()


@pytest.mark.cluster
@pytest.mark.heavy
@pytest.mark.timeout(len(LAUNCHES) * DEADLINE_S)
def test_every_kind_of_process_notes_what_it_reads(reads):
    """Otherwise a key could count as unread because its reader was not watched."""
    assert ("SampledStageConfig", "lr") in reads["rank"] - reads["launcher"]
    assert ("ClusterConfig", "max_restarts") in reads["launcher"] - reads["rank"]
    assert ("ClusterConfig", "connect_timeout_s") in reads["launcher"]


@pytest.mark.parametrize("key", READ_BY)
def test_a_named_test_is_there_and_sets_the_key(key):
    keys = {key for stage in OWN for key in keys_of(stage)}
    assert any(one == key or (key[-1] == "." and one.startswith(key)) for one in keys)
    file, _, test = READ_BY[key].partition("::")
    text = (ROOT / file).read_text()
    assert re.search(rf"^(    )?def {test}\(", text, flags=re.MULTILINE), f"{file} has no {test}"
    assert key.strip(".").rpartition(".")[2] in text
