"""The reward of a completion: the scores of rules, and the weighted sum of all parts.

`experience.py` runs the reward model, scales its scores, and calls `total_score`, which adds them to those of rules.
The reward of `conf/stage/rlhf.yaml` is a reward model alone; then the judge has no rules and gives no scores.

    rules.py              the kinds of rules; reward_forms.py and reward_function.py: how a user's function is called
    reward_model.py       the training and the scale of a reward model
    experience.py         its scores of rollouts, and the sum

Rules run where the controller does, on the first rank or in its child. A rollout on which a rule fails has no score: it
leaves the iteration before any model sees it, so it takes no part in groups, losses, statistics or counts. `usable_of`
returns the remaining rollouts with their scores.

Dimensions: D rollouts drawn, B of these that have a score.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, cast

import numpy as np
import torch

from dist_lm.environments.protocol import LARGEST_REWARD
from dist_lm.errors import ConfigError
from dist_lm.generation.request import Answer, Request
from dist_lm.parallel.messages import broadcast
from dist_lm.rlhf.config import ENVIRONMENT, RewardPartConfig
from dist_lm.rlhf.rollouts import ENDED, Rollouts, ScoredRollouts
from dist_lm.rlhf.rules import (
    Alive,
    Failure,
    FunctionRule,
    PromptRow,
    RewardError,
    Rule,
    RuleInput,
    Score,
    TestsRule,
    length_rule,
    parses_rule,
)
from dist_lm.sandbox.forged import is_forged, is_lookup
from dist_lm.sandbox.pool import Sandboxes, SandboxPool
from dist_lm.sandbox.syntax import parses
from dist_lm.sandbox.task import Task

log = logging.getLogger(__name__)

Decode = Callable[[Sequence[int]], str]
"""Turns token ids into text; special tokens give no text."""
RowOf = Callable[[int], PromptRow]
"""position of a prompt in its order -> what the data say about it."""
REWARD_MODEL = "reward_model"  # the kind of part that is no rule


@dataclass(frozen=True)
class Tasks:
    """The tests of prompts, for parts of kind `tests`; neither benchmarks nor the tasks of an environment."""

    by_prompt: Mapping[str, Task] = field(default_factory=dict)  # keys: texts of prompts, as in `Decode`
    trust_me: bool = False  # see `SandboxPool`
    sandboxes: Callable[[int, bool], Sandboxes] = SandboxPool  # see `TestsRule`
    seed: int = 0  # the run's; with position and text of a prompt it determines the inputs of its hidden tests


def rules_of(parts: Mapping[str, RewardPartConfig], tasks: Tasks) -> dict[str, Rule]:
    """Returns the reward parts that are rules, by name; some have started processes. The caller closes them.

    Raises:
        ConfigError: this machine has no parser for a language, or no sandbox for tests (SandboxError).
    """
    no_rules = (REWARD_MODEL, ENVIRONMENT)
    return {name: _rule(name, part, tasks) for name, part in parts.items() if part.kind not in no_rules}


def _rule(name: str, part: RewardPartConfig, tasks: Tasks) -> Rule:
    """Returns the rule of a part that is no reward model; a user's function is being imported in a process of its own.

    Raises:
        ConfigError: this machine has no parser for the language.
        SandboxError: this machine has no sandbox for tests.
    """
    if part.kind == "tests":
        return TestsRule(f"rlhf.rewards.{name}", part, tasks.by_prompt, tasks.trust_me, tasks.sandboxes, tasks.seed)
    if part.kind == "length":
        return length_rule(part.target)
    if part.kind == "parses":
        # The parser of a language may be a program that this machine lacks.
        if parses(part.language, "") is None:
            raise ConfigError(f"rlhf.rewards.{name}.language={part.language}: no parser for it on this machine")
        return parses_rule(part.language, part.of)
    return FunctionRule(part.function, f"rlhf.rewards.{name}.function", part.timeout_s)


def title_of(name: str, part: RewardPartConfig) -> str:
    """Returns how messages name a part: by its key, a user's function also by its path."""
    if part.function:
        return f"rlhf.rewards.{name}.function={part.function}"
    return f"rlhf.rewards.{name}"


