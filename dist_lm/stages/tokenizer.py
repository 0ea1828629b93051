"""Stage `tokenizer`: trains work/tokenizer/tokenizer.model on the train split of all texts, or takes an existing one.

Without a corpus of texts it learns from the conversations.

An existing tokenizer is copied as it is (`tokenizer.json` keeps its name); `report.json` beside it has the figures.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from dist_lm.chat.documents import read_conversation
from dist_lm.chat.template import layout
from dist_lm.config.corpus import KEEP, TokenizerConfig
from dist_lm.config.root import Config
from dist_lm.config.stage import StageGroup
from dist_lm.data.in_turn import read_in_turn
from dist_lm.data.manifest import read_manifest
from dist_lm.document import Document
from dist_lm.errors import ArtefactError
from dist_lm.interop.existing_tokenizer import named_tokenizer_file
from dist_lm.stages.shards.identity import digest, finished_corpora, in_brief, tokenizer_fingerprint
from dist_lm.stages.stage import Artefact, ArtefactStage
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.byte_level import ByteLevelModel
from dist_lm.tokenizer.tokenizer import (
    CONVERSATIONS,
    FORMAT,
    KeptTemplate,
    SentencePieceModel,
    Tokenizer,
    read_vocabulary,
)
from dist_lm.tokenizer.train import sample_by_language, tokenizer_report, train_tokenizer
from dist_lm.tracking.readable import listed

if TYPE_CHECKING:
    from dist_lm.tracking.console import Console

REPORT_BYTES = 4_000_000  # text of all languages together, for the report
OLD_SETTINGS = {"split_by_unicode_script": True, "max_piece_length": 16}  # if the report of a tokenizer lacks them
READ = 2  # bytes to read per byte of the sample, which is chosen from them


@dataclass
class TokenizerRunConfig(Config):
    """The configuration of stage tokenizer."""

    stage: StageGroup = MISSING


class TokenizerStage(ArtefactStage):
    name = "tokenizer"
    schema = TokenizerRunConfig
    in_pipeline = True

    def inspect(self, config: Config) -> Artefact:
        """Inspects work/tokenizer: ready once the report, which is written last, is there.

        Raises:
            ArtefactError: it has another format, was trained on another text, has another vocabulary, or is another one
                than `tokenizer=PATH`; or there is none with tokenizer=keep.
            ConfigError, UserError: the given tokenizer or a source of text cannot be found, see `check_same_file` and
                `tokenizer_fingerprint`.
            OSError: a file cannot be read.
        """
        work, settings = WorkDirectory(Path(config.work_dir)), config.tokenizer
        exists = work.tokenizer_model.exists()
        if settings.source == KEEP:
            if not exists:
                raise ArtefactError(
                    f"tokenizer=keep: {work.tokenizer} holds no tokenizer: train one (tokenizer=train) or give its path"
                )
            return Artefact(True, f"{settings.vocab_size:,} pieces, kept")

        # The report is written last. A file that somebody copied has none.
        if exists and not settings.is_given and not work.tokenizer_report.exists() and (written := written_with(work)):
            check_size(work, read_manifest(written[0]).recipe.vocab_size, settings)
            names = listed([folder.name for folder in written], 3)
            return Artefact(True, f"{settings.vocab_size:,} pieces, kept; written with it: {names}")
        if not (exists and work.tokenizer_report.exists()):
            origin = settings.source if settings.is_given else f"corpus={config.corpus.name}"
            return Artefact(False, f"{settings.vocab_size:,} pieces from {origin}")

        report = durable.read_json(work.tokenizer_report, {"vocab_size": int, "bytes_per_token": (int, float)})
        remark = ""
        if settings.is_given:
            check_same_file(work, settings)
            check_template(work, settings)
        else:
            remark = check_trained(work, report, config)
        detail = f"{report['vocab_size']:,} pieces"
        # No figure of a given tokenizer without text.
        if report["bytes_per_token"]:
            detail += f", {report['bytes_per_token']:.2f} bytes/token"
        return Artefact(True, detail + remark)

    def build(self, config: Config, console: "Console") -> None:
        """Trains the tokenizer, or copies the given one, and writes a report on it. Files of an earlier tokenizer are
        removed.

        Raises:
            ConfigError: the text gives fewer or needs more pieces than the vocabulary size.
            ArtefactError: the given file is no tokenizer.
            UserError: there is no text, or a source of text cannot be read.
            OSError: a file cannot be read or written.
            RuntimeError: SentencePiece refuses for another reason.
        """
        work, settings = WorkDirectory(Path(config.work_dir)), config.tokenizer
        work.tokenizer.mkdir(parents=True, exist_ok=True)

        # A given tokenizer needs text only for the figures of the report.
        sample_bytes = REPORT_BYTES if settings.is_given else settings.train_bytes
        with console.counting("reading documents", unit="documents") as count:
            # Corpora are read in turn, so that a large one does not fill the whole sample.
            documents = read_in_turn(config.corpus, config.seed, READ * sample_bytes)
            texts = (with_plain_text(count.each(document)) for document in documents)
            sample = list(sample_by_language(texts, sample_bytes))

        report: dict[str, Any] = {"config": asdict(settings)}
        template = None
        if settings.is_given:
            content = named_tokenizer_file(settings)
            path = work.tokenizer / read_vocabulary(content, settings.source).file_name
            durable.write_bytes(path, content)
            template = template_of(settings)
        else:
            path = work.tokenizer / SentencePieceModel.file_name
            with console.waiting(f"training {settings.vocab_size:,} pieces"):
                train_tokenizer((document.text for document in sample), path, settings)
            report["config"] |= settings.learned_as
            report["text_settings"] = tokenizer_fingerprint(config)
            report["text"] = digest(report["text_settings"])

        # Files of an earlier tokenizer of another kind would be taken for parts of this one.
        (work.tokenizer / CONVERSATIONS).unlink(missing_ok=True)
        if template:
            template.write(work.tokenizer)
        for kind in (SentencePieceModel, ByteLevelModel):
            other_path = work.tokenizer / kind.file_name
            if other_path != path:
                other_path.unlink(missing_ok=True)

        report |= tokenizer_report(Tokenizer.load(path), sample_by_language(sample, REPORT_BYTES))
        durable.write_sealed(work.tokenizer_report, report)

    def output(self, config: Config) -> Path:
        return WorkDirectory(Path(config.work_dir)).tokenizer


def with_plain_text(document: Document) -> Document:
    """Returns a document with the text that a tokenizer learns from: of a conversation what its layout has between the
    marks.

    Raises:
        ChatError: the text holds no conversation.
    """
    if document.form != "conversation":
        return document
    parts = layout(read_conversation(document.text))
    return replace(document, text="".join(part.text for part in parts if not part.is_mark), form="text")


def check_same_file(work: WorkDirectory, settings: TokenizerConfig) -> None:
    """Refuses a work directory with another tokenizer than `tokenizer=PATH`. Compares the hashes of the files.

    Raises:
        ArtefactError: names the folder and the way out.
        ConfigError, UserError: the given file cannot be read, see `named_tokenizer_file`.
    """
    stored_sha256 = durable.sha256_of(work.tokenizer_model)
    given_sha256 = sha256(named_tokenizer_file(settings)).hexdigest()
    if stored_sha256 != given_sha256:
        raise ArtefactError(
            f"{work.tokenizer} holds tokenizer {stored_sha256[:12]}, tokenizer={settings.source} is "
            f"{given_sha256[:12]}: use another work_dir, remove that folder to replace it, or keep it by tokenizer=keep"
        )


def check_trained(work: WorkDirectory, report: Mapping[str, Any], config: Config) -> str:
    """Refuses a tokenizer that was trained by another version, with other settings, or on another text unless finished
    corpora were written with it: these would be lost with it.

    Args:
        report: its `report.json`.

    Returns:
        Words for the plan on why a tokenizer of another text is kept; empty if it is of this text.

    Raises:
        ArtefactError: names the folder and the way out.
        ConfigError: a source of text is invalid.
        OSError: a file cannot be read.
    """
    file_format = report.get("format", 1)
    if file_format != FORMAT:
        raise ArtefactError(
            f"{work.tokenizer} holds a tokenizer of format {file_format}, this version reads format {FORMAT}: use "
            "another work_dir, or remove that work_dir to build everything again"
        )
    check_size(work, report["vocab_size"], config.tokenizer)
    check_pieces(work, report, config.tokenizer)

    text_settings = tokenizer_fingerprint(config)
    if report.get("text") == digest(text_settings):
        return ""
    differences = in_brief(report.get("text_settings", {}), text_settings)
    if written := written_with(work):
        names = listed([folder.name for folder in written], 3)
        return f", kept although it was trained on another text{differences}; written with it: {names}"
    raise ArtefactError(
        f"{work.tokenizer} was trained on another text than corpus={config.corpus.name} seed={config.seed}"
        f"{differences}: keep it by tokenizer=keep, use another work_dir, or remove that folder to train it again"
    )


def written_with(work: WorkDirectory) -> list[Path]:
    """Returns the folders of the finished corpora that were written with the tokenizer of the work directory.

    Raises:
        ArtefactError: a manifest is damaged.
        OSError: a file cannot be read.
    """
    sha256 = durable.sha256_of(work.tokenizer_model)
    return [folder for folder in finished_corpora(work) if read_manifest(folder).recipe.tokenizer_sha256 == sha256]


def check_size(work: WorkDirectory, vocab_size: int, settings: TokenizerConfig) -> None:
    """Refuses a tokenizer with another number of pieces than the configuration.

    Raises:
        ArtefactError: names both numbers and the way out.
    """
    if vocab_size != settings.vocab_size:
        raise ArtefactError(
            f"{work.tokenizer} holds {vocab_size} pieces, expected {settings.vocab_size} "
            "(tokenizer.vocab_size follows model.vocab_size): use another work_dir, or remove that folder to train "
            "it again"
        )


def check_pieces(work: WorkDirectory, report: Mapping[str, Any], settings: TokenizerConfig) -> None:
    """Refuses a tokenizer that was trained to have other pieces; a key that is null accepts what is there.

    Raises:
        ArtefactError: names the key and the way out.
    """
    trained_settings = OLD_SETTINGS | report.get("config", {})
    # These keys change the pieces that are learned; a report from before they existed has their old values.
    for key in OLD_SETTINGS:
        expected = getattr(settings, key)
        if expected is not None and expected != trained_settings[key]:
            raise ArtefactError(
                f"{work.tokenizer} was trained with tokenizer.{key}={trained_settings[key]}, expected {expected}: keep "
                f"it by tokenizer.{key}=null, use another work_dir, or remove that folder to train it again"
            )


def template_of(settings: TokenizerConfig) -> KeptTemplate | None:
    """Returns the layout of conversations that comes with a given tokenizer; None: ours.

    Raises:
        ConfigError, ArtefactError, UserError: see `given_template`.
        OSError: a file cannot be read.
    """
    # Only for models of transformers.
    from dist_lm.stages.chat_layout import given_template

    return given_template(settings)


def check_template(work: WorkDirectory, settings: TokenizerConfig) -> None:
    """Refuses a work directory whose conversations are laid out otherwise than the given tokenizer's.

    Raises:
        ArtefactError: names the folder and the way out.
        ConfigError, UserError: see `given_template`.
        OSError: a file cannot be read.
    """
    stored_template, given_template = KeptTemplate.read(work.tokenizer), template_of(settings)
    # Only the text counts: the date of a template is the day of its import.
    if (stored_template and stored_template.text) != (given_template and given_template.text):
        names = ["that of an imported model" if template else "ours" for template in (stored_template, given_template)]
        raise ArtefactError(
            f"{work.tokenizer}: the layout of conversations is {names[0]}, tokenizer={settings.source} "
            f"tokenizer.chat_template={settings.chat_template} is {names[1]}: use another work_dir, remove that folder "
            "to replace it, or keep it by tokenizer=keep"
        )


STAGE = TokenizerStage()
