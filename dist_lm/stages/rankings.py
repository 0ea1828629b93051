"""Stage `rankings`: reads the sources of rankings, and for some a trained model; leaves work/corpora/NAME.

It comes behind the stage that reward models start from, because the samples of that stage's model may be what is ranked
(reader=synthetic_rankings). Those are drawn here, in this process: for models that fit one device.
"""

from pathlib import Path

from dist_lm.chat.documents import encode_ranking
from dist_lm.config.root import Config
from dist_lm.data.corpus import LocalText, corpora_of_form, corpus_sources
from dist_lm.data.manifest import read_manifest
from dist_lm.stages.artefact import SAMPLED, Artefact
from dist_lm.stages.shards import build_corpus, check_corpus, is_whole
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tracking.console import Console


def inspect(config: Config) -> Artefact:
    """What is in work/corpora.

    Raises:
        ArtefactError: a corpus was made from other sources, or with another tokenizer than work/tokenizer.
    """
    work = WorkDirectory(Path(config.work_dir))
    names, missing = wanted_corpora(config), missing_corpora(config)
    for name in names:
        if name not in missing:
            check_corpus(config, name)
    if missing:
        return Artefact(False, f"corpora {', '.join(missing)}")
    counts = [read_manifest(work.corpus(name)).splits["train"].counts.documents for name in names]
    return Artefact(True, f"corpora {', '.join(names) or '(none)'}: {sum(counts):,} rankings to train on")


def wanted_corpora(config: Config) -> list[str]:
    """The corpora of rankings among `stage.corpora`, else all that are configured."""
    chosen = config.stage.corpora
    return [name for name in corpora_of_form(config.corpus, "ranking") if chosen is None or name in chosen]


def missing_corpora(config: Config) -> list[str]:
    """The wanted corpora that are not there, or damaged."""
    work = WorkDirectory(Path(config.work_dir))
    return [name for name in wanted_corpora(config) if not is_whole(work.corpus(name))]


def build(config: Config, console: Console) -> None:
    """Make every wanted corpus that is not there or damaged."""
    for name in missing_corpora(config):
        made = {}
        for source in corpus_sources(config.corpus, name):
            if source.reader == SAMPLED:
                from dist_lm.stages.ranking_samples import ranked_samples  # brings torch with it

                made[repr(source)] = list(ranked_samples(source, config, console))
        build_corpus(config, name, LocalText(made, set()), console, encode_ranking)
