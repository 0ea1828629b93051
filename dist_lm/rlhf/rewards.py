"""The reward of a completion: rules over its text, a reward model's score, and their weighted sum.

Rules run on the first rank, which holds the rollouts; `share_judged` then gives every rank the rollouts and their rule
scores. No rule executes what a model wrote: code is only parsed.

Dimensions: B rollouts, R rules.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_lm.config.rlhf import RewardPartConfig
from dist_lm.config.root import imported_function
from dist_lm.errors import ConfigError, UserError
from dist_lm.rlhf.rollouts import Rollouts
from dist_lm.sandbox.syntax import parses, parses_continued, whole_lines

Decode = Callable[[Sequence[int]], str]
"""Tokens to text; special tokens give no text."""
REWARD_MODEL = "reward_model"  # the kind of part that is no rule
_FIRST = 0  # the rank that holds the rollouts


class RewardError(UserError):
    """A reward function failed or returned no finite number."""


@dataclass(frozen=True)
class Judged:
    """A rollout as rules see it."""

    prompt: str
    completion: str
    new_tokens: int
    whole: bool  # it ended by a stop token and was not cut off


Rule = Callable[[Judged], float]


def length_rule(target: int) -> Rule:
    """1 at `target` tokens, falling linearly to 0 at no tokens and at twice as many."""
    return lambda judged: max(0.0, 1 - abs(judged.new_tokens - target) / target)


def parses_rule(language: str, of: str) -> Rule:
    """1 if the text parses, else 0. The last line of a completion that was cut off does not count.

    Args:
        of: document (prompt and completion as one text) | completion.
    """

    def rule(judged: Judged) -> float:
        if of == "document":
            return float(bool(parses_continued(language, judged.prompt, judged.completion, judged.whole)))
        return float(bool(parses(language, whole_lines(judged.completion, judged.whole))))

    return rule


def function_rule(path: str, key: str) -> Rule:
    """A user's function of prompt text and completion text.

    Args:
        path: 'package.module:name'.
        key: the config key, for messages.

    Raises:
        ConfigError: there is no such function.
    """
    function = imported_function(path, key)

    def rule(judged: Judged) -> float:
        try:
            value = function(judged.prompt, judged.completion)
        except Exception as error:  # any error of the function would come again with the same completion
            raise RewardError(
                f"{key}={path} failed ({type(error).__name__}: {error}) on prompt {judged.prompt!r}, "
                f"completion {judged.completion!r}"
            ) from error
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise RewardError(f"{key}={path} returned {value!r} for a completion; expected a finite number")
        return float(value)

    return rule


def rules_of(parts: Mapping[str, RewardPartConfig]) -> dict[str, Rule]:
    """The reward parts that are rules, by name.

    Raises:
        ConfigError: a function cannot be imported, or this machine has no parser for a language.
    """
    return {name: _rule(name, part) for name, part in parts.items() if part.kind != REWARD_MODEL}


def _rule(name: str, part: RewardPartConfig) -> Rule:
    if part.kind == "length":
        return length_rule(part.target)
    if part.kind == "parses":
        if parses(part.language, "") is None:
            raise ConfigError(f"rlhf.rewards.{name}.language={part.language}: no parser for it on this machine")
        return parses_rule(part.language, part.of)
    return function_rule(part.function, f"rlhf.rewards.{name}.function")


def judge(rollouts: Rollouts, rules: Mapping[str, Rule], decode: Decode) -> dict[str, list[float]]:
    """The score of every rollout under every rule."""
    if not rules:
        return {}
    judged = [
        Judged(decode(one.prompt.tolist()), decode(one.completion.tolist()), len(one.completion), one.whole)
        for one in rollouts
    ]
    return {name: [rule(one) for one in judged] for name, rule in rules.items()}


def total_score(
    score_of_part: Mapping[str, torch.Tensor],
    parts: Mapping[str, RewardPartConfig],
    whole_B: torch.Tensor,
    missing_eos_penalty: float,
) -> torch.Tensor:
    """The weighted sum of the parts, (B,) fp32, minus the penalty for completions that were cut off."""
    total_B = -missing_eos_penalty * (~whole_B).float()
    for name, part in parts.items():
        total_B = total_B + part.weight * score_of_part[name].float()
    return total_B


def share_judged(
    rollouts: Rollouts | None, rules: Mapping[str, Rule], decode: Decode | None
) -> tuple[Rollouts, dict[str, torch.Tensor]]:
    """The first rank's rollouts on every rank, and their fp32 scores (B,) under each rule (collective).

    Args:
        rollouts, decode: None on all other ranks.
    """
    judged: list = [None]
    if rollouts is not None and decode is not None:
        judged = [(rollouts, judge(rollouts, rules, decode))]
    dist.broadcast_object_list(judged, _FIRST)
    shared, scores = judged[0]
    return shared, {name: torch.tensor(scores[name], dtype=torch.float64).float() for name in rules}
