"""The conf group `stage.preference`: the loss of stage preference, and the part of a ranking that it learns from."""

from dataclasses import dataclass

from dist_lm.errors import require

DPO, IPO, KTO, ORPO, SIMPO = "dpo", "ipo", "kto", "orpo", "simpo"
BETAS = {DPO: 0.1, IPO: 0.1, KTO: 0.1, ORPO: 0.1, SIMPO: 2.0}  # algorithm -> default of beta
RANKINGS, PAIRS, ONE_PAIR = "rankings", "pairs", "one_pair"
OWN_KEYS = {"gamma": SIMPO, "desirable_weight": KTO, "undesirable_weight": KTO}  # key -> the algorithm that reads it


@dataclass
class PreferenceConfig:
    """The loss of stage preference. A key that the algorithm does not read must be null."""

    algorithm: str = DPO  # dpo | ipo | kto | orpo | simpo
    # rankings: every one whole, only dpo | pairs: of K completions K - 1 pairs, drawn once | one_pair: one of these;
    # null: rankings for dpo, pairs for the others
    learn_from: str | None = None
    # dpo, ipo, kto: strength of the bond to the reference | orpo: weight of the odds ratio | simpo: scale of the mean
    # log-probability; null: 0.1, simpo 2
    beta: float | None = None
    gamma: float | None = None  # simpo: least lead of the better completion; null: 1
    desirable_weight: float | None = None  # kto: weight of better completions; null: 1
    undesirable_weight: float | None = None  # kto: weight of worse completions; null: 1
    label_noise: float = 0.0  # share of neighbouring ranks, and of judgements, that are swapped in train

    def __post_init__(self) -> None:
        require(self.algorithm in BETAS, "stage.preference.algorithm", self.algorithm, f"one of {', '.join(BETAS)}")

        # Only DPO has a loss of a whole ranking (Plackett-Luce); the others compare pairs.
        lessons = (RANKINGS, PAIRS, ONE_PAIR) if self.algorithm == DPO else (PAIRS, ONE_PAIR)
        accepted = f"null, {' or '.join(lessons)} with stage.preference.algorithm={self.algorithm}"
        require(self.learn_from in (None, *lessons), "stage.preference.learn_from", self.learn_from, accepted)

        require(self.beta is None or self.beta > 0, "stage.preference.beta", self.beta, "null or a positive number")
        for key, algorithm in OWN_KEYS.items():
            number = getattr(self, key)
            is_read = self.algorithm == algorithm
            accepted = "null or a number >= 0"
            if not is_read:
                accepted = f"null unless stage.preference.algorithm={algorithm}"
            require(number is None or (is_read and number >= 0), f"stage.preference.{key}", number, accepted)
        require(0 <= self.label_noise < 0.5, "stage.preference.label_noise", self.label_noise, "in [0, 0.5)")

    @property
    def lesson(self) -> str:
        """`learn_from` without null."""
        return self.learn_from or (RANKINGS if self.algorithm == DPO else PAIRS)

    @property
    def strength(self) -> float:
        """`beta` without null."""
        return self.beta or BETAS[self.algorithm]

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the policy with the model that it starts from."""
        return self.algorithm in (DPO, IPO, KTO)

    @property
    def has_reference_point(self) -> bool:
        """Whether the loss needs the KL divergence of mismatched prompts and completions."""
        return self.algorithm == KTO

    @property
    def learns_text(self) -> bool:
        """Whether the loss includes the likelihood of prompts and better completions."""
        return self.algorithm == ORPO
