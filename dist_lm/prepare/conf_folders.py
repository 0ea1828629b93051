"""The folders that configuration files come from: dist_lm's conf/, those of packages that add stages, and a user's own.

`--config-dir DIR` is `hydra.searchpath=[DIR]`; both may name several folders. A folder is laid out as conf/ is:
DIR/corpus/mine.yaml is corpus=mine. Hydra takes the first file of a name, so a second one is refused.
"""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from dist_lm.config.root import load_yaml
from dist_lm.errors import ConfigError
from dist_lm.stages.registry import OWN, added_conf, stage_names

RECIPE = "recipe"
_RECIPES = f"override /{RECIPE}"  # in an experiment's defaults
GROUPS = ("model", "parallel", "hardware", "stage", RECIPE, "corpus", "cluster", "tracking", "experiment")
KEY = "hydra.searchpath"
FLAGS = ("--config-dir", "-cd")


def conf_directory() -> Path:
    """dist_lm's own folder of YAML files: inside the package if installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def with_config_dir(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments of a command line with all `--config-dir DIR` as one override `hydra.searchpath=[DIR]` at
    the end. Whether the folders exist is not checked.

    Raises:
        ConfigError: the option has no value.
    """
    overrides: list[str] = []
    folders: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, folder = argument.partition("=")
        if flag not in FLAGS:
            overrides.append(argument)
            continue
        if not equals:
            folder = next(remaining, "")
        if not folder:
            raise ConfigError(f"{flag}: expected a folder of configuration files, such as {flag} my_conf")
        folders.append(folder)

    if not folders:
        return overrides
    quoted = ", ".join("'" + folder.replace("\\", "\\\\").replace("'", "\\'") + "'" for folder in folders)
    return [*overrides, f"{KEY}=[{quoted}]"]


def own_folders(overrides: Sequence[str]) -> list[Path]:
    """Returns the user's folders that `hydra.searchpath` names, as absolute paths; other overrides are passed over.

    Raises:
        ConfigError: the value is no list of texts, an entry is no folder of this machine, a folder holds no group, or a
            file of it is not UTF-8, ends in .yml, or has the name of another file.
    """
    search_paths = [override for override in overrides if override.startswith(f"{KEY}=")]
    folders = [_folder(entry) for override in search_paths for entry in _entries(override)]
    packaged_folders = [conf_directory(), *added_conf()]
    for index, folder in enumerate(folders):
        if not any((folder / group).is_dir() for group in GROUPS):
            raise ConfigError(
                f"{FLAGS[0]} {folder}: no folder of a group in it ({', '.join(GROUPS)}): expected for example "
                f"{folder / 'corpus' / 'mine.yaml'}, which is corpus=mine ({KEY})"
            )

        for file in sorted(path for group in GROUPS for path in (folder / group).rglob("*")):
            if file.suffix == ".yml":
                raise ConfigError(f"{file}: names of configuration files end in .yaml: rename it")
            if file.suffix != ".yaml":
                continue
            _check_utf8(file)
            # Hydra would silently take the first file of a name.
            for earlier_folder in (*packaged_folders, *folders[:index]):
                twin = earlier_folder / file.relative_to(folder)
                if twin.is_file():
                    raise ConfigError(f"{file}: {twin} has the same name and would be used: choose another name")
    return folders


def search_path(overrides: Sequence[str]) -> list[str]:
    """Returns Hydra's override that adds the folders of other packages and of the user; empty without such folders.

    Raises:
        ConfigError: see `own_folders`.
    """
    folders = [f"'file://{folder}'" for folder in (*added_conf(), *own_folders(overrides))]
    if not folders:
        return []
    return [f"{KEY}=[{','.join(folders)}]"]


def choices(group: str, overrides: Sequence[str] = ()) -> list[str]:
    """Returns, sorted, the values that `group=` accepts: names of YAML files; of `recipe=` the folders.

    They include `hardware=auto` and the stages of other packages, which have no file.

    Raises:
        ConfigError: see `own_folders`.
    """
    folders = (conf_directory(), *own_folders(overrides))
    if group == RECIPE:
        return sorted({path.name for folder in folders for path in (folder / RECIPE).glob("*") if path.is_dir()})

    without_file: list[str] = []
    if group == "hardware":
        without_file = ["auto"]
    elif group == "stage":
        without_file = [name for name in stage_names() if name not in OWN]
    return sorted([*without_file, *(path.stem for folder in folders for path in (folder / group).glob("*.yaml"))])


