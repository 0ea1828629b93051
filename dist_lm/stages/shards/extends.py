"""Corpora that extend a finished one (`corpus.extends`): what may be extended, and what a build takes over from it."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dist_lm.config.corpus import SPLITS
from dist_lm.config.root import Config
from dist_lm.data.earlier import EarlierCorpora
from dist_lm.data.inputs import inputs_of
from dist_lm.data.manifest import (
    ListInputs,
    changed_inputs,
    differences,
    is_attached,
    manifest_path,
    read_manifest,
    require_decisions,
)
from dist_lm.data.sources.reader import corpus_sources, form_of
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError, ConfigError, UserError, require
from dist_lm.stages.shards.identity import NAMED_DIFFERENCES, check_tokenizer, digest, fingerprint_of, folders_of
from dist_lm.stages.shards.other_corpora import earlier_corpora
from dist_lm.storage.run_directory import WorkDirectory

if TYPE_CHECKING:
    from dist_lm.data.extension import Extension

log = logging.getLogger(__name__)


def n_sources_of(directory: Path) -> int:
    """Returns the number of sources that a corpus was built from.

    Raises:
        ArtefactError: its manifest is missing or damaged.
    """
    return len(read_manifest(directory).licences)


def require_extensible(config: Config, name: str, list_inputs: ListInputs = inputs_of) -> None:
    """Refuses to extend a corpus that has other settings, sources or inputs than the first ones of the configuration;
    returns nothing.

    Args:
        list_inputs: as in `listed_inputs`.

    Raises:
        ConfigError: names the key, what differs, and the way out.
        ArtefactError: the folder is damaged, keeps no decisions, or its inputs have changed.
        UserError: an input cannot be listed.
    """
    key, folder = f"corpus.extends.{name}", config.corpus.extends[name]
    work = WorkDirectory(Path(config.work_dir))
    directory = work.corpus(folder)
    accepted = f"a finished folder of {work.path / 'corpora'}, as `dist-lm data list` shows them; or no such key"
    require(manifest_path(directory).is_file(), key, folder, accepted)
    accepted = "a corpus that was built in this work directory, as the tars of an attached one stay behind their URL"
    require(not is_attached(directory), key, folder, accepted)
    require_decisions(directory)
    check_tokenizer(config, directory)

    n_sources, n_configured = n_sources_of(directory), len(corpus_sources(config.corpus, name))
    accepted = f"a folder with fewer sources than corpus.corpora.{name}, which has {n_configured}: it has {n_sources}"
    require(n_sources < n_configured, key, folder, accepted)
    way_out = "or build all sources without this key"
    if words := _differences_from_first(config, name, directory):
        accepted = f"the settings and the first {n_sources} sources of {directory} ({'; '.join(words)})"
        raise ConfigError(f"{key}={folder}: expected {accepted}: give them, {way_out}")
    if words := changed_inputs(config.corpus, name, directory, list_inputs):
        raise ArtefactError(
            f"{key}={folder}: the inputs of {directory} have changed ({'; '.join(words)}): restore them, {way_out}"
        )
    for split in SPLITS:
        TokenCorpus.open(directory, split)


def _differences_from_first(config: Config, name: str, directory: Path) -> list[str]:
    """Returns how the settings of a finished corpus differ from those of as many first sources of the configuration, in
    words, NAMED_DIFFERENCES at most; empty if they do not.

    Raises:
        ArtefactError: a file of the corpus is damaged.
        OSError: its manifest cannot be read.
    """
    manifest = read_manifest(directory)
    first_sources = corpus_sources(config.corpus, name)[: n_sources_of(directory)]
    corpora = {**config.corpus.corpora, name: first_sources}
    first = replace(config, corpus=replace(config.corpus, corpora=corpora, extends={}))
    recorded = dict(manifest.settings)
    extends = {"extends": recorded["extends"]} if "extends" in recorded else {}
    settings = fingerprint_of(first, [name]) | extends
    if digest(settings) == manifest.recipe.own_fingerprint:
        return []

    # Other corpora that were built with it do not count.
    corpus = dict(recorded.get("corpus", {}))
    corpus["corpora"] = {name: corpus.get("corpora", {}).get(name)}
    words = differences({**recorded, "corpus": corpus}, json.loads(json.dumps(settings)))
    return words[:NAMED_DIFFERENCES] or ["other settings"]


def extension_note(config: Config, name: str, list_inputs: ListInputs) -> list[str]:
    """Returns a list with one note on a finished corpus that a missing one differs from by added sources alone; an
    empty list if there is none. Sources that cannot be listed give no note.

    Raises:
        ArtefactError: a file of a finished corpus is damaged.
        OSError: a file cannot be read.
    """
    if form_of(config.corpus, name) != "text" or name in config.corpus.extends:
        return []
    if config.corpus.cleaning.across_corpora:
        return []

    n_sources = len(corpus_sources(config.corpus, name))
    for folder in folders_of(config, name):
        if not manifest_path(folder).is_file() or not read_manifest(folder).decisions or is_attached(folder):
            continue
        n_added = n_sources - n_sources_of(folder)
        if n_added < 1 or _differences_from_first(config, name, folder):
            continue
        try:
            if changed_inputs(config.corpus, name, folder, list_inputs):
                continue
        except UserError as error:
            log.info("%s", error)  # a note is no reason to refuse a build from nothing
            continue

        keys = f"corpus.extends.{name}={folder.name}"
        if config.corpus.build != "tasks":
            keys = f"corpus.build=tasks {keys}"
        return [f"`{keys}` builds only the added {'source' if n_added == 1 else 'sources'}"]
    return []


def extension_of(config: Config, name: str, earlier: EarlierCorpora) -> "Extension":
    """Returns the corpus that one extends.

    Args:
        config: as `require_extensible` accepts it.
        earlier: the other finished corpora of the work directory.

    Raises:
        ArtefactError: the kept decisions or a manifest are damaged.
        OSError: a file cannot be read.
    """
    from dist_lm.data.extension import Extension
    from dist_lm.data.kept_decisions import KeptDecisions

    work = WorkDirectory(Path(config.work_dir))
    directory = work.corpus(config.corpus.extends[name])
    manifest = read_manifest(directory)

    def was_compared(folder: str, val: str) -> bool:
        if manifest.recipe.compared.get(folder) == val:
            return True
        # It was built behind the corpus that is extended, or together with it.
        recipe = read_manifest(work.corpus(folder)).recipe
        is_same_build = (recipe.corpus_fingerprint, recipe.inputs_sha256) == (
            manifest.recipe.corpus_fingerprint,
            manifest.recipe.inputs_sha256,
        )
        return recipe.compared.get(directory.name) == manifest.splits["val"].content or is_same_build

    unseen = [folder for folder, val in earlier.compared.items() if not was_compared(folder, val)]
    return Extension(
        directory,
        KeptDecisions.open(directory),
        earlier_corpora(config, [directory]),
        {folder: earlier_corpora(config, [work.corpus(folder)]) for folder in unseen},
        manifest.splits["val"].counts.bytes,
    )
