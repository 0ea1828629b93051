"""From the command line to a `Config`: Hydra composes, the dataclasses validate, every error is one line.

The configurations of earlier stages are composed from the same command line: `stage.KEY` and `profile.KEY` belong to
the target stage, `stages.NAME.KEY` to stage NAME.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache, reduce
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from dist_lm.config.corpus import HF, TRAIN, check_sources
from dist_lm.config.renamed import present_key
from dist_lm.config.root import Config, load_yaml
from dist_lm.errors import ConfigError, did_you_mean, require
from dist_lm.prepare.command_file import command_file
from dist_lm.prepare.conf_folders import (
    GROUPS,
    KEY,
    RECIPE,
    check_experiment,
    choices,
    conf_directory,
    content_of,
    default_choice,
    default_stage,
    local_hardware,
    one_line_for_yaml,
    own_folders,
    program_of,
    recipe_override,
    search_path,
    without_recipe,
)
from dist_lm.stages.registry import all_stages, stage_named, stage_names
from dist_lm.tracking.redact import check_no_secrets, redact_command

PIPELINE = "pipeline"
CORPORA = "corpus.corpora"
NAMED = ("model", "corpus", "stage")  # groups whose files may leave out `name`
VOCAB_SIZE = "model.vocab_size"
STEPS, EPOCHS = "stage.steps", "stage.epochs"


def register_schema(schema: type[Config]) -> None:
    """Registers in Hydra's ConfigStore (one per process) what conf/config.yaml names without a file: schema,
    hardware=auto."""
    store = ConfigStore.instance()
    store.store(name="schema", node=_structured(schema))
    store.store(group="hardware", name="auto", node=_hardware_of_this_machine())


# Hydra copies what is registered, so each is made once.
@cache
def _structured(schema: type[Config]) -> DictConfig:
    return OmegaConf.structured(schema)


@cache
def _hardware_of_this_machine() -> DictConfig | ListConfig:
    return load_yaml(conf_directory() / "hardware" / local_hardware())


def compose_config(overrides: Sequence[str]) -> Config:
    """Composes the configuration of `overrides` (`group=choice`, `key=value`) and validates it; later overrides win.

    Without `stage=`, the default of conf/config.yaml applies. `model.vocab_size` becomes that of the tokenizer which
    `tokenizer=` names: a file, `hf:SOURCE`, or with `keep` the one of the work directory. With `tokenizer=train` it
    stays as configured, even if the work directory has a tokenizer. Nothing is written; `hf:SOURCE` of a model or
    tokenizer may download, and Hydra's registers of the process change.

    Raises:
        ConfigError: unknown key, wrong type, value out of bounds, a secret, a folder of the user that cannot be used,
            a file that is no YAML, an experiment that holds a command, no tokenizer at its path, or an invalid
            combination, such as a `model.vocab_size` in the command that is not the tokenizer's. The message is one
            line.
        ArtefactError: the snapshot of `model=hf:SOURCE` or an existing tokenizer cannot be read.
        UserError: a package that is needed to read a model or tokenizer is not installed.
        OSError: a file cannot be read.
    """
    path = search_path(overrides)
    folders = [text for text in overrides if text.startswith(f"{KEY}=")]
    overrides = [text for text in overrides if text not in folders]
    parsed = [_parse(text) for text in overrides]

    # Keys are checked against the schema of the stage before Hydra sees them, because its messages take many lines.
    stage_choices = [str(override.value()) for override in parsed if override.key_or_group == "stage"]
    choice = [default_stage(), *stage_choices][-1]
    stage = program_of(choice, folders)
    # `_check_exists` refuses other names.
    schema = stage_named(stage).schema if stage in stage_names() else Config
    for override in parsed:
        _check_exists(override, schema, folders, stage)
        is_experiment = override.key_or_group == "experiment" and override.value() is not None
        if is_experiment and command_file(str(override.value()), folders):
            raise ConfigError(
                f"experiment={override.value()}: this file holds a whole command, which `python -m dist_lm.launch` runs"
            )

    register_schema(schema)
    try:
        with one_line_for_yaml(), initialize_config_dir(str(conf_directory()), version_base="1.3"):
            composed = compose("config", overrides=[*path, *for_hydra(overrides, schema, folders)])
        _replace_corpora(composed, parsed)
        # A file that leaves out its name is named by the last choice of its group.
        for override in reversed(parsed):
            if override.key_or_group in NAMED and OmegaConf.is_missing(composed[override.key_or_group], "name"):
                composed[override.key_or_group].name = override.value()
        _follow_tokenizer(composed, parsed)
        _follow_epochs(composed, parsed)
        try:
            config = OmegaConf.to_object(composed)
        except ConfigError as error:
            raise ConfigError(f"{error}{without_recipe(composed.model.name, choice, folders)}") from error
    except (HydraException, OmegaConfBaseException) as error:
        _check_corpora(parsed, folders)
        raise ConfigError(_in_one_line(error, parsed, schema, stage)) from error

    assert isinstance(config, Config)
    check_no_secrets(asdict(config), os.environ)
    require(config.stage.name == stage, "stage.name", config.stage.name, f"{stage}, the stage whose program runs")
    require("://" not in config.work_dir, "work_dir", config.work_dir, "a folder of a file system that all nodes share")
    return config


def _follow_tokenizer(composed: Any, overrides: Sequence[Override]) -> None:
    """Sets `model.vocab_size` in `composed` to that of an existing tokenizer; with tokenizer=train it changes nothing.

    It also changes nothing if the size is not known yet. A tokenizer of the hub is downloaded.

    Raises:
        ConfigError: the command gives `model.vocab_size`, and the tokenizer has another size; or there is no tokenizer
            at the path.
        ArtefactError: the file is no tokenizer, or there is no model `hf:SOURCE`.
        UserError: a package that is needed is not installed.
    """
    if composed.tokenizer.source == TRAIN:
        return
    from dist_lm.interop.existing_tokenizer import existing_vocab_size

    tokenizer: Any = OmegaConf.to_object(composed.tokenizer)
    vocab_size = existing_vocab_size(tokenizer, composed.work_dir)
    if vocab_size is None:
        return
    given_sizes = [override.value() for override in overrides if override.key_or_group == VOCAB_SIZE]
    if given_sizes and given_sizes[-1] != vocab_size:
        raise ConfigError(
            f"{VOCAB_SIZE}={given_sizes[-1]}: tokenizer={tokenizer.source} has {vocab_size} pieces: give "
            f"{VOCAB_SIZE}={vocab_size}, or leave it out"
        )
    OmegaConf.update(composed, VOCAB_SIZE, vocab_size)


def _follow_epochs(composed: Any, overrides: Sequence[Override]) -> None:
    """Sets `stage.steps` in `composed` to 0 if it follows from `stage.epochs`, which needs the corpus. Steps of the
    command replace epochs of a file.

    Raises:
        ConfigError: the command sets both.
    """
    epochs = composed.stage.get("epochs")
    if not epochs:
        return
    given_steps = [override.value() for override in overrides if override.key_or_group == STEPS]
    if given_steps and not any(override.key_or_group == EPOCHS for override in overrides):
        OmegaConf.update(composed, EPOCHS, 0.0)
        return
    require(not given_steps, STEPS, given_steps[-1:], f"not together with stage.epochs={epochs}: leave one of them out")
    OmegaConf.update(composed, STEPS, 0)


def overrides_of(stage: str, target: str, overrides: Sequence[str]) -> list[str]:
    """Returns the overrides of a command line for `target` that apply to `stage`, with `stage=` in front.

    Behind it come `model=` and `tokenizer=` if they follow from `init_from=hf:SOURCE`. Keys `stage.KEY`, `profile.KEY`
    and those of groups that only `target` has are left out for an earlier stage; `stages.NAME.KEY` of that stage
    becomes `stage.KEY`. A file of the user that the command chooses for `target` stays (`stage=my_code`).

    Raises:
        ConfigError: there is no stage `target`, or the entry point of another package does not name one.
    """
    target_groups = ("stage.", "profile.", *(f"{name}." for name in own_groups(stage_named(target).schema)))
    for_stage: list[str] = []
    for override in overrides:
        if match := re.match(r"stages\.(\w+)\.(.+)", override, flags=re.DOTALL):
            if match.group(1) == stage:
                for_stage.append(f"stage.{match.group(2)}")
        elif override.startswith("stage="):
            continue
        elif stage == target or not override.startswith(target_groups):
            for_stage.append(override)

    # The user's own stage file, such as stage=my_code, stays; its program is `target`.
    stage_override = f"stage={stage}"
    if stage == target:
        choices_of_stage = [override for override in overrides if override.startswith("stage=")]
        if choices_of_stage and choices_of_stage[-1] != f"stage={PIPELINE}":
            stage_override = choices_of_stage[-1]
    return [stage_override, *_following(overrides), *for_stage]


def _following(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides `model=` and `tokenizer=` that follow from `init_from=hf:SOURCE` of the target or a stage
    on the way.

    The last such start counts. A group that the command sets itself is left out; without such a start the list is
    empty.
    """
    imported = [text for text in overrides if re.match(rf"(stage|stages\.\w+)\.init_from={HF}", text)]
    if not imported:
        return []
    source = imported[-1].partition("=")[2]
    forms_of = {"model": ("model=",), "tokenizer": ("tokenizer=", "tokenizer.source=")}
    return [
        f"{group}={source}"
        for group, forms in forms_of.items()
        if not any(text.startswith(forms) for text in overrides)
    ]


