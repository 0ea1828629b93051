"""Stage `reward`: a scalar head learns from rankings which completions are preferred; starts from the tools checkpoint.

At its end the model that it started from answers held-out prompts. The mean and the deviation of the scores of these
answers stay in result.json, so that scores of different runs can be compared (`rlhf.reward_model`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dist_lm.config.root import Config
from dist_lm.data.epochs import CorpusPass, ranking_sequences
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import require
from dist_lm.stages.corpus_forms import require_form
from dist_lm.stages.reward.config import RewardRunConfig
from dist_lm.stages.stage import VAL_LOSS, KeyFigure, run_of
from dist_lm.stages.training.stage import (
    DataArguments,
    EvaluationArguments,
    StageData,
    TrainingSequences,
    TrainingStage,
    before_and_after,
    print_before_and_after,
)
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.readable import percent, three_decimals

if TYPE_CHECKING:
    from dist_lm.data.batch import Batch
    from dist_lm.tracking.console import Console
    from dist_lm.training.objective import Objective

COLUMNS = {  # figure -> its column in the summary
    "accuracy": "pairs",
    "kendall_tau": "Kendall's tau",
    "top1": "best one",
    "calibration_error": "calibration error",
}


class Reward(TrainingStage):
    name = "reward"
    schema = RewardRunConfig
    needs = ("rankings",)
    starts_from = "tools"
    key_figures = ((KeyFigure("reward/accuracy", percent, "pairs right"),), (VAL_LOSS,))
    unit = "choices"
    packed = "rankings"
    has_sequences = True

    def check(self, config: Config) -> None:
        """Refuses a corpus without rankings, and answers of the initial model that would fill its context.

        Raises:
            ConfigError: names stage.corpus, or stage.reward.normaliser_new_tokens that is too large.
        """
        require_form(config)
        assert isinstance(config, RewardRunConfig)
        settings, longest = config.stage.reward, config.model.max_seq_len
        # Without an initial model, completions of val are scored and nothing is generated.
        if settings.normaliser_prompts and config.stage.init_from != "none":
            new_tokens = settings.normaliser_new_tokens
            accepted = f"less than model.max_seq_len={longest}"
            require(new_tokens < longest, "stage.reward.normaliser_new_tokens", new_tokens, accepted)

    def objective(self, config: Config) -> "Objective":
        # Here and below, imports that need torch wait: the launcher reads this file and does without.
        from dist_lm.rlhf.reward_model import choices_of_people

        return choices_of_people

    def sequences(self, config: Config, run: RunDirectory) -> TrainingSequences:
        from dist_lm.data.rankings.stream import RankingRows

        corpus = TokenCorpus.open(config.corpus_in(run.work, config.stage.corpus), "train")
        return RankingRows(corpus, config.seed, config.stage.seq_len)

    def passes(self, config: Config, exact: bool) -> tuple[CorpusPass, ...]:
        corpus = TokenCorpus.open(config.corpus_in(run_of(config).work, config.stage.corpus), "train")
        return (CorpusPass(config.stage.corpus, ranking_sequences(corpus, config.stage.seq_len)),)

    def open_data(self, arguments: DataArguments) -> StageData:
        from dist_lm.stages.reward import ranks as reward_ranks

        return reward_ranks.open_data(arguments)

    def after_training(self, arguments: EvaluationArguments) -> dict[str, float]:
        from dist_lm.stages.reward import ranks as reward_ranks

        return reward_ranks.score_samples(arguments)

    def result(self, config: Config, run: RunDirectory, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `normaliser`: mean and standard deviation of scores, for stage rlhf."""
        from dist_lm.rlhf.reward_model import KEY

        return {KEY: {"mean": metrics["reward/score_mean"], "std": metrics["reward/score_std"]}}

    def example_batch(self, config: Config) -> "Batch":
        from dist_lm.stages.reward import ranks as reward_ranks

        assert isinstance(config, RewardRunConfig)
        return reward_ranks.example_batch(config)

    def print_figures(self, config: Config, result: Mapping[str, Any], console: "Console") -> None:
        print_before_and_after(result, console)
        print_agreement(result, console)

    def own_entries(self, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if scale := result.get("normaliser"):
            scored = result["metrics"]["reward/scored"]
            yield "scores", f"mean {scale['mean']:.3f}, deviation {scale['std']:.3f} on {scored:,.0f} samples"


def print_agreement(result: Mapping[str, Any], console: "Console") -> None:
    """Prints a row for all rankings, each number of completions and each source, `before -> after`; nothing without
    figures."""
    before, after = result.get("before", {}), result["metrics"]
    # A row for all rankings, one for each source and one for each number of completions.
    suffixes = [name.removeprefix("reward/accuracy") for name in after if name.startswith("reward/accuracy")]
    rows = []
    for suffix in suffixes:
        figures = (before_and_after(f"reward/{name}{suffix}", before, after, three_decimals) for name in COLUMNS)
        rows.append((label(suffix), *figures))
    if rows:
        console.table("agreement with held-out rankings", ("rankings", *COLUMNS.values()), rows)


def label(suffix: str) -> str:
    """Returns the label of a row: `all`, `of 4` for `_k4`, or the source."""
    if size := re.fullmatch(r"_k(\d+)", suffix):
        return f"of {size[1]}"
    return suffix.removeprefix("_") or "all"


STAGE = Reward()
