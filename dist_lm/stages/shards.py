"""Stage `shards`: tokenizes the corpora into work/corpora/NAME/*.tar, each with an index and a manifest.

A fingerprint holds the settings that the files of a work directory depend on. It is stored with the files and compared
before they are used again.
"""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from dist_lm.chat.documents import encode_document
from dist_lm.chat.template import FORMAT
from dist_lm.config.corpus import SPLITS, CorpusConfig
from dist_lm.config.root import Config
from dist_lm.config.stage import StageConfig
from dist_lm.data.corpus import corpus_sources, form_of, text_corpora
from dist_lm.data.ingest import Texts, read_corpus
from dist_lm.data.inputs import inputs_of
from dist_lm.data.journal import require_only_ours
from dist_lm.data.manifest import Counts, FormatError, ManifestError, Recipe, manifest_path, read_manifest
from dist_lm.data.mapped import MappedCorpus
from dist_lm.data.screening import IngestReport
from dist_lm.data.shard_writer import CorpusWriter
from dist_lm.data.sources.reader import source_traits
from dist_lm.data.sources.row_errors import REJECTED
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, require
from dist_lm.stages.stage import Artefact, ArtefactStage
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.encode import Encode, encode_documents
from dist_lm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dist_lm.tracking.console import Console

log = logging.getLogger(__name__)

SAMPLED = "synthetic_rankings"  # reader whose documents a model wrote


@dataclass
class CorporaStageConfig(StageConfig):
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
        read = sorted({name for reader in readers for name in reader.streams})
        return replace(config, stage=replace(own(config), corpora=read))

    def inspect(self, config: Config) -> Artefact:
        return inspect_corpora(config, wanted_corpora(config), lambda counts: f"{counts.tokens:,} training tokens")

    def build(self, config: Config, console: "Console") -> None:
        """Tokenize every missing or damaged corpus."""
        missing = missing_corpora(config, wanted_corpora(config))
        texts = Texts(config.corpus, config.seed)
        if any(form_of(config.corpus, name) == "text" for name in missing):
            with console.waiting("comparing val with train"):
                _ = texts.sides
        for name in missing:
            build_corpus(config, name, texts, console)

    def output(self, config: Config) -> Path:
        return WorkDirectory(Path(config.work_dir)).path / "corpora"


def own(config: Config) -> CorporaStageConfig:
    """The `stage` group with the type of a stage that builds corpora."""
    assert isinstance(config.stage, CorporaStageConfig)
    return config.stage


def wanted_corpora(config: Config, rankings: bool = False) -> list[str]:
    """The corpora in `stage.corpora`, else all configured ones: those of rankings, or all others."""
    chosen = own(config).corpora
    names = [name for name in config.corpus.corpora if chosen is None or name in chosen]
    return [name for name in names if (form_of(config.corpus, name) == "ranking") == rankings]


def missing_corpora(config: Config, names: Sequence[str]) -> list[str]:
    """Those of `names` that are missing or damaged."""
    work = WorkDirectory(Path(config.work_dir))
    return [name for name in names if not is_whole(work.corpus(name))]


def inspect_corpora(config: Config, names: Sequence[str], amount: Callable[[Counts], str]) -> Artefact:
    """The state of the corpora `names`.

    Args:
        amount: says how much there is to train on.

    Raises:
        ArtefactError: a corpus was made from another text or with another tokenizer.
    """
    work = WorkDirectory(Path(config.work_dir))
    missing = missing_corpora(config, names)
    damaged = [name for name in missing if work.corpus_manifest(name).exists()]
    there = [name for name in names if name not in missing]
    for name in there:
        check_corpus(config, name)
    for name in missing:
        for source in corpus_sources(config.corpus, name):
            inputs_of(source)  # keys and places are checked before anything starts
    if missing:
        notes = [f"{', '.join(part)} {word}" for part, word in ((there, "there"), (damaged, "damaged")) if part]
        return Artefact(False, f"corpora {', '.join(missing)}" + (f" ({'; '.join(notes)})" if notes else ""))
    counts = sum((read_manifest(work.corpus(name)).splits["train"].counts for name in names), Counts())
    return Artefact(True, f"corpora {', '.join(names) or '(none)'}: {amount(counts)}")