def own_groups(schema: type[Config]) -> list[str]:
    """Returns the configuration groups that `schema` adds to `Config`."""
    common = {group.name for group in fields(Config)}
    return [group.name for group in fields(schema) if group.name not in common]


def target_stage(overrides: Sequence[str]) -> str:
    """Returns the target stage of a command line; `stage=pipeline` means the last stage of the pipeline.

    Raises:
        ConfigError: no stage is given, the name is unknown, a folder of the user cannot be used, or the user's stage
            file is no YAML or names no stage.
        OSError: a file cannot be read.
    """
    stage_choices = [text.split("=", 1)[1] for text in overrides if text.startswith("stage=")]
    known_choices = choices("stage", overrides)
    accepted = ", ".join([*known_choices, PIPELINE])
    if not stage_choices:
        raise ConfigError(f"stage is not given: expected stage=S with S one of {accepted}")

    choice = stage_choices[-1]
    if choice == PIPELINE:
        return [stage.name for stage in all_stages() if stage.in_pipeline][-1]
    if choice not in known_choices:
        hint = did_you_mean(choice, [*known_choices, PIPELINE], "stage=")
        raise ConfigError(f"stage={choice}: {hint}expected one of {accepted}")
    return program_of(choice, overrides)


def _parse(text: str) -> Override:
    """Returns the parsed override; `tokenizer=VALUE` is short for `tokenizer.source=VALUE`.

    Raises:
        ConfigError: the text is not of the form key=value or group=choice.
    """
    if text.startswith("tokenizer="):
        text = text.replace("tokenizer=", "tokenizer.source=", 1)
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{text}: not of the form key=value or group=choice ({reason})") from error


