"""Reads prompts from files: .jsonl with `prompt` and optionally `id` and `suffix`, or .txt with one prompt per line.

Blank lines are skipped.

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
QUOTED = 200  # characters quoted of an invalid line


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


def find_prompts(where: str, key: str = "stage.prompts", kinds: Sequence[str] = KINDS) -> list[Path]:
    """Returns the files that a key names, in alphabetical order. They are not read.

    Args:
        where: file or glob; `~` is the home folder, `**` any number of folders.
        key: the configuration key, for messages.
        kinds: the suffixes that are accepted, in lower case.

    Raises:
        ConfigError: `where` is empty, no file matches, or a file has another suffix.
    """
    *first, last = kinds
    accepted = f"{', '.join(first)} or {last}"
    path = Path(where).expanduser()
    files = [path]
    if not path.is_file():  # a file may have the letters of a glob in its name
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207  may be absolute
    files = [file for file in files if file.is_file()]
    if not where:
        raise ConfigError(f"{key}=: expected a file or glob of {accepted}")
    if not files:
        raise ConfigError(f"{key}={where}: no such file; expected a file or glob of {accepted}")
    for file in files:
        if not file.name.lower().endswith(tuple(kinds)):
            problem = f"neither {' nor '.join(kinds)}" if len(kinds) == 2 else f"none of {', '.join(kinds)}"
            raise ConfigError(f"{key}={where}: {file.name} is {problem}")
    return files


def count_prompts(files: Sequence[Path], key: str = "stage.prompts") -> dict[str, Any]:
    """Counts the prompts, invalid ones included, and hashes the files: `{prompts, files: [{name, sha256}]}`.

    Reads every file.

    Args:
        key: the configuration key, for messages.

    Raises:
        ConfigError: there are no prompts, the first line of a file has no `prompt`, or two prompts have the same id.
        OSError: a file cannot be read.
    """
    for file in files:
        _check_keys(file, key)
    return {
        "prompts": _count(files, key),
        "files": [{"name": file.name, "sha256": durable.sha256_of(file)} for file in files],
    }


def read_prompts(files: Sequence[Path]) -> Iterator[Prompt]:
    """Yields every prompt, invalid ones included, one at a time.

    Raises:
        OSError: a file cannot be read.
    """
    number = 0
    for file in files:
        for line_number, line in _lines(file):
            yield _parse(number, line, file, line_number)
            number += 1


def _check_keys(file: Path, key: str) -> None:
    """Refuses a .jsonl whose first line has no `prompt`: probably the field has another name in every line.

    A first line that is broken passes: `read_prompts` gives it an error. A .txt and an empty file pass too.

    Args:
        key: the configuration key, for messages.

    Raises:
        ConfigError: names the keys of the line.
    """
    if file.suffix == ".txt" or (first := next(_lines(file), None)) is None:
        return
    line_number, line = first
    try:
        fields = _load(line.decode())
    except (ValueError, RecursionError):
        return  # `read_prompts` refuses this line alone
    if isinstance(fields, dict) and "prompt" not in fields:
        keys = ", ".join(fields) or "(none)"
        raise ConfigError(
            f"{key}: {file.name} line {line_number} has the keys {keys}; expected `prompt`, and perhaps `id`"
        )


def _count(files: Sequence[Path], key: str) -> int:
    """Returns the number of prompts in the files, invalid ones included. Reads every file.

    Args:
        key: the configuration key, for messages.

    Raises:
        ConfigError: there are none, or two have the same id (1 and "1" are the same).
    """
    # Lines of .txt have their number as id, so no two are equal.
    if all(file.suffix == ".txt" for file in files):
        count = sum(1 for file in files for _ in _lines(file))
    else:
        # As texts, because evaluation names questions by the text of the id: 1 and "1" are equal.
        number_of_id: dict[str, int] = {}
        count = 0

        for prompt in read_prompts(files):
            first_number = number_of_id.setdefault(str(prompt.id), prompt.number)
            if first_number != prompt.number:
                # Only numbers are in memory, so the files are read again for the words of the error.
                earlier = next(candidate for candidate in read_prompts(files) if candidate.number == first_number)
                raise ConfigError(
                    f"{key}: id {json.dumps(prompt.id, ensure_ascii=False)} occurs twice, {earlier.place} and "
                    f"{prompt.place}: give each its own (a prompt without an id has its number, from 0, for one)"
                )
            count += 1
    if not count:
        raise ConfigError(f"{key}: no prompts in {', '.join(file.name for file in files)}")
    return count


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, content) of each line that is not blank."""
    with file.open("rb") as opened:
        for line_number, line in enumerate(opened, 1):
            if line.strip():
                yield line_number, line.rstrip(b"\r\n")


def _parse(number: int, line: bytes, file: Path, line_number: int) -> Prompt:
    """Returns the prompt of a line; an invalid line gives a prompt with its `error`. Nothing is raised.

    A lone surrogate in any field makes the line invalid, and so does an id that is neither a text nor an integer.

    Args:
        number: of the prompt, from 0 over all files; it is the id if the line has none.
        line_number: from 1.
    """
    place = f"{file.name} line {line_number}"

    def broken(reason: str, id_: str | int = number) -> Prompt:
        """Returns the prompt of an invalid line, with the beginning of the line."""
        return Prompt(number, id_, "", place, reason, line.decode(errors="replace")[:QUOTED])

    try:
        text = line.decode()
    except UnicodeDecodeError:
        return broken("not UTF-8")
    if file.suffix == ".txt":
        return Prompt(number, number, text, place)

    try:
        fields = _load(text)
    except (ValueError, RecursionError) as error:
        return broken(f"not JSON ({error})")
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        return broken("expected an object with a text `prompt`")

    id_ = fields.get("id")
    if id_ is None:
        id_ = number
    if type(id_) not in (str, int):
        return broken("id is neither a text nor a whole number")
    if not _is_unicode(str(id_)):
        return broken("id holds a lone surrogate")

    # JSON may escape half a character, which neither a tokenizer nor a file in UTF-8 takes.
    suffix = fields.get("suffix")
    if not isinstance(suffix, str | None):
        return broken("suffix is no text", id_)
    for name, text in (("prompt", fields["prompt"]), ("suffix", suffix or "")):
        if not _is_unicode(text):
            return broken(f"{name} holds a lone surrogate", id_)
    extra = {name: content for name, content in fields.items() if name not in ("prompt", "id", "suffix")}
    if not _is_unicode(json.dumps(extra, ensure_ascii=False)):
        return broken("another field holds a lone surrogate", id_)
    return Prompt(number, id_, fields["prompt"], place, extra=extra, suffix=suffix)


def _load(text: str) -> Any:
    """Parses JSON of any kind.

    Raises:
        ValueError, RecursionError: it is none (NaN and Infinity are none), or nested too deeply.
    """

    def refuse(constant: str) -> None:  # NaN and Infinity, which Python accepts, are not JSON
        raise ValueError(f"{constant} is no number")

    return json.loads(text, parse_constant=refuse)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
