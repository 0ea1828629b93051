"""Documents whose loss a run leaves out (`stage.without`): a file of ids, one a line.

An id is CORPUS:NUMBER, the folder of the corpus in `work/corpora` and the number of the document in train. A line may
also be a JSON object with the fields `corpus` and `document`, as `dist-lm data where --json` and `dist-lm data step
--json` print. Blank lines, and lines that begin with #, are skipped.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from dist_lm.errors import ArtefactError

DocumentIds = Mapping[str, frozenset[int]]
"""Folder of a corpus -> numbers of documents in train."""


def read_ids(path: Path) -> dict[str, frozenset[int]]:
    """Reads a file of ids.

    Raises:
        ArtefactError: the file is a device or cannot be read, has no id, or a line is none; names the line.
    """
    if path.is_char_device() or path.is_block_device():  # reading /dev/zero would not end
        raise ArtefactError(f"{path}: expected a file of ids, not a device")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path}: cannot be read ({error})") from error

    ids: dict[str, set[int]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        document = _parsed(line.strip())
        if document is None:
            raise ArtefactError(
                f"{path}: line {number}: {line.strip()[:80]!r}: expected CORPUS:NUMBER, such as code:1204, or a line "
                "of `dist-lm data where --json`"
            )
        ids.setdefault(document[0], set()).add(document[1])
    if not ids:
        raise ArtefactError(f"{path}: it names no document: expected lines such as code:1204")
    return {folder: frozenset(numbers) for folder, numbers in sorted(ids.items())}


def _parsed(line: str) -> tuple[str, int] | None:
    """Returns (folder, number) of a line; None if it is no id."""
    folder: object
    number: object = None
    if line.startswith("{"):
        try:
            fields = json.loads(line)
            folder, number = fields["corpus"], fields["document"]
        except (ValueError, KeyError, RecursionError):
            return None
    else:
        folder, _, digits = line.rpartition(":")
        if digits.isascii() and digits.isdecimal() and len(digits) < 19:
            number = int(digits)

    # true is an integer, too.
    if not isinstance(folder, str) or not isinstance(number, int) or isinstance(number, bool) or number < 0:
        return None
    # A folder name must not lead out of work/corpora.
    if not folder or folder != Path(folder).name or folder == "..":
        return None
    return folder, number


def text_of(ids: DocumentIds) -> str:
    """Returns the content of a file of these ids, the same for equal ids: sorted, one a line."""
    return "".join(f"{folder}:{number}\n" for folder in sorted(ids) for number in sorted(ids[folder]))


def digest_of(ids: DocumentIds) -> str:
    """Returns the first 8 hexadecimal digits of the SHA-256 of `text_of`, by which a run is named."""
    return hashlib.sha256(text_of(ids).encode()).hexdigest()[:8]


def merged(left: DocumentIds, right: DocumentIds) -> dict[str, frozenset[int]]:
    """Returns the documents that are in either."""
    return {folder: left.get(folder, frozenset()) | right.get(folder, frozenset()) for folder in {*left, *right}}


def differing(left: DocumentIds, right: DocumentIds) -> dict[str, frozenset[int]]:
    """Returns the documents that are in one of the two alone."""
    changed = {folder: left.get(folder, frozenset()) ^ right.get(folder, frozenset()) for folder in {*left, *right}}
    return {folder: numbers for folder, numbers in changed.items() if numbers}


def count_of(ids: DocumentIds) -> int:
    """Counts the documents."""
    return sum(map(len, ids.values()))
