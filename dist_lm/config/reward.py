"""Configuration of the stages rankings and reward beside the keys of every stage."""

from dataclasses import dataclass

from dist_lm.errors import require


@dataclass
class RewardConfig:
    """How stage reward learns from rankings, and the samples that measure its scale of scores."""

    # rankings: whole | pairs: K - 1 pairs of K completions, drawn once | one_pair: one of these
    learn_from: str = "rankings"
    label_noise: float = 0.0  # share of neighbouring ranks, and of judgements, swapped in train
    normaliser_prompts: int = 256  # prompts of val that the reference policy answers; 0: score the completions of val
    normaliser_new_tokens: int = 128  # length limit of an answer

    def __post_init__(self) -> None:
        require(
            self.learn_from in ("rankings", "pairs", "one_pair"),
            "stage.reward.learn_from",
            self.learn_from,
            "rankings, pairs or one_pair",
        )
        require(0 <= self.label_noise < 0.5, "stage.reward.label_noise", self.label_noise, "in [0, 0.5)")
        for key in ("normaliser_prompts", "normaliser_new_tokens"):
            value = getattr(self, key)
            lowest = 0 if key == "normaliser_prompts" else 1
            require(value >= lowest, f"stage.reward.{key}", value, f"at least {lowest}")


@dataclass
class RankingSamplesConfig:
    """Samples that stage rankings draws from a model and ranks by rules (reader=synthetic_rankings)."""

    fewest: int = 4  # samples per prompt, uniform from fewest to most
    most: int = 8
    max_new_tokens: int = 48
    temperature: float = 0.9

    def __post_init__(self) -> None:
        accepted = "from 2 to stage.samples.most, which is at most 16"
        require(2 <= self.fewest <= self.most <= 16, "stage.samples.fewest", self.fewest, accepted)
        key = "stage.samples.max_new_tokens"
        require(self.max_new_tokens > 0, key, self.max_new_tokens, "a positive integer")
        require(self.temperature > 0, "stage.samples.temperature", self.temperature, "a number above 0")
