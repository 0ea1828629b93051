"""The contract of an RLHF algorithm: its keys with their defaults, and pure functions over the completion tokens.

An algorithm sees no model, no batch and no layout, so tests give it plain tensors. The learner calls every algorithm
through this contract and knows none by name. A new algorithm is one file in `dist_lm/rlhf/algorithms` and one line in
`registry.py` there.

The launcher reads the keys of all algorithms and starts without torch. So neither this file nor a file of an algorithm
imports torch when it is imported.

Dimensions: B rollouts of an iteration, T tokens of the longest completion, N completion tokens of a micro-batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from dist_lm.rlhf.config import RlhfConfig
    from dist_lm.training.objective import LossSum

# --- keys ---


@dataclass(frozen=True)
class Bounds:
    """The values that a key accepts."""

    accepts: Callable[[Any], bool]
    accepted: str  # description for error messages


COUNT = Bounds(lambda value: value > 0, "a positive integer")
POSITIVE = Bounds(lambda value: 0 < value < math.inf, "a positive number")
NOT_NEGATIVE = Bounds(lambda value: 0 <= value < math.inf, "0 or a positive number")
FRACTION = Bounds(lambda value: 0 <= value <= 1, "in [0, 1]")


def one_of(*names: str) -> Bounds:
    """Returns the bounds of a key that names a choice."""
    return Bounds(lambda value: value in names, ", ".join(names))


KL_ESTIMATE = one_of("k1", "k2", "k3")  # the names of `policy_gradient.ESTIMATES`


def key(default: Any, bounds: Bounds) -> Any:
    """Returns a field of `AlgorithmKeys` with its default and its bounds."""
    return field(default=default, metadata={"bounds": bounds})


@dataclass
class AlgorithmKeys:
    """The keys of `rlhf` whose default depends on the algorithm, or which not every algorithm reads.

    An algorithm has a subclass with its defaults and the keys that it reads beside these. In the configuration
    (`RlhfConfig`) each of these keys is null until the algorithm's default replaces it; a key that the algorithm does
    not read is refused.
    """

    fewest_samples: ClassVar[int] = 1  # smallest value that `samples` may have

    samples: int = key(1, COUNT)  # rollouts per prompt: the group
    epochs: int = key(1, COUNT)  # passes over the rollouts of an iteration
    kl_coefficient: float = key(0.0, NOT_NEGATIVE)  # weight of the KL from the reference, per token

    def complete(self, config: RlhfConfig) -> None:
        """Fills in the defaults that depend on keys common to all algorithms.

        Raises:
            ConfigError: two keys contradict each other.
        """


@dataclass
class GroupKeys(AlgorithmKeys):
    """Keys of an algorithm that compares the rollouts of a prompt with each other."""

    fewest_samples: ClassVar[int] = 2

    samples: int = key(8, COUNT)


# --- inputs ---


@dataclass(frozen=True)
class Experience:
    """The rollouts of an iteration as seen before its first update, the same on every rank.

    Completions are left-aligned, and every tensor is 0 on padding but `importance_BT` and `kl_weight_BT`. All are fp32
    except `prompt_B`.
    """

    mask_BT: torch.Tensor  # 1 on the tokens of a completion
    score_B: torch.Tensor  # weighted sum of the reward parts, penalty included
    prompt_B: torch.Tensor  # int64; position of the prompt: rollouts of one prompt form a group
    logprob_BT: torch.Tensor  # nats, by the trainer's weights
    reference_logprob_BT: torch.Tensor | None  # None: there is no reference model
    value_BT: torch.Tensor | None  # the critic's value before each token; None: there is no critic
    importance_BT: torch.Tensor | None  # weight of each token, see `policy_gradient.truncated_importance`; None: 1
    # importance of each token that older weights drew, not truncated; 1 for other tokens; None: 1 for all
    kl_weight_BT: torch.Tensor | None = None

    @property
    def has_finite_models(self) -> bool:
        """Whether all log-probabilities and values of the models are finite."""
        columns = (self.logprob_BT, self.reference_logprob_BT, self.value_BT)
        return all(bool(column.isfinite().all()) for column in columns if column is not None)


@dataclass(frozen=True)
class Prepared:
    """Inputs of the losses of an iteration."""

    tokens: Mapping[str, torch.Tensor]  # what the losses need at each token: columns (B, T) by name, not token ids
    divisor_B: torch.Tensor  # fp32; each rollout's part of the divisor of a minibatch's policy loss (PPO: its tokens)
    kl_coefficient: float = 0.0  # weight of the KL in the policy loss; 0: the algorithm has it in its rewards
    metrics: Mapping[str, float] = field(default_factory=dict)  # names lack the prefix `rlhf/`


@dataclass(frozen=True)
class DrawnTokens:
    """Completion tokens of a micro-batch under the current policy. A micro-batch holds whole completions."""

    logprob_N: torch.Tensor  # nats, with gradient
    entropy_N: torch.Tensor  # nats, of the distribution at each token; with gradient if `uses_entropy`
    rollout_N: torch.Tensor  # int64; the rollout of each token
    columns: Mapping[str, torch.Tensor]  # the columns of `Prepared`, (N,)
    kl_coefficient: float = 0.0  # the coefficient of `Prepared`
    largest_kl_weight: float = math.inf  # for the KL of tokens that older weights drew


# --- the algorithm ---


class Algorithm(ABC):
    """Advantages and losses. All losses are sums over tokens.

    The learner divides the policy loss by the sum of `Prepared.divisor_B` over the minibatch's rollouts, and the value
    loss and all metrics but `policy_loss` by their completion tokens.
    """

    Keys: ClassVar[type[AlgorithmKeys]] = AlgorithmKeys
    has_critic: ClassVar[bool] = False  # whether it trains a value model with a loss of its own
    # unit of the probability ratio of its loss: token, completion (the product over its tokens) or mean (the geometric
    # mean). The importance weight uses the same unit (`policy_gradient.truncated_importance`)
    ratio_of: ClassVar[str] = "token"  # token | completion | mean

    def __init__(self, config: RlhfConfig) -> None:
        self.config = config
        self.keys: Any = config.algorithm_keys  # an instance of `Keys`

    @property
    def uses_entropy(self) -> bool:
        """Whether the gradient of the policy loss goes through the entropy."""
        return self.config.entropy_coefficient > 0

    @abstractmethod
    def prepare(self, experience: Experience, kl_coefficient: float) -> Prepared:
        """Computes the inputs of the losses, such as advantages and the returns that a critic learns, from scores and
        per-token quantities.

        Args:
            kl_coefficient: of this iteration (`state.KlController`).
        """

    @abstractmethod
    def policy_loss(self, tokens: DrawnTokens) -> LossSum:
        """Returns the loss of the policy. Its count is the number of tokens, by which the learner divides the metrics;
        it divides the loss by `Prepared.divisor_B`.

        Its metrics are sums over tokens: `policy_loss`, the total without bonuses, and `approx_kl`, nats between the
        policy at the start of the iteration and now, which the learner compares with rlhf.stop_kl.
        """

    def value_loss(self, value_N: torch.Tensor, columns: Mapping[str, torch.Tensor]) -> LossSum:
        """Returns the loss of the critic's values before the completion tokens.

        Args:
            value_N: with gradient.
            columns: the columns of `Prepared`, (N,) each.
        """
        raise NotImplementedError(f"{type(self).__name__} has no critic")
