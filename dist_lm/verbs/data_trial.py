"""Tries the first command of a new corpus file in a temporary folder: makes its plan, and builds what it needs from the
first rows of the data."""

import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dist_lm.config.corpus import SPLITS, CorpusConfig
from dist_lm.config.root import Config
from dist_lm.config.stage import StageConfig
from dist_lm.data.corpus_file import MODEL
from dist_lm.data.epochs import ranking_sequences
from dist_lm.data.ingest import NothingHeldOutError, TextSplits
from dist_lm.data.new import Remedy
from dist_lm.data.sequences import packed
from dist_lm.data.sources.reader import form_of
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.plan import Plan, plan_command
from dist_lm.stages.shards.stage import CorporaConfig
from dist_lm.stages.stage import IMPORT, ArtefactStage
from dist_lm.stages.training.stage import TrainingStage
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.train import VocabularyError, train_tokenizer
from dist_lm.tracking.console import Console
from dist_lm.tracking.readable import listed

ROWS = 200  # documents of each source that are built first
MORE_ROWS = (2_000, 20_000, 0)  # read if none of the first ones is held out; 0: all
TRAIN_BYTES = 4_000_000  # text that the tokenizer learns from here
LISTED = 4  # paths that an error names
LEAST_PIECES = 512  # least tokenizer.vocab_size
LARGEST_SHARE = 0.3  # largest part of a corpus that is held out without asking


def try_command(
    config_dir: Path,
    overrides: Sequence[str],
    measure: Callable[[Config], None] | None = None,
    all_corpora: bool = False,
) -> Remedy | None:
    """Tries a command; nothing outside a temporary folder is written. Returns None if it runs, or what would make it.

    The tokenizer learns from at most `TRAIN_BYTES`, and the corpora are built from the first `ROWS` documents of each
    source: from more, if none of these is held out. No model is trained.

    Args:
        config_dir: a configuration folder, which holds the corpus file.
        overrides: those of the command.
        measure: gets the configuration of the last stage, whose corpora are built in its work directory by then.
        all_corpora: builds all corpora of texts and conversations; else those that the command reads.

    Raises:
        UserError: the command must fail; the message says why.
    """
    with tempfile.TemporaryDirectory(prefix="dist_lm_trial_") as folder:
        words = [f"hydra.searchpath=[{config_dir}]", *overrides, f"work_dir={folder}/work"]
        if MODEL in overrides:
            words = _without_model(words, Path(folder))

        plan = plan_command(words)
        try:
            _build(plan, all_corpora)
            if measure:
                measure(plan.target.config)
        except VocabularyError as error:
            return _smaller_vocabulary(error, plan.target.config)
        except NothingHeldOutError as error:
            if error.share is None or error.share >= LARGEST_SHARE:
                raise
            # Rounded up to two digits, which stand in the user's file.
            share = float(f"{1.01 * error.share + 0.005:.2f}")
            return Remedy(
                f"few documents: this file raises val_fraction to {share:g}, so that some are held out",
                settings={"val_fraction": share},
            )
    return None


def _without_model(words: Sequence[str], folder: Path) -> list[str]:
    """Returns the command with a tokenizer of the first rankings, in place of the model that the user will name.

    Args:
        words: overrides, with `MODEL` among them.
        folder: an existing one for the tokenizer.

    Raises:
        UserError: the rankings cannot be read.
    """
    words = ["stage.init_from=none" if word == MODEL else word for word in words]
    config = limited(compose_config(words), ROWS)
    assert config.stage.corpus
    texts = [record.document.text for record in TextSplits(config.corpus, config.seed).screened(config.stage.corpus)]

    path = folder / "tokenizer.model"
    vocab_size = config.model.vocab_size
    # If the text is too short for a vocabulary, the error tells the largest that it fills.
    while not path.exists():
        try:
            train_tokenizer(texts, path, replace(config.tokenizer, vocab_size=vocab_size))
        except VocabularyError as error:
            if not error.most:
                raise
            vocab_size = error.most
    return [*words, f"tokenizer={path}", f"model.vocab_size={vocab_size}"]


