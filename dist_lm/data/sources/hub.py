"""Reads data sets of the Hugging Face hub as streams of rows; files with the same columns may replace a data set.

The stream is resumed at the row where it broke, a bounded number of times with growing pauses. A branch is read at
one commit from the first reading of a launch to the last.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from dist_lm.config.corpus import HF, SourceConfig
from dist_lm.data.inputs import HUB, Input, Inputs
from dist_lm.data.sources.failures import brief, is_transient
from dist_lm.data.sources.formats import Row
from dist_lm.data.sources.reader import Candidate, reader
from dist_lm.data.sources.rows import TEXT, WITH_DEFAULT, Named, SourceRow, list_rows, row_documents, rows_of_files
from dist_lm.data.sources.snapshot import Snapshot
from dist_lm.errors import ArtefactError, ConfigError, UnreachableError

if TYPE_CHECKING:
    from tenacity import Retrying

MAIN, TRAIN = "main", "train"  # revision and split if the source names none
ATTEMPTS = 5  # consecutive ones without a new row
LONGEST_TRY_S = 60.0  # no new attempt after this long without a new row
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
LOCAL = (".json", ".jsonl", ".parquet", ".csv")  # suffixes of no data set's id
WAY_OUT = (
    "Run the command again when the network is back (and HF_HUB_OFFLINE is not set), set HF_ENDPOINT to a "
    "mirror, HF_TOKEN for a gated data set, or name a copy on this machine with path (docs/data.md)"
)
RowsFrom = Callable[[int], Iterable[Row]]  # opens the data set at a row
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_KEYS = ("dataset", "revision", "subset", "data_dir", "split")


def list_data_set(source: SourceConfig) -> Inputs:
    """Returns the commit of a data set as its only input; nothing if the source names the commit. With `path`: the
    files.

    Asks the hub once in a launch, and waits and asks again, at most `ATTEMPTS` times, if it does not answer.

    Raises:
        UnreachableError (an ArtefactError): the hub does not answer, or HF_HUB_OFFLINE is set.
        ArtefactError: it has no such data set or revision, or a file cannot be listed.
        ConfigError: the source names a local path as data set, files that do not exist, or a package is missing.
    """
    if source.path:
        return list_rows(source)
    check_is_data_set(source)
    # The content of a commit never changes, so there is nothing to compare later.
    if COMMIT.fullmatch(source.revision or MAIN):
        return Inputs()

    try:
        commit = retrying()(commit_of, source.dataset, source.revision or MAIN)
    except ImportError as error:
        raise _not_installed(source, error) from error
    except Exception as error:  # whatever the libraries below raise: the user needs the way out with it
        is_unreachable = is_transient(error) or isinstance(error, ConnectionError)
        error_class = UnreachableError if is_unreachable else ArtefactError
        raise error_class(
            f"corpus source {origin_of(source)}: no answer of the hub: {brief(error)}. {WAY_OUT}"
        ) from error
    return Inputs((Input(f"{HUB}{source.dataset}", etag=commit),))


@lru_cache
def commit_of(dataset: str, revision: str) -> str:
    """Resolves a branch or a tag of a data set to its commit, once for a whole launch. A commit is returned as it is.

    Passes on what huggingface_hub raises, ImportError among it.
    """
    if COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(dataset, revision=revision).sha
    assert commit, "the hub names the commit"
    return commit


def origin_of(source: SourceConfig) -> str:
    """Returns the data set of a source with its revision, or the first of its files."""
    if source.path:
        return source.path[0]
    return f"{source.dataset}@{source.revision or MAIN}"


@reader(
    keys=("language", "licence", *HUB_KEYS, "column", *WITH_DEFAULT, "only"),
    needs=("language|language_column", "dataset"),
    inputs=list_data_set,
    takes_files=True,
    advice="check dataset, split and column; no row has text in that column",
)
def read_hub(source: SourceConfig, seed: int, files: Snapshot | None = None) -> Iterator[Candidate]:
    """Yields every row of `source.dataset` as a document or `Rejected`, in the order of the data set.

    `seed` is not used.

    Raises:
        ConfigError: as `data_set_rows` and `row_documents`, as for a column that no row has.
        ArtefactError: the data set cannot be read.
    """
    yield from row_documents(source, data_set_rows(source, files), TEXT)


def data_set_rows(
    source: SourceConfig, files: Snapshot | None = None, columns: Named | None = None
) -> Iterator[SourceRow]:
    """Yields the rows of `source.dataset`, or of the files of `source.path`, with all their columns; a stream that
    breaks is resumed.

    The location of a row of a data set is `NAME@REVISION:NUMBER`, from 0. A broken row of a file is its problem.

    Args:
        columns: those that files are asked for, as in `rows_of_files`; None: all.

    Raises:
        ConfigError: the source names both, a local path as data set, or files that do not exist or lack a column, or
            the `datasets` package is missing.
        ArtefactError: the data set or a file cannot be read.
    """
    if source.path:
        # Keys of the hub would be ignored, and no key may be.
        for key in HUB_KEYS:
            if key != "split" and getattr(source, key):
                raise ConfigError(
                    f"corpus source reader={source.reader}: {key}={getattr(source, key)}: not together with path"
                )
        yield from rows_of_files(files or Snapshot.of(source), columns, whole_rows=True)
        return

    check_is_data_set(source)
    origin = origin_of(source)
    for number, row in resumed(hub_rows(source, listed_commit(files) if files else ""), origin):
        yield SourceRow(f"{origin}:{number}", row, tuple(row))


def listed_commit(files: Snapshot) -> str:
    """Returns the commit at which a data set was listed, which other processes must read, too; empty if the
    configuration names it."""
    commits = [file.etag for file in files.listing.taken if file.name.startswith(HUB)]
    return commits[0] if commits else ""


def check_is_data_set(source: SourceConfig) -> None:
    """Refuses a local path, or an id with a prefix or a revision, in the key of a data set. The hub is not asked.

    Raises:
        ConfigError: names the keys to write instead.
    """
    # Models are named hf:ID@REVISION on the command line; a source has a key for each part.
    dataset, _, revision = source.dataset.removeprefix(HF).removeprefix("//datasets/").partition("@")
    if dataset != source.dataset:
        keys = f"dataset: {dataset}" + (f", revision: {revision}" if revision else "")
        raise ConfigError(
            f"corpus source reader={source.reader}: dataset={source.dataset}: expected the id alone: write {keys}"
        )

    # An id is NAME or OWNER/NAME.
    local = Path(source.dataset).expanduser()
    is_id = source.dataset.count("/") <= 1 and source.dataset[0] not in "./~" and local.suffix not in LOCAL
    if not is_id or local.exists():
        copies = "reader: jsonl (or parquet, csv) and path" if source.reader == "hub" else "path in place of dataset"
        raise ConfigError(
            f"corpus source reader={source.reader}: dataset={source.dataset} is a place of this machine, no data set "
            f"of the hub: write {copies}: {source.dataset}"
        )


def hub_rows(source: SourceConfig, listed: str = "") -> RowsFrom:
    """Returns a function that opens the data set of `source` at any row, counted from 0. Nothing is opened yet.

    Args:
        listed: the commit to read; empty: that of the revision of `source`.

    The function passes on what the libraries of the hub raise.

    Raises:
        ConfigError: the `datasets` package is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise _not_installed(source, error) from error

    def rows_from(row: int) -> Iterable[Row]:
        """Returns the rows from number `row` on; the stream reads them when it is iterated. Asks the hub."""
        # A commit, because a branch may move between two openings of one stream.
        commit = listed or commit_of(source.dataset, source.revision or MAIN)
        options = {"name": source.subset, "revision": commit, "split": source.split or TRAIN}
        if source.data_dir:
            options["data_dir"] = source.data_dir
        dataset = datasets.load_dataset(source.dataset, streaming=True, **options)
        if row:
            dataset = dataset.skip(row)
        return dataset

    return rows_from


