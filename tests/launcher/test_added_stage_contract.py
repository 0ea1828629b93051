"""What the stage of another package may leave out, and how it is refused where it is wrong."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dist_lm.config.root import Config, save_config
from dist_lm.errors import ConfigError
from dist_lm.prepare.compose import compose_config, overrides_of
from dist_lm.prepare.plan import Plan, make_plan, may_need
from dist_lm.stages import registry
from dist_lm.stages.registry import load_config, stage_named
from dist_lm.stages.text import TextStage
from tests.conftest import TINY

Install = Callable[..., Path]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Install]:
    """A function that installs a stage `haiku` with the given attributes and defaults, and returns its folder conf."""
    module = ModuleType("haiku_stage")
    module.__file__ = str(tmp_path / "haiku_stage" / "__init__.py")
    monkeypatch.setitem(sys.modules, "haiku_stage", module)
    monkeypatch.setattr(registry, "_added", lambda: {"haiku": "haiku_stage:STAGE"})
    conf = tmp_path / "haiku_stage" / "conf"

    def make(defaults: str | None = "corpus: language\n", kind: type = TextStage, **attributes: Any) -> Path:
        (conf / "stage").mkdir(parents=True)
        if defaults is not None:
            (conf / "stage" / "haiku.yaml").write_text(defaults)
        module.STAGE = type("Haiku", (kind,), {"name": "haiku", "conf": conf} | attributes)()  # type: ignore[attr-defined]
        stage_named.cache_clear()
        return conf

    yield make
    stage_named.cache_clear()


def plan(work: Path, *overrides: str) -> Plan:
    given = [*TINY, f"work_dir={work}", *overrides]
    return make_plan("haiku", lambda stage: compose_config(overrides_of(stage, "haiku", given)))


@pytest.mark.heavy
def test_the_stage_that_it_starts_from_is_built_first(install: Install, tmp_path: Path) -> None:
    install(starts_from="language")
    planned = plan(tmp_path, "stages.language.steps=3")
    assert [one.name for one in planned.missing] == ["tokenizer", "shards", "language", "haiku"]
    assert planned.missing[-2].config.stage.steps == 3
    assert "language" in may_need("haiku")
    given = plan(tmp_path, "stage.init_from=none")
    assert [one.name for one in given.missing] == ["tokenizer", "shards", "haiku"]


@pytest.mark.parametrize("defaults", ["", "corpus: language\n"])
def test_its_file_need_not_repeat_the_name(install: Install, tmp_path: Path, defaults: str) -> None:
    install(defaults)
    config = compose_config(["stage=haiku", *TINY, "stage.corpus=language"])
    assert (config.stage.name, config.stage.corpus) == ("haiku", "language")


@pytest.mark.heavy
def test_a_value_error_of_its_check_is_a_refusal(install: Install, tmp_path: Path) -> None:
    def check(self: TextStage, config: Config) -> None:
        raise ValueError("stage.steps must be odd")

    install(check=check)
    with pytest.raises(ConfigError, match=r"stage=haiku: stage\.steps must be odd"):
        plan(tmp_path)


def test_without_its_file_the_place_of_the_file_is_named(install: Install) -> None:
    conf = install(defaults=None)
    with pytest.raises(ConfigError, match=str(conf / "stage" / "haiku.yaml")):
        compose_config(["stage=haiku", *TINY])


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"name": "sonnet"}, r"expected STAGE\.name = 'haiku', found 'sonnet'"),
        ({"kind": object}, "expected an object of a subclass of dist_lm.stages.stage.Stage"),
        ({"conf": None}, r"expected its defaults in .*haiku\.yaml"),
    ],
)
def test_a_wrong_stage_is_refused_without_an_address(install: Install, attributes: dict[str, Any], words: str) -> None:
    install(**attributes)
    with pytest.raises(ConfigError, match=words) as refused:
        stage_named("haiku")
    assert " at 0x" not in str(refused.value)


@pytest.mark.heavy
def test_a_run_of_an_older_schema_is_refused_in_one_line(install: Install, tmp_path: Path) -> None:
    install()
    config = compose_config(["stage=haiku", *TINY])
    run = tmp_path / "run"
    run.mkdir()
    save_config(config, run / "config.yaml")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("\nstage:\n", "\nstage:\n  rhyme: abab\n"))
    with pytest.raises(ConfigError, match=f"{run} exists with other settings: stage.rhyme .*another run_id") as refused:
        load_config(run / "config.yaml")
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("value", ["[a,b]", "[1.5,2]"])
def test_an_entry_of_a_list_has_a_type(value: str) -> None:
    with pytest.raises(ConfigError, match=r"profile\.steps\[0\]=.*: expected an integer"):
        compose_config(["stage=language", *TINY, f"profile.steps={value}"])
