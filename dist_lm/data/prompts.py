"""Prompts from files: .jsonl with `prompt` and perhaps `id`, or .txt with a prompt a line. Blank lines are passed over.

They are numbered in the order of the files' names and of the lines. One that cannot be read is still there, with the
reason, so that the numbers of others do not depend on it. What else a line holds goes with its prompt.
"""

import glob
import json
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.storage import durable

KINDS = (".jsonl", ".txt")
TIMEOUT_S = 60.0  # without a byte from a server
SHOWN = 200  # characters of a line that cannot be read


@dataclass(frozen=True)
class Prompt:
    """One line of a file."""

    number: int  # among all
    id: str | int  # its own, or the number
    text: str
    place: str = ""  # `FILE line N`
    error: str = ""  # why it cannot be used
    line: str = ""  # the beginning of a line that cannot be used
    extra: dict[str, Any] = field(default_factory=dict)  # what the line says beside prompt and id


def find_prompts(where: str, downloads: Path | None = None, key: str = "stage.prompts") -> list[Path]:
    """The files that a key names.

    Args:
        where: file, glob or http(s) address.
        downloads: where the file of an address is kept, and looked for; None: it is not fetched yet.
        key: what named them, for messages.

    Raises:
        ConfigError: there are none, or they are of another kind.
        ArtefactError: the server does not give the file.
    """
    if where.startswith(("http://", "https://")):
        name = Path(urlsplit(where).path).name
        _check_kind(key, where, name)
        if downloads is None:
            return []
        kept = downloads / name
        if not kept.exists():
            _download(where, kept)
        return [kept]
    path = Path(where).expanduser()
    files = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207  may be absolute
    files = [file for file in files if file.is_file()]
    if not where or not files:
        raise ConfigError(f"{key}={where}: no such file; expected a file, glob or address of .jsonl or .txt")
    for file in files:
        _check_kind(key, where, file.name)
    return files


def survey(files: Sequence[Path]) -> dict[str, Any]:
    """How many prompts there are, and what the files are: `{prompts, files: [{name, sha256}]}`.

    Raises:
        ConfigError: there are none, the first line of a file has no `prompt`, or two have one id.
    """
    for file in files:
        _check_keys(file)
    return {
        "prompts": _count(files),
        "files": [{"name": file.name, "sha256": durable.sha256_of(file)} for file in files],
    }


def read_prompts(files: Sequence[Path]) -> Iterator[Prompt]:
    """Every prompt, one at a time."""
    number = 0
    for file in files:
        for place, line in _lines(file):
            yield _parse(number, line, file, place)
            number += 1


def _check_keys(file: Path) -> None:
    """One field by another name is the whole file's mistake, not that of each line."""
    if file.suffix == ".txt" or (first := next(_lines(file), None)) is None:
        return
    try:
        value = _load(first[1].decode())
    except (ValueError, RecursionError):
        return  # refused by itself
    if isinstance(value, dict) and "prompt" not in value:
        keys = ", ".join(value) or "(none)"
        raise ConfigError(
            f"stage.prompts: {file.name} line {first[0]} has the keys {keys}; expected `prompt`, and perhaps `id`"
        )


def _count(files: Sequence[Path]) -> int:
    """Of prompts, whose ids are held against each other."""
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
                    f"stage.prompts: id {json.dumps(prompt.id, ensure_ascii=False)} occurs twice, {before.place} and "
                    f"{prompt.place}: give each its own (a prompt without an id has its number, from 0, for one)"
                )
            count += 1
    if not count:
        raise ConfigError(f"stage.prompts: no prompts in {', '.join(file.name for file in files)}")
    return count


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content) of the lines that are not blank."""
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
    if not _is_unicode(value["prompt"]):
        return broken("prompt holds a lone surrogate", id_)
    extra = {key: one for key, one in value.items() if key not in ("prompt", "id")}
    if not _is_unicode(json.dumps(extra, ensure_ascii=False)):
        return broken("another field holds a lone surrogate", id_)
    return Prompt(number, id_, value["prompt"], where, extra=extra)


def _load(text: str) -> Any:
    def refuse(constant: str) -> None:  # JSON has no such numbers, though Python reads and writes them
        raise ValueError(f"{constant} is no number")

    return json.loads(text, parse_constant=refuse)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _check_kind(key: str, where: str, name: str) -> None:
    if not name.endswith(KINDS):
        raise ConfigError(f"{key}={where}: {name or 'it'} is neither .jsonl nor .txt")


def _download(where: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            urllib.request.urlopen(where, timeout=TIMEOUT_S) as answer,  # noqa: S310  http or https: see find_prompts
            tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", suffix=".tmp") as file,
        ):
            shutil.copyfileobj(answer, file)
            file.flush()
            durable.fsync_file(Path(file.name))
            target.hardlink_to(file.name)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ArtefactError(f"stage.prompts={where}: cannot be fetched ({reason})") from error
    durable.fsync_directory(target.parent)