def _check_exists(override: Override, schema: type[Config], folders: Sequence[str], stage: str) -> None:
    """Refuses an override that is no `key=value` or `group=choice` of `schema`. Values of keys are not checked.

    Args:
        folders: the overrides that name folders of the user, whose files are choices too.
        stage: the stage whose program runs.

    Raises:
        ConfigError: one line that says what would be accepted; or a folder of the user cannot be used.
    """
    key, override_text = override.key_or_group, _shown(override)
    if override.is_add() or override.is_delete():
        raise ConfigError(f"{override_text}: keys cannot be added or removed; expected key=value")
    if override.is_sweep_override():
        raise ConfigError(f"{override_text}: a command starts one run; expected a single value")
    if key in GROUPS:
        accepted = choices(key, folders)
        if override.value() not in accepted and not _is_snapshot(override):
            hint = did_you_mean(str(override.value()), accepted, f"{key}=")
            raise ConfigError(f"{override_text}: {hint}expected one of {', '.join(accepted)}")
        return

    # Follow the key through dataclasses, mappings and lists.
    node: Any = schema
    # Whether the last part is a key of a mapping, which users choose.
    is_entry = False
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if is_dataclass(node) and part not in (f.name for f in fields(node)):
            raise ConfigError(_no_such_key(override_text, parts[: depth + 1], node, stage))
        if _is(list, node) and not part.isdecimal():
            list_key = ".".join(parts[:depth])
            raise ConfigError(f"{override_text}: {list_key} is a list; expected {list_key}={_type_name(node)}")
        is_entry = not is_dataclass(node)
        node = _inner_type(node, part)
    if is_dataclass(node) and not (is_entry and isinstance(override.value(), dict)):
        raise ConfigError(
            f"{override_text}: expected {key}.KEY=value with KEY one of {', '.join(f.name for f in fields(node))}"
        )


