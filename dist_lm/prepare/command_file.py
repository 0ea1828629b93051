"""Experiments that hold a whole command: `experiment=ours` stands for the overrides in DIR/experiment/ours.yaml.

    stage: sft            # what the command runs
    corpus: ours          # a choice of a group
    stages:               # keys of the stages that the command runs, by stage
      sft: {init_from: "hf:models/SmolLM2", epochs: 3}

Such a file has the key `stage` with the name of a stage; other experiments are files of Hydra. Words of the command
line come behind those of the file, so they win. `dist-lm recipe new` writes such files.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_lm.errors import ConfigError
from dist_lm.prepare.conf_folders import conf_directory, content_of, own_folders

PLAIN = re.compile(r"[A-Za-z0-9_./~:@+-]+")  # texts that Hydra reads as they are


def command_file(name: str, overrides: Sequence[str] = ()) -> Path | None:
    """Returns the file of an experiment that holds a command; None if there is none of this name, or it is one of
    Hydra's.

    Raises:
        ConfigError: the file is no YAML, or a folder of the user cannot be used.
        OSError: a file cannot be read.
    """
    for folder in (conf_directory(), *own_folders(overrides)):
        file = folder / "experiment" / f"{name}.yaml"
        if file.is_file() and isinstance(content_of(file).get("stage"), str):
            return file
    return None


def overrides_in(file: Path) -> list[str]:
    """Returns the overrides of a command file but `stage=NAME`; keys of stages are `stages.NAME.KEY`.

    Raises:
        ConfigError: the file is no YAML, or has a text that no override can have.
    """
    return list(_overrides(content_of(file), file))


def _overrides(content: dict[Any, Any], file: Path, prefix: str = "") -> Iterator[str]:
    """Yields `key=value` for every value of nested keys.

    Raises:
        ConfigError: a value is no text, number, list or mapping that an override can have.
    """
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key == "stage":
            continue
        if isinstance(value, dict) and value:
            yield from _overrides(value, file, f"{key}.")
        else:
            yield f"{key}={_word(value, f'{file}: {key}')}"


def _word(value: Any, where: str) -> str:
    """Returns a value as an override has it.

    Raises:
        ConfigError: the text has a line break or a quotation mark; names the place.
    """
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return repr(value)
    if value == {}:
        return "{}"
    if isinstance(value, list):
        return f"[{','.join(_word(entry, where) for entry in value)}]"
    if isinstance(value, dict):  # in a list, such as a phase
        return f"{{{','.join(f'{name}:{_word(entry, where)}' for name, entry in value.items())}}}"
    text = str(value)
    if not text.isprintable() or "'" in text:
        raise ConfigError(f"{where}: expected a text without line breaks and quotation marks, found {text!r}")
    # The names of paths stand alone, because a prefix such as hf: is looked for at the beginning of the value.
    return text if PLAIN.fullmatch(text) else f"'{text}'"
