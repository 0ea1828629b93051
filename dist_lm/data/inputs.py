"""Lists, hashes and compares the inputs of a source: every file or URL that it reads or leaves out.

The manifest of a corpus stores them. A later listing of the same source is compared with the stored one, so changed
data is noticed before it is mixed with tokens of the old data.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.archive import unread_archives
from dist_lm.data.sources.opening import open_raw
from dist_lm.data.sources.reader import reader_of, traits_of
from dist_lm.tracking.readable import counted, listed

BLOCK = 1 << 20  # bytes hashed at a time
NAMED = 3  # files that a message names
HUB = "hub:"  # prefix in the name of a data set of the hub


@dataclass(frozen=True, slots=True)
class Input:
    """One file, URL, or data set of the hub. A folder that is left out is one input."""

    name: str  # path or URL, as the source names it
    size: int = -1  # bytes, as stored; -1: unknown
    mtime_ns: int = 0  # 0: unknown, as of a URL
    etag: str = ""  # ETag of a URL, else its Last-Modified; commit of a data set
    sha256: str = ""  # on request
    left_out: str = ""  # why the source does not read it; empty: it does

    def to_json(self) -> dict[str, Any]:
        """Returns the fields that differ from their default: those that are known."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }


@dataclass(frozen=True, slots=True)
class Inputs:
    """A listing of one source, in the order in which it is read. Empty for generated text, and for a data set whose
    commit is in the configuration."""

    files: tuple[Input, ...] = ()

    @property
    def taken(self) -> tuple[Input, ...]:
        """The files that the source reads, in the order in which it reads them."""
        return tuple(file for file in self.files if not file.left_out)

    @property
    def left_out(self) -> tuple[Input, ...]:
        """The files and folders that the source does not read; each has its reason."""
        return tuple(file for file in self.files if file.left_out)

    def summary(self) -> str:
        """Describes the listing: `3 files taken (1,234 bytes), 2 left out (hidden: 1, suffix .md: 1)`."""
        n_bytes = sum(max(file.size, 0) for file in self.taken)
        words = f"{counted(len(self.taken), 'file')} taken ({n_bytes:,} bytes)"
        if reasons := Counter(file.left_out for file in self.left_out):
            listed_reasons = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
            words += f", {reasons.total()} left out ({listed_reasons})"
        return words

    def unread_archives(self) -> str:
        """Returns one line about the archives that were left out because no reader opens them there; empty without
        any."""
        return unread_archives({file.name for file in self.left_out if file.left_out.startswith("suffix ")})

    def to_json(self) -> list[dict[str, Any]]:
        """Returns the files as JSON objects, in their order."""
        return [file.to_json() for file in self.files]

    @classmethod
    def from_json(cls, files: Iterable[Mapping[str, Any]]) -> Self:
        """Inverts `to_json`.

        Raises:
            TypeError: there are unknown fields.
        """
        return cls(tuple(Input(**file) for file in files))


def inputs_of(source: SourceConfig, *, hashes: bool = False) -> Inputs:
    """Lists the inputs of a source now. A generated source has none.

    Args:
        hashes: read every input that is taken and add its SHA-256.

    Raises:
        ConfigError: the reader does not exist or does not take a key of the source, or there is nothing to read.
        ArtefactError: a folder, URL or data set cannot be listed; UnreachableError, one of these, if the hub is silent.
        OSError: with `hashes`, an input cannot be read.
    """
    list_inputs = traits_of(reader_of(source)).inputs
    if list_inputs is None:
        return Inputs()

    listing = list_inputs(source)
    if hashes:
        listing = hashed(listing)
    return listing


def hashed(listing: Inputs) -> Inputs:
    """Returns the listing with the SHA-256 of every input that is taken, as it is stored (compressed bytes).

    Every file is read whole, and URLs are downloaded. A data set of the hub has its commit instead.

    Raises:
        OSError: an input cannot be read.
        ConfigError: the scheme of a URL is not supported.
    """
    files = []
    for file in listing.files:
        if not file.left_out and not file.name.startswith(HUB):
            # Block by block, because a file may not fit into memory.
            digest = hashlib.sha256()
            with open_raw(file.name) as content:
                while block := content.read(BLOCK):
                    digest.update(block)
            file = replace(file, sha256=digest.hexdigest())
        files.append(file)
    return Inputs(tuple(files))


def changes(before: Inputs, now: Inputs) -> list[str]:
    """Returns how the inputs that are taken differ, in words for people: one text for a kind of difference.

    The list is empty if they are the same. A text names at most `NAMED` files. A file that was left out for its suffix
    alone is no new one, and one that is left out now for its split is not gone. Two hashes decide where both listings
    have them; otherwise size, time of change and ETag do. Another order is a difference, too.
    """
    # Later releases read more suffixes, and leave out other splits than train. What was built stays as it is.
    of_other_splits = {file.name for file in now.left_out if file.left_out.startswith("split ")}
    passed_over = {file.name for file in before.left_out if file.left_out.startswith("suffix ")}
    old = {file.name: file for file in before.taken if file.name not in of_other_splits}
    new = {file.name: file for file in now.taken if file.name in old or not _was_passed_over(file.name, passed_over)}
    changes_in_words = []
    for kind, names in (
        ("new", [name for name in new if name not in old]),
        ("gone or left out", [name for name in old if name not in new]),
    ):
        if names:
            changes_in_words.append(f"{counted(len(names), 'file')} {kind}: {listed(names, NAMED)}")

    common = [name for name in old if name in new]
    changed = [f"{name}: {words}" for name in common if (words := difference(old[name], new[name]))]
    if changed:
        changes_in_words.append(listed(changed, NAMED))

    # The order of files is the order of documents, so it changes the corpus.
    if not changes_in_words and common != [name for name in new if name in old]:
        changes_in_words.append("the same files in another order")
    return changes_in_words


def _was_passed_over(name: str, passed_over: set[str]) -> bool:
    """Tells whether a file, or the zip that it is in, is among `passed_over`."""
    while name and name not in passed_over:
        name = name.rpartition("/")[0]
    return bool(name)


def difference(old: Input, new: Input) -> str:
    """Returns how one input changed, in words; empty if it did not."""
    if old.sha256 and new.sha256:
        return "" if old.sha256 == new.sha256 else "other contents (sha256)"

    # Without two hashes, the size is the surest sign and the time of change the weakest.
    if old.size != new.size:
        return f"{new.size:,} bytes, was {old.size:,}"
    if old.etag != new.etag:
        return f"ETag {new.etag or '(none)'}, was {old.etag or '(none)'}"
    if old.mtime_ns != new.mtime_ns:
        return "changed at another time (mtime), the size is the same"
    return ""
