"""Rankings: of one's own files, and of public data sets of preferences (`data.rankings.rows` has what each row means).

The group of a ranking is its prompt, so all rankings of one prompt are on one side of the split.
"""

import glob
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dist_lm.chat.ranking import Ranking
from dist_lm.chat.ranking_documents import write_prompt, write_ranking
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.rankings.local import read_rankings
from dist_lm.data.rankings.rows import (
    Row,
    helpsteer_ranking,
    hh_ranking,
    oasst_rankings,
    ultrafeedback_ranking,
)
from dist_lm.data.sources.hub import hub_rows, licence_of, origin_of, resumed
from dist_lm.data.sources.reader import Candidate, Rejected, reader, text_hash
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError, UserError

BY_ROW: dict[str, Callable[[Row], Ranking | None]] = {
    "hh-rlhf": hh_ranking,
    "helpsteer3": helpsteer_ranking,
    "ultrafeedback": ultrafeedback_ranking,
}
OASST = "oasst1"  # its rankings lie over several rows


@reader(form="ranking", advice="check dataset; no line makes a ranking")
def read_local_rankings(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Every ranking of the files that `source.dataset` names: a file of JSON lines, or a glob. `seed` is not used.

    Raises:
        ConfigError: there is no such file.
        ArtefactError: a line is no ranking; the message names file and line.
    """
    pattern = str(Path(source.dataset).expanduser())
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]  # noqa: PTH207  may be absolute
    if not source.dataset or not files:
        raise ConfigError(
            f"corpus source with reader=rankings: dataset={source.dataset}: no such file; expected one of JSON lines, "
            "or a glob"
        )
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for number, ranking in enumerate(_utf8(read_rankings(lines, str(file)), file)):
                yield ranking_document(ranking, source.language, f"{file}:{number}", source.licence)


@reader(form="ranking", advice="check dataset, split and rows; no row makes a ranking")
def read_hub_rankings(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Every ranking of a data set, in its order. `seed` is not used.

    Raises:
        ConfigError: without the `datasets` package, for rows of an unknown kind, or for a column that is not there.
        ArtefactError: the data set cannot be read.
    """
    kind = rows_of(source)
    origin = origin_of(source)
    rows = resumed(hub_rows(source), origin)
    try:
        if kind == OASST:
            yield from _oasst(rows, source, origin)
        else:
            for number, row in rows:
                yield _candidate(BY_ROW[kind](row), row, source, f"{origin}:{number}", source.language)
    except KeyError as error:
        raise ConfigError(
            f"corpus source {source.dataset}: no column {error}: rows={kind} is not what that data set has; expected "
            f"one of {', '.join(sorted((*BY_ROW, OASST)))}"
        ) from error


@reader(
    form="ranking",
    seeded=True,
    advice="train the stage before for longer, or take another source; no two samples of the model differ by the rules",
)
def read_synthetic_rankings(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Refused: these are made by stage rankings, which has a model to make them with."""
    raise ConfigError(
        "reader=synthetic_rankings ranks samples of a model: it belongs into a corpus that stage=rankings builds"
    )


def rows_of(source: SourceConfig) -> str:
    """What the rows of a data set are: `source.rows`, else by its name.

    Raises:
        ConfigError: neither is known.
    """
    found = source.rows or Path(source.dataset).stem.lower()
    if found not in (*BY_ROW, OASST):
        raise ConfigError(
            f"corpus source {source.dataset}: rows={source.rows or '(by its name)'}: expected one of "
            f"{', '.join(sorted((*BY_ROW, OASST)))}"
        )
    return found


def ranking_document(ranking: Ranking, language: str, name: str, licence: str) -> Candidate:
    """A ranking as a document; rejected where it holds what cannot be written."""
    try:
        text, group = write_ranking(ranking), text_hash(write_prompt(ranking))
    except UserError:
        return Rejected(language, name, "no_ranking")
    return Document(text, language, name, licence, group, form="ranking")


def _oasst(rows: Iterable[tuple[int, Row]], source: SourceConfig, origin: str) -> Iterator[Candidate]:
    """Of each language apart: `oasst1_en`. What the messages of a tree hold is found once all of them are read."""
    languages = frozenset(source.only) if source.only else None
    for number, (language, ranking) in enumerate(oasst_rankings((row for _, row in rows), languages)):
        name = f"{origin}:ranking={number}"
        yield ranking_document(ranking, f"{source.language}_{language}", name, source.licence)


def _candidate(ranking: Ranking | None, row: Row, source: SourceConfig, name: str, language: str) -> Candidate:
    if ranking is None:
        return Rejected(language, name, "no_ranking")
    return ranking_document(ranking, language, name, licence_of(row, source))


def _utf8(rankings: Iterator[Ranking], file: Path) -> Iterator[Ranking]:
    try:
        yield from rankings
    except UnicodeDecodeError as error:
        raise ArtefactError(f"{file}: not UTF-8 ({error})") from error
