"""Stage `shards`: tokenizes the corpora into work/corpora/FOLDER/*.tar, each with an index and a manifest.

A fingerprint holds the settings that the files of a work directory depend on. It is stored with the files and compared
before they are used again.

A corpus NAME lies in the folder NAME. Another content of that name, from other sources, settings or inputs, lies beside
it as NAME-1a2b3c4d: a finished corpus never changes, and runs name the folder that they read. `folder_of` finds
the folder of a configuration.

Corpora of texts that are built together are compared by their sources. All other finished corpora of the work directory
are earlier ones (`data.earlier`): train of a new corpus holds nothing of their val.
"""

import hashlib
import json
import logging
import re
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from dist_lm.chat.documents import encode_document, sample_documents
from dist_lm.chat.template import FORMAT
from dist_lm.config.corpus import DOCUMENT, SPLITS, TRAIN, CorpusConfig, SourceConfig
from dist_lm.config.root import Config
from dist_lm.config.stage import StageGroup
from dist_lm.data.earlier import EarlierCorpora
from dist_lm.data.ingest import TextSplits, split_documents
from dist_lm.data.inputs import HUB, Inputs, inputs_of
from dist_lm.data.journal import (
    REJECTED,
    is_dropped_for_inputs,
    journal_path,
    journal_recipe,
    require_only_ours,
)
from dist_lm.data.manifest import (
    Counts,
    FormatError,
    ListInputs,
    Manifest,
    ManifestError,
    Recipe,
    changed_inputs,
    differences,
    inputs_hash,
    is_attached,
    listed_inputs,
    manifest_path,
    read_manifest,
    require_decisions,
)
from dist_lm.data.screening import IngestReport, SourceReader
from dist_lm.data.shard_writer import CorpusWriter, correct_licences
from dist_lm.data.sources.reader import (
    Candidate,
    corpus_sources,
    form_of,
    source_traits,
    text_corpora,
    tokenizer_corpora,
)
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError, UnreachableError, UserError, require
from dist_lm.interop.existing_tokenizer import named_tokenizer_file
from dist_lm.stages.continuing import recorded_folders
from dist_lm.stages.stage import Action, Artefact, ArtefactStage, Look
from dist_lm.storage import durable
from dist_lm.storage.process import cores
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.encode import Encode, encode_documents
from dist_lm.tokenizer.tokenizer import KeptTemplate, Tokenizer
from dist_lm.training import checkpoint_files

if TYPE_CHECKING:
    from dist_lm.data.extension import Extension
    from dist_lm.data.task_workers import RunPass
    from dist_lm.tracking.console import Console

log = logging.getLogger(__name__)

# Keys of a source that earlier releases did not have.
LATER_KEYS = ("thinking", "opening_answers", "later_system", "question_column", "answer_column")
LATER_KEYS += ("prompt_column", "chosen_column", "rejected_column", "stars_column", "time_column")
NAMED_DIFFERENCES = 3  # settings that a message names
SAMPLED = "synthetic_rankings"  # reader whose documents a model wrote
BESIDE = re.compile(r".*-[0-9a-f]{8}")  # a folder beside that of the name: no name that a corpus may have


@dataclass
class CorporaStageConfig(StageGroup):
    """The `stage` group of stages that build corpora."""

    corpora: list[str] | None = None  # the corpora to build; null: all


@dataclass
class CorporaConfig(Config):
    """The configuration of a stage that builds corpora."""

    stage: CorporaStageConfig = MISSING

    def check_stage(self) -> None:
        super().check_stage()
        for name in self.stage.corpora or []:
            require(name in self.corpus.corpora, "stage.corpora", name, f"some of {', '.join(self.corpus.corpora)}")