def recipe_override(recipe: str, model: str, stage: str, overrides: Sequence[str]) -> list[str]:
    """Returns Hydra's override for `recipe=RECIPE`, at most one; empty if no file is for this stage, which keeps its
    numbers.

    The file is recipe/RECIPE/MODEL_STAGE.yaml, or else recipe/RECIPE/STAGE.yaml. It comes after the file of the size.

    Args:
        model: the choice of `model=`; empty: no numbers of one size (an experiment has its own).
        stage: the choice of `stage=`; a file of the user that has no recipe takes that of the stage it varies.

    Raises:
        ConfigError: no file of the recipe is named after a stage, a folder of the user cannot be used, or the user's
            stage file is no YAML or names no stage.
        OSError: a file cannot be read.
    """
    folders = (conf_directory(), *own_folders(overrides))
    stages = dict.fromkeys((stage, program_of(stage, overrides)))
    names = [f"{model}_{name}" for name in stages if model] + [*stages]

    # A mistyped name would be a recipe without effect.
    stage_choices = choices("stage", overrides)
    file_names = [path.stem for folder in folders for path in (folder / RECIPE / recipe).glob("*.yaml")]
    is_read = any(name == choice or name.endswith(f"_{choice}") for name in file_names for choice in stage_choices)
    if file_names and not is_read:
        raise ConfigError(
            f"recipe={recipe}: {', '.join(sorted(file_names))}: no stage reads such a file; expected STAGE.yaml or "
            f"MODEL_STAGE.yaml with STAGE one of {', '.join(stage_choices)}"
        )

    files = [folder / RECIPE / recipe / f"{name}.yaml" for name in names for folder in folders]
    return [f"+{RECIPE}/{recipe}@{_package(file)}={file.stem}" for file in files if file.is_file()][:1]


def check_experiment(experiment: str, model: str, stage: str, overrides: Sequence[str]) -> None:
    """Refuses an experiment whose recipes have no file for a size that has numbers of its own, which would be lost.

    An experiment without a file is not checked.

    Raises:
        ConfigError: names the file that is missing, or a file that is no YAML; or a folder of the user cannot be used.
        OSError: a file cannot be read.
    """
    folders = (conf_directory(), *own_folders(overrides))

    def exists(recipe: str) -> bool:
        return any((folder / RECIPE / f"{recipe}.yaml").is_file() for folder in folders)

    for folder in folders:
        file = folder / "experiment" / f"{experiment}.yaml"
        if not file.is_file():
            continue
        defaults = content_of(file).get("defaults") or []
        for entry in (entry for entry in defaults if isinstance(entry, dict) and entry.get(_RECIPES)):
            recipe = str(entry[_RECIPES]).replace("${model}", model).replace("${stage}", stage)
            if not exists(recipe) and exists(f"{model}_{stage}") and "${" not in recipe:
                raise ConfigError(
                    f"experiment={experiment}: no recipe/{recipe}.yaml, and recipe/{model}_{stage}.yaml would not "
                    f"apply: leave out model={model} or the experiment, or write the file below --config-dir"
                )


def _package(file: Path) -> str:
    """Returns the group that the keys of a recipe belong to: as its line `# @package` says, by default the root."""
    package = re.match(r"#\s*@package\s+(\S+)", file.read_text(encoding="utf-8"))
    return package[1] if package else "_global_"


def content_of(file: Path) -> dict[Any, Any]:
    """Returns the keys of a YAML file; empty if it holds something else than keys.

    Raises:
        ConfigError: the file is no YAML.
        OSError: a file cannot be read.
    """
    with one_line_for_yaml():
        content = OmegaConf.to_container(load_yaml(file))
    return content if isinstance(content, dict) else {}


def program_of(choice: str, overrides: Sequence[str]) -> str:
    """Returns the stage that `stage=choice` runs: itself, or for a file of the user what its `name` or `defaults` say.

    A choice without a file is returned unchanged.

    Raises:
        ConfigError: the file is no YAML or names no stage, or a folder of the user cannot be used.
        OSError: a file cannot be read.
    """
    if choice in stage_names():
        return choice
    for folder in own_folders(overrides):
        file = folder / "stage" / f"{choice}.yaml"
        if not file.is_file():
            continue

        content = content_of(file)
        entries = [content.get("name"), *(content.get("defaults") or [])]
        named_stages = [entry for entry in entries if entry in stage_names()]
        if not named_stages:
            raise ConfigError(
                f"{file}: names no stage: expected `defaults: [STAGE, _self_]` with STAGE one of "
                f"{', '.join(stage_names())}"
            )
        return named_stages[0]
    return choice


