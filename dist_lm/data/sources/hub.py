"""A column of a data set from the Hugging Face hub, or of a local copy with the same columns, as a stream.

The stream is resumed at the row where it broke, a bounded number of times with growing pauses.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.reader import Candidate, Rejected, reader, text_hash
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError

TEXT, MAIN, TRAIN = "text", "main", "train"  # column, revision and split where the source names none
ATTEMPTS = 5  # in a row without a new row
LONGEST_TRY_S = 60.0  # no new attempt after this long without a new row
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
# Packages whose own errors mean that bytes did not arrive.
TRANSPORTS = {"aiohttp", "fsspec", "http", "httpcore", "httpx", "httpx2", "requests", "urllib3"}
WAY_OUT = (
    "Run the command again when the network is back (and HF_HUB_OFFLINE is not set), set HF_ENDPOINT to a "
    "mirror, HF_TOKEN for a gated data set, or point dataset= to a local copy (json, jsonl, parquet or csv)"
)
Row = dict[str, Any]
RowsFrom = Callable[[int], Iterable[Row]]  # opens the data set at a row


HUB_KEYS = ("dataset", "revision", "subset", "data_dir", "split")


@reader(
    streamed=True,
    keys=("language", "licence", *HUB_KEYS, "column", "licence_column"),
    needs=("language", "dataset"),
    advice="check dataset, split and column; no row has text in that column",
)
def read_hub(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Every row of `source.dataset` as a document, in the order of the data set. `seed` is not used.

    Raises:
        ConfigError: the `datasets` package or the column is missing.
        ArtefactError: the data set cannot be read.
    """
    origin = origin_of(source)
    for number, row in resumed(hub_rows(source), origin):
        if (source.column or TEXT) not in row:
            raise ConfigError(
                f"corpus source {source.dataset}: column={source.column or TEXT}: "
                f"the columns there are {', '.join(sorted(row))}"
            )
        yield _candidate(row, source, f"{origin}:{number}")


def origin_of(source: SourceConfig) -> str:
    """The data set of a source: its local path, or its id and revision.

    Raises:
        ConfigError: the source names none.
    """
    if not source.dataset:
        raise ConfigError(
            f"corpus source with reader={source.reader}: dataset is empty: expected a data set id or a local path"
        )
    is_local = Path(source.dataset).expanduser().exists()
    return source.dataset if is_local else f"{source.dataset}@{source.revision or MAIN}"


def hub_rows(source: SourceConfig) -> RowsFrom:
    """How to open the data set of `source` at any row."""
    try:
        import datasets
        import tenacity  # noqa: F401  (what `resumed` needs is asked for here, with the way out)
    except ImportError as error:
        raise ConfigError(
            f"corpus source {source.dataset}: the package {error.name!r} is not installed: "
            "in the checkout, pip install -e '.[hub]'"
        ) from error

    def rows_from(row: int) -> Iterable[Row]:
        path, options = _location(source)
        dataset = datasets.load_dataset(path, streaming=True, **options)
        return dataset.skip(row) if row else dataset

    return rows_from


def _location(source: SourceConfig) -> tuple[str, dict[str, Any]]:
    """The arguments of `load_dataset`: a hub id, or a builder with local files."""
    local = Path(source.dataset).expanduser()
    if not local.exists():
        is_id = source.dataset.count("/") <= 1 and source.dataset[0] not in "./~" and local.suffix not in BUILDERS
        if not is_id:
            raise ConfigError(f"corpus source {source.dataset}: no such file or folder")
        options = {"name": source.subset, "revision": source.revision or MAIN, "split": source.split or TRAIN}
        return source.dataset, options | ({"data_dir": source.data_dir} if source.data_dir else {})
    inside = local.rglob("*") if local.is_dir() else [local]
    files = sorted(path for path in inside if path.suffix in BUILDERS)
    builders = {BUILDERS.get(path.suffix) for path in files}
    if len(builders) != 1 or None in builders:
        kinds = ", ".join(BUILDERS)
        raise ConfigError(
            f"corpus source {source.dataset}: expected a file, or a folder of files, of one kind of {kinds}"
        )
    return str(builders.pop()), {"data_files": [str(path) for path in files], "split": "train"}


def resumed(
    rows_from: RowsFrom, what: str, attempts: int = ATTEMPTS, first_wait_s: float = FIRST_WAIT_S
) -> Iterator[tuple[int, Row]]:
    """`(number, row)` of every row; a broken stream is opened again at the row where it broke.

    Raises ArtefactError naming `what` after `attempts` openings in a row that gave no new row, and at once
    where another attempt would not help.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_exponential

    retrying = Retrying(
        stop=stop_after_attempt(attempts) | stop_after_delay(LONGEST_TRY_S),
        wait=wait_exponential(multiplier=first_wait_s, max=LONGEST_WAIT_S),
        retry=retry_if_exception(is_transient),
        reraise=True,
    )
    end: Row = {}
    stream: Iterator[Row] | None = None
    number = 0

    def reopen() -> Row:
        nonlocal stream
        stream = iter(rows_from(number))
        return next(stream, end)

    while True:
        try:
            try:
                row = retrying(reopen) if stream is None else next(stream, end)
            except Exception as error:
                if stream is None or not is_transient(error):
                    raise
                row = retrying(reopen)
        except (ConfigError, ArtefactError):
            raise
        except Exception as error:  # whatever the libraries below raise: the user needs the way out with it
            raise ArtefactError(f"corpus source {what}: stopped at row {number}: {_brief(error)}. {WAY_OUT}") from error
        if row is end:
            return
        yield number, row
        number += 1


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: broken connections, time-outs, overloaded servers."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    if isinstance(status, int):
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, ConnectionError | TimeoutError):
        # not with HF_HUB_OFFLINE=1, which the user set
        return "OfflineModeIsEnabled" not in f"{type(error).__name__} {error}"
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False  # among them: a data set that does not exist, or is gated
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in TRANSPORTS


def _brief(error: Exception) -> str:
    """The type and first line of an error."""
    message = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {message[:300]}".rstrip(": .")


def _candidate(row: Row, source: SourceConfig, name: str) -> Candidate:
    text = row[source.column or TEXT]
    if text is None:
        return Rejected(source.language, name, "empty")
    if not isinstance(text, str):
        raise ConfigError(
            f"corpus source {source.dataset}: column={source.column or TEXT} holds {type(text).__name__}, expected text"
        )
    try:
        group = text_hash(text)
    except UnicodeEncodeError:  # a lone surrogate out of JSON
        return Rejected(source.language, name, "invalid_utf8")
    return Document(text, source.language, name, licence_of(row, source), group)


def licence_of(row: Row, source: SourceConfig) -> str:
    """The licence of a row where the data set has a column for it, else that of the source."""
    licence = row.get(source.licence_column) or source.licence
    return ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence)