def _not_installed(source: SourceConfig, error: ImportError) -> ConfigError:
    return ConfigError(
        f"corpus source {source.dataset}: the package {error.name!r} is not installed: "
        "in the checkout, pip install -e '.[hub]'"
    )


def retrying(attempts: int = ATTEMPTS, first_wait_s: float = FIRST_WAIT_S) -> "Retrying":
    """Returns a caller that repeats a function, with growing pauses, while that may help; then it raises the error.

    `is_transient` tells whether it may help. No call begins later than `LONGEST_TRY_S` seconds after the first.

    Args:
        attempts: calls in all.
        first_wait_s: the first pause, in seconds.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_exponential

    return Retrying(
        stop=stop_after_attempt(attempts) | stop_after_delay(LONGEST_TRY_S),
        wait=wait_exponential(multiplier=first_wait_s, max=LONGEST_WAIT_S),
        retry=retry_if_exception(is_transient),
        reraise=True,
    )


def resumed(
    rows_from: RowsFrom, what: str, attempts: int = ATTEMPTS, first_wait_s: float = FIRST_WAIT_S
) -> Iterator[tuple[int, Row]]:
    """Yields `(number, row)` of every row, from 0; a broken stream is opened again at the row where it broke.

    Args:
        what: the data set, for errors.
        attempts: consecutive openings without a new row before it gives up.
        first_wait_s: the pause before the second opening, in seconds; later ones grow.

    Raises:
        ArtefactError: no attempt is left, or another one would not help; names the row and the way out.
        ConfigError: as `rows_from` raises it.
    """
    retry = retrying(attempts, first_wait_s)
    end: Row = {}  # compared by identity: a row may be empty
    stream: Iterator[Row] | None = None
    number = 0  # next row

    def reopen() -> Row:
        """Opens the stream at the next row, and returns that row, or `end`."""
        nonlocal stream
        stream = iter(rows_from(number))
        return next(stream, end)

    while True:
        try:
            try:
                row = retry(reopen) if stream is None else next(stream, end)
            except Exception as error:
                # The stream broke: it is opened again at this row. An error of `retry` itself is the last one.
                if stream is None or not is_transient(error):
                    raise
                row = retry(reopen)
        except (ConfigError, ArtefactError):
            raise
        except Exception as error:  # whatever the libraries below raise: the user needs the way out with it
            raise ArtefactError(f"corpus source {what}: stopped at row {number}: {brief(error)}. {WAY_OUT}") from error

        if row is end:
            return
        yield number, row
        number += 1
