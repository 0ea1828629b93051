"""A model over several processes answers as it does in one, and none of them is left behind."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import pytest
import torch

from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.generation import followers as followers_module
from dist_lm.generation.engine import Engine
from dist_lm.generation.followers import RankLostError
from dist_lm.generation.request import Answer, Refusal, Request, SamplingParams
from dist_lm.model.transformer import Transformer
from dist_lm.storage.process import title
from tests.generation.test_engine import (
    CONFIG,
    EOT,
    PAGE,
    SMALL,
    answers_of,
    check,
    check_answer,
    engine_of,
    model_of,
    requests_of_all_kinds,
)

OPTIONS = replace(SMALL, cache_tokens=12 * PAGE)  # so small that sequences are set aside
DEADLINE_S = 90.0  # less than what a living rank has to join a collective
FOREVER = Request("long", [3, 4], SamplingParams(max_new_tokens=150, ignore_eot=True), n=3)
LEADER = """
import psutil, torch
from dist_lm.generation.engine import Engine
from tests.cluster.small_pool import MODEL, SPEC, requests, weights_of
weights = {{name: torch.from_numpy(value) for name, value in weights_of(0).items()}}
engine = Engine(MODEL, weights, eot_id=0, options=SPEC.options, tp={tp})
print(*(child.pid for child in psutil.Process().children()), flush=True)
for request in requests(1_000_000):
    engine.submit(request)
    engine.run()
