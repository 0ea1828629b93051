"""Stage `shards`: tokenizes the corpora into work/corpora/NAME/*.tar, each with an index and a manifest.

A fingerprint holds the settings that the files of a work directory depend on. It is stored with the files and compared
before they are used again.
"""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from dist_lm.chat.documents import encode_document, sample_documents
from dist_lm.chat.template import FORMAT
from dist_lm.config.corpus import KEEP, SPLITS, CorpusConfig
from dist_lm.config.root import Config
from dist_lm.config.stage import StageGroup
from dist_lm.data.ingest import TextSplits, split_documents
from dist_lm.data.inputs import HUB, inputs_of
from dist_lm.data.journal import REJECTED, is_dropped_for_inputs, journal_path, require_only_ours
from dist_lm.data.manifest import (
    Counts,
    FormatError,
    ListInputs,
    ManifestError,
    Recipe,
    changed_inputs,
    differences,
    inputs_hash,
    listed_inputs,
    manifest_path,
    read_manifest,
)
from dist_lm.data.screening import IngestReport
from dist_lm.data.shard_writer import CorpusWriter, correct_licences
from dist_lm.data.sources.reader import corpus_sources, form_of, source_traits, text_corpora, tokenizer_corpora
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError, UnreachableError, UserError, require
from dist_lm.stages.stage import Artefact, ArtefactStage
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.encode import Encode, encode_documents
from dist_lm.tokenizer.tokenizer import KeptTemplate, Tokenizer

if TYPE_CHECKING:
    from dist_lm.tracking.console import Console

log = logging.getLogger(__name__)

