"""Reads preferences in the layouts that people have them in, one ranking of a row, told apart by its columns:

| kind | columns |
| --- | --- |
| pairs | `chosen` and `rejected`, texts or turns, and `prompt` (or turns that both begin with); perhaps `margin` |
| ranked | `prompt`, `completions`, and `ranks` (the smallest is best) or `scores` (the largest is), or these in each |
| labelled | `prompt`, `completion`, `label`: one completion that is wanted or not, for KTO |
| hh-rlhf, helpsteer3, ultrafeedback | those of `hub_rankings` |

Turns are read as those of conversations are (`chat.layouts.turns`), and may be JSON text. A row that is well formed and
compares nothing is counted under a word: tied, differ_earlier (answers to different turns), no_ranking.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dist_lm.chat.layouts.tools import TOOLS, tools_of
from dist_lm.chat.layouts.transcript import MEDIA, list_of, one_of, plain_text, value_of
from dist_lm.chat.layouts.turns import SYSTEMS, conversation_of
from dist_lm.chat.messages import ChatError, Conversation, Message, Tool
from dist_lm.chat.ranking import MOST, Judgement, Ranking, check_ranking, ranks_of_scores
from dist_lm.chat.template import thinking_block
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.prompt_rows import is_turns
from dist_lm.data.sources.formats import BadRow, Row
from dist_lm.data.sources.hub import HUB_KEYS, data_set_rows, list_data_set
from dist_lm.data.sources.hub_rankings import BY_ROW, HH_TURN, PARTS_OF_TEXT, hh_turns
from dist_lm.data.sources.rankings import ranking_document
from dist_lm.data.sources.reader import Candidate, Rejected, reader
from dist_lm.data.sources.rows import SourceRow, kept_columns, licence_of, own_licence
from dist_lm.data.sources.snapshot import Snapshot
from dist_lm.errors import ConfigError, require

PROMPT = "prompt"
PROMPTS = (PROMPT, "messages", "conversations", "conversation", "instruction", "question", "query", "input")
COMPLETIONS = ("completions", "responses", "answers", "candidates", "generations")
RANKS, SCORES = ("ranks", "rank"), ("scores", "score", "rewards", "reward", "ratings", "rating", "overall_score")
TEXTS = ("content", "text", "response", "completion", "answer", "output", "generated_text", "value")
ROLE_KEYS = ("role", "from")
# Column -> the key of a source that names another one in its place.
NAMED_COLUMNS = {PROMPT: "prompt_column", "chosen": "chosen_column", "rejected": "rejected_column"}
PARTS = (*PARTS_OF_TEXT, *PROMPTS, *SYSTEMS, *COMPLETIONS, *RANKS, "completion", "label", "judgements", *TOOLS)


@reader(
    form="ranking",
    keys=("language", "licence", *HUB_KEYS, "path", "exclude", "licence_column", "rows", *NAMED_COLUMNS.values()),
    needs=("language", "dataset|path"),
    inputs=list_data_set,
    takes_files=True,
    advice="check path or dataset, and rows; no row makes a ranking",
)
def read_preferences(source: SourceConfig, seed: int, files: Snapshot | None = None) -> Iterator[Candidate]:
    """Yields every row of a data set, or of files, as a ranking or `Rejected`, in its order. `seed` is not used.

    Raises:
        ConfigError: the kind of rows is unknown, or as `data_set_rows`.
        ArtefactError: the data set or a file cannot be read.
    """
    if source.rows and source.rows not in KINDS:
        raise ConfigError(
            f"corpus source reader={source.reader}: rows={source.rows}: expected one of {', '.join(sorted(KINDS))}, or "
            "none, to tell them by their columns"
        )
    require(
        not source.chosen_column or source.rows in ("", "pairs"),
        f"corpus source reader={source.reader}: rows",
        source.rows,
        "pairs, or none, with chosen_column",
    )
    for source_row in data_set_rows(source, files):
        yield _candidate(source_row, source)


def ranking_of(row: Row, kind: str = "") -> Ranking | str:
    """Returns the ranking of a row, unchecked; for a row that compares nothing, the word under which it is counted.

    Args:
        kind: one of `KINDS`; empty: by the columns.

    Raises:
        ChatError: the row is of no kind, lacks a column of its kind, or is not well formed.
    """
    kind = kind or kind_of(row)
    needed = {"pairs": ("chosen", "rejected"), "labelled": ("completion", "label")}.get(kind, ())
    missing = [name for name in needed if row.get(name) is None]
    if kind == "ranked" and not any(row.get(name) is not None for name in COMPLETIONS):
        missing = [COMPLETIONS[0]]
    if missing:
        raise ChatError(
            f"no {' and no '.join(missing)} (rows={kind}); the columns there are {', '.join(row) or 'none'}"
        )
    return KINDS[kind](row)


def with_usual_names(row: Row, source: SourceConfig) -> Row:
    """Returns a row with the columns that the source names as `prompt`, `chosen` and `rejected`; without named columns,
    the row itself.

    Raises:
        ChatError: the row has no such column.
    """
    if not source.chosen_column:
        return row
    columns = {name: column for name, key in NAMED_COLUMNS.items() if (column := getattr(source, key))}
    for name, column in columns.items():
        if column not in row:
            raise ChatError(
                f"no column {column} ({NAMED_COLUMNS[name]}); the columns there are {', '.join(row) or 'none'}"
            )

    other_cells = {name: cell for name, cell in row.items() if name not in {*columns, *columns.values()}}
    return {name: row[column] for name, column in columns.items()} | other_cells


def kind_of(row: Row) -> str:
    """Returns the kind of preferences in a row, which the columns with a value decide: pairs, hh-rlhf, helpsteer3,
    labelled, ultrafeedback or ranked.

    Raises:
        ChatError: the row has the columns of no kind; the message names its columns.
    """
    columns = {name for name, cell in row.items() if cell is not None}
    if {"chosen", "rejected"} <= columns:
        # hh-rlhf has columns of these names too, and whole dialogues in them.
        is_dialogue = all(isinstance(row[name], str) and HH_TURN.match(row[name]) for name in ("chosen", "rejected"))
        return "hh-rlhf" if is_dialogue and not columns & {*PROMPTS} else "pairs"

    if {"context", "response1", "response2", "overall_preference"} <= columns:
        return "helpsteer3"
    if {"completion", "label"} <= columns:
        return "labelled"
    if {"instruction", "completions"} <= columns and all(
        "response" in completion for completion in _mappings(row["completions"])
    ):
        return "ultrafeedback"
    if columns & {*COMPLETIONS}:
        return "ranked"
    raise ChatError(
        "no preference: expected chosen and rejected (or chosen_column and rejected_column of the source), completions "
        f"with ranks or scores, or completion and label; the columns there are {', '.join(row) or 'none'}"
    )


def pair_ranking(row: Row) -> Ranking | str:
    """Reads `chosen` and `rejected`: two answers to one prompt, which is a column, or the turns that both begin with.

    Returns a word, as `ranking_of`, if both are equal or differ before the last answer.

    Raises:
        ChatError: an answer or the prompt is missing or not well formed.
    """
    prompt = prompt_turns(row)
    is_dialogue = isinstance(row.get(PROMPT), str) and bool(HH_TURN.match(row[PROMPT]))
    (before, chosen), (before_rejected, rejected) = (answer_of(row[name], name) for name in ("chosen", "rejected"))
    if is_dialogue:  # the answers follow `Assistant:` and a space
        chosen, rejected = chosen.strip(), rejected.strip()
    if before != before_rejected:
        return "differ_earlier"
    if chosen == rejected:
        return "tied"

    # Whole conversations repeat the prompt; a prompt may be a text that stands for their last turn.
    if before and prompt and before[-len(prompt) :] != prompt:
        raise ChatError("chosen and rejected begin with other turns than the prompt")
    conversation = Conversation(tuple(before or prompt), _tools(row))
    if not conversation.messages:
        raise ChatError(
            f"no prompt: expected one of {', '.join(PROMPTS)}, or turns that chosen and rejected begin with"
        )

    margin = row.get("margin")
    if margin is None:
        return Ranking(conversation, (chosen, rejected), (0, 1))
    return Ranking(conversation, (chosen, rejected), (), (Judgement(0, 1, _number(margin, "margin")),))


def ranked_ranking(row: Row) -> Ranking | str:
    """Reads K completions with ranks, scores or judgements. Of equal texts the first counts. Of more than `MOST`
    completions, those at even distances from best to worst are taken.

    Returns a word, as `ranking_of`, if fewer than two are judged, or all are tied.

    Raises:
        ChatError: the prompt, a completion or a rank is missing or not well formed.
    """
    (name,) = [name for name in COMPLETIONS if row.get(name) is not None][:1]
    values = _list(row[name], name)
    completions = [answer_of(value, f"{name}[{number}]")[1] for number, value in enumerate(values)]
    prompt = Conversation(tuple(prompt_turns(row)), _tools(row))
    if row.get("judgements"):
        pairs = [_list(pair, "judgements") for pair in _list(row["judgements"], "judgements")]
        judgements = tuple(Judgement(*pair[:2], *([float(pair[2])] if len(pair) > 2 else [])) for pair in pairs)
        return Ranking(prompt, tuple(completions), (), judgements)

    # A score is good if it is large, a rank if it is small.
    scores = _judged(row, values, RANKS, sign=-1.0) or _judged(row, values, SCORES, sign=1.0)
    if scores is None:
        raise ChatError(f"{name}: no ranks or scores: expected a column {RANKS[0]} or {SCORES[0]}, or one in each")
    if len(scores) != len(completions):
        raise ChatError(f"{len(scores)} ranks or scores of {len(completions)} completions; expected as many")

    best: dict[str, float] = {}
    for text, score in zip(completions, scores, strict=True):
        if score is not None:
            best.setdefault(text, score)
    if len(set(best.values())) < 2:
        return "tied"
    ordered = sorted(best, key=lambda text: -best[text])
    if len(ordered) > MOST:
        ordered = [ordered[i * (len(ordered) - 1) // (MOST - 1)] for i in range(MOST)]
    return Ranking(prompt, tuple(ordered), ranks_of_scores([best[text] for text in ordered]))


def labelled_ranking(row: Row) -> Ranking:
    """Returns a ranking of one completion with a label, which the row gives as true, false, 1, 0, or text of these in
    any case.

    Raises:
        ChatError: the prompt, the completion or the label is missing or not well formed.
    """
    before, completion = answer_of(row["completion"], "completion")
    label = row.get("label")
    if isinstance(label, str):
        label = {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower(), label)
    if label not in (True, False):  # 1 and 0 are among them
        raise ChatError(f"label: {label!r:.40}; expected true or false")
    prompt = Conversation(tuple(before or prompt_turns(row)), _tools(row))
    return Ranking(prompt, (completion,), label=bool(label))


def prompt_turns(row: Row) -> list[Message]:
    """Returns the turns of the prompt of a row; none if it has no column of one.

    `instruction` and `input` are one turn, as in Alpaca's layout; a system text stands before the others.

    Raises:
        ChatError: the turns are not well formed, or a column of images is there.
    """
    for name in MEDIA:
        if row.get(name):
            raise ChatError(f"the column {name} is not read: only text is; leave such rows out")

    names = [name for name in PROMPTS if row.get(name) not in (None, "", [])]
    turns: list[Message] = []
    if names[:1] == [PROMPT] or len(names) == 1:
        turns = _turns(row[names[0]], names[0])
    elif names == ["instruction", "input"]:
        turns = _turns(f"{row['instruction']}\n{row['input']}", names[0])
    elif names:
        raise ChatError(f"the columns {', '.join(names)} may all be the prompt: name one of them {PROMPT}")

    system = plain_text(one_of(row, SYSTEMS), "system")
    if system and turns and turns[0].role != "system":
        turns.insert(0, Message("system", system))
    return turns


def answer_of(value: Any, where: str) -> tuple[list[Message], str]:
    """Returns (the turns before the answer, the text of the answer) of a text, a turn, turns, or an object with a text.

    Raises:
        ChatError: there is no answer of the assistant, or one with calls; the message begins with `where`.
    """
    if isinstance(value, Mapping) and not any(value.get(key) for key in ROLE_KEYS):
        texts = [value[key] for key in TEXTS if value.get(key) is not None]
        if not texts:
            raise ChatError(f"{where}: no text: expected one of {', '.join(TEXTS)}")
        return answer_of(texts[0], where)
    if isinstance(value, str) and not is_turns(value):
        if HH_TURN.match(value):
            value = _without_mark(value)
        turns = [Message("assistant", value)]
    else:
        turns = _turns([value] if isinstance(value, Mapping) else value, where)

    # A completion is text; a call in it would be lost.
    if not turns or turns[-1].role != "assistant":
        raise ChatError(f"{where}: expected an answer of the assistant at the end")
    *before, answer = turns
    if answer.calls:
        raise ChatError(f"{where}: calls of tools are not compared: leave such rows out")
    if not answer.content:
        raise ChatError(f"{where}: the answer is empty")
    # A completion is what the model writes, thinking included.
    return before, thinking_block(answer) + answer.content


def _turns(value: Any, where: str) -> list[Message]:
    """Returns turns, or the one turn of the user that a text stands for; `Human: ... Assistant:` is split, and its
    empty turns are left out.

    Raises:
        ChatError: a list holds no well-formed turns; the message begins with `where`.
    """
    if isinstance(value, str) and not is_turns(value):
        if HH_TURN.match(value):
            return [turn for turn in hh_turns(value) if turn.content]
        return [Message("user", value)]
    try:
        return list(conversation_of(value).messages)
    except ChatError as error:
        raise ChatError(f"{where}: {error}") from None


def _without_mark(text: str) -> str:
    """Returns the answer of `\\n\\nAssistant: ...`."""
    turns = hh_turns(text)
    return turns[-1].content if turns else text


def _judged(row: Row, values: Sequence[Any], names: Sequence[str], sign: float) -> list[float | None] | None:
    """Returns a number for each completion, times `sign`, from the first of `names` that is a column of the row or a
    key of the completions; None: there are none.

    A null stays None: nobody judged that completion.

    Raises:
        ChatError: a value is no number.
    """
    for name in names:
        if isinstance(row.get(name), list | tuple):
            return [None if number is None else sign * _number(number, name) for number in row[name]]
        if any(name in value for value in _mappings(values)):
            numbers = [value.get(name) for value in _mappings(values)]
            return [None if number is None else sign * _number(number, name) for number in numbers]
    return None


def _mappings(values: Any) -> list[Mapping[str, Any]]:
    """Returns the values if all are objects, else none."""
    if not isinstance(values, list | tuple) or not all(isinstance(value, Mapping) for value in values):
        return []
    return list(values)


def _tools(row: Row) -> tuple[Tool, ...]:
    """Returns the tools of a row."""
    return tools_of(one_of(row, TOOLS))


def _list(value: Any, where: str) -> list[Any]:
    """Returns a list, also from its JSON. Raises ChatError, which begins with `where`, for another value."""
    return list_of(value_of(value, where), where)


def _number(value: Any, where: str) -> float:
    """Returns a finite number, also from its text. Raises ChatError, which begins with `where`, for another value."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ChatError(f"{where}: {value!r:.40}; expected a number")
    return number


