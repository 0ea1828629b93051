"""Stage `rankings`: builds corpora of rankings, work/corpora/NAME, from files, a hub, or samples of a model.

It runs after stage tools, because it may rank samples of that model (reader=synthetic_rankings). The launcher's process
generates these samples, so the model must fit one device.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dist_lm.chat.documents import encode_ranking
from dist_lm.config.root import Config
from dist_lm.data.ingest import TextSplits
from dist_lm.data.sources.reader import corpus_sources
from dist_lm.stages.continuing import with_start
from dist_lm.stages.rankings.config import RankingsConfig
from dist_lm.stages.shards import (
    SAMPLED,
    build_corpus,
    correct_corpora,
    inspect_corpora,
    missing_corpora,
    own,
    wanted_corpora,
)
from dist_lm.stages.stage import Artefact, ArtefactStage, Look
from dist_lm.storage.run_directory import WorkDirectory

if TYPE_CHECKING:
    from dist_lm.tracking.console import Console


class Rankings(ArtefactStage):
    name = "rankings"
    schema = RankingsConfig
    needs = ("shards",)
    starts_from = "tools"

    def for_readers(self, config: Config, readers: Sequence[Config]) -> Config:
        """Build only the corpora that later stages read, with samples of the model that they start from."""
        corpora = sorted({reader.stage.corpus for reader in readers if reader.stage.corpus})
        return replace(config, stage=replace(own(config), corpora=corpora, init_from=readers[0].stage.init_from))

    def look(self, config: Config, *, is_target: bool, rebuilt: Collection[str]) -> Look:
        # The samples depend on the model, so `auto` becomes a path before anything is compared.
        return super().look(with_start(self, config), is_target=is_target, rebuilt=rebuilt)

    def inspect(self, config: Config) -> Artefact:
        names = wanted_corpora(config, rankings=True)
        return inspect_corpora(config, names, lambda counts: f"{counts.documents:,} rankings to train on")

    def build(self, config: Config, console: "Console") -> None:
        """Builds every missing or damaged corpus of rankings and corrects the licences of the others; may sample a
        model.

        Raises:
            ConfigError: no corpus is configured, or a source is invalid.
            ArtefactError: there is no model or program to sample from, or a folder holds files of others.
            UserError: a source cannot be read.
        """
        assert isinstance(config, RankingsConfig)
        names = wanted_corpora(config, rankings=True)
        missing = missing_corpora(config, names)
        correct_corpora(config, [name for name in names if name not in missing])

        for name in missing:
            samples = {}
            for source in corpus_sources(config.corpus, name):
                if source.reader == SAMPLED:
                    from dist_lm.stages.rankings.samples import ranked_samples  # imports torch

                    # A list, so that the model is freed before the corpus is built.
                    samples[repr(source)] = list(ranked_samples(source, config, console))
            build_corpus(config, name, TextSplits(config.corpus, config.seed, samples), console, encode_ranking)

    def output(self, config: Config) -> Path:
        return WorkDirectory(Path(config.work_dir)).corpus("rankings")


STAGE = Rankings()