NAMED_DIFFERENCES = 3  # settings that a message names
SAMPLED = "synthetic_rankings"  # reader whose documents a model wrote


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

    def for_readers(self, config: Config, readers: Sequence[Config]) -> Config:
        """Build only the corpora that later stages read."""
        read = sorted({name for reader in readers for name in reader.corpus_names})
        return replace(config, stage=replace(own(config), corpora=read))

    def inspect(self, config: Config) -> Artefact:
        return inspect_corpora(config, wanted_corpora(config), lambda counts: f"{counts.tokens:,} training tokens")

    def build(self, config: Config, console: "Console") -> None:
        """Tokenizes every corpus that is missing, damaged or older than its inputs; corrects the licences of the
        others.

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
        wanted = wanted_corpora(config)
        # Files are listed once for the whole build: what is compared with val is what is tokenized.
        text_splits = TextSplits(config.corpus, config.seed)
        missing = missing_corpora(config, wanted, text_splits.reader.files)
        correct_corpora(config, [name for name in wanted if name not in missing])

        # No train text may contain a held-out text of any corpus. So the other corpora of texts are compared with val
        # before the first build; the first corpus itself is compared while it is built.
        if first := next((name for name in missing if form_of(config.corpus, name) == "text"), ""):
            text_splits.frozen = frozen_corpora(config, missing, text_splits.reader.files)
            with console.waiting("comparing val with train"):
                text_splits.compare(name for name in text_corpora(config.corpus) if name != first)
                text_splits.train_rule()  # reads all that it needs while the console shows this wait
            require_compared(config, missing, text_splits)

        for name in missing:
            build_corpus(config, name, text_splits, console)

    def output(self, config: Config) -> Path:
        return WorkDirectory(Path(config.work_dir)).path / "corpora"


def own(config: Config) -> CorporaStageConfig:
    """The `stage` group with the type of a stage that builds corpora."""
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
    """Returns those of `names` whose tars must be built: missing or damaged, or their inputs changed.

    A corpus whose inputs cannot be listed now counts as unchanged.

    Args:
        list_inputs: as of `listed_inputs`.

    Raises:
        ArtefactError: see `is_whole`.
    """
    work = WorkDirectory(Path(config.work_dir))
    return [name for name in names if not is_whole(work.corpus(name)) or _changed(config, name, list_inputs)[0]]


def correct_corpora(config: Config, names: Sequence[str]) -> None:
    """Gives the documents of whole corpora the licences of the configuration; rewrites origins and manifest of those
    that have others.

    Raises:
        ArtefactError: a manifest is missing or damaged.
        ConfigError: there is no such corpus.
    """
    work = WorkDirectory(Path(config.work_dir))
    for name in names:
        if list(read_manifest(work.corpus(name)).licences) != _licences(config, name):
            correct_licences(work.corpus(name), _licences(config, name))


def inspect_corpora(config: Config, names: Sequence[str], amount: Callable[[Counts], str]) -> Artefact:
    """Returns the state of the corpora `names`: ready only if all of them are; its text says what is missing or
    changed. A corpus with other licences than the configuration is not ready either.

    Args:
        amount: says how much there is to train on.

    Raises:
        ArtefactError: a corpus was made from another text or with another tokenizer, which may be missing, or its
            folder holds files of others.
        ConfigError: a source is invalid.
        UnreachableError: the hub cannot be asked for a missing corpus; not in a dry run.
    """
    if not names:
        return Artefact(True, "no corpus to build")

    work = WorkDirectory(Path(config.work_dir))
    ready: list[str] = []
    missing: list[str] = []
    notes: list[str] = []
    for name in names:
        corpus_path = work.corpus(name)
        if not is_whole(corpus_path):
            missing.append(name)
            words_of = {manifest_path(corpus_path): "damaged", journal_path(corpus_path): "unfinished"}
            notes += [f"{name} {words}" for path, words in words_of.items() if path.is_file()]
            notes += _unlisted(config, name)
            continue

        check_corpus(config, name)
        changes, unknown = _changed(config, name)
        # Licences are corrected in place: a build would give the same tars.
        if not changes and list(read_manifest(corpus_path).licences) != _licences(config, name):
            changes = ["licences only"]
        if changes:
            missing.append(name)
            notes.append(f"{name} changed: {'; '.join(changes)}")
        else:
            ready.append(name)
        if unknown:
            notes.append(f"inputs of {name} are not compared: {unknown}")

    if missing:
        if ready:
            notes.insert(0, f"{', '.join(ready)} there")
        detail = f"corpora {', '.join(missing)}"
        if notes:
            detail += f" ({'; '.join(notes)})"
        return Artefact(False, detail)

    counts = sum((read_manifest(work.corpus(name)).splits["train"].counts for name in names), Counts())
    return Artefact(True, "; ".join([f"corpora {', '.join(names)}: {amount(counts)}", *notes]))


def _unlisted(config: Config, name: str) -> list[str]:
    """Checks keys and places of a missing corpus before anything starts. Returns notes: why the hub was not asked (dry
    run).

    Raises:
        ConfigError: a source is invalid.
        UnreachableError: the hub cannot be asked, and this is no dry run.
        ArtefactError: a folder or URL cannot be listed.
    """
    try:
        listed_inputs(config.corpus, name)
    except UnreachableError as error:
        if not config.dry_run:
            raise
        return [str(error)]
    return []


def _licences(config: Config, name: str) -> list[str]:
    return [source.licence for source in corpus_sources(config.corpus, name)]


def _changed(config: Config, name: str, list_inputs: ListInputs = inputs_of) -> tuple[list[str], str]:
    """(how the inputs of a whole corpus changed since it was built, why they are not known)."""
    try:
        directory = WorkDirectory(Path(config.work_dir)).corpus(name)
        return changed_inputs(config.corpus, name, directory, list_inputs), ""
    except UserError as error:
        return [], str(error)


def is_whole(directory: Path) -> bool:
    """Returns whether a corpus can be opened and matches its manifest. If not, it can be built in `directory`. Missing
    indices of its tars are built and saved.

    Raises:
        FormatError: it has another format.
        ManifestError: its manifest is damaged.
        ArtefactError: it must be built, but the folder holds files that are not ours.
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
        log.info("%s", error)
    require_only_ours(directory)
    return False