class Judge:
    """Scores rollouts under rules, where the controller runs. A context manager; leaving it closes the rules."""

    def __init__(
        self,
        parts: Mapping[str, RewardPartConfig],
        decode: Decode,
        max_failed_fraction: float,
        alive: Alive = lambda: None,
        tasks: Tasks = Tasks(),
        request_of: Decode | None = None,
        row_of: RowOf = lambda position: PromptRow(),
    ) -> None:
        """
        Args:
            max_failed_fraction: largest share of the rollouts of an iteration that may stay without a score.
            alive: called while rules work, from any thread.
            tasks: for parts of kind `tests`.
            request_of: reads the text of the user's last turn in a prompt; None: the prompt has no turns.
            row_of: for parts of kind `function`.

        Raises:
            ConfigError: this machine has no parser for a language, or no sandbox for tests.
        """
        self._parts, self._decode, self._request_of, self._row_of = parts, decode, request_of, row_of
        self._max_failed_fraction = max_failed_fraction
        self._alive = alive
        self._tasks = tasks
        self._rules = rules_of(parts, tasks)
        # programs run beside generation, so that their time is hidden
        self._beside_generation = [rule for rule in self._rules.values() if isinstance(rule, TestsRule)]

    def for_prompts(self, row_of: RowOf) -> "Judge":
        """Returns the same judge for another order of prompts. Both share their processes: close one of them."""
        judge = copy.copy(self)
        judge._row_of = row_of
        return judge

    def begin(self, request: Request, answer: Answer) -> None:
        """Starts the tests of an answer while other answers are still generated; `__call__` reads the scores later.

        Raises:
            RewardError: the prompt has no tests.
            SandboxError: this machine has no sandbox.
        """
        for rule in self._beside_generation:
            is_ended = answer.finish in ENDED
            rule.begin(self._judged(list(request.prompt), list(answer.tokens), is_ended, int(request.id), answer.index))

    def __call__(self, rollouts: Rollouts, expected: int = 0) -> ScoredRollouts:
        """Returns the rollouts with their score under every rule, float64 in the order of `rollouts`: NaN where the
        rule failed, 0 and a mark in `skipped` where it does not apply. Without rules there are no scores.

        Each failure is logged as a warning.

        Args:
            expected: rollouts of the iteration, if these are only some of them; `max_failed_fraction` is a share of
                these.

        Raises:
            RewardError: rules failed on more of them than `max_failed_fraction` allows.
        """
        if not self._rules:
            return ScoredRollouts(rollouts, {})

        # Completions of a prompt share its row.
        rows = {position: self._row_of(position) for position in dict.fromkeys(rollouts.position_B.tolist())}
        judged = [
            self._judged(
                rollout.prompt.tolist(),
                rollout.completion.tolist(),
                rollout.ended,
                rollout.position,
                rollout.sample,
                rows[rollout.position],
            )
            for rollout in rollouts
        ]
        expected = max(expected, len(judged))
        failed: set[int] = set()  # numbers of the rollouts on which some rule failed
        score_of_rule, skipped = {}, {}
        for name, rule in self._rules.items():
            score_of_rule[name], skipped[name] = np.full(len(judged), np.nan), np.zeros(len(judged), bool)
            for b, score in enumerate(rule(judged, self._alive)):
                if score is None:
                    score_of_rule[name][b], skipped[name][b] = 0.0, True
                    continue
                if not isinstance(score, Failure):
                    score = self._weighable(name, score)
                if not isinstance(score, Failure):
                    score_of_rule[name][b] = score
                    continue

                failed.add(b)
                failure = f"{self._title(name)} has no score"
                cause = f"prompt {judged[b].position}, sample {judged[b].sample}: {score.reason}"
                log.warning("%s for %s; the completion is left out", failure, cause)
                if len(failed) > self._max_failed_fraction * expected:
                    raise RewardError(
                        f"{failure} for {cause}. With it, {len(failed)} of {expected} completions of an iteration have "
                        f"no score, above rlhf.max_failed_fraction={self._max_failed_fraction:g}: mend it, or raise "
                        "that"
                    )
        # Most functions apply to all completions; then nothing more is kept with the scores.
        skipped = {name: skipped_B for name, skipped_B in skipped.items() if skipped_B.any()}
        return ScoredRollouts(rollouts, score_of_rule, marks=self._marks(judged), skipped=skipped)

    def _marks(self, judged: Sequence[RuleInput]) -> dict[str, np.ndarray]:
        """Returns which answers to tasks look forged (`forged`), and which look like a table of the tests (`lookups`).

        Bool, in the order of `judged`; empty without a part of kind `tests`. Marks are counted and change no score.
        """
        if not self._beside_generation:
            return {}
        programs = [(self._tasks.by_prompt[rollout.prompt], rollout.completion) for rollout in judged]
        sources = [(task, task.program(completion).source) for task, completion in programs]
        return {
            "forged": np.array([is_forged(task.language, source) for task, source in sources], bool),
            "lookups": np.array([is_lookup(task.language, source, task.tests) for task, source in sources], bool),
        }

    def _judged(
        self,
        prompt: Sequence[int],
        completion: Sequence[int],
        ended: bool,
        position: int,
        sample: int,
        row: PromptRow | None = None,
    ) -> RuleInput:
        """Returns what rules may use of a completion. `row`: of its prompt; None: nothing is known, or no rule asks."""
        text = self._decode(prompt)
        return RuleInput(
            prompt=text,
            completion=self._decode(completion),
            new_tokens=len(completion),
            ended=ended,
            position=position,
            sample=sample,
            request=self._request_of(prompt) if self._request_of else text,  # without turns the prompt is the request
            tokens=completion,
            row=row or PromptRow(),
        )

    def _weighable(self, name: str, score: float) -> Score:
        """Returns `score`, or a failure if the sum of all parts could leave the range of fp32 with it."""
        weight = self._parts[name].weight
        # One share more than parts: the penalty for a missing end is a term of the sum, too.
        if abs(weight * score) <= LARGEST_REWARD / (len(self._parts) + 1):
            return score
        return Failure(f"its score {score:g} times its weight {weight:g} leaves the range of fp32")

    def _title(self, name: str) -> str:
        return title_of(name, self._parts[name])

    def close(self) -> None:
        """Ends the processes of the rules."""
        for rule in self._rules.values():
            rule.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def total_score(
    score_of_part: Mapping[str, torch.Tensor],
    parts: Mapping[str, RewardPartConfig],
    ended_B: torch.Tensor,
    missing_eos_penalty: float,
) -> torch.Tensor:
    """Returns the weighted sum of the parts, (B,) fp32, minus the penalty for completions that were cut off.

    Args:
        score_of_part: (B,) by the name of the part; every part of `parts` has one.
        ended_B: bool; whether the completion was not cut off.
    """
    # A completion that was cut off has no end to judge, so it pays the penalty in addition to the scores of its parts.
    total_B = -missing_eos_penalty * (~ended_B).float()
    for name, part in parts.items():
        total_B = total_B + part.weight * score_of_part[name].float()
    return total_B


