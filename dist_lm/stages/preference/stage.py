"""Stage `preference`: the policy learns from rankings directly (DPO, IPO, KTO, ORPO, SimPO), from the tools checkpoint.

No reward model, no rollouts. The model that training starts from is the reference; its log-probabilities of all
rankings are computed before the first step (`rlhf.reference`).
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dist_lm.config.root import Config
from dist_lm.data.epochs import CorpusPass, ranking_sequences
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import require
from dist_lm.stages.corpus_forms import require_form
from dist_lm.stages.preference.config import PreferenceRunConfig, settings_of
from dist_lm.stages.stage import VAL_LOSS, KeyFigure, run_of
from dist_lm.stages.training.stage import DataArguments, StageData, TrainingSequences, TrainingStage, before_and_after
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.readable import percent, three_decimals

if TYPE_CHECKING:
    from dist_lm.data.batch import Batch
    from dist_lm.tracking.console import Console
    from dist_lm.training.objective import Objective, Prepare

ROWS = {  # metric -> its row in the summary
    "val/loss": "loss, nats per choice",
    "preference/accuracy": "pairs in the right order",
    "preference/kendall_tau": "Kendall's tau",
    "preference/margin": "lead of the chosen completion",
    "preference/chosen_reward": "implicit reward, chosen",
    "preference/rejected_reward": "implicit reward, rejected",
    "preference/chosen_logprob": "log-probability, chosen",
    "preference/rejected_logprob": "log-probability, rejected",
    "preference/kl": "KL from the reference, mismatched pairs",
}


class Preference(TrainingStage):
    name = "preference"
    schema = PreferenceRunConfig
    needs = ("rankings",)
    starts_from = "tools"
    key_figures = ((KeyFigure("preference/accuracy", percent, "pairs right"),), (VAL_LOSS,))
    writes_text = True
    answers_requests = True
    unit = "choices"
    packed = "rankings"
    has_sequences = True

    def check(self, config: Config) -> None:
        require_form(config)
        require(config.model.head == "tokens", "model.head", config.model.head, "tokens: the policy writes text")

    def objective(self, config: Config) -> "Objective":
        # Here and below, imports that need torch wait: the launcher reads this file and does without.
        from dist_lm.rlhf.preference import PreferenceLoss
        from dist_lm.rlhf.preference_objective import preference_objective

        return preference_objective(PreferenceLoss(settings_of(config)))

    def prepare(self, config: Config) -> "Prepare | None":
        from dist_lm.rlhf.preference import PreferenceLoss
        from dist_lm.rlhf.preference_objective import preparation

        return preparation(PreferenceLoss(settings_of(config)))

    def sequences(self, config: Config, run: RunDirectory) -> TrainingSequences:
        from dist_lm.data.rankings.stream import RankingRows

        corpus = TokenCorpus.open(config.corpus_in(run.work, config.stage.corpus), "train")
        return RankingRows(corpus, config.seed, config.stage.seq_len)

    def passes(self, config: Config, exact: bool) -> tuple[CorpusPass, ...]:
        corpus = TokenCorpus.open(config.corpus_in(run_of(config).work, config.stage.corpus), "train")
        return (CorpusPass(config.stage.corpus, ranking_sequences(corpus, config.stage.seq_len)),)

    def open_data(self, arguments: DataArguments) -> StageData:
        from dist_lm.stages.preference import ranks as preference_ranks

        return preference_ranks.open_data(arguments)

    def example_batch(self, config: Config) -> "Batch":
        from dist_lm.stages.preference import ranks as preference_ranks

        assert isinstance(config, PreferenceRunConfig)
        return preference_ranks.example_batch(config)

    def print_figures(self, config: Config, result: Mapping[str, Any], console: "Console") -> None:
        before, after = result.get("before", {}), result["metrics"]
        rows = [(label, before_and_after(name, before, after, three_decimals)) for name, label in ROWS.items()]
        # Not every algorithm measures every figure.
        console.table("held-out rankings", ("figure", "before -> after"), [row for row in rows if row[1]])

    def own_entries(self, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if algorithm := result.get("algorithm"):
            yield "loss", algorithm

    def result(self, config: Config, run: RunDirectory, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `algorithm`: the name of the loss and its main settings."""
        settings = settings_of(config)
        return {"algorithm": f"{settings.algorithm} from {settings.lesson}, beta {settings.strength:g}"}


STAGE = Preference()
