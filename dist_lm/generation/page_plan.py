"""Which pages a step reads in plain PyTorch and where it writes: built once a step and used in every layer.

Dimensions: B sequences, P pages of the longest one, n slots; a slot is a page as one sequence reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.generation.pages import pages_for

FEWEST_SLOTS = 2  # one product alone takes another way through the libraries, which rounds differently
SUMMED = 4  # numbers of which `sum` gives the same bits with and without zeros behind them, or a multiple
WASTE = 2  # reading a stretch of pages as it lies is cheaper than copying those that count, up to so many times as many


@dataclass(frozen=True)
class SharedRead:
    """Pages that several sequences hold, as another of these sequences reads them."""

    page_S: torch.Tensor
    row_S: torch.Tensor
    again: bool  # the same pages as the read before


@dataclass
class DecodePlan:
    """One new token for every sequence of a batch."""

    position_B: torch.Tensor  # int64; of the new token
    written_B: torch.Tensor  # int64; page * page_size + offset
    n_pages: int  # slots 0 to n_pages - 1 are the pool's pages themselves; 0: they are `page_n`
    page_n: torch.Tensor  # the page of each slot of the first read
    row_n: torch.Tensor  # the sequence that reads it; any, where nobody does
    shared: list[SharedRead]  # further slots, in this order
    slot_X: torch.Tensor  # (B * P,); of each page of a sequence; any, where it has no such page
    summed_X: torch.Tensor  # the same, P rounded up to what `sum` adds in one order; behind the last slot, where none
    place_n: torch.Tensor  # of each slot in `slot_X`
    bias_B1S: torch.Tensor  # fp32; 0 where a key is visible, -inf elsewhere

    def advance(self) -> None:
        """To the next position of every sequence, none of which began a new page."""
        self.position_B += 1
        self.written_B += 1
        self._show()

    def _show(self) -> None:
        row_B = torch.arange(len(self.position_B), device=self.position_B.device)
        self.bias_B1S[row_B, 0, self.position_B] = 0


def plan_decode(
    pages: Sequence[Sequence[int]], positions: Sequence[int], page_size: int, device: torch.device
) -> DecodePlan:
    """The plan of a step.

    Args:
        pages: of each sequence, with one for the new token.
        positions: of the new tokens.
    """
    counts = [pages_for(position + 1, page_size) for position in positions]
    longest = max(counts)
    readers: dict[int, list[tuple[int, int]]] = {}  # page -> (row, place among its pages) of all that hold it
    for row, (own, count) in enumerate(zip(pages, counts, strict=True)):
        for place, page in enumerate(own[:count]):
            readers.setdefault(page, []).append((row, row * longest + place))
    used = sorted(readers)
    stretch = max(used[-1] + 1, FEWEST_SLOTS)
    as_it_lies = stretch <= WASTE * max(len(used), FEWEST_SLOTS)

    absent = -1
    slot_of = [absent] * (len(pages) * longest)
    rows: list[int] = []
    places: list[int] = []

    def read(page: int, turn: int) -> None:
        """A slot: the page as one of those reads it that hold it; as anybody reads it, where nobody does."""
        held = readers.get(page, ())
        row, place = held[turn] if turn < len(held) else (0, 0)
        if turn < len(held):
            slot_of[place] = len(rows)
        rows.append(row)
        places.append(place)

    def on_device(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, device=device)

    def read_all(own: list[int], turn: int) -> list[int]:
        for page in own:
            read(page, turn)
        if len(own) < FEWEST_SLOTS:
            own = own * FEWEST_SLOTS
            read(own[0], len(readers[own[0]]))  # once more, for nobody
        return own

    first = read_all(list(range(stretch)) if as_it_lies else used, 0)
    n_first = len(rows)
    shared: list[SharedRead] = []
    before: list[int] = []
    for turn in range(1, max(len(held) for held in readers.values())):
        own = [page for page in used if len(readers[page]) > turn]
        begin = len(rows)
        own = read_all(own, turn)
        shared.append(SharedRead(on_device(own), on_device(rows[begin:]), again=own == before))
        before = own

    slot_BP = on_device(slot_of).view(len(pages), longest)
    summed_BP = F.pad(slot_BP, (0, -longest % SUMMED), value=absent)
    position_B = on_device(positions)
    key_S = torch.arange(longest * page_size, device=device)
    bias_BS = torch.zeros(len(pages), len(key_S), device=device)
    bias_BS.masked_fill_(key_S > position_B[:, None], float("-inf"))
    last = [own[position // page_size] for own, position in zip(pages, positions, strict=True)]
    return DecodePlan(
        position_B=position_B,
        written_B=on_device(last) * page_size + position_B % page_size,
        n_pages=stretch if as_it_lies else 0,
        page_n=on_device(first),
        row_n=on_device(rows[:n_first]),
        shared=shared,
        slot_X=slot_BP.flatten().clamp(min=0),
        summed_X=summed_BP.masked_fill(summed_BP == absent, len(rows)).flatten(),
        place_n=on_device(places),
        bias_B1S=bias_BS[:, None],
    )
