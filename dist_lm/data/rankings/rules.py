"""How good a model's own sample is by rules that anybody can check: what rankings are made of where no person judged.

Nothing here runs what it reads.
"""

import re
from dataclasses import dataclass

NAME = re.compile(r"[A-Za-z_]\w{2,}")
WORD = re.compile(r"\w+|[^\w\s]")
WEIGHTS = {"parses": 0.5, "names": 0.3, "repetition": 0.2}
ENOUGH_NAMES = 3  # of the prompt, in one completion
LONG_ENOUGH = 60  # characters
RUN = 3  # words: what is looked for a second time


@dataclass(frozen=True)
class Marks:
    """What each rule gives, in [0, 1]."""

    parses: float  # 1: prompt and completion are a text of their language
    names: float  # distinct names of the prompt that come again, of `ENOUGH_NAMES` or of all there are
    repetition: float  # share of the runs of three words that are there once
    length: float  # characters, up to `LONG_ENOUGH`

    @property
    def quality(self) -> float:
        """The weighted sum of the others times the mark for length, to two decimals: what differs by less is a tie.

        Without the product the best completion would be none: the prompt alone often parses, and repeats nothing.
        """
        return round(self.length * sum(weight * getattr(self, rule) for rule, weight in WEIGHTS.items()), 2)


def marks_of(prompt: str, completion: str, parses: bool) -> Marks:
    """The marks of a completion.

    Args:
        parses: what its language's parser says of both together (`dist_lm.sandbox.syntax`).
    """
    asked, used = set(NAME.findall(prompt)), set(NAME.findall(completion))
    words = WORD.findall(completion)
    runs = [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]
    return Marks(
        parses=float(parses),
        names=min(1.0, len(asked & used) / min(ENOUGH_NAMES, len(asked))) if asked else 0.0,
        repetition=len(set(runs)) / len(runs) if runs else 1.0,
        length=min(1.0, len(completion.strip()) / LONG_ENOUGH),
    )
