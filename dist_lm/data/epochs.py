"""Orders of the epochs that are being read: made when they are asked for, and dropped when later ones are."""

from collections.abc import Callable
from typing import Generic, TypeVar

KEPT = 2  # sequences are asked for in rising numbers

Order = TypeVar("Order")


class Epochs(Generic[Order]):
    """The orders of a corpus with as many sequences in every epoch, numbered over all of them."""

    def __init__(self, n_sequences: int, order: Callable[[int], Order]) -> None:
        """`order`: that of an epoch."""
        self._n_sequences, self._order = n_sequences, order
        self._kept: dict[int, Order] = {}

    def place(self, number: int) -> tuple[Order, int]:
        """The order in which sequence `number` lies, and its number there."""
        epoch, i = divmod(number, self._n_sequences)
        if epoch not in self._kept:
            self._kept[epoch] = self._order(epoch)
            while len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
        return self._kept[epoch], i
