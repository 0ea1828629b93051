"""The verb `data where`: the documents of a run's training text that hold a text, and the steps that read it there."""

import json
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dist_lm.config.root import Config
from dist_lm.data.exclusions import read_exclusions
from dist_lm.data.journal import REJECTED
from dist_lm.data.order import DocumentSlice
from dist_lm.data.text_search import ByteTable, find_text
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError
from dist_lm.stages.continuing import left_out_by
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.readable import counted
from dist_lm.training import checkpoint_files
from dist_lm.verbs.data_step import (
    IMPORTED,
    config_of,
    is_imported,
    origins_of,
    stage_with_corpus,
    tokenizer_of,
    training_sequences,
)

log = logging.getLogger(__name__)

STEP_OF_RUN = re.compile(r"@\d+$")  # end of a start that names a step of a run
NAMED_STEPS = 8  # most steps that a line names


@dataclass(frozen=True)
class Place:
    """Tokens [start, stop) of a document, which hold the text."""

    run: str
    corpus: str  # folder in work/corpora
    document: int  # number in train
    start: int
    stop: int
    language: str
    source: str
    licence: str
    steps: tuple[int, ...]  # steps of the run that read a token of the place, rising; from 1
    left_out: bool = False  # whether its loss does not count (stage.without)
    excluded: str = ""  # why the corpus excludes it (`data.exclusions`): duplicate | near_duplicate | contains_val
    excluded_for: str = ""  # source of the document for which it is excluded
    near_duplicates: tuple[str, ...] = ()  # sources of texts that the build dropped because they resemble the document


def places_of_text(config: Config, run: RunDirectory, text: str, most: int) -> tuple[list[Place], bool]:
    """Returns where the training text of a run holds a text, with the steps that read a token of it: at most `most`
    places of each corpus, and whether there are more.

    Reads the train split of each corpus of the run whole.

    Raises:
        ArtefactError: there is no run, it trains on no documents, its corpus has changed since, or a file is damaged.
        UserError: the package that the tokenizer needs is not installed.
    """
    sequences = training_sequences(config, run)
    # Sequences behind the newest checkpoint have not been trained on yet.
    end = trained_steps(config, run) * config.stage.global_batch
    table = ByteTable(tokenizer_of(run, sequences.corpora).vocabulary())
    left_out = left_out_by(config, run)

    places, has_more = [], False
    for corpus in sequences.corpora:
        # One place more than asked for tells whether there are more.
        parts = list(islice(find_text(corpus, text.encode(), table), most + 1))
        has_more |= len(parts) > most
        parts = parts[:most]
        numbers = sequences.numbers(corpus, parts, end)
        steps = [_steps(numbers[part], config) for part in parts]
        places += _places(run, corpus, parts, steps, left_out.get(corpus.directory.name, frozenset()))
    return places, has_more