def check_corpus(config: Config, name: str) -> None:
    """Refuses a corpus that was made from another text or with another tokenizer.

    Raises:
        ArtefactError: names the folder and the way out.
        ConfigError: a source is invalid.
    """
    work = WorkDirectory(Path(config.work_dir))
    manifest = read_manifest(work.corpus(name))
    settings = corpus_fingerprint(config, name)
    if manifest.recipe.corpus_fingerprint != digest(settings) and not is_frozen(config, name):
        raise ArtefactError(
            f"{work.corpus(name)} was made from another text than corpus={config.corpus.name} seed={config.seed}, or "
            f"by another version of dist_lm{in_brief(manifest.settings, settings)}: use another work_dir, or remove "
            "that folder to build it again"
        )

    if not work.tokenizer_model.exists():
        raise ArtefactError(
            f"{work.corpus(name)} exists, but its tokenizer is missing: restore {work.tokenizer_model}, "
            f"or remove {work.path / 'corpora'} to build both again"
        )
    manifest.require_tokenizer(durable.sha256_of(work.tokenizer_model), work.corpus(name))


def is_frozen(config: Config, name: str) -> bool:
    """Returns whether a corpus of texts is not rebuilt with `tokenizer=keep`, although other corpora may have changed
    since.

    Its own sources must be those it was made from.

    Raises:
        ArtefactError: the manifest is missing or damaged.
        ConfigError: a source is invalid.
    """
    if config.tokenizer.source != KEEP or form_of(config.corpus, name) != "text":
        return False
    recipe = read_manifest(WorkDirectory(Path(config.work_dir)).corpus(name)).recipe
    return recipe.own_fingerprint == digest(_fingerprint(config, [name]))


def frozen_corpora(config: Config, missing: Sequence[str], list_inputs: ListInputs = inputs_of) -> frozenset[str]:
    """Returns the corpora of texts that stay as they are while `missing` are built, although other corpora have changed
    since.

    They keep their held-out split, so new train text must not contain it.

    Args:
        list_inputs: as of `listed_inputs`.

    Raises:
        ArtefactError: a manifest is damaged.
        ConfigError: a source is invalid.
        UserError: an input cannot be listed.
    """
    work = WorkDirectory(Path(config.work_dir))
    existing = [
        name for name in text_corpora(config.corpus) if name not in missing and work.corpus_manifest(name).is_file()
    ]
    if not existing:
        return frozenset()
    # Fingerprint and inputs are those of all corpora of texts.
    current = recipe_of(config, existing[0], list_inputs)

    def is_older(name: str) -> bool:
        recipe = read_manifest(work.corpus(name)).recipe
        if recipe.corpus_fingerprint != current.corpus_fingerprint:
            return is_frozen(config, name)
        return recipe.inputs_sha256 != current.inputs_sha256

    return frozenset(name for name in existing if is_older(name))


