"""Finds documents that hold a part of a benchmark: 13 consecutive words of it, as in GPT-3 (Brown et al. 2020, C).

A word is one of `data.containment`: indentation and line breaks do not matter, case and punctuation do. The texts of a
benchmark are the strings of its rows, each for itself, and a prompt with its solution behind it. A text with fewer
words is in no document.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_lm.data.containment import MARGIN, WindowTable, window_hashes, word_hashes
from dist_lm.data.sources.opening import open_content
from dist_lm.errors import ConfigError

WINDOW = 13  # words
KEY = "corpus.cleaning.benchmarks"
OWN = "own"  # stands for the problems of this package
OWN_FOLDER = Path(__file__).parents[1] / "evaluation" / "problems"
JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}
SOLUTIONS = ("canonical_solution", "solution")  # fields of HumanEval, of our own problems


class Contamination(NamedTuple):
    """The part of a benchmark that a document holds."""

    benchmark: str  # name of its file; with its folders if several files have that name
    words: str  # the first 13 words, with a space between them


class Benchmarks:
    """The 13-word windows of benchmarks: about 25 bytes a word in memory."""

    def __init__(self, texts: Sequence[tuple[str, str]]) -> None:
        """`texts`: (name of the benchmark, text).

        Raises:
            ConfigError: none has 13 words.
        """
        windows = [windows_of(text)[2] for _, text in texts]
        if not sum(map(len, windows)):
            raise ConfigError(f"{KEY}: expected texts of {WINDOW} words or more; there are none")
        self._names = [name for name, _ in texts]
        self._table = WindowTable(
            [(hashes, number) for number, hashes in enumerate(windows)], np.zeros(len(texts), bool)
        )

    @classmethod
    def read(cls, paths: Sequence[str]) -> "Benchmarks":
        """Reads files of benchmarks; `own` stands for the problems of this package.

        Raises:
            ConfigError: a file cannot be read, or no text has 13 words.
        """
        return cls([(name, text) for name, content in _files(paths) for text in _texts(name, content)])

    def first_in(self, text: str) -> Contamination | None:
        """Returns the first 13 words of a text that a benchmark has too; None: there are none."""
        raw, starts, windows = windows_of(text)
        indices, ids = self._table.find(windows)
        if not len(indices):
            return None

        first = int(indices[0])
        end = int(starts[first + WINDOW]) if first + WINDOW < len(starts) else len(raw)
        words = raw[int(starts[first]) : end].decode(errors="replace").split()
        benchmark = self._names[int(self._table.texts_of(ids[:1])[0][0])]
        return Contamination(benchmark, " ".join(words))


def windows_of(text: str) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Returns a text in UTF-8 behind a space and before `MARGIN`, the byte offset of each word in it, (words,) int64,
    and the hash of each 13-word window, (words - 12,) uint64; none of a shorter text."""
    raw = b" " + text.encode() + MARGIN
    starts, words = word_hashes(np.frombuffer(raw, np.uint8))
    return raw, starts, window_hashes(words, {WINDOW})[WINDOW]


def fingerprints(paths: Sequence[str]) -> dict[str, str]:
    """Returns the SHA-256 of each file of benchmarks by its name.

    Raises:
        ConfigError: a file cannot be read.
    """
    return {name: hashlib.sha256(content).hexdigest() for name, content in _files(paths)}


def _files(paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content without compression) of each file, also of those that `own` stands for. Names differ.

    Raises:
        ConfigError: a file cannot be read.
    """
    times_of_name = Counter(Path(path).name for path in set(paths))
    for path in dict.fromkeys(paths):
        if path == OWN:
            for own_path in sorted(OWN_FOLDER.glob("*.jsonl")):
                yield f"{OWN}_{own_path.name}", _content(str(own_path))
            continue

        # Of two files `test.jsonl`, each must count and be compared for itself.
        name = Path(path).name
        yield path if times_of_name[name] > 1 else name, _content(path)


def _content(path: str) -> bytes:
    """Reads a file, without its compression.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with open_content(path) as file:
            return file.read()
    # Libraries of compressions and of remote files raise errors of their own.
    except Exception as error:
        raise ConfigError(f"{KEY}={path}: cannot be read ({error})") from error


def _texts(name: str, content: bytes) -> Iterator[str]:
    """Yields the texts of a benchmark: the strings of each row of a list or lines of JSON; else the content.

    Raises:
        ConfigError: it is no UTF-8, or no JSON although its name says so.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{KEY}: {name}: expected UTF-8, as JSON lines, a list of JSON, or text ({error})") from error
    try:
        # No splitlines: JSON may hold U+2028 as it is.
        is_list = text.lstrip().startswith("[")
        rows = json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        # As one text, words of it would have the escapes of JSON, and no document would be dropped for them.
        if JSON_SUFFIXES.intersection(Path(name).suffixes):
            raise ConfigError(f"{KEY}: {name}: is no JSON ({error}): repair or rename it") from error
        yield text
        return

    for row in rows:
        yield from _strings(row)
        if isinstance(row, Mapping) and isinstance(row.get("prompt"), str):
            yield from (row["prompt"] + row[field] for field in SOLUTIONS if isinstance(row.get(field), str))


def _strings(value: Any) -> Iterator[str]:
    """Yields the strings of a JSON value; a list of strings, such as tests, is one text, joined by line breaks.

    The keys of objects and values of other types are passed over.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        if all(isinstance(inner, str) for inner in value):
            yield "\n".join(value)
        else:
            for inner in value:
                yield from _strings(inner)
