"""The ledger of a pool assigns requests to actors. Pure data, no effects.

Requests are dealt by tokens in flight, dealt again when their actor dies, and their results released once. A lane
stands for one actor. A request is complete when all its answers are there; if its actor dies before, its partial
answers are dropped. So no result is lost or released twice.

    requests -> lane: unsent -> sent -> complete -> results
       ^                 |
       '---- again <-----'  its actor died
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from dist_lm.generation.request import Answer, Refusal, Request

SUSPECT_DEATHS = 4  # a request is suspect after the deaths of this many actors that worked on it; it then runs alone
LONELY_DEATHS = 3  # a suspect is refused after this many deaths of actors that worked on it alone

END = object()  # behind the last request

Result = Answer | Refusal


@dataclass(frozen=True)
class Depth:
    """Most work assigned to one actor at a time."""

    answers: int
    tokens: int  # upper bound of the tokens of prompts and outstanding answers


@dataclass(eq=False)
class Ticket:
    """One request on its way."""

    number: int  # unique; the id that actors see
    request: Request
    answers: dict[int, Answer] = field(default_factory=dict)  # index -> answer, since it was last dealt
    deaths: int = 0
    lonely_deaths: int = 0

    @property
    def tokens(self) -> int:
        """Upper bound of its tokens."""
        return len(self.request.prompt) + self.request.n * self.request.params.max_new_tokens

    @property
    def is_suspect(self) -> bool:
        return self.deaths >= SUSPECT_DEATHS


@dataclass(eq=False)
class Lane:
    """The work of one actor."""

    unsent: dict[int, Ticket] = field(default_factory=dict)  # number -> ticket
    sent: dict[int, Ticket] = field(default_factory=dict)
    reported: int = 0  # tokens in flight: the actor's last report, plus the requests sent since

    @property
    def load(self) -> int:
        return self.reported + sum(ticket.tokens for ticket in self.unsent.values())

    @property
    def tickets(self) -> list[Ticket]:
        """In the order in which they were dealt."""
        return [*self.sent.values(), *self.unsent.values()]

    def fits(self, ticket: Ticket, depth: Depth) -> bool:
        """Returns whether the actor can take another ticket; an idle actor takes any."""
        tickets = self.tickets
        if not tickets:
            return True
        answers = sum(dealt.request.n - len(dealt.answers) for dealt in tickets)
        return answers + ticket.request.n <= depth.answers and self.load + ticket.tokens <= depth.tokens


class Ledger:
    """All requests of one call. Only requests on their way are held in memory."""

    def __init__(self, requests: Iterator[Request | None], depth: Depth) -> None:
        """`requests`: None among them means that there is none now."""
        self._requests = requests
        self._depth = depth
        self._lanes: dict[int, Lane] = {}
        self._next: Ticket | None = None  # read from the requests, not yet dealt
        self._pulled = 0
        self._all_pulled = False
        self._again: deque[Ticket] = deque()
        self._suspects: deque[Ticket] = deque()
        self._lonely: int | None = None  # the lane reserved for a suspect
        self._over: deque[Sequence[Result]] = deque()  # the results of each complete ticket, in the order of completion
        self._released = 0

    @property
    def is_over(self) -> bool:
        """Whether every result has been released."""
        return self._all_pulled and self._next is None and self._released == self._pulled

    @property
    def lanes(self) -> frozenset[int]:
        return frozenset(self._lanes)

    def join(self, lane: int) -> None:
        """Adds an actor."""
        self._lanes[lane] = Lane()

    def leave(self, lane: int, blamed: bool = True) -> None:
        """Removes an actor; its requests are dealt again before others, without their partial answers.

        A request that has been there at `SUSPECT_DEATHS` deaths is a suspect, which then runs alone; after
        `LONELY_DEATHS` more it is refused.

        Args:
            blamed: its work may have killed it; False: the deaths of its requests are not counted.
        """
        tickets = self._lanes.pop(lane).tickets
        was_alone = lane == self._lonely and len(tickets) == 1 and tickets[0].is_suspect
        if lane == self._lonely:
            self._lonely = None

        # In reverse, since each goes to the front: they keep their order.
        for ticket in reversed(tickets):
            ticket.answers.clear()
            ticket.deaths += blamed
            ticket.lonely_deaths += blamed and was_alone
            if ticket.lonely_deaths >= LONELY_DEATHS:
                reason = f"{ticket.deaths} actors died while they worked on it, {LONELY_DEATHS} of it alone"
                self._over.append([Refusal(ticket.request.id, reason)])
            elif ticket.is_suspect:
                self._suspects.appendleft(ticket)
            else:
                self._again.appendleft(ticket)

    def deal(self) -> None:
        """Assigns requests to lanes, always to the one with the fewest tokens, until no lane can take more or no
        request is left.

        Suspects come first, on a lane of their own. It reads further requests as lanes have room.
        """
        self._deal_suspects()

        # Tokens, not requests, are balanced: long answers take an engine longer.
        open_lanes = [lane for number, lane in self._lanes.items() if number != self._lonely]
        while open_lanes and (ticket := self._peek()):
            lane = min(open_lanes, key=lambda lane: lane.load)
            if lane.fits(ticket, self._depth):
                self._take()
                lane.unsent[ticket.number] = ticket
            else:
                open_lanes.remove(lane)

    def send(self, lane: int) -> list[Request]:
        """Returns the requests to send to the actor now; their ids are ticket numbers."""
        work = self._lanes[lane]
        requests = [replace(ticket.request, id=str(ticket.number)) for ticket in work.unsent.values()]
        work.reported = work.load
        work.sent |= work.unsent
        work.unsent = {}
        return requests

    def has_work(self, lane: int) -> bool:
        """Returns whether the actor has a request to work on."""
        return bool(self._lanes[lane].tickets)

    def report(self, lane: int, results: Sequence[Result], tokens: int) -> int:
        """Records an actor's results; returns how many requests they complete. A refusal completes its request.

        Args:
            tokens: number of tokens in flight on the actor.
        """
        work = self._lanes[lane]
        work.reported = tokens
        n_complete = 0
        for result in results:
            # Actors see ticket numbers; the caller's id comes back here.
            ticket = work.sent[int(result.request)]
            named = replace(result, request=ticket.request.id)
            complete: list[Result] | None = None
            if isinstance(named, Refusal):
                complete = [named]
            else:
                ticket.answers[named.index] = named
                if len(ticket.answers) == ticket.request.n:
                    complete = [answer for _, answer in sorted(ticket.answers.items())]

            if complete is not None:
                self._over.append(complete)
                del work.sent[ticket.number]
                n_complete += 1

        if lane == self._lonely and not work.tickets:
            self._lonely = None
        return n_complete

    def release(self) -> Iterator[Result]:
        """Yields the results that are due, each once."""
        while self._over:
            self._released += 1
            yield from self._over.popleft()

    def _deal_suspects(self) -> None:
        """Gives the next suspect to a lane of its own once that is empty, so that it can kill no other request. The
        lane with the fewest requests is reserved for that, until its suspect is done.
        """
        if not self._suspects or not self._lanes:
            return
        if self._lonely is None:
            self._lonely = min(self._lanes, key=lambda number: len(self._lanes[number].tickets))
        lane = self._lanes[self._lonely]
        if not lane.tickets:
            ticket = self._suspects.popleft()
            lane.unsent[ticket.number] = ticket

    def _peek(self) -> Ticket | None:
        """Returns the next request to deal, reading one if needed; None if there is none."""
        if self._again:
            return self._again[0]
        if self._next is None and not self._all_pulled:
            request = next(self._requests, END)
            if request is END:
                self._all_pulled = True
            elif isinstance(request, Request):  # None: there is none now
                self._next = Ticket(self._pulled, request)
                self._pulled += 1
        return self._next

    def _take(self) -> None:
        if self._again:
            self._again.popleft()
        else:
            self._next = None
