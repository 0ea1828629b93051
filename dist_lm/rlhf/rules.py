"""Rules: the parts of a reward that need no model. A rule judges a batch of completions and may fail on some.

No rule executes what a model wrote in this process: code is only parsed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dist_lm.sandbox.syntax import parses, parses_continued, whole_lines

Alive = Callable[[], None]
"""Called while a rule works, from any thread."""


@dataclass(frozen=True)
class Judged:
    """A rollout as rules see it."""

    prompt: str  # as the model sees it, without the names of special tokens; the key of its tests
    completion: str
    new_tokens: int
    whole: bool  # it ended by a stop token and was not cut off
    position: int = 0  # of its prompt in the order of prompts
    sample: int = 0  # number among the completions of its prompt
    request: str = ""  # text of the user's last turn in the prompt


@dataclass(frozen=True)
class Failure:
    """Why a completion has no score."""

    reason: str


Score = float | Failure


class Rule(Protocol):
    """One part of the reward. It may keep processes between calls, which `close` ends."""

    def __call__(self, judged: Sequence[Judged], alive: Alive) -> Iterator[Score]:
        """A finite number or a failure for each completion, in order.

        Raises:
            UserError: the rule can judge nothing, whatever the completion.
        """
        ...

    def close(self) -> None:
        """End the rule's processes. A later call starts them again."""
        ...


@dataclass(frozen=True)
class TextRule:
    """A rule that is a plain function."""

    score: Callable[[Judged], Score]

    def __call__(self, judged: Sequence[Judged], alive: Alive) -> Iterator[Score]:
        for one in judged:
            alive()
            yield self.score(one)

    def close(self) -> None:
        """Nothing to end."""


def length_rule(target: int) -> TextRule:
    """1 at `target` tokens, falling linearly to 0 at no tokens and at twice as many."""
    return TextRule(lambda judged: max(0.0, 1 - abs(judged.new_tokens - target) / target))


def parses_rule(language: str, of: str) -> TextRule:
    """1 if the text parses, else 0. The last line of a completion that was cut off does not count.

    Args:
        of: document (request and completion as one text) | completion.
    """

    def score(judged: Judged) -> Score:
        if of == "document":
            verdict = parses_continued(language, judged.request, judged.completion, judged.whole)
        else:
            verdict = parses(language, whole_lines(judged.completion, judged.whole))
        return Failure(f"the parser of {language} gave no verdict in time") if verdict is None else float(verdict)

    return TextRule(score)