def _no_such_key(override_text: str, parts: Sequence[str], node: Any, stage: str) -> str:
    """Returns the message for a key that the stage does not have.

    It names the new name of a renamed key, or says to leave a removed one out. For any other key it names a similar key
    of `node`, if there is one, and all keys of `node`.

    Args:
        override_text: the override, without secrets.
        parts: the key up to its first unknown part, at least one.
        node: the dataclass (class or instance) that lacks this part.
        stage: the stage whose program runs.
    """
    present = present_key(".".join(parts), stage)
    if present is not None:
        way_out = f"give {present} in its place" if present else "leave it out"
        return f"{override_text}: no such key of stage {stage}: {way_out}"

    *outer_parts, unknown = parts
    names = [f.name for f in fields(node)]
    hint = did_you_mean(unknown, names, "".join(f"{part}." for part in outer_parts))

    # Other groups than `stage` have the same keys in every stage.
    owner = group = ""
    if outer_parts:
        group = f" of {'.'.join(outer_parts)}"
    if outer_parts[:1] == ["stage"]:
        owner = f" of stage {stage}"
    return f"{override_text}: no such key{owner}; {hint}keys{group}: {', '.join(names)}"


def for_hydra(overrides: Sequence[str], schema: type[Config], folders: Sequence[str] = ()) -> list[str]:
    """Returns the overrides in Hydra's syntax, in their order.

    Keys inside mappings, which the user chooses, get `++`. `recipe=NAME` becomes the override that adds the recipe's
    file, in front of all others, or nothing if it has no file for this stage. `model=hf:SOURCE` becomes the choice of
    that model, which is downloaded without weights and stored in Hydra's ConfigStore.

    Args:
        folders: the overrides that name folders of the user, where recipes and experiments are looked for too.

    Raises:
        ConfigError: an override is not of the form key=value, no file of the recipe is named after a stage, the
            experiment would lose the numbers of the model's size, or a folder of the user cannot be used.
        ArtefactError: the snapshot of `model=hf:SOURCE` cannot be read, or our model lacks an option of it.
        UserError: a package that is needed to read the snapshot is not installed.
        OSError: a file cannot be read.
    """
    parsed = [_parse(text) for text in overrides]
    choice_of = {override.key_or_group: str(override.value()) for override in parsed}
    stage = choice_of.get("stage", default_stage())
    if {"experiment", "model"} <= choice_of.keys():
        check_experiment(choice_of["experiment"], choice_of["model"], stage, folders)

    recipe: list[str] = []
    if RECIPE in choice_of:
        # An experiment has its own numbers, whatever the size.
        model = ""
        if "experiment" not in choice_of:
            model = choice_of.get("model", default_choice("model"))
        recipe = recipe_override(choice_of[RECIPE], model, stage, folders)
    return [*recipe, *(_for_hydra(override, schema) for override in parsed if override.key_or_group != RECIPE)]


def _is_snapshot(override: Override) -> bool:
    return override.key_or_group == "model" and str(override.value()).startswith(HF)


def _for_hydra(override: Override, schema: type[Config]) -> str:
    """Returns one override in Hydra's syntax; see `for_hydra`. Puts the model of `hf:SOURCE` into the ConfigStore.

    Raises:
        ArtefactError: the snapshot of `model=hf:SOURCE` cannot be read, or our model lacks an option of it.
        UserError: a package that is needed to read the snapshot is not installed.
    """
    if _is_snapshot(override):
        from dist_lm.interop.snapshot import named_model

        # Like hardware=auto, the model of `hf:SOURCE` has no file, so Hydra's group `model` gets it from here.
        model = named_model(str(override.value()))
        ConfigStore.instance().store(group="model", name=f"hf_{model.name}", node=asdict(model))
        return f"model=hf_{model.name}"

    node: Any = schema
    in_mapping = False
    parts = override.key_or_group.split(".")
    for depth, part in enumerate(parts):
        outer = node
        node = _inner_type(outer, part)
        if is_dataclass(node) and _is(dict, outer):
            # Hydra cannot create a dataclass under a new key, but accepts one as the value of the mapping
            value = str(override.input_line).partition("=")[2] or "''"
            for name in reversed(parts[depth:]):
                value = f"{{{name}: {value}}}"
            return f"++{'.'.join(parts[:depth])}={value}"
        in_mapping = in_mapping or _is(dict, node)

    # `++` adds the key or replaces its value; Hydra refuses a new key without it.
    return f"{'++' if in_mapping else ''}{override.input_line}"


