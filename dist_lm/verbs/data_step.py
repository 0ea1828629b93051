"""The verb `data step`: the documents that a training step of a run was made of, with their sources and licences.

Nothing was recorded for this: the order of data is a function of the configuration of the run, so a step of any past
run, on any layout, can be looked up.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text
from zstandard import ZstdError

from dist_lm.config.root import Config, read_groups
from dist_lm.data.manifest import read_manifest, require_content
from dist_lm.data.order import DocumentSlice
from dist_lm.data.shard_writer import Origin, read_origins
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError
from dist_lm.stages.registry import load_config, stage_named
from dist_lm.stages.training.arguments import TrainingSequences
from dist_lm.stages.training.stage import TrainingStage
from dist_lm.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from dist_lm.tokenizer.tokenizer import Tokenizer

SHOWN_TOKENS = 160  # of a slice, with `--text`
IMPORTED = "an imported model, whose training text is not known here"


@dataclass(frozen=True)
class UsedSlice:
    """Tokens [start, stop) of a document, in one sequence of a step."""

    sequence: int  # number in the training stream, from 0
    corpus: str  # folder in work/corpora
    document: int  # number in train
    start: int
    stop: int
    document_tokens: int
    language: str
    source: str
    licence: str
    text: str = ""  # the beginning, with the names of special tokens, where it was asked for


def slices_of_step(run: RunDirectory, step: int, with_text: bool = False) -> list[UsedSlice]:
    """Returns what the ranks together read in a step of a run, in the order of its sequences.

    A sequence has one token more than `stage.seq_len`, the last target. Reads the index of each corpus, and the origins
    of the tars that hold the documents.

    Args:
        step: from 1, as in metrics and in the names of checkpoints.

    Raises:
        ArtefactError: there is no run, it trains on no documents, it has no such step, its corpus has changed since, or
            a file is damaged.
        UserError: the package that the tokenizer needs is not installed.
    """
    from dist_lm.tokenizer.tokenizer import text_with_marks

    config = config_of(run)
    numbers = _sequences_of_step(config, run, step)
    sequences = training_sequences(config, run)

    # Documents of one corpus are looked up together, because origins are read from the beginning of a file.
    read: list[tuple[int, TokenCorpus, DocumentSlice]] = []
    for number in numbers:
        corpus, slices = sequences.slices(number)
        read += [(number, corpus, part) for part in slices]
    documents_of: dict[TokenCorpus, set[int]] = {}
    for _, corpus, part in read:
        documents_of.setdefault(corpus, set()).add(part.document)
    origins = {corpus: origins_of(corpus, documents) for corpus, documents in documents_of.items()}

    tokenizer = tokenizer_of(run, sequences.corpora) if with_text else None

    def text_of(corpus: TokenCorpus, part: DocumentSlice) -> str:
        if tokenizer is None:
            return ""
        stop = min(part.stop, part.start + SHOWN_TOKENS)
        text = text_with_marks(corpus.tokens(part.document, part.start, stop).tolist(), tokenizer)
        return text + " ..." if stop < part.stop else text

    return [
        UsedSlice(
            sequence=number,
            corpus=corpus.directory.name,
            document=part.document,
            start=part.start,
            stop=part.stop,
            document_tokens=int(corpus.lengths[part.document]),
            language=corpus.languages[corpus.language_codes[part.document]],
            source=origins[corpus][part.document].source,
            licence=origins[corpus][part.document].licence,
            text=text_of(corpus, part),
        )
        for number, corpus, part in read
    ]


def config_of(run: RunDirectory) -> Config:
    """Returns the configuration of a run of a stage.

    Raises:
        ConfigError: a value is not accepted by this version.
        ArtefactError: there is no run, its configuration is damaged, or it is an imported model.
    """
    if not run.config.is_file():
        raise ArtefactError(f"{run.path}: no run is there; expected a run directory, such as work/runs/code/default")
    try:
        return load_config(run.config)
    except ArtefactError:
        # Reading a configuration takes most of the time of a short answer, so that this is asked where it failed alone.
        if not is_imported(run):
            raise
        message = f"{run.path}: {IMPORTED}; expected a run of a stage that trains on a corpus"
        raise ArtefactError(message) from None


def is_imported(run: RunDirectory) -> bool:
    """Returns whether a run holds a model of others, which no stage of ours trained.

    Raises:
        ArtefactError: its configuration cannot be read.
    """
    return "stage" not in read_groups(run.config)


def training_sequences(config: Config, run: RunDirectory) -> TrainingSequences:
    """Returns what the training stream of a run reads.

    Raises:
        ArtefactError: the run trains on no documents, its corpus has changed since it began, or a file is damaged.
        UserError: the package that the tokenizer needs is not installed.
    """
    stage = stage_with_corpus(config)
    if stage is None:
        raise ArtefactError(
            f"{run.path}: stage {config.stage.name} draws what it trains on itself; expected a run of a stage that "
            "trains on a corpus"
        )
    require_content(run, config.stage.corpus_names)
    return stage.sequences(config, run)


def stage_with_corpus(config: Config) -> TrainingStage | None:
    """Returns the stage of a run, if its training stream is sequences of a corpus."""
    stage = stage_named(config.stage.name)
    return stage if isinstance(stage, TrainingStage) and stage.has_sequences else None


def tokenizer_of(run: RunDirectory, corpora: Iterable[TokenCorpus]) -> "Tokenizer":
    """Returns the tokenizer of a run's work directory, with which `corpora` were written.

    Raises:
        ArtefactError: it cannot be read, or a corpus was written with another one: its tokens would be other text.
        UserError: the package that it needs is not installed.
    """
    from dist_lm.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(run.work.tokenizer_model)
    for corpus in corpora:
        if read_manifest(corpus.directory).recipe.tokenizer_sha256 != tokenizer.sha256:
            raise ArtefactError(
                f"corpus {corpus.directory} was written with another tokenizer than {run.work.tokenizer_model}: "
                "restore that tokenizer to see its text"
            )
    return tokenizer


def _sequences_of_step(config: Config, run: RunDirectory, step: int) -> range:
    """Returns the numbers of the sequences of a step in the training stream.

    Raises:
        ArtefactError: the run has no such step.
    """
    if not 1 <= step <= config.stage.steps:
        raise ArtefactError(f"{run.path}: step {step:,}: expected 1 to stage.steps={config.stage.steps:,}")
    return range((step - 1) * config.stage.global_batch, step * config.stage.global_batch)


def origins_of(corpus: TokenCorpus, documents: Iterable[int]) -> dict[int, Origin]:
    """Returns the source and licence of each document, by its number in the split of `corpus`; a number that the split
    does not have is left out.

    Raises:
        ArtefactError: the manifest is missing or damaged; or the file of origins beside a tar is, and the message names
            the tar.
        OSError: the manifest cannot be read.
    """
    numbers = sorted(documents)
    origins: dict[int, Origin] = {}
    first = 0
    for shard in read_manifest(corpus.directory).splits[corpus.split].shards:
        end = first + shard.counts.documents
        inside = [document for document in numbers if first <= document < end]
        if inside:
            tar = corpus.directory / shard.name
            try:
                read = read_origins(tar, {document - first for document in inside})
                origins |= dict(zip(inside, read, strict=True))
            except (OSError, ValueError, KeyError, ZstdError) as error:
                raise ArtefactError(f"{tar}: sources and licences cannot be read ({error})") from error
        first = end
    return origins


def print_step(run: RunDirectory, step: int, console: Console, *, as_json: bool, with_text: bool) -> None:
    """Prints the slices of a step, sequence by sequence, and its tokens by licence; or a JSON line for each slice.

    Args:
        with_text: print the beginning of the text of each slice, too.

    Raises:
        ArtefactError, UserError: as `slices_of_step`; or a tar is damaged.
    """
    used = slices_of_step(run, step, with_text)
    if as_json:
        for part in used:
            print(json.dumps({key: value for key, value in asdict(part).items() if with_text or key != "text"}))
        return

    # No table: it would fold a path, which then could not be copied.
    console.print(Text(f"Step {step:,} of {run.path}", style="bold"), soft_wrap=True)
    for sequence, parts in groupby(used, key=lambda part: part.sequence):
        for number, part in enumerate(parts):
            if number == 0:
                console.print(Text(f"sequence {sequence:,}, of {part.corpus}", style="bold"), soft_wrap=True)
            tokens = f"{part.start:>7,} to {part.stop:>7,} of {part.document_tokens:>7,}"
            # As `data without` takes it.
            document = f"{part.corpus}:{part.document}"
            line = f"{tokens}  {document}  {part.licence or 'licence not given'}  {part.source}"
            console.print(Text(line), soft_wrap=True)
            if with_text:
                console.print(Text(part.text, style="dim"))
    for line in _licence_lines(used):
        console.print(Text(line), soft_wrap=True)


def _licence_lines(used: Sequence[UsedSlice]) -> list[str]:
    """Returns the tokens of a step by licence, most first."""
    tokens: Counter[str] = Counter()
    for part in used:
        tokens[part.licence or "not given"] += part.stop - part.start
    return ["Licences", f"{'tokens':>12}  licence", *(f"{n:>12,}  {name}" for name, n in tokens.most_common())]
