"""Configurations of old runs are read under the keys of this version; a command is told their present names."""

from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dist_lm.config import renamed
from dist_lm.config.renamed import RENAMED, present_key, with_present_keys
from dist_lm.errors import ConfigError
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.continuing import differing_keys
from dist_lm.stages.registry import load_config, stage_named
from dist_lm.stages.training.stage import training_stage
from tests.config.keys_of_schemas import settable_keys

FILES = sorted((Path(__file__).parent / "runs_of_805e6f6").glob("*.yaml"))
# what the commands of these runs gave besides the settings of the quick start
GIVEN = {"code": ["run_id=lora", "stage.lora.rank=4", "stage.steps=12", "stage.lr=1e-3", "stage.warmup_steps=2"]}


def leaves(content: Any, key: str = "") -> dict[str, Any]:
    """Every value of nested mappings, by its dotted key."""
    if not isinstance(content, dict) or not content:
        return {key: content}
    return {
        name: value for part in content for name, value in leaves(content[part], f"{key}.{part}".strip(".")).items()
    }


def contains(now: Any, was: Any) -> bool:
    """Whether a value is the same, but for keys that objects in lists have gained since, such as those of a source."""
    if isinstance(was, list) and isinstance(now, list):
        return len(now) == len(was) and all(map(contains, now, was))
    if isinstance(was, dict) and isinstance(now, dict):
        return was.keys() <= now.keys() and all(contains(now[key], was[key]) for key in was)
    return bool(now == was)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_run_of_an_earlier_version_is_read_with_every_value_that_it_had(file):
    was: Any = leaves(OmegaConf.to_container(OmegaConf.load(file)))
    now = leaves(asdict(load_config(file)))
    dropped = {key for key in was if present_key(key, file.stem) is not None}
    for key in was.keys() - dropped:
        assert contains(now[key], was[key]), (key, now[key], was[key])
    assert bool(dropped) == (file.stem in RENAMED)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_command_of_that_run_still_continues_it(file):
    stage = training_stage(file.stem)
    command = compose_config([f"stage={file.stem}", "model=nano", *GIVEN.get(file.stem, [])])
    assert differing_keys(load_config(file), command, "", stage.free_keys) == []


@pytest.mark.parametrize("stage", RENAMED)
def test_a_former_key_is_no_key_and_its_present_name_is_one(stage):
    keys = {key for key, _, _ in settable_keys(stage_named(stage).schema)}
    groups = {key.rpartition(".")[0] for key in keys} | keys
    for former, present in RENAMED[stage].items():
        assert former not in groups, former
        assert present == "" or present in groups, present


@pytest.mark.parametrize(("stage", "former"), [(stage, key) for stage in RENAMED for key in RENAMED[stage]])
def test_a_former_key_on_a_command_line_is_refused_with_the_present_one(stage, former):
    present = RENAMED[stage][former]
    way_out = f"give {present} in its place" if present else "leave it out"
    with pytest.raises(ConfigError, match=rf"^{former}=3: no such key of stage {stage}: {way_out}$"):
        compose_config([f"stage={stage}", f"{former}=3"])


def test_a_value_moves_to_the_present_key_unless_the_file_has_both(monkeypatch):
    monkeypatch.setattr(renamed, "RENAMED", {"code": {"stage.rate": "stage.lr", "old": "new.group.key", "gone": ""}})
    before = {"stage": {"name": "code", "rate": 3}, "old": [1], "gone": {"a": 1}, "left": 2}
    assert with_present_keys(before, "code") == {
        "stage": {"name": "code", "lr": 3},
        "new": {"group": {"key": [1]}},
        "left": 2,
    }
    assert with_present_keys({"stage": {"rate": 3, "lr": 5}}, "code") == {"stage": {"lr": 5}}
    assert before["stage"]["rate"] == 3  # the file's own content stays
    assert with_present_keys(before, "language") == before


def test_every_stage_has_a_name_and_keys_of_its_own():
    for stage in ("tokenizer", "shards", "rankings", "import", "export", "generate", "evaluate"):
        group = next(field.type for field in fields(stage_named(stage).schema) if field.name == "stage")
        assert is_dataclass(group)
        assert not {"lr", "steps", "seq_len", "checkpoint_every"} & {field.name for field in fields(group)}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("stage=tokenizer stage.lr=5", r"^stage\.lr=5: no such key of stage tokenizer; keys of stage: name$"),
        ("stage=shards stage.steps=5", r"^stage\.steps=5: no such key of stage shards; .*: name, corpora$"),
        ("stage=import stage.corpus=code", r"^stage\.corpus=code: no such key of stage import; .*: name, init_from$"),
        ("stage=rankings stage.lr=5", r"^stage\.lr=5: no such key of stage rankings; "),
        ("stage=export stage.dropout=0.1", r"^stage\.dropout=0\.1: no such key of stage export; "),
    ],
)
def test_a_stage_refuses_what_it_does_not_read(command, message):
    with pytest.raises(ConfigError, match=message):
        compose_config(command.split())