class Shards(ArtefactStage):
    name = "shards"
    schema = CorporaConfig
    needs = ("tokenizer",)
    in_pipeline = True

    def check(self, config: Config) -> None:
        for name in config.corpus.corpora or {}:
            accepted = "another name: folders of this form hold another content of a corpus"
            require(not BESIDE.fullmatch(name), "the name of a corpus in corpus.corpora", name, accepted)
        require_corpora_of_extends(config)

    def for_readers(self, config: Config, readers: Sequence[Config]) -> Config:
        """Returns `config` with only the corpora that later stages read, in the folders of those that have begun.

        Raises:
            ArtefactError: as `begun_folders`.
            OSError: a file cannot be read.
        """
        read = sorted({name for reader in readers for name in reader.corpus_names})
        return replace(begun_folders(config, readers), stage=replace(own(config), corpora=read))

    def look(self, config: Config, *, is_target: bool, rebuilt: Collection[str]) -> Look:
        # Later stages read the folders that are found here.
        list_inputs = listing_once()
        config = with_folders(config, wanted_corpora(config), list_inputs)
        artefact = inspect_corpora(config, wanted_corpora(config), train_tokens, list_inputs)
        return Look(config, Action.READY if artefact.ready else Action.BUILD, artefact.detail)

    def inspect(self, config: Config) -> Artefact:
        return inspect_corpora(config, wanted_corpora(config), train_tokens)

    def build(self, config: Config, console: "Console") -> None:
        """Tokenizes every corpus that is missing or damaged; corrects the licences of the others.

        These are the corpora in `stage.corpora` (null: all), except those of rankings. An interrupted build goes on
        after its finished tars; if the inputs have changed, these are dropped.

        Raises:
            ConfigError: there is no corpus, or a source is invalid.
            ArtefactError: a folder holds files of others, sources have changed under finished tars or give no document
                for a split, too many rows are broken, a manifest is damaged, or the tokenizer is missing.
            UserError: a source cannot be read or reached.
            OSError: a file cannot be read or written.
            ZstdError, ValueError, KeyError: a file of origins, whose licences it corrects, is damaged.
        """
        wanted_names = wanted_corpora(config)
        # Files are listed once for the whole build: what is compared with val is what is tokenized.
        reader = TextSplits(config.corpus, config.seed).reader
        # The choice of the plan stays, even if inputs have changed since. Texts are compared with all others.
        open_names = [
            name for name in {*wanted_names, *text_corpora(config.corpus)} if name not in config.corpus.folders
        ]
        config = with_folders(config, sorted(open_names), reader.files)
        missing = missing_corpora(config, wanted_names, reader.files)
        correct_corpora(config, [name for name in wanted_names if name not in missing])
        tell_of_tokenizer(config, missing, console)

        # A corpus that is repaired is compared with the earlier corpora of its first build, so its bytes come again.
        texts = [name for name in missing if form_of(config.corpus, name) == "text"]
        extended = [name for name in texts if name in config.corpus.extends]
        together = corpora_together(config, [name for name in texts if name not in extended], reader.files)
        groups: dict[tuple[Path, ...], list[str]] = {}
        for name in texts:
            if name in extended:
                continue
            groups.setdefault(tuple(earlier_folders(config, name, together, reader)), []).append(name)

        for folders, names in groups.items():
            text_splits = TextSplits(
                config.corpus, config.seed, together=together, earlier=earlier_corpora(config, folders), reader=reader
            )
            if config.corpus.build == "tasks":
                build_by_tasks(config, names, missing, text_splits, console)
                continue

            # No train text may contain a held-out text. So the other corpora of texts are compared with val before the
            # first build; the first corpus itself is compared while it is built.
            with console.waiting("comparing val with train"):
                text_splits.compare(name for name in together if name != names[0])
                text_splits.train_rule()  # reads all that it needs while the console shows this wait
            require_compared(config, missing, text_splits)
            for name in names:
                build_corpus(config, name, text_splits, console)

        # The finished corpus that is extended was compared with the others, so the added sources are compared alone.
        for name in extended:
            folders = earlier_folders(config, name, [name], reader)
            earlier = earlier_corpora(config, folders)
            text_splits = TextSplits(config.corpus, config.seed, together=[name], earlier=earlier, reader=reader)
            build_by_tasks(config, [name], missing, text_splits, console)

        for name in missing:
            if name not in texts:
                build_corpus(config, name, alone(config, name, reader=reader), console)

    def output(self, config: Config) -> Path:
        return WorkDirectory(Path(config.work_dir)).path / "corpora"