def _smaller_vocabulary(error: VocabularyError, config: Config) -> Remedy:
    """Returns the vocabulary that the text fills.

    Raises:
        VocabularyError: `error` itself, if the vocabulary is too small.
        ArtefactError: the text fills none that a tokenizer may have; names the paths of the sources.
    """
    if not error.most:
        raise error
    if error.most < LEAST_PIECES:
        corpora = config.corpus.corpora or {}
        paths = [path for sources in corpora.values() for source in sources or [] for path in source.path or []]
        raise ArtefactError(
            f"{listed(paths, LISTED)}: too little text for a tokenizer: it gives {error.most:,} pieces, of at least "
            f"{LEAST_PIECES}. Add text, or name the columns that hold it: those that were found may be titles"
        ) from error

    return Remedy(
        f"the text gives {error.most:,} pieces of a tokenizer, fewer than the model has: the commands lower "
        "model.vocab_size",
        overrides=(f"model.vocab_size={error.most}",),
    )


def try_all_corpora(config_dir: Path, overrides: Sequence[str]) -> Remedy | None:
    """Tries the first command of a corpus file, and builds what the commands behind it read, as `try_command` does.

    Raises:
        UserError: as `try_command`.
    """
    return try_command(config_dir, overrides, all_corpora=True)


def _build(plan: Plan, all_corpora: bool) -> None:
    """Builds the tokenizer and the first rows of the corpora of a plan, and packs them as its last stage does.

    Args:
        all_corpora: as in `try_command`.

    Raises:
        UserError: as the stages raise it.
    """
    console = Console(io.StringIO(), io.StringIO(), live=False)
    # An import copies all weights, and no corpus needs them.
    stages = [stage for stage in plan.stages if isinstance(stage.stage, ArtefactStage) and stage.name != IMPORT]
    for planned in stages:
        assert isinstance(planned.stage, ArtefactStage)
        tokenizer = replace(planned.config.tokenizer, workers=1)
        if planned.name == "tokenizer":
            config = replace(planned.config, tokenizer=replace(tokenizer, train_bytes=TRAIN_BYTES))
            planned.stage.build(config, console)
            continue

        config = replace(planned.config, tokenizer=tokenizer)
        if all_corpora and isinstance(config, CorporaConfig) and planned.name == "shards":
            config = replace(config, stage=replace(config.stage, corpora=None))
        for rows in (ROWS, *MORE_ROWS):
            try:
                planned.stage.build(limited(config, rows), console)
                break
            except NothingHeldOutError as error:
                # Few rows may hold none out by chance; all rows together do not.
                if rows == 0 or error.n_read < rows:
                    raise
    for planned in plan.stages:
        if isinstance(planned.stage, TrainingStage):
            _check_lengths(planned.config)


def limited(config: Config, rows: int) -> Config:
    """Returns the configuration with at most `rows` documents of each source; 0: with all of them."""
    if not rows:
        return config
    corpora = {
        name: [replace(source, limit=min(rows, source.limit or rows)) for source in sources or []]
        for name, sources in (config.corpus.corpora or {}).items()
    }
    corpus: CorpusConfig = replace(config.corpus, corpora=corpora)
    return replace(config, corpus=corpus)


def _check_lengths(config: Config) -> None:
    """Refuses corpora of conversations or rankings of which none fits into a sequence of the stage.

    Raises:
        ArtefactError: names the key and the length that would fit.
    """
    work = WorkDirectory(Path(config.work_dir))
    for name in config.corpus_names:
        corpora = [TokenCorpus.open(config.corpus_in(work, name), split) for split in SPLITS]
        # The few documents of val may be long by chance, unless they are all that there are.
        if sum(corpus.n_documents for corpus in corpora) >= ROWS:
            corpora = corpora[:1]
        for corpus in corpora:
            if form_of(config.corpus, name) == "ranking":
                if corpus.n_documents and not ranking_sequences(corpus, config.stage.seq_len):
                    raise ArtefactError(
                        f"corpus {name}: every ranking is longer than stage.seq_len={config.stage.seq_len}: raise it"
                    )
            elif corpus.has_mask and isinstance(config.stage, StageConfig):
                packed(corpus, config.stage.seq_len, too_long=config.stage.too_long)
