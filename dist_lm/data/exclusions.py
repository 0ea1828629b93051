"""Train documents of a corpus whose loss never counts: those that sources added later have made unwanted.

A corpus that extends another one (`corpus.extends`) has the tars of that one, which never change. A document in them
that is a copy of an added one which stays by rule, or that contains a text of an added source with `held_out`, is
excluded: its tokens keep their places, and training leaves out its loss as with `stage.without` (`data.without`).

`excluded.jsonl` has a line for each of them, in the order of the documents: {"document": number in train, "reason",
"for": the document for which it is excluded, as its reader names it}. The manifest has the hash of the file.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dist_lm.data.manifest import Manifest, excluded_path, read_manifest
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable


class Exclusion(NamedTuple):
    """A train document that is excluded."""

    document: int  # number in train
    reason: str  # duplicate | near_duplicate | contains_val
    cause: str  # the document for which it is excluded, as its reader names it


def write_exclusions(directory: Path, exclusions: Iterable[Exclusion]) -> dict[str, Any]:
    """Writes the file, and returns its entry for the manifest: its hash, and the number of documents by reason. Without
    a document nothing is written, and the entry is empty.

    Raises:
        OSError: the file cannot be written.
    """
    lines, reasons = [], Counter()
    for document, reason, cause in sorted(exclusions):
        lines.append(json.dumps({"document": document, "reason": reason, "for": cause}) + "\n")
        reasons[reason] += 1
    if not lines:
        return {}
    content = "".join(lines).encode()
    durable.write_bytes(excluded_path(directory), content)
    return {"sha256": hashlib.sha256(content).hexdigest(), "reasons": dict(sorted(reasons.items()))}


def read_exclusions(directory: Path, manifest: Manifest | None = None) -> list[Exclusion]:
    """Returns the excluded documents of a corpus, in their order; most corpora have none.

    Args:
        manifest: of the corpus; None: it is read.

    Raises:
        ArtefactError: the file is missing or damaged, or the manifest is.
    """
    manifest = manifest or read_manifest(directory)
    if not manifest.excluded:
        return []
    path = excluded_path(directory)
    cure = "restore it, or remove this folder and build it again with the same command"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error.strerror}): {cure}") from error
    if hashlib.sha256(content).hexdigest() != manifest.excluded["sha256"]:
        raise ArtefactError(f"{path}: other contents than the manifest says (sha256): {cure}")
    lines = map(json.loads, content.splitlines())
    return [Exclusion(line["document"], line["reason"], line["for"]) for line in lines]


def excluded_documents(directory: Path, manifest: Manifest | None = None) -> frozenset[int]:
    """Returns the numbers of the excluded documents of a corpus in train.

    Args:
        manifest: as in `read_exclusions`.

    Raises:
        ArtefactError: as `read_exclusions`.
    """
    return frozenset(exclusion.document for exclusion in read_exclusions(directory, manifest))