@cache
def default_choice(group: str) -> str:
    """Returns the choice of a group that conf/config.yaml names."""
    # Hydra would know only after composing, and what is composed depends on the stage.
    defaults = load_yaml(conf_directory() / "config.yaml").defaults
    return next(str(entry[group]) for entry in defaults if group in entry)


def default_stage() -> str:
    """Returns the stage that conf/config.yaml names."""
    return default_choice("stage")


def local_hardware() -> str:
    """Returns the file in conf/hardware for this machine: the one of its first GPU, else the one of the CPU."""
    gpus = [path.read_text().lower() for path in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    gpu_files = [path.name for path in sorted((conf_directory() / "hardware").glob("*.yaml")) if path.stem != "cpu"]
    return next((name for gpu in gpus[:1] for name in gpu_files if name.removesuffix(".yaml") in gpu), "cpu.yaml")


def without_recipe(model: str, choice: str, overrides: Sequence[str]) -> str:
    """Returns a hint for error messages if a stage file of the user lacks the recipe that its program has; else an
    empty string.

    Args:
        model: name of the model, the first part of the names of recipes.
        choice: that of `stage=`.

    Raises:
        ConfigError: as `program_of`.
        OSError: a file cannot be read.
    """
    program = program_of(choice, overrides)
    recipe_of_program = conf_directory() / "recipe" / f"{model}_{program}.yaml"
    user_recipe = f"recipe/{model}_{choice}.yaml"
    folders = own_folders(overrides)
    has_recipe = any((folder / user_recipe).is_file() for folder in folders)
    if choice == program or not recipe_of_program.is_file() or has_recipe:
        return ""
    return f" ({recipe_of_program} does not apply to stage={choice}: copy it to {folders[0] / user_recipe})"


@contextmanager
def one_line_for_yaml() -> Iterator[None]:
    """Turns the error of a file that is no YAML, or has a key twice, into one line with the file and its line, inside
    the block.

    Other errors pass unchanged.

    Raises:
        ConfigError: in place of a YAMLError.
    """
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{mark.name}:{mark.line + 1}" if mark else "a configuration file"
        problem = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        # OmegaConf's reader refuses what YAML allows.
        _, _, key = problem.partition("found duplicate key ")
        if key:
            raise ConfigError(f"{where}: the key {key} is given twice: expected each key once") from error
        raise ConfigError(
            f"{where}: no YAML: {problem}: expected spaces for indentation, closed brackets and quotes"
        ) from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigError(f"{' '.join(str(error).split())}: expected a YAML file in UTF-8") from error


def _check_utf8(file: Path) -> None:
    """Refuses a file that is not UTF-8.

    Raises:
        ConfigError: names the byte, or why the file cannot be read.
    """
    try:
        file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is not UTF-8: convert the file to UTF-8") from error


def _entries(override: str) -> list[str]:
    """Returns the entries of an override `hydra.searchpath=[DIR, ...]` as they are written.

    Raises:
        ConfigError: its value is no list of texts.
    """
    try:
        entries = OverridesParser.create().parse_override(override).value()
    except HydraException as error:
        raise ConfigError(f"{override}: expected {KEY}=[DIR, ...]") from error
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ConfigError(f"{override}: expected {KEY}=[DIR, ...]")
    return [str(entry) for entry in entries]


def _folder(entry: str) -> Path:
    """Returns the folder of an entry of Hydra's search path: a path, `file://PATH` or `pkg://MODULE`.

    Raises:
        ConfigError: the folder or package does not exist, or the scheme is another one.
    """
    scheme, separator, address = entry.partition("://")
    if separator and scheme == "pkg":
        # A module that is a single file has no folder.
        spec = importlib.util.find_spec(address)
        if not spec or not spec.submodule_search_locations:
            raise ConfigError(f"{KEY}: {entry}: there is no such package")
        return Path(next(iter(spec.submodule_search_locations)))
    if separator and scheme != "file":
        raise ConfigError(f"{KEY}: {entry}: expected a folder of this machine")

    folder = Path(entry.removeprefix("file://")).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(
            f"{FLAGS[0]} {entry}: there is no folder {folder}: expected one laid out as {conf_directory()} ({KEY})"
        )
    return folder
