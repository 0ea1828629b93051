"""Which corpus a configuration means: the settings that it depends on, and the folder that holds it.

A fingerprint holds the settings that the files of a work directory depend on. It is stored with the files and compared
before they are used again.

A corpus NAME lies in the folder NAME. Another content of that name, from other sources, settings or inputs, lies beside
it as NAME-1a2b3c4d: a finished corpus never changes, and runs name the folder that they read. `folder_of` finds
the folder of a configuration.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from dist_lm.chat.template import FORMAT
from dist_lm.config.corpus import DOCUMENT, SPLITS, CorpusConfig, SourceConfig
from dist_lm.config.root import Config
from dist_lm.data.ingest import TextSplits
from dist_lm.data.inputs import Inputs, inputs_of
from dist_lm.data.journal import journal_path, journal_recipe, require_only_ours
from dist_lm.data.manifest import (
    FormatError,
    ListInputs,
    ManifestError,
    Recipe,
    changed_inputs,
    differences,
    inputs_hash,
    is_attached,
    listed_inputs,
    manifest_path,
    read_manifest,
)
from dist_lm.data.sources.reader import corpus_sources, form_of, source_traits, text_corpora, tokenizer_corpora
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError, UserError, require
from dist_lm.interop.existing_tokenizer import named_tokenizer_file
from dist_lm.stages.continuing import recorded_folders
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import KeptTemplate, Tokenizer
from dist_lm.training import checkpoint_files

log = logging.getLogger(__name__)

# Keys of a source that earlier releases did not have.
LATER_KEYS = ("thinking", "opening_answers", "later_system", "question_column", "answer_column")
LATER_KEYS += ("prompt_column", "chosen_column", "rejected_column", "stars_column", "time_column")
NAMED_DIFFERENCES = 3  # settings that a message names
SAMPLED = "synthetic_rankings"  # reader whose documents a model wrote
BESIDE = re.compile(r".*-[0-9a-f]{8}")  # a folder beside that of the name: no name that a corpus may have


# --- the folder of a corpus ---


def with_folders(config: Config, names: Sequence[str], list_inputs: ListInputs = inputs_of) -> Config:
    """Returns `config` with the folders of the corpora `names`: the finished ones in `corpus.folders`, else those of
    `folder_of`.

    Args:
        list_inputs: as in `listed_inputs`.

    Raises:
        ConfigError: as `folder_of`, or `corpus.folders` names a folder that holds no finished corpus.
        ArtefactError: as `folder_of`.
        OSError: a file cannot be read.
    """
    work = WorkDirectory(Path(config.work_dir))
    folders = dict(config.corpus.folders)
    for name in names:
        if name in folders and manifest_path(work.corpus(folders[name])).is_file():
            continue
        chosen = folder_of(config, name, list_inputs).name
        accepted = f"a finished folder of {work.path / 'corpora'}, as `dist-lm data list` shows them; or no such key"
        require(folders.get(name, chosen) == chosen, f"corpus.folders.{name}", folders.get(name), accepted)
        folders[name] = chosen
    return replace(config, corpus=replace(config.corpus, folders=folders))


def folder_of(config: Config, name: str, list_inputs: ListInputs = inputs_of) -> Path:
    """Returns the folder of a corpus: that with the settings and inputs of the configuration, else a free one.

    It is the folder NAME or NAME-1a2b3c4d. A finished corpus whose inputs have changed, or that has other settings, is
    another one and stays. Where inputs cannot be listed, settings decide, and the corpus that was finished last is
    taken. A build that was begun with these settings is continued, whatever its inputs were.

    Args:
        list_inputs: as in `listed_inputs`.

    Raises:
        ConfigError: a source is invalid.
        ArtefactError: none fits, and a manifest or journal of this name is damaged or of another format.
        OSError: a file cannot be read.
    """
    named = WorkDirectory(Path(config.work_dir)).corpus(name)
    not_compared: list[Path] = []
    unfinished: list[Path] = []
    damaged: list[ArtefactError] = []
    for folder in folders_of(config, name):
        try:
            if not manifest_path(folder).is_file():
                recipe = journal_recipe(folder)
                if recipe and is_of_settings(config, name, recipe):
                    unfinished.append(folder)
                continue
            if not is_of_settings(config, name, read_manifest(folder).recipe):
                continue
        except (ManifestError, FormatError) as error:
            # The damaged one may be another data set of this name.
            damaged.append(error)
            continue

        changes, unknown = changes_of(config, name, folder, list_inputs)
        if unknown:
            not_compared.append(folder)
        elif not changes:
            return folder

    if not_compared:
        return max(not_compared, key=lambda folder: manifest_path(folder).stat().st_mtime_ns)
    if unfinished:
        return unfinished[0]
    if damaged:
        raise damaged[0]
    if not manifest_path(named).is_file() and not journal_path(named).is_file():
        return named
    return named.with_name(f"{name}-{identity(config, name, list_inputs)[:8]}")


def folders_of(config: Config, name: str) -> list[Path]:
    """Returns the folders that a corpus may lie in: that of its name, and those beside it."""
    named = WorkDirectory(Path(config.work_dir)).corpus(name)
    return [named, *sorted(path for path in named.parent.glob(f"{name}-????????") if BESIDE.fullmatch(path.name))]


def identity(config: Config, name: str, list_inputs: ListInputs = inputs_of) -> str:
    """Returns a hash of the settings and inputs of one corpus. Inputs that cannot be listed do not count.

    Raises:
        ConfigError: a source is invalid.
        OSError: a file cannot be read.
    """
    inputs = ""
    try:
        listings = (
            listing
            for corpus in corpora_of_settings(config, name)
            for listing in listed_inputs(config.corpus, corpus, list_inputs)
        )
        inputs = inputs_hash(listings)
    except UserError as error:
        log.info("%s", error)  # the plan refuses to build without them, or says that this is a dry run
    return digest([corpus_settings(config, name), inputs])


def is_of_settings(config: Config, name: str, recipe: Recipe) -> bool:
    """Returns whether a corpus was made with the settings that the documents of `name` depend on now.

    Raises:
        ConfigError: a source is invalid.
        ArtefactError, OSError: as `corpus_fingerprint`.
    """
    if form_of(config.corpus, name) != "text":
        settings = corpus_fingerprint(config, name)
        # Earlier releases did not record the model whose samples are ranked.
        without_model = {key: value for key, value in settings.items() if key != "model"}
        return recipe.corpus_fingerprint in (digest(settings), digest(without_model))
    if recipe.own_fingerprint == digest(corpus_settings(config, name)):
        return True
    # Earlier releases compared the settings of all corpora of texts, and at first recorded nothing else.
    return name not in config.corpus.extends and recipe.corpus_fingerprint == digest(text_fingerprint(config))


def corpus_settings(config: Config, name: str) -> dict[str, Any]:
    """Returns the settings that the documents of one corpus depend on, before other corpora are compared.

    Raises:
        ConfigError: a source is invalid.
        ArtefactError, OSError: as `corpus_fingerprint`.
    """
    if form_of(config.corpus, name) == "text":
        return fingerprint_of(config, corpora_of_settings(config, name)) | content_of_extended(config, name)
    return corpus_fingerprint(config, name)


def corpora_of_settings(config: Config, name: str) -> list[str]:
    """Lists the corpora whose sources decide on the documents of one: itself, and with `cleaning.across_corpora` those
    of texts before it.

    Raises:
        ConfigError: a source is invalid.
    """
    if config.corpus.cleaning.across_corpora and name in (texts := text_corpora(config.corpus)):
        return texts[: texts.index(name) + 1]
    return [name]


def content_of_extended(config: Config, name: str) -> dict[str, Any]:
    """Returns the content hashes of the corpus that one extends, under a key for its fingerprint; empty if it extends
    none. A corpus that is gone has none: the plan refuses it where it is needed.

    Raises:
        ArtefactError: a manifest is damaged.
    """
    if name not in config.corpus.extends:
        return {}
    directory = WorkDirectory(Path(config.work_dir)).corpus(config.corpus.extends[name])
    return {"extends": read_manifest(directory).content if manifest_path(directory).is_file() else None}


def begun_folders(config: Config, readers: Sequence[Config]) -> Config:
    """Returns `config` with the folders that runs have begun with, for corpora that only such runs read.

    Raises:
        ArtefactError: the record of a run is damaged.
        OSError: a file cannot be read.
    """
    folders: dict[str, set[str]] = {}
    for reader in readers:
        recorded = recorded_folders(reader)
        for name in reader.corpus_names:
            folders.setdefault(name, set()).add(recorded.get(name, ""))
    # Two runs may have begun with different folders: then the plan is about that of the sources.
    chosen = {
        name: run_folders.pop()
        for name, run_folders in folders.items()
        if len(run_folders) == 1 and "" not in run_folders
    }
    return replace(config, corpus=replace(config.corpus, folders={**config.corpus.folders, **chosen}))


def listing_once() -> ListInputs:
    """Returns a function that lists the inputs of a source once, and gives the same listing to later calls, also if the
    files have changed. It raises what `inputs_of` does.
    """
    listings: dict[str, Inputs] = {}

    def list_once(source: SourceConfig) -> Inputs:
        if repr(source) not in listings:
            listings[repr(source)] = inputs_of(source)
        return listings[repr(source)]

    return list_once


def is_whole(directory: Path) -> bool:
    """Returns whether a corpus can be opened and matches its manifest. If not, it can be built in `directory`. Missing
    indices of its tars are built and saved.

    Raises:
        FormatError: it has another format.
        ManifestError: its manifest is damaged.
        ArtefactError: it must be built, but the folder holds files that are not ours; or an attached corpus cannot be
            opened.
        OSError: a file cannot be read.
    """
    if not directory.exists():
        return False
    if not directory.is_dir():
        raise ArtefactError(f"{directory} is a file, but a corpus is a folder: move it away")

    # Opening reads the index of every tar; the members are checked when they are first read.
    try:
        if manifest_path(directory).is_file():
            for split in SPLITS:
                TokenCorpus.open(directory, split)
            return True
    except (FormatError, ManifestError):
        raise
    except ArtefactError as error:
        # A build would put other tars into the folder.
        if is_attached(directory):
            raise
        log.info("%s", error)
    require_only_ours(directory)
    return False


def check_tokenizer(config: Config, directory: Path) -> None:
    """Refuses a corpus that was made with another tokenizer; returns nothing.

    Raises:
        ArtefactError: names the folder and the way out.
        OSError: a file cannot be read.
    """
    work = WorkDirectory(Path(config.work_dir))
    if work.tokenizer_model.exists():
        sha256 = durable.sha256_of(work.tokenizer_model)
    elif config.tokenizer.is_given:
        # The stage before this one will copy it.
        sha256 = hashlib.sha256(named_tokenizer_file(config.tokenizer)).hexdigest()
    else:
        cure = f"or remove {work.path / 'corpora'} to build both again"
        if is_attached(directory):
            cure = "a copy of the one that it was built with, or give the path of that file as tokenizer=PATH"
        raise ArtefactError(f"{directory} exists, but its tokenizer is missing: restore {work.tokenizer_model}, {cure}")
    read_manifest(directory).require_tokenizer(sha256, directory)


def licences_of(config: Config, name: str) -> list[str]:
    return [source.licence for source in corpus_sources(config.corpus, name)]


def has_other_licences(config: Config, name: str, directory: Path) -> bool:
    """Returns whether a whole corpus of the configured sources has other licences than the configuration."""
    # The licences of an attached corpus are those of its remote folder.
    if is_attached(directory):
        return False
    manifest = read_manifest(directory)
    return is_of_settings(config, name, manifest.recipe) and list(manifest.licences) != licences_of(config, name)


def changes_of(config: Config, name: str, directory: Path, list_inputs: ListInputs) -> tuple[list[str], str]:
    """Returns how settings or inputs of a whole corpus differ from the configured ones (empty: not at all), and why the
    inputs are not known (empty: they are). Inputs are compared only if the settings are the same.

    Raises:
        ArtefactError: the manifest is damaged.
        OSError: a file cannot be read.
    """
    manifest = read_manifest(directory)
    if not is_of_settings(config, name, manifest.recipe):
        words = in_brief(manifest.settings, corpus_fingerprint(config, name))
        return [f"its settings are others{words}"], ""
    try:
        return changed_inputs(config.corpus, name, directory, list_inputs), ""
    except UserError as error:
        return [], str(error)


def finished_corpora(work: WorkDirectory) -> list[Path]:
    """Lists the folders of finished corpora that this version reads, by name. Tars are not looked at.

    Raises:
        ManifestError (an ArtefactError): a manifest is damaged.
        OSError: a file cannot be read.
    """
    folders = []
    for path in sorted((work.path / "corpora").glob("*/manifest.json")):
        try:
            read_manifest(path.parent)
        except FormatError as error:
            log.info("%s", error)
            continue
        folders.append(path.parent)
    return folders


def corpora_read(config: Config, name: str, text_splits: TextSplits) -> Sequence[str]:
    """Returns the corpora whose sources the documents of one depend on: texts on all that are built together.

    Raises:
        ConfigError: a source is invalid.
    """
    return text_splits.together if form_of(config.corpus, name) == "text" else [name]


def recipe_of(config: Config, name: str, text_splits: TextSplits | None = None) -> Recipe:
    """Returns the settings, inputs and earlier corpora that the tars of one corpus depend on; lists the inputs, also on
    the hub.

    Args:
        text_splits: of the build; None: all corpora of texts are built together, and there are no earlier ones.

    Raises:
        ArtefactError: there is no tokenizer.
        UserError: an input cannot be listed.
        OSError: a file cannot be read.
    """
    text_splits = text_splits or TextSplits(config.corpus, config.seed)
    tokenizer_model = WorkDirectory(Path(config.work_dir)).tokenizer_model

    # Where tasks build a corpus, each writes one tar a split, however many tokens that has.
    is_by_tasks = config.corpus.build == "tasks" and form_of(config.corpus, name) == "text"
    listings = (
        listing
        for corpus in corpora_read(config, name, text_splits)
        for listing in listed_inputs(config.corpus, corpus, text_splits.reader.files)
    )

    return Recipe(
        tokenizer_sha256=durable.sha256_of(tokenizer_model),
        vocab_size=Tokenizer.load(tokenizer_model).vocab_size,
        corpus_fingerprint=digest(corpus_fingerprint(config, name, text_splits.together)),
        documents_per_member=config.corpus.documents_per_member,
        shard_tokens=0 if is_by_tasks else config.corpus.shard_tokens,
        inputs_sha256=inputs_hash(listings),
        own_fingerprint=digest(
            fingerprint_of(config, corpora_of_settings(config, name)) | content_of_extended(config, name)
        ),
        compared={**text_splits.earlier.compared, **_val_of_extended(config, name)},
    )


def _val_of_extended(config: Config, name: str) -> dict[str, str]:
    """Returns the folder that a corpus extends with the hash of its val, which is compared as that of earlier corpora;
    empty if it extends none."""
    if name not in config.corpus.extends:
        return {}
    directory = WorkDirectory(Path(config.work_dir)).corpus(config.corpus.extends[name])
    return {directory.name: read_manifest(directory).splits["val"].content}


def text_fingerprint(config: Config) -> dict[str, Any]:
    """Returns the settings that the texts of all corpora depend on.

    Corpora of texts that are built together share a fingerprint, because a train text of one corpus drops the val text
    of another corpus that it contains.

    Raises:
        ConfigError: a source is invalid.
    """
    return fingerprint_of(config, text_corpora(config.corpus))


def tokenizer_fingerprint(config: Config) -> dict[str, Any]:
    """Returns the settings that the text of a trained tokenizer depends on: those of the corpora that it learns from.

    Raises:
        ConfigError: a source is invalid.
    """
    fingerprint = fingerprint_of(config, tokenizer_corpora(config.corpus))
    # A tokenizer learns from near-duplicates and from texts with parts of benchmarks, too.
    for key in ("near_duplicates", "near_duplicates_by", "benchmarks"):
        fingerprint["corpus"]["cleaning"].pop(key, None)
    return fingerprint


def corpus_fingerprint(config: Config, name: str, together: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the settings that the documents of one corpus and their tokens depend on, as JSON values.

    A corpus of conversations or rankings depends on no other corpus of the configuration.

    Args:
        together: corpora of texts that are built together; None: all.

    Raises:
        ConfigError: a source is invalid.
        ArtefactError: the chat template beside the tokenizer is damaged.
        OSError: a file cannot be read.
    """
    if form_of(config.corpus, name) == "text":
        fingerprint = text_fingerprint(config) if together is None else fingerprint_of(config, [*together])
        return fingerprint | content_of_extended(config, name)
    fingerprint = fingerprint_of(config, [name]) | {"format": FORMAT}
    template = KeptTemplate.read(WorkDirectory(Path(config.work_dir)).tokenizer)
    if template:
        fingerprint["chat_template"] = asdict(template)
    if any(source.reader == SAMPLED for source in corpus_sources(config.corpus, name)):
        fingerprint |= _sampled_model(config)
    return fingerprint


