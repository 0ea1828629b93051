"""The stages by name: those of this package, and those that installed packages add.

A package adds a stage with an entry point in the group `dist_lm.stages`: NAME = "module:OBJECT", where OBJECT is a
`Stage`. Modules of stages are imported on first use.
"""

import importlib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from dist_lm.config.root import Config, read_config
from dist_lm.errors import ConfigError
from dist_lm.stages.stage import Stage

GROUP = "dist_lm.stages"
# Stage name -> its module below dist_lm.stages, in the order of the pipeline. pyproject.toml has the same list as entry
# points; this one also serves a checkout that is not installed.
OWN = {
    "import": "importing.stage",
    "tokenizer": "tokenizer",
    "shards": "shards.stage",
    "language": "language",
    "code": "code",
    "sft": "sft",
    "tools": "tools",
    "rankings": "rankings.stage",
    "preference": "preference.stage",
    "reward": "reward.stage",
    "rlhf": "rlhf.stage",
    "generate": "generate.stage",
    "evaluate": "evaluate.stage",
    "export": "exporting.stage",
}


@cache
def _added() -> dict[str, str]:
    # An installed dist_lm has entry points for its own stages too: `OWN` names those.
    return {point.name: point.value for point in entry_points(group=GROUP) if point.name not in OWN}


def stage_names() -> tuple[str, ...]:
    """Returns the names of all stages in the order of the pipeline; stages of other packages come last."""
    return (*OWN, *sorted(_added()))


@cache
def stage_named(name: str) -> Stage:
    """Returns the stage of that name; its module is imported on first use.

    Raises:
        ConfigError: the name is unknown, or the entry point of another package does not name a stage with its defaults.
    """
    if name in OWN:
        return importlib.import_module(f"dist_lm.stages.{OWN[name]}").STAGE
    if name not in _added():
        raise ConfigError(f"stage={name}: expected one of {', '.join(stage_names())}")

    where = f"entry point {name} = {_added()[name]!r} in group {GROUP}"
    # The package is not ours, so each fault gets its own message.
    module, _, attribute = _added()[name].partition(":")
    try:
        stage = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{where}: cannot be imported ({error}); update or remove the package") from error
    if not isinstance(stage, Stage):
        raise ConfigError(f"{where}: expected an object of a subclass of dist_lm.stages.stage.Stage")
    if getattr(stage, "name", None) != name:
        raise ConfigError(f"{where}: expected {attribute}.name = {name!r}, found {getattr(stage, 'name', None)!r}")

    # Without `conf` the message names the folder that it should be.
    folder = stage.conf or Path(str(importlib.import_module(module).__file__)).parent / "conf"
    file = folder / "stage" / f"{name}.yaml"
    if not stage.conf or not file.is_file():
        raise ConfigError(f"{where}: expected its defaults in {file}, and {attribute}.conf = the folder {folder}")
    return stage


def all_stages() -> Iterator[Stage]:
    """Returns every stage; a stage is imported when it is reached.

    Raises:
        ConfigError: the entry point of another package does not name a stage with its defaults.
    """
    return (stage_named(name) for name in stage_names())


def added_conf() -> list[Path]:
    """Returns the folders with the YAML files of stages that other packages add.

    Raises:
        ConfigError: the entry point of another package does not name a stage with its defaults.
    """
    folders = (stage_named(name).conf for name in sorted(_added()))
    return list(dict.fromkeys(folder for folder in folders if folder))


def load_config(path: Path) -> Config:
    """Reads a run's `config.yaml`; types and bounds are checked again.

    Raises:
        ConfigError: a value is not accepted by this version, or the stage is unknown.
        ArtefactError: the file is missing, cannot be read, or is no configuration of a run.
    """
    return read_config(path, lambda stage: stage_named(stage).schema)
