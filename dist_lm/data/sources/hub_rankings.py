"""Rankings from public data sets of preferences: one pure function from a row to a ranking for every data set.

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
from dist_lm.data.sources.places import bare_name
from dist_lm.data.sources.rankings import ranking_document
from dist_lm.data.sources.reader import Candidate, Rejected, reader
from dist_lm.data.sources.rows import PlacedRow, licence_of, looked_ahead, named_columns, own_licence
from dist_lm.errors import ConfigError

ROLES: dict[str, Role] = {"system": "system", "user": "user", "prompter": "user", "assistant": "assistant"}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
OASST = "oasst1"  # its rankings extend over several rows


@reader(
    form="ranking",
    keys=("language", "licence", *HUB_KEYS, "path", "exclude", "licence_column", "rows", "only"),
    needs=("language", "dataset|path"),
    inputs=list_data_set,
    advice="check dataset, split and rows; no row makes a ranking",
)
def read_hub_rankings(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Every ranking of a data set, or of files with its columns, in its order. `seed` is not used.

    Raises:
        ConfigError: without the `datasets` package, for rows of an unknown kind, or for a column that is not there.
        ArtefactError: the data set cannot be read.
    """
    kind = rows_of(source)
    ignored = "licence_column" if kind == OASST else "only"
    if getattr(source, ignored):
        raise ConfigError(
            f"corpus source reader={source.reader}: {ignored}={getattr(source, ignored)}: rows={kind} does not take it"
        )
    rows = looked_ahead(source, data_set_rows(source), named_columns(source))
    try:
        if kind == OASST:
            yield from _oasst(rows, source)
        else:
            for one in rows:
                yield _candidate(BY_ROW[kind], one, source)
    except KeyError as error:
        raise ConfigError(
            f"corpus source {origin_of(source)}: no column {error}: rows={kind} is not what it has; expected "
            f"one of {', '.join(sorted((*BY_ROW, OASST)))}"
        ) from error


def rows_of(source: SourceConfig) -> str:
    """What the rows of a data set are: `source.rows`, else by its name.

    Raises:
        ConfigError: neither is known.
    """
    found = source.rows or PurePosixPath(bare_name(source.path[0] if source.path else source.dataset)).stem
    if found not in (*BY_ROW, OASST):
        raise ConfigError(
            f"corpus source {origin_of(source)}: rows={source.rows or '(by its name)'}: expected one of "
            f"{', '.join(sorted((*BY_ROW, OASST)))}"
        )
    return found


def oasst_rankings(rows: Iterable[Row], languages: frozenset[str] | None = None) -> Iterator[tuple[str, Ranking]]:
    """`OpenAssistant/oasst1` (Koepf et al. 2023): people ranked the answers to one message; rank 0 is the best.

    Yields (language, ranking).

    Args:
        rows: messages, those of a tree one after the other.
        languages: that are kept, such as `en`; none: all.
    """
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
            best = sorted(siblings, key=lambda row: row["rank"])[:MOST]
            if thread:
                ranking = _ranking(thread, [row["text"] for row in best], ranks=[row["rank"] for row in best])
                if ranking:
                    yield siblings[0].get("lang") or "unknown", ranking


def hh_ranking(row: Row) -> Ranking | None:
    """`Anthropic/hh-rlhf` (Bai et al. 2022): `chosen` and `rejected` are dialogues that differ in the last answer."""
    chosen, rejected = _hh_turns(row["chosen"]), _hh_turns(row["rejected"])
    if not chosen or not rejected or chosen[:-1] != rejected[:-1] or chosen[-1].role != "assistant":
        return None  # they differ earlier: no two answers to one prompt
    return _ranking(chosen[:-1], [chosen[-1].content, rejected[-1].content], ranks=[0, 1])


def helpsteer_ranking(row: Row) -> Ranking | None:
    """`nvidia/HelpSteer3`, preferences (Wang et al. 2025): -3 (the first is much better) to 3 (the second is)."""
    lead = int(row["overall_preference"])
    if lead == 0:
        return None
    judgement = Judgement(better=int(lead > 0), worse=int(lead < 0), margin=float(abs(lead)))
    turns = [Message(ROLES[turn["role"]], turn["content"]) for turn in row["context"]]
    return _ranking(turns, [row["response1"], row["response2"]], judgements=[judgement])


def ultrafeedback_ranking(row: Row) -> Ranking | None:
    """`openbmb/UltraFeedback` (Cui et al. 2023): a model scored up to four answers. Not human."""
    scored = [one for one in row["completions"] if one.get("overall_score") is not None]
    ranks = ranks_of_scores([float(one["overall_score"]) for one in scored])
    return _ranking([Message("user", row["instruction"])], [one["response"] for one in scored], ranks=ranks)


BY_ROW: dict[str, Callable[[Row], Ranking | None]] = {
    "hh-rlhf": hh_ranking,
    "helpsteer3": helpsteer_ranking,
    "ultrafeedback": ultrafeedback_ranking,
}


def _oasst(rows: Iterable[PlacedRow], source: SourceConfig) -> Iterator[Candidate]:
    """Rankings of oasst1, by language (`oasst1_en`); then the rows that are broken."""
    languages = frozenset(source.only) if source.only else None
    broken: list[Rejected] = []

    def good() -> Iterator[Row]:
        for one in rows:
            if isinstance(one.row, BadRow):
                broken.append(Rejected(source.language, one.place, one.row.reason, one.row.words))
            else:
                yield one.row

    for number, (language, ranking) in enumerate(oasst_rankings(good(), languages)):
        name = f"{origin_of(source)}:ranking={number}"
        yield ranking_document(ranking, f"{source.language}_{language}", name, source.licence)
    yield from broken


def _candidate(ranking_of: Callable[[Row], Ranking | None], one: PlacedRow, source: SourceConfig) -> Candidate:
    if isinstance(one.row, BadRow):
        return Rejected(source.language, one.place, one.row.reason, one.row.words)
    try:
        ranking = ranking_of(one.row)
    except (TypeError, ValueError, AttributeError) as error:
        return Rejected(source.language, one.place, "no_ranking", f"a column holds another kind of value ({error})")
    if ranking is None:
        return Rejected(source.language, one.place, "no_ranking")
    own = bool(own_licence(one.row, source))
    return ranking_document(ranking, source.language, one.place, licence_of(one.row, source), own)


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
    except ChatError:  # rows of a data set that say nothing are passed over, as its readers count
        return None
    return ranking


def _thread(message: str | None, messages: dict[str, Row]) -> list[Message]:
    """The turns from the root to a message; empty if a message in between is missing."""
    turns = []
    while message is not None:
        row = messages.get(message)
        if row is None:
            return []
        turns.append(Message(ROLES[row["role"]], row["text"]))
        message = row["parent_id"]
    return turns[::-1]


def _hh_turns(dialogue: str) -> list[Message]:
    """`\\n\\nHuman: ...\\n\\nAssistant: ...`; empty where it does not begin so."""
    before, *parts = HH_TURN.split(dialogue)
    if before.strip() or not parts:
        return []
    return [Message(HH_ROLES[who], text.strip()) for who, text in zip(parts[::2], parts[1::2], strict=True)]
