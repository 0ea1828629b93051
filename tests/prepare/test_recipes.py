"""Recipes: every file composes at its size and stage, and `recipe=tuned` changes rates and initial values alone."""

from dataclasses import asdict
from typing import Any

import pytest
from omegaconf import OmegaConf

from dist_lm.config.root import Config
from dist_lm.errors import ConfigError
from dist_lm.interop.architectures import Architecture, architecture_of
from dist_lm.prepare.compose import compose_config, overrides_of
from dist_lm.prepare.conf_folders import choices, conf_directory, recipe_override

RECIPES = conf_directory() / "recipe"
SIZES, TUNED = choices("model"), ("language", "code")
OTHER_SIZES = [size for size in SIZES if size != "nano"]
TIED_SIZES = ("llama_1b", "llama_3b", "qwen3_0.6b", "qwen3_1.7b", "qwen3_4b")
# what a recipe for any size may set: no shape, no budget
FREE = {"model.base_width", "model.init_std", "model.residual_init"}
FREE |= {f"stage.{key}" for key in ("lr", "min_lr_ratio", "schedule", "weight_decay")}
GROUPS = ("stage.rates.", "stage.muon.")


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted key -> value of everything that is no mapping."""
    if not isinstance(value, dict):
        return {key: value}
    return {name: one for part, inner in value.items() for name, one in flat(inner, f"{key}.{part}".strip(".")).items()}


def changed(plain: Config, other: Config) -> set[str]:
    before, after = flat(asdict(plain)), flat(asdict(other))
    return {key for key in before | after if before.get(key) != after.get(key)}


@pytest.mark.parametrize("size", TIED_SIZES)
def test_tuned_is_refused_by_name_for_a_tied_head(size):
    """Finds a rate that scales an embedding as if it were a head alone."""
    with pytest.raises(ConfigError, match=r"model\.base_width=.*model\.tie_embeddings=true"):
        compose_config(["stage=code", f"model={size}", "recipe=tuned"])


@pytest.mark.parametrize("stage", TUNED)
@pytest.mark.parametrize("size", [size for size in OTHER_SIZES if size not in TIED_SIZES])
def test_tuned_changes_rates_and_initial_values_alone(size, stage):
    command = [f"stage={stage}", f"model={size}"]
    plain, tuned = compose_config(command), compose_config([*command, "recipe=tuned"])
    keys = changed(plain, tuned)
    assert "model.base_width" in keys
    assert {key for key in keys if key not in FREE and not key.startswith(GROUPS)} == set()
    found = architecture_of(tuned.model)
    assert isinstance(found, Architecture)
    assert found == architecture_of(plain.model)


@pytest.mark.parametrize("stage", TUNED)
@pytest.mark.parametrize("more", [[], ["experiment=thorough"]], ids=["quick start", "thorough"])
def test_nano_is_tuned_already(stage, more):
    plain, tuned = (compose_config([f"stage={stage}", *more, *recipe]) for recipe in ([], ["recipe=tuned"]))
    assert tuned.model.base_width == tuned.model.d_model  # so nothing is scaled
    assert changed(plain, tuned) == {"model.base_width"}


def test_large_keeps_its_numbers_unless_tuned_is_asked_for():
    stage = compose_config(["stage=language", "model=large"]).stage
    assert (stage.lr, stage.warmup_steps, stage.schedule, stage.muon.lr) == (1e-4, 2000, "cosine", 0.0)
    assert compose_config(["stage=code", "model=large"]).stage.lr == 1e-5


def test_a_key_of_the_command_line_wins_over_the_recipe():
    command = ["stage=code", "model=tiny", "recipe=tuned", "stage.lr=0.5", "model.base_width=80"]
    config = compose_config(command)
    assert (config.stage.lr, config.model.base_width) == (0.5, 80)


@pytest.mark.heavy
def test_tuned_goes_with_every_stage_of_a_command_and_leaves_those_without_rates_of_its_own():
    command = ["stage=rlhf", "model=tiny", "recipe=tuned"]
    for stage in ("language", "code", "tools", "rlhf"):
        plain, config = (compose_config(overrides_of(stage, "rlhf", given)) for given in (command[:2], command))
        assert bool(changed(plain, config)) == (stage in TUNED)


def test_tuned_can_be_combined_with_an_experiment():
    config = compose_config(["stage=code", "experiment=smoke", "recipe=tuned"])
    assert config.stage.steps == 20
    assert config.model.base_width is not None


def test_an_experiment_without_numbers_for_a_size_is_refused(tmp_path):
    command = ["stage=language", "experiment=thorough", "model=medium"]
    with pytest.raises(ConfigError, match=r"no recipe/thorough_medium_language.yaml, and recipe/medium_language.yaml"):
        compose_config(command)
    own = tmp_path / "recipe" / "thorough_medium_language.yaml"
    own.parent.mkdir()
    own.write_text("# @package stage\nsteps: 7\n")
    assert compose_config([f"hydra.searchpath=['{tmp_path}']", *command]).stage.steps == 7
    assert compose_config(["stage=language", "experiment=smoke", "model=tiny"]).stage.steps == 20


def files() -> list[str]:
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize("name", files())
def test_every_file_of_a_recipe_is_taken_by_its_size_and_stage(name):
    """An unknown key is refused when it is composed."""
    if "/" in name:
        recipe, _, rest = name.partition("/")
        size, _, stage = rest.rpartition("_")
        command = [f"stage={stage}", f"model={size or 'tiny'}", f"recipe={recipe}"]
    else:
        first, _, stage = name.rpartition("_")
        size = first.removeprefix("thorough_") if first != "smoke" else "nano"
        assert size in SIZES
        command = [f"stage={stage}", f"model={size}"]
        command += [f"experiment={word}" for word in ("smoke", "thorough") if first.startswith(word)]
    config = flat(asdict(compose_config(command)))
    content = OmegaConf.to_container(OmegaConf.load(RECIPES / f"{name}.yaml"))
    assert isinstance(content, dict)
    package = (RECIPES / f"{name}.yaml").read_text().partition("\n")[0].removeprefix("# @package ").strip()
    content.pop("defaults", None)
    for key, value in flat(content if package == "_global_" else {package: content}).items():
        assert config[key] == value, key


def test_an_unknown_recipe_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"recipe=nano_code: expected one of tuned"):
        compose_config(["stage=code", "recipe=nano_code"])


@pytest.mark.parametrize(
    "text", ["stage: {lr: 0.25}", "# @package _global_\nstage: {lr: 0.25}", "# @package stage\nlr: 0.25"]
)
def test_keys_of_a_recipe_belong_where_its_first_line_says(tmp_path, text):
    file = tmp_path / "recipe" / "ours" / "code.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    command = [f"hydra.searchpath=['{tmp_path}']", "stage=code", "recipe=ours"]
    assert compose_config(command).stage.lr == 0.25
    file.rename(file.with_name("coed.yaml"))
    with pytest.raises(ConfigError, match=r"recipe=ours: coed: no stage reads such a file; expected STAGE\.yaml"):
        compose_config(command)


def test_a_recipe_of_ones_own_and_a_stage_file_that_varies_code(tmp_path):
    for name, text in {
        "stage/notes.yaml": "defaults: [code, _self_]\nsteps: 7\nseq_len: 128",
        "recipe/ours/code.yaml": "# @package _global_\nstage: {lr: 0.25}",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    folder = f"hydra.searchpath=['{tmp_path}']"
    config = compose_config([folder, "stage=notes", "recipe=ours"])
    assert (config.stage.steps, config.stage.lr) == (7, 0.25)
    assert recipe_override("ours", "nano", "tools", [folder]) == []
    (tmp_path / "recipe" / "tuned").mkdir()
    (tmp_path / "recipe" / "tuned" / "code.yaml").write_text("stage: {lr: 1}")
    with pytest.raises(ConfigError, match="has the same name"):
        compose_config([folder, "stage=notes"])
