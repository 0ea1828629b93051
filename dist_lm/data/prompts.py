"""Prompts from files: .jsonl with `prompt` and perhaps `id`, or .txt with a prompt a line. Blank lines are passed over.

They are numbered in the order of the files' names and of the lines. One that cannot be read is still there, with the
reason, so that the numbers of others do not depend on it.
"""

import glob
import json
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dist_lm import durable
from dist_lm.errors import ArtefactError, ConfigError

KINDS = (".jsonl", ".txt")
TIMEOUT_S = 60.0  # without a byte from a server


@dataclass(frozen=True)
class Prompt:
    """One line of a file."""

    number: int  # among all
    id: str  # its own, or the number
    text: str
    error: str = ""  # why it cannot be used


def find_prompts(where: str, downloads: Path | None = None) -> list[Path]:
    """The files that stage.prompts names.

    Args:
        where: file, glob or http(s) address.
        downloads: where the file of an address is kept, and looked for; None: it is not fetched yet.

    Raises:
        ConfigError: there are none, or they are of another kind.
        ArtefactError: the server does not give the file.
    """
    if where.startswith(("http://", "https://")):
        name = Path(urlsplit(where).path).name
        _check_kind(where, name)
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
        raise ConfigError(f"stage.prompts={where}: no such file; expected a file, glob or address of .jsonl or .txt")
    for file in files:
        _check_kind(where, file.name)
    return files


def survey(files: Sequence[Path]) -> dict[str, Any]:
    """How many prompts there are, and what the files are: `{prompts, files: [{name, sha256}]}`."""
    return {
        "prompts": sum(1 for file in files for _ in _lines(file)),
        "files": [{"name": file.name, "sha256": durable.sha256_of(file)} for file in files],
    }


def read_prompts(files: Sequence[Path]) -> Iterator[Prompt]:
    """Every prompt, one at a time."""
    number = 0
    for file in files:
        for place, line in _lines(file):
            yield _parse(number, line, file, place)
            number += 1


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content) of the lines that are not blank."""
    with file.open("rb") as opened:
        for place, line in enumerate(opened, 1):
            if line.strip():
                yield place, line.rstrip(b"\r\n")


def _parse(number: int, line: bytes, file: Path, place: int) -> Prompt:
    def broken(reason: str, id_: str = str(number)) -> Prompt:
        return Prompt(number, id_, "", f"{file.name}, line {place}: {reason}")

    try:
        text = line.decode()
    except UnicodeDecodeError:
        return broken("not UTF-8")
    if file.suffix == ".txt":
        return Prompt(number, str(number), text)
    try:
        value = json.loads(text)
    except ValueError as error:
        return broken(f"not JSON ({error})")
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        return broken("expected an object with a text `prompt`")
    id_ = str(number) if value.get("id") is None else str(value["id"])
    if not _is_unicode(id_):
        return broken("id holds a lone surrogate")
    if not _is_unicode(value["prompt"]):
        return broken("prompt holds a lone surrogate", id_)
    return Prompt(number, id_, value["prompt"])


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _check_kind(where: str, name: str) -> None:
    if not name.endswith(KINDS):
        raise ConfigError(f"stage.prompts={where}: {name or 'it'} is neither .jsonl nor .txt")


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
