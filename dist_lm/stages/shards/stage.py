"""Stage `shards`: tokenizes the corpora into work/corpora/FOLDER/*.tar, each with an index and a manifest.

What a corpus is and where it lies is in `identity`, what it is compared with in `other_corpora`, and how its tars are
written in `builds`. Stage `rankings` uses these parts too.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import MISSING

from dist_lm.config.root import Config
from dist_lm.config.stage import StageGroup
from dist_lm.data.ingest import TextSplits
from dist_lm.data.inputs import inputs_of
from dist_lm.data.journal import journal_path
from dist_lm.data.manifest import Counts, ListInputs, listed_inputs, manifest_path, read_manifest
from dist_lm.data.shard_writer import correct_licences
from dist_lm.data.sources.reader import form_of, text_corpora
from dist_lm.errors import ArtefactError, ConfigError, UnreachableError, require
from dist_lm.stages.shards.builds import build_by_tasks, build_corpus, tell_of_tokenizer
from dist_lm.stages.shards.extends import extension_note, require_extensible
from dist_lm.stages.shards.identity import (
    BESIDE,
    begun_folders,
    changes_of,
    check_tokenizer,
    corpus_fingerprint,
    has_other_licences,
    in_brief,
    is_of_settings,
    is_whole,
    licences_of,
    listing_once,
    with_folders,
)
from dist_lm.stages.shards.other_corpora import (
    alone,
    corpora_together,
    earlier_corpora,
    earlier_folders,
    require_compared,
)
from dist_lm.stages.stage import Action, Artefact, ArtefactStage, Look
from dist_lm.storage.run_directory import WorkDirectory

if TYPE_CHECKING:
    from dist_lm.tracking.console import Console


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
    """Returns the names of the corpora to build, in the order of `corpus.corpora`.

    With `rankings` these are the corpora of rankings, without it all others. If `stage.corpora` is not null, only the
    corpora named there are among them. The list may be empty.

    Raises:
        ConfigError: `stage.corpora` is null and `corpus.corpora` is empty.
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
        config: as returned by `with_folders`.
        list_inputs: as in `listed_inputs`.

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
    changes, _ = changes_of(config, name, directory, list_inputs)
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
        config: as returned by `with_folders`.

    Raises:
        ArtefactError: a manifest is missing or damaged.
        ConfigError: there is no such corpus.
        OSError: a file cannot be read or written.
    """
    work = WorkDirectory(Path(config.work_dir))
    for name in names:
        directory = config.corpus_in(work, name)
        if has_other_licences(config, name, directory):
            correct_licences(directory, licences_of(config, name))


def inspect_corpora(
    config: Config, names: Sequence[str], amount: Callable[[Counts], str], list_inputs: ListInputs = inputs_of
) -> Artefact:
    """Returns the state of the corpora `names`: ready only if all of them are; its text says what is missing, and why a
    corpus is built beside another of its name. A corpus with other licences than the configuration is not ready either.

    Args:
        amount: says how much there is to train on.
        list_inputs: as in `listed_inputs`.

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
            notes += extension_note(config, name, list_inputs)
            continue

        check_tokenizer(config, directory)
        changes, unknown = changes_of(config, name, directory, list_inputs)
        # Licences are corrected in place: a build would give the same tars.
        if has_other_licences(config, name, directory):
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
    """Returns a list with one note on why a corpus is built beside the folder of its name; an empty list if it is not.

    Raises:
        ArtefactError: the manifest of that folder is damaged.
        OSError: a file cannot be read.
    """
    named = directory.with_name(name)
    if named == directory or not manifest_path(named).is_file():
        return []
    manifest = read_manifest(named)
    words = in_brief(manifest.settings, corpus_fingerprint(config, name)) or " of other settings"
    if is_of_settings(config, name, manifest.recipe):
        words = f" ({'; '.join(changes_of(config, name, named, list_inputs)[0])})"
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


def require_corpora_of_extends(config: Config) -> None:
    """Refuses a key of corpus.extends that names no corpus; returns nothing.

    Raises:
        ConfigError: names the key.
    """
    for name, folder in config.corpus.extends.items():
        accepted = f"the name of a corpus of texts: {', '.join(text_corpora(config.corpus)) or 'there is none'}"
        require(name in text_corpora(config.corpus), f"corpus.extends.{name}", folder, accepted)


STAGE = Shards()