def refuse_void(
    parts: Mapping[str, RewardPartConfig], part_B: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> None:
    """Refuses to train on inputs of the losses, computed from scores, that are not finite: no update could be applied.

    Args:
        part_B: scores of the parts; the one with the largest share in a sum is named.
        inputs: by name; none is changed.

    Raises:
        RewardError: some input is not finite; names it, the part and the range of its scores.
    """
    void = [name for name, values in inputs.items() if not bool(values.isfinite().all())]
    if not void:
        return

    share_of_part = {
        name: float((parts[name].weight * scores.double()).abs().nan_to_num(torch.inf).max())
        for name, scores in part_B.items()
    }
    name = max(share_of_part, key=lambda name: share_of_part[name])
    low, high = float(part_B[name].min()), float(part_B[name].max())
    raise RewardError(
        f"{title_of(name, parts[name])}: with its scores, {low:g} to {high:g}, {', '.join(void)} of an iteration are "
        "not finite, so nothing can be learned from it: bound the scores, or lower the weight"
    )


@dataclass(frozen=True)
class UsableRollouts:
    """The rollouts with a score under every rule, the same on every rank."""

    rollouts: Rollouts
    rule_score_B: Mapping[str, torch.Tensor]  # fp32, by part
    kept_D: np.ndarray  # bool; which of the rollouts drawn these are
    prompts: int  # number of prompts drawn, including prompts that have no scored rollout
    failed: Mapping[str, int]  # number of rollouts drawn without a score, by part
    marked: Mapping[str, int] = field(default_factory=dict)  # number of rollouts drawn with each mark
    skipped: Mapping[str, int] = field(default_factory=dict)  # number of rollouts drawn that a part does not apply to
    # bool (B,), by part: where the rule does not apply and adds 0; parts that apply to all are left out
    skipped_B: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """Share of the rollouts drawn that were left out, the number that each part failed on or does not apply to,
        and that of each mark."""
        failed = {f"rlhf/failed_{name}": float(count) for name, count in self.failed.items()}
        marked = {f"reward/{name}": float(count) for name, count in self.marked.items()}
        skipped = {f"rlhf/skipped_{name}": float(count) for name, count in self.skipped.items()}
        if not failed:
            return {}
        return {"rlhf/left_out": 1 - float(self.kept_D.mean()), **failed, **skipped, **marked}

    def means(self, part_B: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Returns the mean score of each part over the rollouts that it applies to; parts without one are left out."""
        means = {}
        for name, score_B in part_B.items():
            if name in self.skipped_B:
                score_B = score_B[~self.skipped_B[name].to(score_B.device)]
            if len(score_B):
                means[name] = float(score_B.double().mean())
        return means


def share_usable(judged: ScoredRollouts | None, some: bool = True, has_reward_model: bool = False) -> UsableRollouts:
    """Sends the first rank's rollouts to every rank, and returns what `usable_of` makes of them, in host memory
    (collective). The learner's loop calls `usable_of` itself, because `controller.on_every_rank` has sent them.

    Args:
        judged: None on all other ranks.
        some, has_reward_model: see `usable_of`.

    Raises:
        RewardError: on every rank, if `some` and no rollout has a score.
    """
    return usable_of(broadcast(cast(ScoredRollouts, judged), ScoredRollouts), some, has_reward_model)


def usable_of(judged: ScoredRollouts, some: bool = True, has_reward_model: bool = False) -> UsableRollouts:
    """Returns those of a rank's rollouts that have a score under every rule; no communication.

    A score that is NaN or out of the range of fp32 counts as none. A rollout to which no part applies has no score
    either.

    Args:
        judged: the rollouts drawn, the same on every rank.
        some: whether at least one must have a score.
        has_reward_model: whether a part of the reward is a reward model, which applies to all rollouts.

    Raises:
        RewardError: if `some` and no rollout has a score.
    """
    drawn, scores = judged.rollouts, judged.scores

    # A rollout needs the score of every rule: a sum without one part would compare unequal things.
    kept_D = np.ones(len(drawn), bool)
    for score_D in scores.values():
        kept_D &= np.abs(score_D) <= LARGEST_REWARD  # rollouts of older releases are pending with larger ones
    if not has_reward_model:
        kept_D &= judged.applicable
    if some and not kept_D.any():
        raise RewardError(f"none of the {len(drawn)} completions of an iteration has a score (rlhf.rewards)")
    return UsableRollouts(
        rollouts=drawn if kept_D.all() else drawn.chosen(kept_D),
        rule_score_B={name: torch.from_numpy(score_D[kept_D]).float() for name, score_D in scores.items()},
        kept_D=kept_D,
        prompts=judged.prompts,
        failed={name: int((~(np.abs(score_D) <= LARGEST_REWARD)).sum()) for name, score_D in scores.items()},
        marked={name: int(mark_D.sum()) for name, mark_D in judged.marks.items()},
        skipped={name: int(skipped_D.sum()) for name, skipped_D in judged.skipped.items()},
        skipped_B={name: torch.from_numpy(skipped_D[kept_D]) for name, skipped_D in judged.skipped.items()},
    )
