"""Requests are dealt evenly, none is lost or comes twice, whoever dies."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.cluster.pool_ledger import LONELY_DEATHS, SUSPECT_DEATHS, Depth, Ledger
from dist_lm.generation.request import Answer, Refusal, Request, SamplingParams

DEPTH = Depth(answers=8, tokens=200)


def request_of(number: int, n: int = 1, tokens: int = 10) -> Request:
    return Request(f"r{number}", [1] * 5, SamplingParams(max_new_tokens=tokens), n=n)


def answer_of(request: Request, index: int) -> Answer:
    return Answer(request.id, index, 5, (7,), "", (-1.0,), (-1.0,), "length", 0, 0)


@pytest.mark.heavy
@settings(max_examples=200)
@given(st.integers(0, 2**32))
def test_every_answer_comes_once_whoever_dies(seed):
    chance = random.Random(seed)
    requests = [request_of(i, n=chance.randint(1, 3), tokens=chance.randint(1, 60)) for i in range(60)]
    ledger = Ledger(iter(requests), DEPTH)
    actors: dict[int, list[tuple[Request, int]]] = {}  # answers that each has yet to give
    came: list[tuple[str, int]] = []
    newest, deaths = 0, 0
    while not ledger.is_over:
        if not actors or (len(actors) < 3 and chance.random() < 0.3):
            newest += 1
            ledger.join(newest)
            actors[newest] = []
        ledger.deal()
        lane = chance.choice(list(actors))
        if deaths < 40 and chance.random() < 0.2:
            deaths += 1
            del actors[lane]
            ledger.leave(lane, blamed=False)
            continue
        actors[lane] += [(request, index) for request in ledger.send(lane) for index in range(request.n)]
        chance.shuffle(actors[lane])
        done = [actors[lane].pop() for _ in range(chance.randint(0, len(actors[lane])))]
        ledger.report(lane, [answer_of(*one) for one in done], sum(r.params.max_new_tokens for r, _ in actors[lane]))
        came += [(result.request, result.index) for result in ledger.release() if isinstance(result, Answer)]
    expected = [(request.id, index) for request in requests for index in range(request.n)]
    assert sorted(came) == sorted(expected)


def test_work_is_dealt_by_tokens_and_pulled_only_when_there_is_room():
    pulled = []
    sizes = [100, 10, 10, 10, 10, 10, 10, 10, 10] + [50] * 1000
    ledger = Ledger((pulled.append(i) or request_of(i, tokens=size) for i, size in enumerate(sizes)), DEPTH)
    ledger.join(0)
    ledger.join(1)
    ledger.deal()
    dealt = [[request.params.max_new_tokens for request in ledger.send(lane)] for lane in (0, 1)]
    assert dealt[0][0] == 100
    assert abs(sum(dealt[0]) - sum(dealt[1])) <= 60
    assert sum(len(one) for one in dealt) >= len(pulled) - 1
    assert len(pulled) <= 12


def test_a_request_larger_than_all_room_still_goes_to_an_idle_actor():
    ledger = Ledger(iter([request_of(0, tokens=10_000), request_of(1)]), DEPTH)
    ledger.join(0)
    ledger.deal()
    assert [request.params.max_new_tokens for request in ledger.send(0)] == [10_000]


def test_a_refusal_takes_the_place_of_all_answers():
    ledger = Ledger(iter([request_of(0, n=3), request_of(1)]), DEPTH)
    ledger.join(0)
    ledger.deal()
    first, second = ledger.send(0)
    ledger.report(0, [answer_of(first, 1), answer_of(second, 0), Refusal(first.id, "nan")], 0)
    assert sorted((result.request, type(result).__name__) for result in ledger.release()) == [
        ("r0", "Refusal"),
        ("r1", "Answer"),
    ]
    assert ledger.is_over


def test_a_request_that_actors_die_of_is_refused_and_no_other():
    requests = [request_of(i) for i in range(20)]
    ledger = Ledger(iter(requests), DEPTH)
    results, lane = [], 0
    ledger.join(lane)
    while not ledger.is_over:
        ledger.deal()
        sent = ledger.send(lane)
        if any(request.id == "7" for request in sent):
            ledger.leave(lane)
            lane += 1
            ledger.join(lane)
        else:
            ledger.report(lane, [answer_of(request, 0) for request in sent], 0)
        results += ledger.release()
    assert [result.request for result in results if isinstance(result, Refusal)] == ["r7"]
    assert Counter(result.request for result in results) == Counter(request.id for request in requests)
    assert lane == SUSPECT_DEATHS + LONELY_DEATHS


def test_an_iterator_that_has_nothing_now_is_asked_again():
    """Finds a pool that takes a pause of its requests for their end."""
    ledger = Ledger(iter([None, request_of(0), None, None, request_of(1)]), DEPTH)
    ledger.join(1)
    sent: list[str] = []
    for _ in range(8):
        ledger.deal()
        assert not ledger.is_over or len(sent) == 2
        for request in ledger.send(1):
            sent.append(request.id)
            ledger.report(1, [answer_of(request, 0)], 0)
        list(ledger.release())
    assert len(sent) == 2
    assert ledger.is_over