def _replace_corpora(composed: DictConfig, parsed: Sequence[Override]) -> None:
    """Lets `corpus.corpora={...}` replace all corpora in `composed`, as a corpus file does. Hydra merges: `{}` would
    change nothing.

    Later `corpus.corpora.NAME=...` are applied again. Other mappings are merged, so that `rlhf.rewards={...}` adds a
    part.
    """
    if not any(override.key_or_group == CORPORA for override in parsed):
        return
    for override in parsed:
        if override.key_or_group == CORPORA:
            OmegaConf.update(composed, CORPORA, {}, merge=False)
        if override.key_or_group.startswith(CORPORA):
            OmegaConf.update(composed, override.key_or_group, override.value(), force_add=True)


def _check_corpora(parsed: Sequence[Override], folders: Sequence[str]) -> None:
    """Refuses a corpus file or override with a wrong source by its place, which OmegaConf does not know.

    Raises:
        ConfigError: names the file or key of the source, or a file that is no YAML; without a wrong source the function
            returns.
    """
    for override in parsed:
        key, value = override.key_or_group, override.value()
        if key == CORPORA and value is not None:
            check_sources(value, CORPORA)
        elif re.fullmatch(rf"{re.escape(CORPORA)}\.[^.]+", key):
            check_sources({key.removeprefix(f"{CORPORA}."): value}, CORPORA)
        elif key == "corpus":
            for file in [folder / "corpus" / f"{value}.yaml" for folder in own_folders(folders)]:
                if file.is_file() and (corpora := content_of(file).get("corpora")) is not None:
                    check_sources(corpora, f"{file}: corpora")


def _inner_type(node: Any, part: str) -> Any:
    """Returns the type of a field of a dataclass, or of the values of a mapping or list; None for other types."""
    if is_dataclass(node):
        return get_type_hints(node).get(part)
    return next((get_args(option)[-1] for option in _options(node) if get_origin(option) in (dict, list)), None)


def _options(node: Any) -> list[Any]:
    """Returns the alternatives of a union without None: [int] for `int | None`."""
    alternatives = (node,)
    if get_origin(node) in (Union, UnionType):
        alternatives = get_args(node)
    return [option for option in alternatives if option is not type(None)]


def _is(kind: type, node: Any) -> bool:
    """Returns whether a type is a dict (or a list), or a union with one."""
    return any(get_origin(option) is kind for option in _options(node))


def _shown(override: Override) -> str:
    """Returns the text of an override without secrets."""
    return redact_command([override.input_line or ""])[0]


def _in_one_line(error: Exception, overrides: Sequence[Override], schema: type[Config], stage: str) -> str:
    """Returns the message of a Hydra or OmegaConf error in one line, with the key=value that caused it where that is
    known, and without secrets.

    Args:
        stage: the stage whose program runs.
    """
    cause = error
    while isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    lines = str(cause).splitlines()
    message = lines[0]
    if message.endswith(":"):
        message = " ".join(lines[:2])

    key = getattr(cause, "full_key", None)
    if not key:
        return message
    override_text = next((_shown(override) for override in overrides if override.key_or_group == key), None)

    if isinstance(cause, ConfigKeyError):
        parts = key.split(".")
        node = _type_of(parts[:-1], schema)
        # Inside a list, whose place OmegaConf does not know.
        if len(parts) == 1 and cause.object_type is not schema:
            node = cause.object_type
            override_text = f"{key} of a {cause.object_type_str}"
        if is_dataclass(node):
            return _no_such_key(override_text or key, parts, node, stage)
        return f"{key}: {message}"

    if override_text is None and isinstance(cause, ValidationError):
        override_text = redact_command([f"{key}={cause.value}"])[0]
    if not override_text:
        return f"{key}: {message}"
    # An entry of a list is profile.steps[0].
    parts = key.replace("[", ".").replace("]", "").split(".")
    return f"{override_text}: expected {_type_name(_type_of(parts, schema))}"


def _type_of(parts: Sequence[str], schema: type[Config]) -> Any:
    """Returns the type of the key with these parts."""
    return reduce(_inner_type, parts, schema)


def _type_name(node: Any) -> str:
    if node is None:
        return "another type"
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    return " or ".join(names.get(option) or _form(option) for option in _options(node))


def _form(node: Any) -> str:
    """Returns the form of a dataclass, mapping or list, for messages, such as `{NAME: a number}`; else its name."""
    if is_dataclass(node):
        return "{" + ", ".join(f"{f.name}: ..." for f in fields(node)) + "}"
    inner = _type_name(_inner_type(node, "NAME"))
    if _is(dict, node):
        return f"{{NAME: {inner}}}"
    if _is(list, node):
        return f"[{inner}, ...]"
    return str(node)