def _steps(numbers: Sequence[int], config: Config) -> tuple[int, ...]:
    """Returns the steps that read sequences of these numbers, rising."""
    return tuple(sorted({number // config.stage.global_batch + 1 for number in numbers}))


def _places(
    run: RunDirectory,
    corpus: TokenCorpus,
    parts: Sequence[DocumentSlice],
    steps: Sequence[tuple[int, ...]],
    left_out: Collection[int],
) -> list[Place]:
    """Returns the place of each part of a corpus.

    Args:
        steps: for each part, the steps that read it.
        left_out: documents of the corpus whose loss the run leaves out.

    Raises:
        ArtefactError: origins, or the list of dropped or of excluded documents, are damaged.
    """
    origins = origins_of(corpus, {part.document for part in parts})
    dropped = _near_duplicates(corpus.directory, {origin.source for origin in origins.values()})
    excluded = {exclusion.document: exclusion for exclusion in read_exclusions(corpus.directory)}

    places = []
    for part, steps_of_part in zip(parts, steps, strict=True):
        origin = origins[part.document]
        near_duplicates = dropped.get(origin.source, ())
        exclusion = excluded.get(part.document)

        place = Place(
            run=str(run.path),
            corpus=corpus.directory.name,
            document=part.document,
            start=part.start,
            stop=part.stop,
            language=corpus.languages[corpus.language_codes[part.document]],
            source=origin.source,
            licence=origin.licence,
            steps=steps_of_part,
            left_out=part.document in left_out,
            excluded=exclusion.reason if exclusion else "",
            excluded_for=exclusion.cause if exclusion else "",
            near_duplicates=tuple(near_duplicates),
        )
        places.append(place)
    return places


def _near_duplicates(directory: Path, sources: Collection[str]) -> dict[str, list[str]]:
    """Returns the near-duplicates of documents that the build of a corpus dropped: source of a document -> places of
    the dropped ones, in the order of the list; documents without any have no entry.

    Args:
        sources: those of the documents that are asked about.

    Raises:
        ArtefactError: the list of dropped documents is damaged.
    """
    dropped: dict[str, list[str]] = {}
    path = directory / REJECTED
    if not path.is_file():
        return dropped
    try:
        for line in durable.json_lines(path):
            if (source := line.get("resembles", "")) in sources:
                dropped.setdefault(source, []).append(str(line["place"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{path}: cannot be read ({error})") from error
    return dropped


def trained_steps(config: Config, run: RunDirectory) -> int:
    """Returns the steps that a run has taken, by its newest checkpoint; before it has one, those that it will take.

    Raises:
        ArtefactError: the pointer to that checkpoint names nothing that is there.
    """
    newest = checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST)
    return config.stage.steps if newest is None else checkpoint_files.step_of(newest)


def with_ancestors(run: RunDirectory) -> list[tuple[RunDirectory, Config | None]]:
    """Returns a run and those whose weights it began with, the youngest first, with their configurations; runs that
    are gone are left out. An imported model is the last of them and has None.

    Raises:
        ArtefactError, ConfigError: there is no run, or the configuration of one cannot be read.
    """
    config = config_of(run)
    runs: list[tuple[RunDirectory, Config | None]] = [(run, config)]
    while True:
        # A start names a run, RUN@STEP, its folder of checkpoints, or one of them.
        start = Path(STEP_OF_RUN.sub("", config.stage.init_from))
        folders = [folder for folder in (start, *start.parents) if RunDirectory(folder).config.is_file()]
        if not start.is_absolute() or not folders:
            return runs

        ancestor = RunDirectory(folders[0])
        if is_imported(ancestor):
            return [*runs, (ancestor, None)]
        config = config_of(ancestor)
        runs.append((ancestor, config))


def print_places(run: RunDirectory, text: str, most: int, console: Console, *, as_json: bool) -> None:
    """Prints the places of a text in the training text of a run and of those that it began with.

    Raises:
        ArtefactError, UserError: as `places_of_text`; or the text is empty.
    """
    if not text:
        raise ArtefactError("TEXT is empty: expected the text to look for")
    for searched_run, config in with_ancestors(run):
        if config is None or stage_with_corpus(config) is None:
            reason = IMPORTED if config is None else "trained on no corpus of this work directory"
            if not as_json:
                console.print(Text(f"{searched_run.path}: {reason}"), soft_wrap=True)
            continue

        places, has_more = places_of_text(config, searched_run, text, most)
        if has_more:
            log.warning("%s: there are more places than --most %d of a corpus", searched_run.path, most)
        if as_json:
            for place in places:
                print(json.dumps(asdict(place)))
            continue

        console.print(Text(f"{searched_run.path}: {counted(len(places), 'place')}", style="bold"), soft_wrap=True)
        for place in places:
            console.print(Text(f"  {place.source}  ({place.licence or 'licence not given'})"), soft_wrap=True)
            # The document as `data without` takes it; the steps are those of these tokens, not of all its tokens.
            where = f"{place.corpus}:{place.document}, tokens {place.start:,} to {place.stop:,}"
            left_out = ", without its loss" if place.left_out else ""
            console.print(Text(f"    {where}: {_in_words(place.steps)}{left_out}"), soft_wrap=True)
            if place.excluded:
                words = f"excluded as {place.excluded} for {place.excluded_for}: training leaves out its loss"
                console.print(Text(f"    {words}"), soft_wrap=True)
            for source in place.near_duplicates:
                console.print(Text(f"    {source} was dropped as its near-duplicate"), soft_wrap=True)


def _in_words(steps: Sequence[int]) -> str:
    if not steps:
        return "these tokens were read by no step"
    named = ", ".join(f"{step:,}" for step in steps[:NAMED_STEPS])
    more = f" and {len(steps) - NAMED_STEPS:,} more" if len(steps) > NAMED_STEPS else ""
    return f"these tokens were read by step {named}{more}"