def own(config: Config) -> CorporaStageConfig:
    """Returns the `stage` group with the type of a stage that builds corpora."""
    assert isinstance(config.stage, CorporaStageConfig)
    return config.stage


def wanted_corpora(config: Config, rankings: bool = False) -> list[str]:
    """Returns the corpora in `stage.corpora`, else all configured ones: those of rankings, or all others.

    Raises:
        ConfigError: no corpus is configured.
    """
    chosen = own(config).corpora
    # A file of corpora with a wrong indentation has none; without this, the stage would build nothing.
    if chosen is None and not config.corpus.corpora:
        raise ConfigError(
            f"corpus.corpora={{}}: corpus={config.corpus.name} has no corpus: expected NAME: [SOURCE, ...] below "
            "`corpora:`, indented"
        )
    names = [name for name in config.corpus.corpora if chosen is None or name in chosen]
    return [name for name in names if (form_of(config.corpus, name) == "ranking") == rankings]


def missing_corpora(config: Config, names: Sequence[str], list_inputs: ListInputs = inputs_of) -> list[str]:
    """Returns those of `names` whose tars must be built: missing or damaged.

    Args:
        config: of `with_folders`.
        list_inputs: as of `listed_inputs`.

    Raises:
        ArtefactError: see `is_whole`; or a damaged corpus was made from other sources than those of the configuration.
        OSError: a file cannot be read.
    """
    work = WorkDirectory(Path(config.work_dir))
    missing = []
    for name in names:
        directory = config.corpus_in(work, name)
        if not is_whole(directory):
            _require_same_sources(config, name, directory, list_inputs)
            missing.append(name)
    return missing


def _require_same_sources(config: Config, name: str, directory: Path, list_inputs: ListInputs) -> None:
    """Refuses to repair a corpus from other sources than it was made from; returns nothing. A run may have begun with
    it, or `corpus.folders` names it.

    Raises:
        ArtefactError: names the folder, the differences and the way out.
    """
    if not manifest_path(directory).is_file():
        return
    changes, _ = _changed(config, name, directory, list_inputs)
    if changes:
        raise ArtefactError(
            f"{directory} is damaged, and cannot be built again from these sources: {'; '.join(changes)}: restore it, "
            "or give the settings that it was built with"
        )


def correct_corpora(config: Config, names: Sequence[str]) -> None:
    """Gives the documents of whole corpora the licences of the configuration; rewrites origins and manifest of those
    that have others.

    A folder that was chosen although its sources are others keeps its licences.

    Args:
        config: of `with_folders`.

    Raises:
        ArtefactError: a manifest is missing or damaged.
        ConfigError: there is no such corpus.
        OSError: a file cannot be read or written.
    """
    work = WorkDirectory(Path(config.work_dir))
    for name in names:
        directory = config.corpus_in(work, name)
        if _has_other_licences(config, name, directory):
            correct_licences(directory, _licences(config, name))