def _sampled_model(config: Config) -> dict[str, str]:
    """Returns the hash of the checkpoint in `stage.init_from`, whose samples are ranked; empty if there is none yet."""
    try:
        checkpoint = checkpoint_files.find_checkpoint(Path(getattr(config.stage, "init_from", "none")))
        return {"model": checkpoint_files.fingerprint(checkpoint)}
    except ArtefactError as error:
        log.info("%s", error)  # a plan that builds the model first, or a build that fails when it samples
        return {}


def fingerprint_of(config: Config, names: list[str]) -> dict[str, Any]:
    """Returns the settings that the documents of the corpora `names` depend on; keys that change no document are left
    out.

    The seed is None where no reader makes documents by it.

    Raises:
        ConfigError: a source is invalid.
    """
    selected: CorpusConfig = replace(config.corpus, corpora={name: config.corpus.corpora[name] for name in names})
    corpus = asdict(selected)
    for key in (
        "name",
        "documents_per_member",
        "shard_tokens",
        "max_bad_fraction",
        "folders",
        "build",
        "extends",
    ):  # none changes a document
        corpus.pop(key)
    # Corpora from before these keys have no such setting, and are as without it.
    if not corpus["shuffle_in_tasks"]:
        corpus.pop("shuffle_in_tasks")
    if not corpus["cleaning"]["near_duplicates"]:
        corpus["cleaning"].pop("near_duplicates")
    if corpus["cleaning"]["near_duplicates_by"] == DOCUMENT:
        corpus["cleaning"].pop("near_duplicates_by")
    benchmarks = corpus["cleaning"].pop("benchmarks")
    if benchmarks:
        from dist_lm.data.benchmarks import fingerprints

        corpus["cleaning"]["benchmarks"] = fingerprints(benchmarks)
    for source in chain.from_iterable(corpus["corpora"].values()):
        for key in LATER_KEYS:
            if not source[key]:
                source.pop(key)
    # No document is chosen by its licence.
    if not config.corpus.cleaning.licences:
        for source in chain.from_iterable(corpus["corpora"].values()):
            source.pop("licence")

    # The seed counts only where a reader makes documents by it.
    readers = {source.reader: source_traits(source) for sources in selected.corpora.values() for source in sources}
    fingerprint: dict[str, Any] = {
        "seed": config.seed if any(traits.seeded for traits in readers.values()) else None,
        "revisions": {name: traits.revision for name, traits in readers.items()},
        "corpus": corpus,
    }
    if SAMPLED in readers:
        fingerprint |= config.stage.sampled_by()
    return fingerprint


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    # Sorted, because equal settings must have one digest.
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def in_brief(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns how the settings of a fingerprint differ from those `before`, in brackets, at most `NAMED_DIFFERENCES` of
    them; empty without a difference, or where `before` is not known.
    """
    if not before:
        return ""
    # Fingerprints are stored as JSON, so the present one is compared in that form: tuples are lists there.
    changes = differences(before, json.loads(json.dumps(now)))
    if not changes:
        return ""

    named = list(changes[:NAMED_DIFFERENCES])
    if len(changes) > NAMED_DIFFERENCES:
        named.append(f"{len(changes) - NAMED_DIFFERENCES} more")
    return f" ({'; '.join(named)})"
