"""Stage `tokenizer`: reads the train split of all texts, writes work/tokenizer/{tokenizer.model,report.json}."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dist_lm.config.root import Config
from dist_lm.data.ingest import train_texts
from dist_lm.errors import ArtefactError
from dist_lm.stages.shards import digest, text_fingerprint
from dist_lm.stages.stage import Artefact, ArtefactStage
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import FORMAT, Tokenizer
from dist_lm.tokenizer.train import sample_by_language, tokenizer_report, train_tokenizer

if TYPE_CHECKING:
    from dist_lm.tracking.console import Console

REPORT_BYTES = 4_000_000  # of all languages together, for the report


class TokenizerStage(ArtefactStage):
    name = "tokenizer"
    in_pipeline = True

    def inspect(self, config: Config) -> Artefact:
        """Inspect work/tokenizer.

        Raises:
            ArtefactError: it has another format, was trained on another text, or has another vocabulary.
        """
        work = WorkDirectory(Path(config.work_dir))
        if not (work.tokenizer_model.exists() and work.tokenizer_report.exists()):
            return Artefact(False, f"{config.tokenizer.vocab_size:,} pieces from corpus={config.corpus.name}")
        report = json.loads(work.tokenizer_report.read_text())
        if (found := report.get("format", 1)) != FORMAT:
            raise ArtefactError(
                f"{work.tokenizer} holds a tokenizer of format {found}, this version reads format {FORMAT}: use "
                "another work_dir, or remove that work_dir to build everything again"
            )
        if report["vocab_size"] != config.tokenizer.vocab_size:
            raise ArtefactError(
                f"{work.tokenizer} holds {report['vocab_size']} pieces, expected {config.tokenizer.vocab_size} "
                "(tokenizer.vocab_size follows model.vocab_size): use another work_dir, or remove that folder to train "
                "it again"
            )
        if report["text"] != digest(text_fingerprint(config)):
            raise ArtefactError(
                f"{work.tokenizer} was trained on another text than corpus={config.corpus.name} seed={config.seed}: "
                "use another work_dir, or remove that folder to train it again"
            )
        return Artefact(True, f"{report['vocab_size']:,} pieces, {report['bytes_per_token']:.2f} bytes/token")

    def build(self, config: Config, console: "Console") -> None:
        """Train the tokenizer and report on it."""
        work = WorkDirectory(Path(config.work_dir))
        work.tokenizer.mkdir(parents=True, exist_ok=True)
        with console.counting("reading documents", unit="documents") as count:
            documents = (count.each(document) for document in train_texts(config.corpus, config.seed))
            sample = list(sample_by_language(documents, config.tokenizer.train_bytes))
        with console.waiting(f"training {config.tokenizer.vocab_size:,} pieces"):
            train_tokenizer((document.text for document in sample), work.tokenizer_model, config.tokenizer)
        tokenizer = Tokenizer.load(work.tokenizer_model)
        report = tokenizer_report(tokenizer, sample_by_language(sample, REPORT_BYTES))
        report |= {"text": digest(text_fingerprint(config)), "config": asdict(config.tokenizer)}
        durable.write_json(work.tokenizer_report, report)

    def output(self, config: Config) -> Path:
        return WorkDirectory(Path(config.work_dir)).tokenizer


STAGE = TokenizerStage()