def inspect_corpora(
    config: Config, names: Sequence[str], amount: Callable[[Counts], str], list_inputs: ListInputs = inputs_of
) -> Artefact:
    """Returns the state of the corpora `names`: ready only if all of them are; its text says what is missing, and why a
    corpus is built beside another of its name. A corpus with other licences than the configuration is not ready either.

    Args:
        amount: says how much there is to train on.
        list_inputs: as of `listed_inputs`.

    Raises:
        ArtefactError: a corpus was made with another tokenizer, which may be missing, or its folder holds files of
            others, or a manifest is damaged.
        ConfigError: a source is invalid.
        UnreachableError: the hub cannot be asked for a missing corpus; not in a dry run.
        OSError: a file cannot be read.
    """
    if not names:
        return Artefact(True, "no corpus to build")

    work = WorkDirectory(Path(config.work_dir))
    require_corpora_of_extends(config)
    config = with_folders(config, names, list_inputs)
    ready: list[str] = []
    missing: list[str] = []
    notes: list[str] = []
    for name in names:
        directory = config.corpus_in(work, name)
        if not is_whole(directory):
            _require_same_sources(config, name, directory, list_inputs)
            missing.append(name)
            if name in config.corpus.extends:
                require_extensible(config, name, list_inputs)
            words_of = {manifest_path(directory): "damaged", journal_path(directory): "unfinished"}
            notes += [f"{name} {words}" for path, words in words_of.items() if path.is_file()]
            notes += _beside(config, name, directory, list_inputs)
            notes += _unlisted(config, name, list_inputs)
            notes += _not_compared(config, name)
            notes += _extensible(config, name, list_inputs)
            continue

        check_tokenizer(config, directory)
        changes, unknown = _changed(config, name, directory, list_inputs)
        # Licences are corrected in place: a build would give the same tars.
        if _has_other_licences(config, name, directory):
            missing.append(name)
            notes.append(f"{name} changed: licences only")
        else:
            ready.append(name)
        if changes:
            notes.append(f"{name} stays, in folder {directory.name}: {'; '.join(changes)}")
        if unknown:
            notes.append(f"inputs of {name} are not compared: {unknown}")

    if missing:
        if ready:
            notes.insert(0, f"{', '.join(ready)} there")
        detail = f"corpora {', '.join(missing)}"
        if notes:
            detail += f" ({'; '.join(notes)})"
        return Artefact(False, detail)

    counts = sum((read_manifest(config.corpus_in(work, name)).splits["train"].counts for name in names), Counts())
    return Artefact(True, "; ".join([f"corpora {', '.join(names)}: {amount(counts)}", *notes]))


def train_tokens(counts: Counts) -> str:
    """Says how many tokens of text there are to train on."""
    return f"{counts.tokens:,} training tokens"


def _beside(config: Config, name: str, directory: Path, list_inputs: ListInputs) -> list[str]:
    """Returns a note on why a corpus is built beside the folder of its name; none if it is not."""
    named = directory.with_name(name)
    if named == directory or not manifest_path(named).is_file():
        return []
    manifest = read_manifest(named)
    words = in_brief(manifest.settings, corpus_fingerprint(config, name)) or " of other settings"
    if is_of_settings(config, name, manifest.recipe):
        words = f" ({'; '.join(_changed(config, name, named, list_inputs)[0])})"
    return [f"{name} in {directory.name}, beside another {name}{words}"]


def _unlisted(config: Config, name: str, list_inputs: ListInputs) -> list[str]:
    """Checks keys and places of a missing corpus before anything starts. Returns notes: why the hub was not asked (dry
    run).

    Raises:
        ConfigError: a source is invalid.
        UnreachableError: the hub cannot be asked, and this is no dry run.
        ArtefactError: a folder or URL cannot be listed.
    """
    try:
        listed_inputs(config.corpus, name, list_inputs)
    except UnreachableError as error:
        if not config.dry_run:
            raise
        return [str(error)]
    return []


def _not_compared(config: Config, name: str) -> list[str]:
    """Returns a note about each comparison of `corpus.cleaning` that is set but passes over a corpus of this form.

    Raises:
        ConfigError: a source is invalid.
    """
    form = form_of(config.corpus, name)
    if form == "text":
        return []
    keys = [key for key in ("across_corpora", "near_duplicates", "benchmarks") if getattr(config.corpus.cleaning, key)]
    return [f"corpus.cleaning.{key} compares texts, not the {form}s of {name}" for key in keys]


def _licences(config: Config, name: str) -> list[str]:
    return [source.licence for source in corpus_sources(config.corpus, name)]


