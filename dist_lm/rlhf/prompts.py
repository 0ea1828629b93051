"""The prompts of all iterations in their order: a pure function of seed and position."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dist_lm.data.order import key, permutation
from dist_lm.errors import ArtefactError

PromptOrder = Callable[[int, int], list[Sequence[int]]]
"""(first position, how many) -> the tokens of those prompts."""

_PROMPTS = 6  # what is shuffled; smaller numbers are those of the data room


@dataclass(frozen=True)
class ShuffledPrompts:
    """Prompts over and over again, in another order in every epoch. A `PromptOrder`."""

    prompts: Sequence[Sequence[int]]  # token ids; each begins with end-of-text where a document begins
    seed: int

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ArtefactError("there are no prompts to draw completions of")

    def __call__(self, position: int, count: int) -> list[Sequence[int]]:
        found: list[Sequence[int]] = []
        while len(found) < count:
            epoch, begin = divmod(position + len(found), len(self.prompts))
            order = permutation(len(self.prompts), key(_PROMPTS, self.seed, epoch))
            found += [self.prompts[int(i)] for i in order[begin : begin + count - len(found)]]
        return found