def _known(read: Callable[[Row], Ranking | None]) -> Callable[[Row], Ranking | str]:
    """Wraps a function of `BY_ROW`: the new one returns `no_ranking` where that returns None, and raises ChatError for
    a missing column or a value of another kind.
    """

    def ranking_of(row: Row) -> Ranking | str:
        try:
            return read(row) or "no_ranking"
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ChatError(f"a column is missing or holds another kind of value ({error})") from None

    return ranking_of


KINDS: dict[str, Callable[[Row], Ranking | str]] = {
    "pairs": pair_ranking,
    "ranked": ranked_ranking,
    "labelled": labelled_ranking,
    **{name: _known(read) for name, read in BY_ROW.items()},
}


def _candidate(source_row: SourceRow, source: SourceConfig) -> Candidate:
    """Returns the document of a row, or `Rejected`: with an error if the row is broken, without one if it compares
    nothing."""
    row, location = source_row.row, source_row.location
    if isinstance(row, BadRow):
        return Rejected(source.language, location, row.reason, row.words)
    try:
        row = with_usual_names(row, source)
        ranking = ranking_of(row, source.rows)
        if isinstance(ranking, str):
            return Rejected(source.language, location, ranking)
        check_ranking(ranking)
    except ChatError as error:
        return Rejected(source.language, location, "no_ranking", str(error))
    licence, has_own_licence = licence_of(row, source), bool(own_licence(row, source))
    return ranking_document(ranking, source.language, location, licence, has_own_licence, kept_columns(row, PARTS))
