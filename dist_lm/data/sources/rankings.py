"""Reads rankings: files of your own. Samples of the model get their rankings in stage=rankings.

A file has one ranking a line:

    {"prompt": "Name a colour.", "completions": ["Blue.", "7"], "ranks": [0, 1]}
    {"prompt": [{"role": "user", "content": "..."}, ...], "completions": [...], "judgements": [[0, 1], [2, 1, 0.5]]}

A judgement is `[better, worse]` or `[better, worse, margin]`; completions are named by their index in the list. The
group of a ranking is the hash of its prompt, so all rankings of one prompt are in one split.
"""

import glob
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dist_lm.chat.documents import write_prompt, write_ranking
from dist_lm.chat.messages import ChatError, Conversation, Message
from dist_lm.chat.ranking import Judgement, Ranking, check_ranking
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.inputs import Input, Inputs
from dist_lm.data.sources.reader import Candidate, Rejected, reader, text_hash
from dist_lm.data.sources.snapshot import Snapshot
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError, UserError

KEYS = {"prompt", "completions", "ranks", "judgements"}


def list_rankings(source: SourceConfig) -> Inputs:
    """Returns the files that `source.dataset` names: a file of JSON lines, or a glob. They are not read.

    Raises:
        ConfigError: there is no such file.
    """
    pattern = str(Path(source.dataset).expanduser())
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]  # noqa: PTH207  may be absolute
    if not files:
        raise ConfigError(
            f"corpus source with reader=rankings: dataset={source.dataset}: no such file; expected one of JSON lines, "
            "or a glob"
        )
    return Inputs(tuple(Input(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@reader(
    form="ranking",
    keys=("language", "licence", "dataset"),
    needs=("language", "dataset"),
    inputs=list_rankings,
    takes_files=True,
    advice="check dataset; no line makes a ranking",
)
def read_local_rankings(source: SourceConfig, seed: int, files: Snapshot | None = None) -> Iterator[Candidate]:
    """Yields every ranking of the files that `source.dataset` names. `seed` is not used.

    A ranking is named `FILE:NUMBER`, counted from 0 in its file.

    Raises:
        ConfigError: there is no such file.
        ArtefactError: a line is no ranking, or is not UTF-8, or a file has changed since it was listed; the message
            names the file.
        OSError: a file cannot be read.
    """
    files = files or Snapshot.of(source)
    for file in files.listing.taken:
        try:
            with files.reading(file) as reading:
                lines = io.TextIOWrapper(reading.open_content(may_grow=True), encoding="utf-8")
                for number, ranking in enumerate(read_rankings(lines, file.name)):
                    yield ranking_document(ranking, source.language, f"{file.name}:{number}", source.licence)
        except UnicodeDecodeError as error:
            raise ArtefactError(f"{file.name}: not UTF-8 ({error})") from error


@reader(
    form="ranking",
    seeded=True,
    advice="train the stage before for longer, or take another source; no two samples of the model differ by the rules",
)
def read_synthetic_rankings(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Raises ConfigError: stage=rankings makes these documents, because it has the model to sample from."""
    raise ConfigError(
        "reader=synthetic_rankings ranks samples of a model: it belongs into a corpus that stage=rankings builds"
    )


def ranking_document(
    ranking: Ranking, language: str, name: str, licence: str, own_licence: bool = False, row: str = ""
) -> Candidate:
    """Turns a ranking into a document; rejects one that cannot be written, such as one with a lone surrogate.

    Args:
        row: as in `Document`.
    """
    try:
        text, group = write_ranking(ranking), text_hash(write_prompt(ranking))
    except UserError:
        return Rejected(language, name, "no_ranking")
    return Document(text, language, name, licence, group, form="ranking", own_licence=own_licence, row=row)


def read_rankings(lines: Iterable[str], name: str) -> Iterator[Ranking]:
    """Yields the rankings of lines of JSON; blank lines are passed over.

    Raises:
        ArtefactError: a line is no ranking; the message names file, line and what was expected.
    """
    # Blank lines count, so that the number is that of an editor.
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield ranking_of(json.loads(line))
            except json.JSONDecodeError as error:
                raise ArtefactError(f"{name}, line {number}: no JSON ({error.msg} at character {error.pos})") from None
            except RecursionError:
                raise ArtefactError(f"{name}, line {number}: no JSON (nested too deeply)") from None
            except ValueError as error:
                raise ArtefactError(f"{name}, line {number}: {error}") from None


def ranking_of(fields: Any) -> Ranking:
    """Returns the ranking of the JSON of a line, checked.

    Args:
        fields: what `json.loads` returns; any value.

    Raises:
        ChatError (a UserError): says what was expected.
    """
    if type(fields) is not dict or not {"prompt", "completions"} <= fields.keys() <= KEYS:
        raise ChatError("expected an object of prompt, completions, and ranks or judgements")

    # Types are compared exactly, because true and false are integers for isinstance.
    completions, ranks = fields["completions"], fields.get("ranks", [])
    if type(completions) is not list or not all(type(text) is str for text in completions):
        raise ChatError("completions: expected a list of texts")
    if type(ranks) is not list or not all(type(rank) is int for rank in ranks):
        raise ChatError("ranks: expected a list of integers, the smallest of the best completion")
    judgements = tuple(_judgement(numbers) for numbers in _list(fields.get("judgements", []), "judgements"))

    ranking = Ranking(_prompt(fields["prompt"]), tuple(completions), tuple(ranks), judgements)
    check_ranking(ranking)
    return ranking


def _prompt(prompt: Any) -> Conversation:
    """Returns the conversation of a prompt: a list of turns, or a text, which is one turn of the user.

    Raises:
        ChatError: it is neither, or a turn has another role or key.
    """
    if type(prompt) not in (str, list):
        raise ChatError("prompt: expected a text, or a list of turns with role and content")
    # A text is short for one turn of the user.
    turns = prompt
    if type(prompt) is str:
        turns = [{"role": "user", "content": prompt}]
    messages = []
    for turn in turns:
        if type(turn) is not dict or turn.keys() != {"role", "content"} or type(turn["content"]) is not str:
            raise ChatError("prompt: expected a text, or a list of turns with role and content")
        if turn["role"] not in ("system", "user", "assistant"):
            raise ChatError(f"prompt: role={turn['role']!r}; expected system, user or assistant")
        messages.append(Message(turn["role"], turn["content"]))
    return Conversation(tuple(messages))


def _judgement(judgement: Any) -> Judgement:
    """Returns the judgement of `[better, worse]` or `[better, worse, margin]`; indices are not compared with the
    completions.

    Raises:
        ChatError: it has another form.
    """
    numbers = _list(judgement, "judgements")
    if len(numbers) not in (2, 3) or not all(type(index) is int for index in numbers[:2]):
        raise ChatError("judgements: expected [better, worse] or [better, worse, margin]")
    better, worse, *margin = numbers
    if not margin:
        return Judgement(better, worse, None)
    if type(margin[0]) not in (int, float):
        raise ChatError("judgements: margin: expected a number")
    return Judgement(better, worse, float(margin[0]))


def _list(json_value: Any, name: str) -> list:
    """Returns the value if it is a list; raises ChatError, which begins with `name`, if not."""
    if type(json_value) is not list:
        raise ChatError(f"{name}: expected a list")
    return json_value
