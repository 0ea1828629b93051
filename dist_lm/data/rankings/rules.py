"""Marks a model's own samples by rules that anybody can check. The marks make rankings where no person judged.

Nothing here runs what it reads.
"""

import re
from dataclasses import dataclass

NAME = re.compile(r"[A-Za-z_]\w{2,}")
WORD = re.compile(r"\w+|[^\w\s]")
WEIGHTS = {"parses": 0.5, "names": 0.3, "repetition": 0.2}
ENOUGH_NAMES = 3  # names of the prompt in one completion, for the full mark
LONG_ENOUGH = 60  # characters, for the full mark
RUN = 3  # words of a run that must not be repeated


@dataclass(frozen=True)
class Marks:
    """The mark of a completion by each rule, in [0, 1]."""

    parses: float  # 1: prompt and completion are a text of their language
    names: float  # distinct names of the prompt used again, divided by `ENOUGH_NAMES` or by all there are
    repetition: float  # distinct runs of three words, divided by all runs
    length: float  # characters, divided by `LONG_ENOUGH`

    @property
    def quality(self) -> float:
        """The weighted sum of the other marks times the mark for length, to two decimals: closer ones are ties.

        Without the product the best completion would be an empty one: the prompt alone often parses, and repeats
        nothing.
        """
        return round(self.length * sum(weight * getattr(self, rule) for rule, weight in WEIGHTS.items()), 2)


def marks_of(prompt: str, completion: str, parses: bool) -> Marks:
    """Returns the marks of a completion, each in [0, 1]; 1 is the best.

    Without a name in the prompt the mark for names is 0; a completion below three words repeats nothing: 1.

    Args:
        parses: the verdict of the language's parser on prompt and completion together (`dist_lm.sandbox.syntax`).
    """
    # A few names give the full mark: a long prompt must not ask for a completion full of names.
    prompt_names = set(NAME.findall(prompt))
    names = 0.0
    if prompt_names:
        reused_names = prompt_names & set(NAME.findall(completion))
        names = min(1.0, len(reused_names) / min(ENOUGH_NAMES, len(prompt_names)))

    # A completion that is too short for a run repeats nothing.
    words = WORD.findall(completion)
    runs = [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)] or [()]
    return Marks(
        parses=float(parses),
        names=names,
        repetition=len(set(runs)) / len(runs),
        length=min(1.0, len(completion.strip()) / LONG_ENOUGH),
    )
