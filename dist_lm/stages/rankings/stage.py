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
from dist_lm.data.manifest import Counts
from dist_lm.data.sources.reader import corpus_sources
from dist_lm.stages.continuing import with_start
from dist_lm.stages.rankings.config import RankingsConfig
from dist_lm.stages.shards.builds import build_corpus
from dist_lm.stages.shards.identity import SAMPLED, begun_folders, listing_once, with_folders
from dist_lm.stages.shards.other_corpora import alone
from dist_lm.stages.shards.stage import correct_corpora, inspect_corpora, missing_corpora, own, wanted_corpora
from dist_lm.stages.stage import Action, Artefact, ArtefactStage, Look
from dist_lm.storage.run_directory import WorkDirectory

if TYPE_CHECKING:
    from dist_lm.tracking.console import Console


class Rankings(ArtefactStage):
    name = "rankings"
    schema = RankingsConfig
    needs = ("shards",)
    starts_from = "tools"

    def for_readers(self, config: Config, readers: Sequence[Config]) -> Config:
        """Returns `config` with only the corpora that later stages read, and with the model that these start from as
        the one that samples.

        Raises:
            ArtefactError: as `begun_folders`.
            OSError: a file cannot be read.
        """
        corpora = sorted({reader.stage.corpus for reader in readers if reader.stage.corpus})
        config = begun_folders(config, readers)
        return replace(config, stage=replace(own(config), corpora=corpora, init_from=readers[0].stage.init_from))

    def look(self, config: Config, *, is_target: bool, rebuilt: Collection[str]) -> Look:
        # The samples depend on the model, so `auto` becomes a path before anything is compared.
        config, list_inputs = with_start(self, config), listing_once()
        names = wanted_corpora(config, rankings=True)
        config = with_folders(config, names, list_inputs)
        artefact = inspect_corpora(config, names, _train_rankings, list_inputs)
        return Look(config, Action.READY if artefact.ready else Action.BUILD, artefact.detail)

    def inspect(self, config: Config) -> Artefact:
        return inspect_corpora(config, wanted_corpora(config, rankings=True), _train_rankings)

    def build(self, config: Config, console: "Console") -> None:
        """Builds every missing or damaged corpus of rankings and corrects the licences of the others; may sample a
        model.

        Raises:
            ConfigError: no corpus is configured, or a source is invalid.
            ArtefactError: there is no model or program to sample from, or a folder holds files of others.
            UserError: a source cannot be read.
            OSError: a file cannot be read.
        """
        assert isinstance(config, RankingsConfig)
        names = wanted_corpora(config, rankings=True)
        config = with_folders(config, [name for name in names if name not in config.corpus.folders])
        assert isinstance(config, RankingsConfig)
        missing = missing_corpora(config, names)
        correct_corpora(config, [name for name in names if name not in missing])

        for name in missing:
            samples = {}
            for source in corpus_sources(config.corpus, name):
                if source.reader == SAMPLED:
                    from dist_lm.stages.rankings.samples import ranked_samples  # imports torch

                    # A list, so that the model is freed before the corpus is built.
                    samples[repr(source)] = list(ranked_samples(source, config, console))
            build_corpus(config, name, alone(config, name, samples), console, encode_ranking)

    def output(self, config: Config) -> Path:
        return config.corpus_in(WorkDirectory(Path(config.work_dir)), "rankings")


def _train_rankings(counts: Counts) -> str:
    return f"{counts.documents:,} rankings to train on"


STAGE = Rankings()