def _has_other_licences(config: Config, name: str, directory: Path) -> bool:
    """Returns whether a whole corpus of the configured sources has other licences than the configuration."""
    # The licences of an attached corpus are those of its remote folder.
    if is_attached(directory):
        return False
    manifest = read_manifest(directory)
    return is_of_settings(config, name, manifest.recipe) and list(manifest.licences) != _licences(config, name)


def _changed(config: Config, name: str, directory: Path, list_inputs: ListInputs) -> tuple[list[str], str]:
    """(how settings or inputs of a whole corpus differ from the configured ones, why inputs are not known)."""
    manifest = read_manifest(directory)
    if not is_of_settings(config, name, manifest.recipe):
        words = in_brief(manifest.settings, corpus_fingerprint(config, name))
        return [f"its settings are others{words}"], ""
    try:
        return changed_inputs(config.corpus, name, directory, list_inputs), ""
    except UserError as error:
        return [], str(error)


# --- a corpus that extends a finished one ---


def require_corpora_of_extends(config: Config) -> None:
    """Refuses a key of corpus.extends that names no corpus; returns nothing.

    Raises:
        ConfigError: names the key.
    """
    for name, folder in config.corpus.extends.items():
        accepted = f"the name of a corpus of texts: {', '.join(text_corpora(config.corpus)) or 'there is none'}"
        require(name in text_corpora(config.corpus), f"corpus.extends.{name}", folder, accepted)


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
        list_inputs: as of `listed_inputs`.

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
    words; empty if they do not."""
    manifest = read_manifest(directory)
    first_sources = corpus_sources(config.corpus, name)[: n_sources_of(directory)]
    corpora = {**config.corpus.corpora, name: first_sources}
    first = replace(config, corpus=replace(config.corpus, corpora=corpora, extends={}))
    recorded = dict(manifest.settings)
    extends = {"extends": recorded["extends"]} if "extends" in recorded else {}
    settings = _fingerprint(first, [name]) | extends
    if digest(settings) == manifest.recipe.own_fingerprint:
        return []

    # Other corpora that were built with it do not count.
    corpus = dict(recorded.get("corpus", {}))
    corpus["corpora"] = {name: corpus.get("corpora", {}).get(name)}
    words = differences({**recorded, "corpus": corpus}, json.loads(json.dumps(settings)))
    return words[:NAMED_DIFFERENCES] or ["other settings"]


def _extensible(config: Config, name: str, list_inputs: ListInputs) -> list[str]:
    """Returns a note on a finished corpus that a missing one differs from by added sources alone; none without it."""
    if form_of(config.corpus, name) != "text" or name in config.corpus.extends:
        return []
    if config.corpus.cleaning.across_corpora:
        return []

    n_sources = len(corpus_sources(config.corpus, name))
    for folder in _folders_of(config, name):
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


# --- the folder of a corpus ---


def with_folders(config: Config, names: Sequence[str], list_inputs: ListInputs = inputs_of) -> Config:
    """Returns `config` with the folders of the corpora `names`: the finished ones in `corpus.folders`, else those of
    `folder_of`.

    Args:
        list_inputs: as of `listed_inputs`.

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
        list_inputs: as of `listed_inputs`.

    Raises:
        ConfigError: a source is invalid.
        ArtefactError: none fits, and a manifest or journal of this name is damaged or of another format.
        OSError: a file cannot be read.
    """
    named = WorkDirectory(Path(config.work_dir)).corpus(name)
    not_compared: list[Path] = []
    unfinished: list[Path] = []
    damaged: list[ArtefactError] = []
    for folder in _folders_of(config, name):
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

        changes, unknown = _changed(config, name, folder, list_inputs)
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


def _folders_of(config: Config, name: str) -> list[Path]:
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
        return _fingerprint(config, corpora_of_settings(config, name)) | _content_of_extended(config, name)
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


def _content_of_extended(config: Config, name: str) -> dict[str, Any]:
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
    """Returns a function that lists the inputs of a source once, and gives the same listing to later calls."""
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


# --- the other corpora of the work directory ---


def corpora_together(config: Config, missing: Sequence[str], list_inputs: ListInputs = inputs_of) -> list[str]:
    """Returns the corpora of texts whose sources are compared when `missing` are built: these, those that are not there
    yet, and finished ones whose val was compared with the same sources of `missing`.

    Args:
        config: of `with_folders`, for all corpora of texts.
        missing: corpora of texts.
        list_inputs: as of `listed_inputs`.

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
    if manifest.recipe.corpus_fingerprint != digest(_fingerprint(config, names)):
        return False
    try:
        listings = (listing for name in names for listing in listed_inputs(config.corpus, name, list_inputs))
        return manifest.recipe.inputs_sha256 == inputs_hash(listings)
    except UserError as error:
        log.info("%s", error)  # it is an earlier corpus then, whose sources need not be there
        return False


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


