"""Steps that are there already, in place of a stream of a corpus."""

from collections.abc import Callable, Iterable, Iterator

from dist_lm.data.stream import StepData


class FixedSteps(Iterator[StepData]):
    """Gives these steps in turn."""

    def __init__(self, steps: Iterable[StepData]) -> None:
        self._steps = iter(steps)

    def wait(self, alive: Callable[[], None]) -> None:
        """Returns at once."""

    def __next__(self) -> StepData:
        return next(self._steps)
