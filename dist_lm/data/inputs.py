"""The inputs of a source: every file or URL that it reads and every one that it leaves out, as values.

The manifest of a corpus stores them. A later listing of the same source is compared with the stored one, so changed
data is noticed before it is mixed with tokens of the old data.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.reader import reader_of, traits_of

BLOCK = 1 << 20  # bytes hashed at a time
NAMED = 3  # files that a message names
HUB = "hub:"  # begins the name of a data set of the hub


@dataclass(frozen=True, slots=True)
class Input:
    """One file, URL, or data set of the hub. A folder that is left out is one entry."""

    name: str  # path or URL, as the source names it
    size: int = -1  # bytes, as stored; -1: unknown
    mtime_ns: int = 0  # 0: unknown, as of a URL
    etag: str = ""  # of a URL: its ETag, else Last-Modified; of a data set: the commit
    sha256: str = ""  # on request
    left_out: str = ""  # why the source does not read it; empty: it does

    def to_json(self) -> dict[str, Any]:
        """The fields that are known."""
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
        return tuple(one for one in self.files if not one.left_out)

    @property
    def left_out(self) -> tuple[Input, ...]:
        return tuple(one for one in self.files if one.left_out)

    def summary(self) -> str:
        """`3 files taken (1,234 bytes), 2 left out (hidden: 1, suffix .md: 1)`."""
        taken = self.taken
        words = f"{_files(len(taken))} taken ({sum(max(one.size, 0) for one in taken):,} bytes)"
        if reasons := Counter(one.left_out for one in self.left_out):
            counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
            words += f", {reasons.total()} left out ({counts})"
        return words

    def to_json(self) -> list[dict[str, Any]]:
        return [one.to_json() for one in self.files]

    @classmethod
    def from_json(cls, value: Iterable[Mapping[str, Any]]) -> Self:
        """What `to_json` gave.

        Raises:
            TypeError: it holds other fields.
        """
        return cls(tuple(Input(**one) for one in value))


def inputs_of(source: SourceConfig, *, hashes: bool = False) -> Inputs:
    """List the inputs of a source now.

    Args:
        hashes: read every input that is taken and add its SHA-256.

    Raises:
        ConfigError: the reader does not exist or does not take a key of the source.
        ArtefactError: there is nothing to read, or a folder or URL cannot be listed.
    """
    list_inputs = traits_of(reader_of(source)).inputs
    listing = Inputs() if list_inputs is None else list_inputs(source)
    return hashed(listing) if hashes else listing


def hashed(listing: Inputs) -> Inputs:
    """`listing` with the SHA-256 of every input that is taken, as it is stored."""
    from dist_lm.data.sources.opening import open_raw

    def digest(name: str) -> str:
        found = hashlib.sha256()
        with open_raw(name) as file:
            while block := file.read(BLOCK):
                found.update(block)
        return found.hexdigest()

    files = (
        one if one.left_out or one.name.startswith(HUB) else replace(one, sha256=digest(one.name))
        for one in listing.files
    )
    return Inputs(tuple(files))


def changes(before: Inputs, now: Inputs) -> list[str]:
    """How the inputs that are taken differ, in words for people; empty if they are the same.

    Two hashes decide where both listings have them; otherwise size, time of change and ETag do.
    """
    old, new = ({one.name: one for one in listing.taken} for listing in (before, now))
    found = []
    for words, names in (
        ("new", [name for name in new if name not in old]),
        ("gone or left out", [name for name in old if name not in new]),
    ):
        if names:
            found.append(f"{_files(len(names))} {words}: {_some(names)}")
    changed = [
        f"{name}: {difference}" for name in old if name in new and (difference := _difference(old[name], new[name]))
    ]
    if changed:
        found.append(_some(changed))
    both = [name for name in old if name in new]
    if not found and both != [name for name in new if name in old]:
        found.append("the same files in another order")
    return found


def _difference(old: Input, new: Input) -> str:
    if old.sha256 and new.sha256:
        return "" if old.sha256 == new.sha256 else "other contents (sha256)"
    if old.size != new.size:
        return f"{new.size:,} bytes, was {old.size:,}"
    if old.etag != new.etag:
        return f"ETag {new.etag or '(none)'}, was {old.etag or '(none)'}"
    return "changed at another time (mtime), the size is the same" if old.mtime_ns != new.mtime_ns else ""


def _files(count: int) -> str:
    return f"{count:,} file{'' if count == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")
