"""Prompts from files: .jsonl with `prompt` and optionally `id` and `suffix`, or .txt with one prompt per line. Skips
blank lines.

Prompts are numbered in the order of file names and lines. An invalid line keeps its number and gets the reason, so the
numbers of other prompts do not depend on it. Other fields of a line are returned with its prompt.
"""

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_lm.errors import ConfigError
from dist_lm.storage import durable

KINDS = (".jsonl", ".txt")
SHOWN = 200  # characters kept of an invalid line


@dataclass(frozen=True)
class Prompt:
    """One line of a file."""

    number: int  # from 0, over all files
    id: str | int  # `id` of the line, else the number
    text: str
    place: str = ""  # `FILE line N`
    error: str = ""  # why the line is invalid; empty: it is valid
    line: str = ""  # the beginning of an invalid line
    extra: dict[str, Any] = field(default_factory=dict)  # other fields of the line
    suffix: str | None = None  # the text behind the answer: the prompt asks for the middle


def find_prompts(where: str, key: str = "stage.prompts") -> list[Path]:
    """The files that a key names.

    Args:
        where: file or glob.
        key: the configuration key, for messages.

    Raises:
        ConfigError: no file matches, or a file is neither .jsonl nor .txt.
    """
    path = Path(where).expanduser()
    files = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207  may be absolute
    files = [file for file in files if file.is_file()]
    if not where or not files:
        raise ConfigError(f"{key}={where}: no such file; expected a file or glob of .jsonl or .txt")
    for file in files:
        if file.suffix not in KINDS:
            raise ConfigError(f"{key}={where}: {file.name} is neither .jsonl nor .txt")
    return files


def survey(files: Sequence[Path], key: str = "stage.prompts") -> dict[str, Any]:
    """The number of prompts, and the files with their hashes: `{prompts, files: [{name, sha256}]}`.

    Args:
        key: the configuration key, for messages.

    Raises:
        ConfigError: there are no prompts, the first line of a file has no `prompt`, or two prompts have the same id.
    """
    for file in files:
        _check_keys(file, key)
    return {
        "prompts": _count(files, key),
        "files": [{"name": file.name, "sha256": durable.sha256_of(file)} for file in files],
    }


def read_prompts(files: Sequence[Path]) -> Iterator[Prompt]:
    """Every prompt, one at a time."""
    number = 0
    for file in files:
        for place, line in _lines(file):
            yield _parse(number, line, file, place)
            number += 1


def _check_keys(file: Path, key: str) -> None:
    """Refuse a file whose first line has no `prompt`: probably the field has another name in every line."""
    if file.suffix == ".txt" or (first := next(_lines(file), None)) is None:
        return
    try:
        value = _load(first[1].decode())
    except (ValueError, RecursionError):
        return  # `read_prompts` refuses this line alone
    if isinstance(value, dict) and "prompt" not in value:
        keys = ", ".join(value) or "(none)"
        raise ConfigError(
            f"{key}: {file.name} line {first[0]} has the keys {keys}; expected `prompt`, and perhaps `id`"
        )


def _count(files: Sequence[Path], key: str) -> int:
    """The number of prompts; refuses equal ids."""
    if all(file.suffix == ".txt" for file in files):
        count = sum(1 for file in files for _ in _lines(file))
    else:
        numbers: dict[str, int] = {}  # by id
        count = 0
        for prompt in read_prompts(files):
            first = numbers.setdefault(str(prompt.id), prompt.number)
            if first != prompt.number:
                before = next(one for one in read_prompts(files) if one.number == first)
                raise ConfigError(
                    f"{key}: id {json.dumps(prompt.id, ensure_ascii=False)} occurs twice, {before.place} and "
                    f"{prompt.place}: give each its own (a prompt without an id has its number, from 0, for one)"
                )
            count += 1
    if not count:
        raise ConfigError(f"{key}: no prompts in {', '.join(file.name for file in files)}")
    return count


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, content) of each line that is not blank."""
    with file.open("rb") as opened:
        for place, line in enumerate(opened, 1):
            if line.strip():
                yield place, line.rstrip(b"\r\n")


def _parse(number: int, line: bytes, file: Path, place: int) -> Prompt:
    where = f"{file.name} line {place}"

    def broken(reason: str, id_: str | int = number) -> Prompt:
        return Prompt(number, id_, "", where, reason, line.decode(errors="replace")[:SHOWN])

    try:
        text = line.decode()
    except UnicodeDecodeError:
        return broken("not UTF-8")
    if file.suffix == ".txt":
        return Prompt(number, number, text, where)
    try:
        value = _load(text)
    except (ValueError, RecursionError) as error:
        return broken(f"not JSON ({error})")
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        return broken("expected an object with a text `prompt`")
    id_ = number if value.get("id") is None else value["id"]
    if type(id_) not in (str, int):
        return broken("id is neither a text nor a whole number")
    if not _is_unicode(str(id_)):
        return broken("id holds a lone surrogate")
    suffix = value.get("suffix")
    if not isinstance(suffix, str | None):
        return broken("suffix is no text", id_)
    for name, text in (("prompt", value["prompt"]), ("suffix", suffix or "")):
        if not _is_unicode(text):
            return broken(f"{name} holds a lone surrogate", id_)
    extra = {key: one for key, one in value.items() if key not in ("prompt", "id", "suffix")}
    if not _is_unicode(json.dumps(extra, ensure_ascii=False)):
        return broken("another field holds a lone surrogate", id_)
    return Prompt(number, id_, value["prompt"], where, extra=extra, suffix=suffix)


def _load(text: str) -> Any:
    def refuse(constant: str) -> None:  # NaN and Infinity, which Python accepts, are not JSON
        raise ValueError(f"{constant} is no number")

    return json.loads(text, parse_constant=refuse)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
