"""Weights that change in the middle of answers: what was drawn stays, and an answer follows from its versions."""

import random
from dataclasses import replace

import pytest
import torch

from dist_lm.generation.engine import Engine
from dist_lm.generation.request import Answer, Refusal, Request, RequestError, SamplingParams
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from tests.generation.test_engine import CONFIG, EOT
from tests.generation.test_prefix_cache import CONTEXT, OPTIONS

VERSIONS = 5
SHAPE = replace(CONFIG, max_seq_len=CONTEXT)
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> list[Weights]:
    """Weights of each version."""
    versions = []
    for seed in range(VERSIONS):
        model = Transformer(SHAPE)
        initialise(model, seed)
        versions.append({name: value.detach().clone() for name, value in model.named_parameters()})
    return versions


def engine_of(weights: list[Weights], pages: int, version: int = 0) -> Engine:
    options = replace(OPTIONS, cache_tokens=pages * OPTIONS.page_tokens)
    return Engine(SHAPE, weights[version], eot_id=EOT, options=options, version=version)


def requests_of(dice: random.Random, count: int) -> list[Request]:
    prefix = [dice.randrange(64) for _ in range(100)]
    requests = []
    for number in range(count):
        prompt = prefix[: dice.choice([0, 70, 100])] + [dice.randrange(64) for _ in range(dice.choice([1, 9, 80]))]
        params = SamplingParams(max_new_tokens=dice.choice([3, 20, 40]), ignore_eot=True)
        requests.append(Request(str(number), prompt, params, seed=dice.getrandbits(60)))
    return requests


def swapped(weights: list[Weights], requests: list[Request], dice: random.Random, pages: int) -> dict[str, Answer]:
    """Returns answers to requests that come at random times, while the weights change at random times."""
    engine, waiting, version = engine_of(weights, pages), list(requests), 0
    answers: list[Answer | Refusal] = []
    while waiting or engine.busy:
        if waiting and dice.random() < 0.3:
            engine.submit(waiting.pop(0))
        if dice.random() < 0.1 and version < VERSIONS - 1:
            version += 1
            engine.swap_weights(weights[version], version)
        answers += engine.step()
    return {answer.request: answer for answer in answers if isinstance(answer, Answer)}


def followed(weights: list[Weights], requests: list[Request], versions: dict[str, tuple]) -> dict[str, Answer]:
    """Returns answers to requests that wait for their versions, in another order and on another cache."""
    engine = engine_of(weights, 40, version=VERSIONS - 1)
    for request in reversed(requests):
        engine.submit(replace(request, versions=versions[request.id]))
    answers: list[Answer | Refusal] = []
    while engine.busy:
        version = engine.awaited_version()
        if version is not None:
            engine.swap_weights(weights[version], version)
        answers += engine.step()
    return {answer.request: answer for answer in answers if isinstance(answer, Answer)}


def bits(answer: Answer) -> tuple:
    return answer.tokens, answer.logprobs, answer.raw_logprobs, answer.version


def check(weights: list[Weights], seed: int, pages: int, count: int = 10) -> int:
    """Returns the number of answers in whose middle weights changed."""
    dice = random.Random(seed)
    requests = requests_of(dice, count)
    answers = swapped(weights, requests, dice, pages)
    versions = {id: answer.versions or ((0, answer.version),) for id, answer in answers.items()}
    again = followed(weights, requests, versions)
    for request in requests:
        assert bits(again[request.id]) == bits(answers[request.id])
        assert again[request.id].versions == versions[request.id]
    return sum(len(pairs) > 1 for pairs in versions.values())


@pytest.mark.parametrize("pages", [6, 40])
def test_an_answer_follows_from_the_versions_that_it_notes(pages, weights):
    """Finds versions noted at another token, a prompt read by two versions, pages of a prefix that older weights
    filled, and what a swap does to preempted sequences (6 pages)."""
    assert check(weights, 0, pages, count=5)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(1, 30))
def test_many_schedules(seed, weights):
    """As above."""
    check(weights, seed, pages=6 + seed % 5)


def test_what_was_drawn_stays_and_the_next_token_is_of_the_new_weights(weights):
    """Finds tokens that are attributed to weights that did not draw them."""
    request = Request("r", [1, 2, 3], SamplingParams(max_new_tokens=20, ignore_eot=True), seed=3)
    plain = engine_of(weights, 6)
    plain.submit(request)
    (unswapped,) = plain.run()
    assert isinstance(unswapped, Answer)
    assert unswapped.versions == ()

    engine = engine_of(weights, 6)
    engine.submit(request)
    for _ in range(7):
        engine.step()
    engine.swap_weights(weights[1], 1)
    (answer,) = engine.run()
    assert isinstance(answer, Answer)
    # Seven tokens are drawn, and the last one is not read yet.
    assert answer.versions == ((0, 0), (6, 1))
    assert answer.version == 0
    assert answer.tokens[:7] == unswapped.tokens[:7]
    assert answer.raw_logprobs[:7] == unswapped.raw_logprobs[:7]
    assert answer.raw_logprobs[7] != unswapped.raw_logprobs[7]


def test_a_prompt_under_way_is_read_by_one_version(weights):
    """Finds keys of a prompt by two versions: its answer would depend on the size of the pieces."""
    request = Request("r", [5] * 200, SamplingParams(max_new_tokens=9, ignore_eot=True), seed=3)
    engine = engine_of(weights, 12)
    engine.submit(request)
    engine.step()
    engine.swap_weights(weights[2], 2)
    (answer,) = engine.run()
    plain = engine_of(weights, 12, version=2)
    plain.submit(request)
    assert [answer] == plain.run()
    assert engine.free_pages == plain.free_pages


def test_a_prompt_that_is_read_again_leaves_no_nan_behind(weights):
    """Finds keys of nan, by weights that have diverged, in a page that goes to another request."""
    diverged = {name: value.clone() for name, value in weights[0].items()}
    diverged["embedding.weight"][63] = torch.nan
    engine = engine_of([diverged], 12)
    engine.submit(Request("r", [4] * 25 + [63] + [5] * 174, SamplingParams(max_new_tokens=9)))
    engine.step()
    engine.swap_weights(weights[1], 1)
    engine.cancel("r")
    request = Request("next", [3, 3, 3], SamplingParams(max_new_tokens=9, ignore_eot=True), seed=3)
    engine.submit(request)
    _, answer = engine.run()
    plain = engine_of(weights, 12, version=1)
    plain.submit(request)
    assert [answer] == plain.run()


def test_nothing_is_left_of_requests_that_are_cancelled_together(weights):
    """Finds requests of a caller who has left in the answers of the next one."""
    engine = engine_of(weights, 6)
    for request in requests_of(random.Random(1), 9):
        engine.submit(request)
    for _ in range(5):
        engine.step()
    engine.submit(Request("later", [1], versions=((0, 3),)))
    engine.cancel_all()
    assert not engine.busy
    assert engine.run() == []
    assert engine.free_pages == 6


def test_versions_of_several_answers_are_refused(weights):
    with pytest.raises(RequestError, match="n=2: expected 1 with versions"):
        engine_of(weights, 6).submit(Request("r", [1], n=2, versions=((0, 0),)))