def build_corpus(
    config: Config, name: str, text_splits: TextSplits, console: "Console", encode: Encode = encode_document
) -> None:
    """Writes the tars of one corpus. Tars that an interrupted build finished are kept; the manifest, last, completes
    it.

    Rows that cannot be read are written to a file beside the tars. If the inputs changed, the finished tars are dropped
    (a warning, if some are on the hub).

    Args:
        text_splits: decides the splits of the corpora of texts.

    Raises:
        ArtefactError: the sources give other or fewer documents than the finished tars hold or none for a split, too
            many rows are broken, the tokenizer is missing, or the folder holds files of others.
        ChangedInputError: a file changed since it was listed; no manifest is written.
        ConfigError: a source is invalid.
        UserError: a source cannot be read, or is not Unicode.
        OSError: a file cannot be read or written.
    """
    work = WorkDirectory(Path(config.work_dir))
    report = IngestReport()
    sources = corpus_sources(config.corpus, name)
    directory = config.corpus_in(work, name)
    inputs = listed_inputs(config.corpus, name, text_splits.reader.files)
    recipe = recipe_of(config, name, text_splits)

    name_unread_archives(name, inputs, console)
    # A branch of the hub may have moved on since an earlier build, whose tars are then dropped.
    heads = [f"{file.name} {file.etag}" for listing in inputs for file in listing.taken if file.name.startswith(HUB)]
    if heads and is_dropped_for_inputs(directory, recipe):
        console.warning(
            f"corpus {name} is built from the beginning: inputs changed after an earlier build began. `revision` of a "
            f"source keeps it at one commit; those read now: {', '.join(heads)}"
        )

    # (split, source, hash of the text) of each document that the encoder has not returned yet; it returns them in order
    origins: deque[tuple[str, int, bytes]] = deque()
    with (
        CorpusWriter(directory, recipe) as writer,
        (directory / REJECTED).open("w", encoding="utf-8") as rejected,
        console.counting(f"tokenizing {name}", unit="documents") as count,
    ):
        # Documents in finished tars that are still to be skipped, by split.
        n_finished = dict(writer.kept)

        # A template may ask for several samples of a conversation; each is a document of the tars.
        tokenizer = Tokenizer.load(work.tokenizer_model)

        def documents() -> Iterator[Document]:
            for split, whole_document, source in split_documents(
                config.corpus, name, config.seed, report, text_splits, rejected
            ):
                for document in sample_documents(whole_document, tokenizer):
                    content = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
                    if n_finished[split]:
                        n_finished[split] -= 1
                        writer.pass_over(split, content)
                        count.advance()
                    else:
                        origins.append((split, sources.index(source), content))
                        yield document

        for document in encode_documents(work.tokenizer_model, documents(), config.tokenizer.workers, encode):
            split, source, content = origins.popleft()
            # Documents of train come first, so the first of val completes the tars of train.
            if split == "val":
                writer.finish_split("train")
            writer.write(split, document, source, content)
            count.advance()

        if any(n_finished.values()):
            raise ArtefactError(
                f"corpus {name}: its sources give fewer documents than the finished tars of {directory} hold: "
                "they have changed; remove that folder to build it again"
            )
        listed = [listing.to_json() for listing in inputs]
        read = {corpus: text_splits.reader.documents(corpus) for corpus in corpora_read(config, name, text_splits)}
        settings = corpus_fingerprint(config, name, text_splits.together)
        writer.finish(asdict(report), _licences(config, name), listed, settings, read)


