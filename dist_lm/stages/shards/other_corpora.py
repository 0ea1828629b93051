"""What a new corpus is compared with, so that its train holds nothing of the val of another.

Corpora of texts that are built together are compared by their sources. All other finished corpora of the work directory
are earlier ones (`data.earlier`): train of a new corpus holds nothing of their val.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from dist_lm.config.root import Config
from dist_lm.data.earlier import EarlierCorpora
from dist_lm.data.ingest import TextSplits
from dist_lm.data.inputs import inputs_of
from dist_lm.data.journal import journal_recipe
from dist_lm.data.manifest import ListInputs, Manifest, inputs_hash, listed_inputs, manifest_path, read_manifest
from dist_lm.data.screening import SourceReader
from dist_lm.data.sources.reader import Candidate, text_corpora
from dist_lm.errors import ArtefactError, UserError
from dist_lm.stages.shards.identity import digest, fingerprint_of, finished_corpora, recipe_of
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory

log = logging.getLogger(__name__)


def corpora_together(config: Config, missing: Sequence[str], list_inputs: ListInputs = inputs_of) -> list[str]:
    """Returns the corpora of texts whose sources are compared when `missing` are built: these, those that are not there
    yet, and finished ones whose val was compared with the same sources of `missing`.

    Args:
        config: as returned by `with_folders`, for all corpora of texts.
        missing: corpora of texts.
        list_inputs: as in `listed_inputs`.

    Raises:
        ArtefactError: a manifest is damaged.
        ConfigError: a source is invalid.
        OSError: a file cannot be read.
    """
    if not missing:
        return []
    work = WorkDirectory(Path(config.work_dir))
    together = []
    for name in text_corpora(config.corpus):
        if name in config.corpus.extends and name not in missing:
            continue  # it is built behind these, or was built on its own
        directory = config.corpus_in(work, name)
        is_there = name not in missing and manifest_path(directory).is_file()
        if not is_there or _has_seen(config, read_manifest(directory), missing, list_inputs):
            together.append(name)
    return together


def _has_seen(config: Config, manifest: Manifest, missing: Sequence[str], list_inputs: ListInputs) -> bool:
    """Returns whether val of a finished corpus was compared with the sources of `missing` as they are now.

    Raises:
        ConfigError: a source is invalid.
    """
    recorded = manifest.settings.get("corpus", {}).get("corpora", {})
    names = [name for name in text_corpora(config.corpus) if not recorded or name in recorded]
    # Manifests of earlier releases recorded no documents.
    documents_read = manifest.documents or names
    if not set(missing) <= set(names) & set(documents_read) or set(recorded) - set(names):
        return False
    if manifest.recipe.corpus_fingerprint != digest(fingerprint_of(config, names)):
        return False
    try:
        listings = (listing for name in names for listing in listed_inputs(config.corpus, name, list_inputs))
        return manifest.recipe.inputs_sha256 == inputs_hash(listings)
    except UserError as error:
        log.info("%s", error)  # it is an earlier corpus then, whose sources need not be there
        return False


def earlier_folders(
    config: Config, name: str, together: Sequence[str] = (), reader: SourceReader | None = None
) -> list[Path]:
    """Returns the finished corpora of the work directory that `name` is compared with, ordered by name.

    These are all but its own folder and those of `together`. Corpora of another tokenizer or format are left out: no
    model of this tokenizer can be evaluated on them. A corpus that is repaired, or whose build goes on, is compared
    with those that it was compared with first, if that gives the same bytes again: corpora of later days were compared
    with it.

    Args:
        together, reader: as for `TextSplits`.

    Raises:
        ArtefactError: a manifest or journal is damaged.
        UserError: an input cannot be listed.
        OSError: a file cannot be read.
    """
    work = WorkDirectory(Path(config.work_dir))
    own_folder = config.corpus_in(work, name)
    excluded = {own_folder, *(config.corpus_in(work, corpus) for corpus in together)}
    # The one that is extended is compared by tasks.
    if name in config.corpus.extends:
        excluded.add(work.corpus(config.corpus.extends[name]))
    tokenizer_sha256 = durable.sha256_of(work.tokenizer_model)
    manifests = {folder: read_manifest(folder) for folder in finished_corpora(work) if folder not in excluded}
    recipes = {
        folder: manifest.recipe
        for folder, manifest in manifests.items()
        if manifest.recipe.tokenizer_sha256 == tokenizer_sha256
    }

    was_finished = manifest_path(own_folder).is_file()
    begun_recipe = read_manifest(own_folder).recipe if was_finished else journal_recipe(own_folder)
    if begun_recipe is None:
        return list(recipes)
    first = [folder for folder in recipes if folder.name in begun_recipe.compared]
    later = [folder for folder in recipes if own_folder.name in recipes[folder].compared]
    earlier = earlier_corpora(config, first)
    again = recipe_of(
        config, name, TextSplits(config.corpus, config.seed, together=together, earlier=earlier, reader=reader)
    )
    is_same = again == begun_recipe and (was_finished or set(recipes) == {*first, *later})
    return first if is_same else list(recipes)


def earlier_corpora(config: Config, folders: Sequence[Path]) -> EarlierCorpora:
    """Returns the corpora of these folders, to be compared with a new one.

    Raises:
        ArtefactError: a manifest is damaged.
    """
    work = WorkDirectory(Path(config.work_dir))
    return EarlierCorpora(folders, work.tokenizer_model, config.tokenizer.workers)


def alone(
    config: Config,
    name: str,
    preloaded: dict[str, list[Candidate]] | None = None,
    reader: SourceReader | None = None,
) -> TextSplits:
    """Returns what decides on the splits of a corpus of conversations or rankings: its groups, and earlier corpora.

    Args:
        preloaded, reader: as for `TextSplits`.

    Raises:
        ArtefactError: a manifest is damaged.
    """
    earlier = earlier_corpora(config, earlier_folders(config, name, reader=reader))
    return TextSplits(config.corpus, config.seed, preloaded, together=(), earlier=earlier, reader=reader)


def require_compared(config: Config, missing: Sequence[str], text_splits: TextSplits) -> None:
    """Refuses a corpus that is not built again although the sources have other documents now; returns nothing.

    The files of a corpus may have changed although their sizes and times are the same. The val of a corpus that is
    not built again was never compared with these documents, so train text that is built now may contain it.

    Args:
        missing: names of the corpora that are built now; their own manifests are not read.
        text_splits: has read the corpora that are built together.

    Raises:
        ArtefactError: names both corpora, or a manifest is damaged.
        OSError: a file cannot be read.
    """
    work = WorkDirectory(Path(config.work_dir))
    # Train text that contains val of any other corpus is dropped, so those need no refusal.
    for name in text_splits.together:
        directory = config.corpus_in(work, name)
        if name in missing or not manifest_path(directory).is_file():
            continue

        for corpus, documents in read_manifest(directory).documents.items():
            if corpus in text_splits.together and text_splits.reader.documents(corpus) != documents:
                raise ArtefactError(
                    f"{directory} was built when corpus {corpus} had other documents, although sizes and times "
                    f"of its inputs are the same: remove {directory} to build both again"
                )