"""


def sharded(model: Transformer, tp: int) -> Engine:
    """Returns an engine over `tp` processes. A process has one at a time: tests that start another one while the
    `engine` of this file is there are in test_sharded_shapes.py."""
    weights = dict(model.named_parameters())
    return Engine(model.config, weights, eot_id=EOT, options=OPTIONS, dtype=model.embedding.weight.dtype, tp=tp)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return model_of(CONFIG)


def rank_processes() -> list[psutil.Process]:
    """Children that are ranks of an engine: other tests may have left servers that start processes for them."""
    return [child for child in psutil.Process().children() if followers_module.PROGRAM in title(child)]


@pytest.fixture(scope="module")
def engine(model: Transformer) -> Iterator[Engine]:
    with sharded(model, 2) as engine:
        children = rank_processes()
        assert len(children) == 1
        yield engine
    assert not any(child.is_running() for child in children)


def await_true(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def disturbed(engine: Engine, requests: list[Request], seed: int) -> list[Answer | Refusal]:
    """Requests join and are cancelled at random steps."""
    dice, left, done = random.Random(seed), list(requests), []
    while left or engine.busy:
        while left and dice.random() < 0.3:
            engine.submit(left.pop(0))
        if dice.random() < 0.04:
            engine.cancel(dice.choice(requests).id)
        done += engine.step()
    return done


def check_schedule(engine: Engine, model: Transformer, requests: list[Request], seed: int) -> None:
    done = disturbed(engine, requests, seed)
    submitted = {answer.request for answer in done}
    check(model, [request for request in requests if request.id in submitted], done)
    assert engine._page_pool.n_free == engine.options.n_pages, "a page has leaked"


@pytest.mark.heavy
def test_a_schedule_gives_what_a_plain_forward_gives_and_others_keep_nothing(engine, model, monkeypatch):
    told: list[str] = []
    tell = engine._decoder._followers.tell
    monkeypatch.setattr(engine._decoder._followers, "tell", lambda command: (told.append(command[0]), tell(command)))
    check_schedule(engine, model, requests_of_all_kinds(), seed=2)
    assert told.count("save") > 1
    assert told.count("copy_page") > 3
    assert told.count("save") == told.count("restore") + told.count("forget")


@pytest.mark.heavy
def test_an_answer_is_the_same_to_the_last_bit_whatever_it_is_batched_with(engine):
    requests = requests_of_all_kinds(3)
    for request in requests:
        engine.submit(request)
    together = answers_of(engine)
    for request in requests:
        engine.submit(request)
        for key, answer in answers_of(engine).items():
            assert answer == together[key]


@pytest.mark.heavy
def test_greedy_answers_are_those_of_one_process(engine, model):
    alone = engine_of(model)
    for place in (alone, engine):
        for number in range(4):
            place.submit(Request(str(number), [5 + number] * 20, SamplingParams(max_new_tokens=30, temperature=0)))
    expected, found = answers_of(alone), answers_of(engine)
    assert {key: one.tokens for key, one in found.items()} == {key: one.tokens for key, one in expected.items()}
    for key, answer in found.items():
        raw = (torch.tensor(one.raw_logprobs) for one in (answer, expected[key]))
        torch.testing.assert_close(*raw, rtol=0, atol=1e-5)


def test_new_weights_reach_all_ranks(engine, model):
    other = model_of(replace(CONFIG, init_std=0.2))
    with pytest.raises(ArtefactError, match="another model"):
        engine.load_weights({**dict(model.named_parameters()), "embedding.weight": torch.zeros(3, 40)}, 7)
    engine.load_weights(dict(other.named_parameters()), 8)
    request = Request("b", [3, 9], SamplingParams(max_new_tokens=10), seed=4)
    engine.submit(request)
    (answer,) = engine.run()
    assert isinstance(answer, Answer)
    assert answer.version == 8
    check_answer(other, request, answer)
    engine.load_weights(dict(model.named_parameters()), 0)


@pytest.mark.heavy
def test_all_ranks_free_their_caches_and_answer_as_before(engine, model):
    asked = Request("b", [3] * 40, SamplingParams(max_new_tokens=20), seed=4)
    found = []
    for _ in range(2):
        engine.submit(asked)
        found += engine.run()
        engine.sleep()
    assert found[0] == found[1]
    check_answer(model, asked, found[0])


@pytest.mark.parametrize("bad", [63, 0])  # 0: in the row that is looked up for tokens of other ranks, if one were
def test_logits_that_are_no_numbers_end_their_request_alone(engine, model, bad):
    weights = {name: value.clone() for name, value in model.named_parameters()}
    weights["embedding.weight"][bad] = torch.nan
    engine.load_weights(weights, 1)
    params = SamplingParams(max_new_tokens=12, ignore_eot=True, logit_bias={bad: -float("inf")})
    good = [Request(f"good{i}", [3 + i], params, seed=i) for i in range(4)]
    for request in (good[0], Request("bad", [4, bad, 5], params, n=3), *good[1:]):
        engine.submit(request)
    done = engine.run()
    assert [one.request for one in done if isinstance(one, Refusal)] == ["bad"]
    answers = [one for one in done if isinstance(one, Answer)]
    assert {answer.request for answer in answers} == {request.id for request in good}
    for answer in answers:
        check_answer(model, next(request for request in good if request.id == answer.request), answer)
    engine.load_weights(dict(model.named_parameters()), 0)


def test_a_second_model_in_the_same_process_is_refused_before_anything_starts(engine, model):
    before = rank_processes()
    with pytest.raises(RuntimeError, match="is a rank already"):
        sharded(model, 2)
    with pytest.raises(ConfigError, match=r"tp=8: expected a degree.*model\.n_heads=5"):
        sharded(model, 8)
    assert rank_processes() == before


def test_a_rank_that_dies_is_named_and_the_others_end(model, engine):
    """Last of those that use the engine: its ranks are dead behind it."""
    children = rank_processes()
    engine.submit(FOREVER)
    for _ in range(3):
        engine.step()
    children[0].send_signal(signal.SIGSTOP)  # so that the leader waits in a message
    killer = threading.Timer(0.5, children[0].kill)
    killer.start()
    started = time.monotonic()
    with pytest.raises(RankLostError, match=rf"rank 1 \(process {children[0].pid}\) of 2.*killed by SIGKILL"):
        engine.run()
    assert time.monotonic() - started < DEADLINE_S
    killer.join()
    with pytest.raises(RankLostError, match="rank 1"):
        engine.step()
    await_true(lambda: not any(child.is_running() for child in children))


def test_a_rank_that_does_not_start_says_why(model, monkeypatch):
    monkeypatch.setattr(followers_module, "PROGRAM", "dist_lm.generation.nonsense")
    with pytest.raises(RankLostError, match=r"rank 1 .* exit code 1: .*No module named dist_lm\.generation\.nonsense"):
        followers_module.Followers(2, {}, on_loss=lambda: None)
    assert not rank_processes()


@pytest.mark.heavy
@pytest.mark.parametrize("tp", [2, pytest.param(3, marks=pytest.mark.heavy)])
def test_ranks_end_with_the_one_that_leads(tp):
    leader = subprocess.Popen([sys.executable, "-c", LEADER.format(tp=tp)], stdout=subprocess.PIPE, text=True)
    assert leader.stdout
    with leader.stdout:
        ranks = [psutil.Process(int(pid)) for pid in leader.stdout.readline().split()]
    assert len(ranks) == tp - 1
    if tp > 2:
        ranks[0].send_signal(signal.SIGSTOP)  # one that can do nothing for its own end, while another waits for it
    os.kill(leader.pid, signal.SIGKILL)
    leader.wait()
    await_true(lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks))