def is_whole(directory: Path) -> bool:
    """Whether a corpus can be opened and matches its manifest. If not, it can be built in `directory`.

    Raises:
        FormatError: it has another format.
        ManifestError: its manifest is damaged.
        ArtefactError: it must be built, but the folder holds files that are not ours.
    """
    if not directory.exists():
        return False
    if not directory.is_dir():
        raise ArtefactError(f"{directory} is a file, but a corpus is a folder: move it away")
    try:
        if manifest_path(directory).is_file():
            for split in SPLITS:
                MappedCorpus.open(directory, split)
            return True
    except (FormatError, ManifestError):
        raise
    except ArtefactError as error:
        log.info("%s", error)
    require_only_ours(directory)
    return False


def check_corpus(config: Config, name: str) -> None:
    """Refuse a corpus that was made from another text or with another tokenizer.

    Raises:
        ArtefactError: names the folder and the way out.
    """
    work = WorkDirectory(Path(config.work_dir))
    manifest = read_manifest(work.corpus(name))
    if manifest.recipe.corpus_fingerprint != digest(corpus_fingerprint(config, name)):
        raise ArtefactError(
            f"{work.corpus(name)} was made from another text than corpus={config.corpus.name} seed={config.seed}, or "
            "by another version of dist_lm: use another work_dir, or remove that folder to build it again"
        )
    if not work.tokenizer_model.exists():
        raise ArtefactError(
            f"{work.corpus(name)} exists, but its tokenizer is missing: restore {work.tokenizer_model}, "
            f"or remove {work.path / 'corpora'} to build both again"
        )
    manifest.require_tokenizer(durable.sha256_of(work.tokenizer_model), work.corpus(name))


def build_corpus(config: Config, name: str, texts: Texts, console: "Console", encode: Encode = encode_document) -> None:
    """Write the tars of one corpus, behind those that an earlier build finished. The manifest completes the corpus."""
    work = WorkDirectory(Path(config.work_dir))
    report = IngestReport()
    splits: deque[str] = deque()  # splits of the documents inside the encoder, which keeps their order
    with (
        CorpusWriter(work.corpus(name), recipe_of(config, name)) as writer,
        (work.corpus(name) / REJECTED).open("w", encoding="utf-8") as rejected,
        console.counting(f"tokenizing {name}", unit="documents") as count,
    ):
        kept = dict(writer.kept)

        def documents() -> Iterator[Document]:
            for split, document in read_corpus(config.corpus, name, config.seed, report, texts, rejected):
                if kept[split]:  # in a finished tar
                    kept[split] -= 1
                    count.advance()
                else:
                    splits.append(split)
                    yield document

        for document in encode_documents(work.tokenizer_model, documents(), config.tokenizer.workers, encode):
            writer.write(splits.popleft(), document)
            count.advance()
        if any(kept.values()):
            raise ArtefactError(
                f"corpus {name}: its sources give fewer documents than the finished tars of {work.corpus(name)} hold: "
                "they have changed; remove that folder to build it again"
            )
        writer.finish(asdict(report))


def recipe_of(config: Config, name: str) -> Recipe:
    """What the tars of one corpus depend on."""
    model = WorkDirectory(Path(config.work_dir)).tokenizer_model
    return Recipe(
        tokenizer_sha256=durable.sha256_of(model),
        vocab_size=Tokenizer.load(model).vocab_size,
        corpus_fingerprint=digest(corpus_fingerprint(config, name)),
        documents_per_member=config.corpus.documents_per_member,
        shard_tokens=config.corpus.shard_tokens,
    )


def text_fingerprint(config: Config) -> dict[str, Any]:
    """The settings that the texts of all corpora depend on.

    One fingerprint covers all of them, because a text of one corpus keeps a similar text out of another corpus' val.
    """
    return _fingerprint(config, text_corpora(config.corpus))


def corpus_fingerprint(config: Config, name: str) -> dict[str, Any]:
    """The settings that the documents of one corpus and their tokens depend on.

    A corpus of conversations or rankings depends on no other corpus.
    """
    if form_of(config.corpus, name) == "text":
        return text_fingerprint(config)
    return _fingerprint(config, [name]) | {"format": FORMAT}


def _fingerprint(config: Config, names: list[str]) -> dict[str, Any]:
    chosen: CorpusConfig = replace(config.corpus, corpora={name: config.corpus.corpora[name] for name in names})
    corpus = asdict(chosen)
    for key in ("documents_per_member", "shard_tokens"):
        corpus.pop(key)
    readers = {source.reader: source_traits(source) for sources in chosen.corpora.values() for source in sources}
    found: dict[str, Any] = {
        "seed": config.seed if any(traits.seeded for traits in readers.values()) else None,
        "revisions": {name: traits.revision for name, traits in readers.items()},
        "corpus": corpus,
    }
    if SAMPLED in readers:
        found |= config.stage.sampled_by()
    return found


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


STAGE = Shards()