def workers_of(config: Config) -> AbstractContextManager["RunPass"]:
    """Returns what runs the tasks of a build: all nodes of a Ray cluster, or processes of this machine, where Ray would
    only cost its start.

    Raises:
        ClusterError: on entering, the cluster cannot be joined.
        UserError: from the `RunPass`, when workers die again and again.
    """
    if config.cluster.name == "ray":
        from dist_lm.cluster.build_workers import ray_workers

        return ray_workers(config.cluster)
    from dist_lm.data.task_workers import local_workers

    return local_workers(config.tokenizer.workers or cores())


def name_unread_archives(name: str, inputs: Sequence[Inputs], console: "Console") -> None:
    """Names the archives that no reader of a corpus opens."""
    for listing in inputs:
        if hint := listing.unread_archives():
            console.line(f"corpus {name}: {hint}")


def build_by_tasks(
    config: Config, names: Sequence[str], missing: Sequence[str], text_splits: TextSplits, console: "Console"
) -> None:
    """Builds corpora of texts by tasks (`corpus.build=tasks`) in processes of this machine or of a Ray cluster; results
    of tasks of an interrupted build are used again.

    Args:
        config: of `with_folders`.
        names: corpora to build.
        missing: all corpora that are missing.
        text_splits: holds the corpora that are compared; it reads none.

    Raises:
        ArtefactError: as `require_compared`; or as `run_passes`, whose other errors pass.
        OSError: a file cannot be read or written.
        UserError: an input cannot be listed.
    """
    # Imported here, because runs that find their corpora need none of it.
    from dist_lm.data.build_by_tasks import plan_of, publish, run_passes
    from dist_lm.data.build_folder import Build
    from dist_lm.data.build_plan import plan_fingerprint
    from dist_lm.data.build_tasks import IN_TURN, REVISION, sizes_of_pass
    from dist_lm.data.task_results import has_result
    from dist_lm.data.unfinished_builds import begin_pass

    extension, n_old_sources = None, 0
    if names[0] in config.corpus.extends:
        require_extensible(config, names[0], text_splits.reader.files)
        extension = extension_of(config, names[0], text_splits.earlier)
        n_old_sources = n_sources_of(extension.directory)
    together, list_inputs = text_splits.together, text_splits.reader.files
    work = WorkDirectory(Path(config.work_dir))
    # Of a corpus that is not compared only its texts count, which drop equal ones of later corpora.
    earlier_names = {before for name in together for before in corpora_of_settings(config, name)}
    read_names = [name for name in text_corpora(config.corpus) if name in {*together, *earlier_names}]
    old_tasks = extension.decisions.tasks(names[0]) if extension else []
    tasks, listings = plan_of(config.corpus, read_names, list_inputs, old_tasks=old_tasks, n_old_sources=n_old_sources)
    recipes = {name: recipe_of(config, name, text_splits) for name in names}
    key = digest(
        [REVISION, asdict(config.corpus), plan_fingerprint(tasks), [asdict(recipe) for recipe in recipes.values()]]
    )
    build = Build(work.path.resolve() / "builds" / key[:16])
    tell_of_builds(build.folder, console)
    base = extension.directory if extension else None
    build.write(config.corpus, config.seed, work.tokenizer_model, tasks, listings, base, len(old_tasks))

    with workers_of(config) as workers:

        def run_pass(folder: Path, pass_name: str, numbers: Sequence[int]) -> Iterator[int]:
            begin_pass(folder, names, pass_name, len(numbers))
            sizes = sizes_of_pass(tasks, pass_name, numbers)
            finished_numbers = [number for number in numbers if has_result(build.result(pass_name, number))]
            with console.tasks(f"{pass_name} of {', '.join(names)}", sizes, finished_numbers) as progress:
                batches = [[number] for number in numbers] if pass_name in IN_TURN else [numbers]
                for batch in batches:
                    yield from map(progress.ended, workers(folder, pass_name, batch))

        run_passes(build.folder, tasks, run_pass, names, together, text_splits.earlier, text_splits.reader, extension)
    require_compared(config, missing, text_splits)

    for name in names:
        inputs = listed_inputs(config.corpus, name, list_inputs)
        name_unread_archives(name, inputs, console)
        publish(
            build,
            tasks,
            name,
            config.corpus_in(work, name),
            recipes[name],
            licences=_licences(config, name),
            inputs=[listing.to_json() for listing in inputs],
            settings=corpus_fingerprint(config, name, together),
            # The documents of the corpus that is extended were not read again.
            documents={} if extension else {corpus: text_splits.reader.documents(corpus) for corpus in together},
        )
    shutil.rmtree(build.folder)