def require_compared(config: Config, missing: Sequence[str], text_splits: TextSplits) -> None:
    """Refuses a corpus that is not built again although the sources have other documents now; returns nothing.

    The files of a corpus may have changed although their sizes and times are the same. The val of a corpus that is
    not built again was never compared with these documents, so train text that is built now may contain it.

    Args:
        text_splits: has read all corpora of texts.

    Raises:
        ArtefactError: names both corpora, or a manifest is damaged.
    """
    work = WorkDirectory(Path(config.work_dir))
    for name in text_corpora(config.corpus):
        # Train text that contains val of a frozen corpus is dropped, so those need no refusal.
        if name in missing or name in text_splits.frozen or not work.corpus_manifest(name).is_file():
            continue

        for other, documents in read_manifest(work.corpus(name)).documents.items():
            if text_splits.reader.documents(other) != documents:
                raise ArtefactError(
                    f"{work.corpus(name)} was built when corpus {other} had other documents, although sizes and times "
                    f"of its inputs are the same: remove {work.corpus(name)} to build both again"
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
    """
    work = WorkDirectory(Path(config.work_dir))
    report = IngestReport()
    sources = corpus_sources(config.corpus, name)
    inputs = listed_inputs(config.corpus, name, text_splits.reader.files)
    recipe = recipe_of(config, name, text_splits.reader.files)

    # A branch of the hub may have moved on since an earlier build, whose tars are then dropped.
    heads = [f"{file.name} {file.etag}" for listing in inputs for file in listing.taken if file.name.startswith(HUB)]
    if heads and is_dropped_for_inputs(work.corpus(name), recipe):
        console.warning(
            f"corpus {name} is built from the beginning: inputs changed after an earlier build began. `revision` of a "
            f"source keeps it at one commit; those read now: {', '.join(heads)}"
        )

    # (split, source, hash of the text) of each document that the encoder has not returned yet; it returns them in order
    origins: deque[tuple[str, int, bytes]] = deque()
    with (
        CorpusWriter(work.corpus(name), recipe) as writer,
        (work.corpus(name) / REJECTED).open("w", encoding="utf-8") as rejected,
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
                f"corpus {name}: its sources give fewer documents than the finished tars of {work.corpus(name)} hold: "
                "they have changed; remove that folder to build it again"
            )
        listed = [listing.to_json() for listing in inputs]
        is_text = form_of(config.corpus, name) == "text"
        corpora_read = text_corpora(config.corpus) if is_text else [name]
        read = {corpus: text_splits.reader.documents(corpus) for corpus in corpora_read}
        writer.finish(asdict(report), _licences(config, name), listed, corpus_fingerprint(config, name), read)


def recipe_of(config: Config, name: str, list_inputs: ListInputs = inputs_of) -> Recipe:
    """Returns the settings and inputs that the tars of one corpus depend on; lists the inputs, also on the hub.

    Args:
        list_inputs: as of `listed_inputs`.

    Raises:
        ArtefactError: there is no tokenizer.
        UserError: an input cannot be listed.
    """
    tokenizer_model = WorkDirectory(Path(config.work_dir)).tokenizer_model
    # Texts depend on the held-out text of all corpora of texts.
    corpora_read = text_corpora(config.corpus) if form_of(config.corpus, name) == "text" else [name]
    return Recipe(
        tokenizer_sha256=durable.sha256_of(tokenizer_model),
        vocab_size=Tokenizer.load(tokenizer_model).vocab_size,
        corpus_fingerprint=digest(corpus_fingerprint(config, name)),
        documents_per_member=config.corpus.documents_per_member,
        shard_tokens=config.corpus.shard_tokens,
        inputs_sha256=inputs_hash(
            listing for corpus in corpora_read for listing in listed_inputs(config.corpus, corpus, list_inputs)
        ),
        own_fingerprint=digest(_fingerprint(config, [name])),
    )


def text_fingerprint(config: Config) -> dict[str, Any]:
    """Returns the settings that the texts of all corpora depend on.

    All corpora of texts share a fingerprint, because a train text of one corpus drops the val text of another corpus
    that it contains.

    Raises:
        ConfigError: a source is invalid.
    """
    return _fingerprint(config, text_corpora(config.corpus))


def tokenizer_fingerprint(config: Config) -> dict[str, Any]:
    """Returns the settings that the text of a trained tokenizer depends on: those of the corpora that it learns from.

    Raises:
        ConfigError: a source is invalid.
    """
    return _fingerprint(config, tokenizer_corpora(config.corpus))


def corpus_fingerprint(config: Config, name: str) -> dict[str, Any]:
    """Returns the settings that the documents of one corpus and their tokens depend on, as JSON values.

    A corpus of conversations or rankings depends on no other corpus.

    Raises:
        ConfigError: a source is invalid.
        ArtefactError: the chat template beside the tokenizer is damaged.
    """
    if form_of(config.corpus, name) == "text":
        return text_fingerprint(config)
    fingerprint = _fingerprint(config, [name]) | {"format": FORMAT}
    template = KeptTemplate.read(WorkDirectory(Path(config.work_dir)).tokenizer)
    if template:
        fingerprint["chat_template"] = asdict(template)
    return fingerprint


def _fingerprint(config: Config, names: list[str]) -> dict[str, Any]:
    """Returns the settings that the documents of the corpora `names` depend on; keys that change no document are left
    out.

    The seed is None where no reader makes documents by it.

    Raises:
        ConfigError: a source is invalid.
    """
    selected: CorpusConfig = replace(config.corpus, corpora={name: config.corpus.corpora[name] for name in names})
    corpus = asdict(selected)
    for key in ("name", "documents_per_member", "shard_tokens", "max_bad_fraction"):  # none changes a document
        corpus.pop(key)
    # Corpora from before these keys have no such setting, and read their rows as without it.
    for source in chain.from_iterable(corpus["corpora"].values()):
        for key in ("thinking", "opening_answers"):
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
