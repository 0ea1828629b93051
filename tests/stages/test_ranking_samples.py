"""Stage rankings: samples of a model ranked by rules, the same for the same seed, in the split of their prompt."""

import shutil
from dataclasses import replace

import pytest

from dist_lm.chat.documents import read_ranking
from dist_lm.config.corpus import SPLITS, SourceConfig
from dist_lm.config.root import Config
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.document import Document
from dist_lm.errors import ArtefactError
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.rankings import stage as rankings
from dist_lm.stages.rankings.samples import Beginning, Sample, ranked_samples, ranking_of_samples
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tracking.console import Console
from tests.conftest import TINY_MODEL
from tests.training_run import write_untrained

SOURCE = SourceConfig("synthetic_rankings", "synthetic", licence="none", limit=24)
PYTHON = Beginning("python", "def total(values):\n", "code:1")


def config_for(work: WorkDirectory, *overrides: str) -> Config:
    start = work.run("tools", "default").path
    settings = ["stage.samples.max_new_tokens=8", "device=cpu", "tokenizer.workers=1", f"stage.init_from={start}"]
    config = compose_config(["stage=rankings", *TINY_MODEL, f"work_dir={work.path}", *settings, *overrides])
    corpora = config.corpus.corpora | {"rankings": [SOURCE]}
    return replace(config, corpus=replace(config.corpus, corpora=corpora, val_fraction=0.3))


def made(config: Config) -> list[Document]:
    return [one for one in ranked_samples(SOURCE, config, Console()) if isinstance(one, Document)]


@pytest.mark.heavy
def test_samples_are_ranked_the_same_for_the_same_seed_and_land_in_shards(work) -> None:
    run = write_untrained(work, "tools", 1)
    config = config_for(work)
    first = made(config)
    assert len(first) > 10
    assert {one.language for one in first} == {"synthetic_python", "synthetic_bash", "synthetic_sql"}
    assert first == made(config)
    assert first != made(replace(config, seed=1))
    for one in first:
        assert len(set(read_ranking(one.text).ranks)) > 1

    assert not rankings.STAGE.inspect(config).ready
    rankings.STAGE.build(config, Console())
    assert rankings.STAGE.inspect(config).ready
    opened = [RankingCorpus.open(work.corpus("rankings"), split) for split in SPLITS]
    assert sum(one.corpus.n_documents for one in opened) == len({one.text for one in first})
    other_prompts = rankings.STAGE.inspect(replace(config, stage=replace(config.stage, corpus="language")))
    assert not other_prompts.ready
    assert "beside another rankings (prompts=" in other_prompts.detail

    # Samples of another model are other rankings.
    kept = shutil.copytree(run.checkpoints, run.path / "kept")
    write_untrained(work, "tools", 2)
    other_model = rankings.STAGE.inspect(config)
    assert not other_model.ready
    assert "beside another rankings (model=" in other_model.detail
    shutil.rmtree(run.checkpoints)
    kept.rename(run.checkpoints)
    assert rankings.STAGE.inspect(config).ready


def test_without_a_model_there_is_nothing_to_rank(work) -> None:
    with pytest.raises(ArtefactError, match=r"stage\.init_from=none"):
        made(config_for(work, "stage.init_from=none"))


def test_equal_and_empty_samples_are_no_completions() -> None:
    good, bad = Sample("    return sum(values)\n", True), Sample("    return (((\n", True)
    ranking = ranking_of_samples(PYTHON, [bad, good, bad, Sample(" \n", True)])
    assert ranking is not None
    assert ranking.completions == (bad.text, good.text)
    assert ranking.ranks == (1, 0)
    assert ranking_of_samples(PYTHON, [good, good]) is None
