"""Reads rankings from public data sets of preferences, by one pure function from a row to a ranking for each data set.

A row without a comparison (all answers tied, or only one answer) gives None and is counted.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import PurePosixPath

from dist_lm.chat.messages import ChatError, Conversation, Message, Role
from dist_lm.chat.ranking import MOST, Judgement, Ranking, check_ranking, ranks_of_scores
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.formats import BadRow, Row
from dist_lm.data.sources.hub import HUB_KEYS, data_set_rows, list_data_set, origin_of
from dist_lm.data.sources.listing import bare_name
from dist_lm.data.sources.rankings import ranking_document
from dist_lm.data.sources.reader import Candidate, Rejected, reader
from dist_lm.data.sources.rows import (
    SourceRow,
    kept_columns,
    licence_of,
    looked_ahead,
    named_columns,
    own_licence,
)
from dist_lm.data.sources.snapshot import Snapshot
from dist_lm.errors import ConfigError

ROLES: dict[str, Role] = {"system": "system", "user": "user", "prompter": "user", "assistant": "assistant"}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
PARTS_OF_TEXT = ("chosen", "rejected", "context", "response1", "response2", "instruction", "completions")
OASST = "oasst1"  # its rankings extend over several rows


@reader(
    form="ranking",
    keys=("language", "licence", *HUB_KEYS, "path", "exclude", "licence_column", "rows", "only"),
    needs=("language", "dataset|path"),
    inputs=list_data_set,
    takes_files=True,
    advice="check dataset, split and rows; no row makes a ranking",
)
def read_hub_rankings(source: SourceConfig, seed: int, files: Snapshot | None = None) -> Iterator[Candidate]:
    """Yields every ranking of a data set, or of files with its columns, in its order. `seed` is not used.

    A row that gives no ranking is yielded as `Rejected`.

    Raises:
        ConfigError: the `datasets` package is missing, the kind of rows is unknown, a column is missing, a message has
            an unknown role, the source has a key that the kind does not take, or as `data_set_rows`.
        ArtefactError: the data set cannot be read.
    """
    kind = rows_of(source)
    # A ranking of oasst1 is made of several rows, which have one licence; only its rows have a language.
    ignored = "licence_column" if kind == OASST else "only"
    if getattr(source, ignored):
        raise ConfigError(
            f"corpus source reader={source.reader}: {ignored}={getattr(source, ignored)}: rows={kind} does not take it"
        )

    rows = looked_ahead(source, data_set_rows(source, files), named_columns(source))
    try:
        if kind == OASST:
            yield from _oasst(rows, source)
        else:
            for source_row in rows:
                yield _candidate(BY_ROW[kind], source_row, source)
    except KeyError as error:  # the functions of `BY_ROW` take their columns for granted
        raise ConfigError(
            f"corpus source {origin_of(source)}: no column {error}: rows={kind} is not what it has; expected "
            f"one of {', '.join(sorted((*BY_ROW, OASST)))}"
        ) from error


def rows_of(source: SourceConfig) -> str:
    """Returns the kind of rows of a data set, a key of `BY_ROW` or `OASST`: `source.rows`, else by its name.

    Raises:
        ConfigError: neither is known.
    """
    name, *_ = source.path or [source.dataset]
    kind = source.rows or PurePosixPath(bare_name(name)).stem
    if kind not in (*BY_ROW, OASST):
        raise ConfigError(
            f"corpus source {origin_of(source)}: rows={source.rows or '(by its name)'}: expected one of "
            f"{', '.join(sorted((*BY_ROW, OASST)))}"
        )
    return kind


def oasst_rankings(rows: Iterable[Row], languages: frozenset[str] | None = None) -> Iterator[tuple[str, Ranking]]:
    """Yields (language, ranking) of `OpenAssistant/oasst1` (Koepf et al. 2023): people ranked answers to one message.

    Rank 0 is the best; at most `MOST` answers stay. Deleted messages, answers without a rank, answers with a missing
    message above them, and messages whose answers are no comparison are passed over.

    Args:
        rows: messages, those of a tree one after the other; a tree at a time is in memory.
        languages: those to read, such as `en`; None: all. The language is that of the first answer.

    Raises:
        KeyError: a row lacks a column, or has an unknown role.
    """
    # Every message of a tree that has ranked answers gives a ranking.
    for _, tree in groupby(rows, key=lambda row: row["message_tree_id"]):
        messages = {row["message_id"]: row for row in tree if not row.get("deleted")}
        answers: dict[str, list[Row]] = {}
        for row in messages.values():
            if row["role"] == "assistant" and row.get("rank") is not None:
                answers.setdefault(row["parent_id"], []).append(row)

        for parent, siblings in answers.items():
            if languages is not None and siblings[0].get("lang") not in languages:
                continue
            thread = _thread(parent, messages)
            if not thread:
                continue
            # A ranking holds a limited number of completions; the worst ones are left out.
            best = sorted(siblings, key=lambda row: row["rank"])[:MOST]
            ranking = _ranking(thread, [row["text"] for row in best], ranks=[row["rank"] for row in best])
            if ranking:
                yield siblings[0].get("lang") or "unknown", ranking


def hh_ranking(row: Row) -> Ranking | None:
    """Reads `Anthropic/hh-rlhf` (Bai et al. 2022): `chosen` and `rejected` dialogues differ in the last answer.

    None if they differ earlier, and for a ranking that `check_ranking` refuses. A missing column is a KeyError.
    """
    # Both are whole dialogues: what they share is the prompt.
    chosen, rejected = hh_turns(row["chosen"]), hh_turns(row["rejected"])
    if not chosen or not rejected or chosen[:-1] != rejected[:-1] or chosen[-1].role != "assistant":
        return None  # they differ earlier: no two answers to one prompt
    return _ranking(chosen[:-1], [chosen[-1].content, rejected[-1].content], ranks=[0, 1])


def helpsteer_ranking(row: Row) -> Ranking | None:
    """Reads `nvidia/HelpSteer3`, preferences (Wang et al. 2025): -3 (the first is much better) to 3 (the second is).

    None for 0, and for a ranking that `check_ranking` refuses. A missing column and an unknown role are KeyErrors.
    """
    preference = int(row["overall_preference"])
    if preference == 0:  # both are equally good, which is no comparison
        return None
    judgement = Judgement(better=int(preference > 0), worse=int(preference < 0), margin=float(abs(preference)))
    turns = [Message(ROLES[turn["role"]], turn["content"]) for turn in row["context"]]
    return _ranking(turns, [row["response1"], row["response2"]], judgements=[judgement])


def ultrafeedback_ranking(row: Row) -> Ranking | None:
    """Reads `openbmb/UltraFeedback` (Cui et al. 2023): a model, no person, scored up to four answers.

    None for a ranking that `check_ranking` refuses, as with equal scores. A missing column is a KeyError.
    """
    scored = [completion for completion in row["completions"] if completion.get("overall_score") is not None]
    ranks = ranks_of_scores([float(completion["overall_score"]) for completion in scored])
    prompt = [Message("user", row["instruction"])]
    return _ranking(prompt, [completion["response"] for completion in scored], ranks=ranks)


BY_ROW: dict[str, Callable[[Row], Ranking | None]] = {
    "hh-rlhf": hh_ranking,
    "helpsteer3": helpsteer_ranking,
    "ultrafeedback": ultrafeedback_ranking,
}


def _oasst(rows: Iterable[SourceRow], source: SourceConfig) -> Iterator[Candidate]:
    """Yields the rankings of oasst1, by language (`oasst1_en`); then the rows that are broken.

    Raises:
        KeyError: a row lacks a column, or has an unknown role.
    """
    languages = frozenset(source.only or ()) or None
    broken: list[Rejected] = []  # reported at the end, because a ranking extends over several rows

    def intact_rows() -> Iterator[Row]:
        for source_row in rows:
            if isinstance(source_row.row, BadRow):
                problem = source_row.row
                broken.append(Rejected(source.language, source_row.location, problem.reason, problem.words))
            else:
                yield source_row.row

    for number, (language, ranking) in enumerate(oasst_rankings(intact_rows(), languages)):
        name = f"{origin_of(source)}:ranking={number}"
        yield ranking_document(ranking, f"{source.language}_{language}", name, source.licence)
    yield from broken


def _candidate(ranking_of: Callable[[Row], Ranking | None], source_row: SourceRow, source: SourceConfig) -> Candidate:
    """Returns the document of a row, or `Rejected` with the reason why it gives none (no_ranking, or of a broken row).

    Raises:
        KeyError: the row lacks a column, or has an unknown role.
    """
    row, location = source_row.row, source_row.location
    if isinstance(row, BadRow):
        return Rejected(source.language, location, row.reason, row.words)
    try:
        ranking = ranking_of(row)
    except (TypeError, ValueError, AttributeError) as error:
        return Rejected(source.language, location, "no_ranking", f"a column holds another kind of value ({error})")
    if ranking is None:
        return Rejected(source.language, location, "no_ranking")
    licence, has_own_licence = licence_of(row, source), bool(own_licence(row, source))
    return ranking_document(
        ranking, source.language, location, licence, has_own_licence, kept_columns(row, PARTS_OF_TEXT)
    )


def _ranking(
    turns: list[Message],
    completions: list[str],
    *,
    ranks: Iterable[int] = (),
    judgements: Iterable[Judgement] = (),
) -> Ranking | None:
    ranking = Ranking(Conversation(tuple(turns)), tuple(completions), tuple(ranks), tuple(judgements))
    try:
        check_ranking(ranking)
    except ChatError:  # a row without a comparison is no error: it is counted as `no_ranking`
        return None
    return ranking


def _thread(message: str | None, messages: dict[str, Row]) -> list[Message]:
    """Returns the turns from the root to a message; empty if a message in between is missing, or `message` is None.

    Args:
        message: id of the last message.
        messages: id -> row.

    Raises:
        KeyError: a row lacks a column, or has an unknown role.
    """
    turns = []
    while message is not None:
        row = messages.get(message)
        if row is None:
            return []
        turns.append(Message(ROLES[row["role"]], row["text"]))
        message = row["parent_id"]
    return turns[::-1]


def hh_turns(dialogue: str) -> list[Message]:
    """Splits `\\n\\nHuman: ...\\n\\nAssistant: ...` into turns; returns none for a dialogue that does not begin so."""
    preamble, *parts = HH_TURN.split(dialogue)
    if preamble.strip() or not parts:
        return []
    return [Message(HH_ROLES[role], text.strip()) for role, text in zip(parts[::2], parts[1::2], strict=True)]