def tell_of_tokenizer(config: Config, missing: Sequence[str], console: "Console") -> None:
    """Says which of the corpora to build a trained tokenizer was not trained on: their inputs or settings have changed
    since it wrote other corpora of these names.

    Args:
        config: of `with_folders`.
        missing: corpora to build.

    Raises:
        ArtefactError: there is no tokenizer, or a manifest is damaged.
    """
    if config.tokenizer.source != TRAIN:
        return  # the user has chosen it
    work = WorkDirectory(Path(config.work_dir))
    sha256 = durable.sha256_of(work.tokenizer_model)
    written = {
        folder.name for folder in finished_corpora(work) if read_manifest(folder).recipe.tokenizer_sha256 == sha256
    }

    def is_other_content(folder: str, name: str) -> bool:
        return folder == name or (BESIDE.fullmatch(folder) is not None and folder[: -len("-1a2b3c4d")] == name)

    changed = [
        name
        for name in tokenizer_corpora(config.corpus)
        if name in missing
        and any(is_other_content(folder, name) for folder in written - {config.corpus_in(work, name).name})
    ]
    if changed:
        console.line(
            f"{work.tokenizer} is kept, trained on earlier sources of {', '.join(changed)}: to train one on those of "
            "now, give another work_dir; with tokenizer=keep this line is not shown"
        )


def tell_of_builds(folder: Path, console: "Console") -> None:
    """Says whether a build goes on, and which builds of other settings or inputs were not finished.

    Raises:
        OSError: a file cannot be read.
    """
    from dist_lm.data.unfinished_builds import unfinished_builds

    for build in unfinished_builds(folder.parent.parent):
        if build.folder == folder:
            console.line(f"{build.text()}: goes on, results that are there are used")
        else:
            console.line(f"{build.text()}; of other settings or inputs: remove it if nothing goes on with it")


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
            _fingerprint(config, corpora_of_settings(config, name)) | _content_of_extended(config, name)
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
    return _fingerprint(config, text_corpora(config.corpus))


def tokenizer_fingerprint(config: Config) -> dict[str, Any]:
    """Returns the settings that the text of a trained tokenizer depends on: those of the corpora that it learns from.

    Raises:
        ConfigError: a source is invalid.
    """
    fingerprint = _fingerprint(config, tokenizer_corpora(config.corpus))
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
        fingerprint = text_fingerprint(config) if together is None else _fingerprint(config, [*together])
        return fingerprint | _content_of_extended(config, name)
    fingerprint = _fingerprint(config, [name]) | {"format": FORMAT}
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


def _fingerprint(config: Config, names: list[str]) -> dict[str, Any]:
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


STAGE = Shards()
