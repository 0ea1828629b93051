"""An engine with a prefix cache answers as one without it, and computes less."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_lm.errors import ConfigError
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.paged_cache import BLOCK, PagePool
from dist_lm.generation.prefix_cache import PrefixCache, block_digests
from dist_lm.generation.request import Answer, Refusal, Request, SamplingParams
from dist_lm.model.transformer import Transformer
from tests.generation.test_engine import CONFIG, EOT, GROUPED, model_of

PAGE = 64
CONTEXT = 320
OPTIONS = EngineOptions(
    cache_tokens=40 * PAGE, page_tokens=PAGE, max_sequences=6, piece_tokens=64, step_tokens=128, prefix_cache=True
)


@pytest.fixture(scope="module", params=[CONFIG, GROUPED], ids=["heads", "groups"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return model_of(replace(request.param, max_seq_len=CONTEXT))


def engine_of(model: Transformer, options: EngineOptions = OPTIONS) -> Engine:
    return Engine(model.config, dict(model.named_parameters()), eot_id=EOT, options=options)


def without_cache(model: Transformer, page_tokens: int = PAGE) -> Engine:
    return engine_of(model, replace(OPTIONS, page_tokens=page_tokens, prefix_cache=False))


def answers_of(engine: Engine, requests: Sequence[Request]) -> dict[tuple[str, int], Answer]:
    for request in requests:
        engine.submit(request)
    return {(answer.request, answer.index): answer for answer in engine.run() if isinstance(answer, Answer)}


def check_conversations(model: Transformer, seed: int, pages: int) -> Engine:
    """Runs conversations at random times on a cache of so many pages; each turn's prompt goes on from an answer to an
    earlier turn, mostly the last one, with a random change now and then."""
    dice = random.Random(seed)
    page_tokens = dice.choice([32, 64])
    engine = engine_of(model, replace(OPTIONS, cache_tokens=pages * page_tokens, page_tokens=page_tokens))
    asked: dict[str, Request] = {}
    done: list[Answer | Refusal] = []
    histories: list[list[int]] = [[dice.randrange(64) for _ in range(dice.choice([3, 40, 90]))] for _ in range(3)]
    while len(asked) < 10 or engine.busy:
        if len(asked) < 10 and dice.random() < 0.3:
            prompt = list(dice.choice(histories[-4:] if dice.random() < 0.7 else histories))
            if dice.random() < 0.15:
                prompt[dice.randrange(len(prompt))] = dice.randrange(64)
            prompt += [dice.randrange(64) for _ in range(dice.choice([0, 1, 17, 60]))]
            request = Request(
                str(len(asked)),
                prompt[: CONTEXT - 130],
                SamplingParams(max_new_tokens=dice.choice([2, 40, 120]), ignore_eot=dice.random() < 0.7),
                seed=dice.getrandbits(60),
                n=dice.choice([1, 1, 1, 2, 4]),
                cache_key=dice.choice(["", "", "another"]),
            )
            asked[request.id] = request
            engine.submit(request)
        if dice.random() < 0.03 and asked:
            engine.cancel(dice.choice([*asked]))
        for answer in engine.step():
            done.append(answer)
            assert isinstance(answer, Answer)
            if asked[answer.request].n == 1 or dice.random() < 0.4:
                histories.append([*asked[answer.request].prompt, *answer.tokens])

    expected = answers_of(without_cache(model, page_tokens), [*asked.values()])
    for answer in done:
        assert isinstance(answer, Answer)
        reference = expected[answer.request, answer.index]
        if answer.finish == "cancelled":
            n = len(answer.tokens)
            assert (answer.tokens, answer.logprobs) == (reference.tokens[:n], reference.logprobs[:n])
        else:
            assert answer == reference
    # The first answer to a request computes the prompt for all of them.
    reused = sum(answer.reused_tokens for answer in done if isinstance(answer, Answer) and answer.index == 0)
    assert engine.prefix_counts.reused == reused
    assert engine.free_pages == pages, "a page has leaked"
    assert sorted(engine._page_pool.take() for _ in range(pages)) == list(range(pages))
    assert not engine._prefixes._page_of, "an evicted page is still known"  # type: ignore[union-attr]
    return engine


@pytest.mark.heavy
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30), pages=st.integers(11, 30))
def test_any_conversation_gets_the_bits_of_an_engine_without_the_cache(model, seed, pages):
    """Finds a prefix taken for another one, one computed in other blocks than a cold prompt, and a page that was
    written to or evicted while it was shared."""
    check_conversations(model, seed, pages)


@pytest.mark.bars
@pytest.mark.timeout(1800)
def test_five_hundred_random_conversations(model):
    dice = random.Random(20261201)
    reused = 0
    for _ in range(250):  # of each model
        reused += check_conversations(model, dice.getrandbits(30), dice.randint(11, 30)).prefix_counts.reused
    assert reused


@pytest.mark.heavy
def test_conversations_on_a_small_cache_evict_share_and_preempt(model, monkeypatch):
    """Finds the same faults in one schedule, and that conversations do not meet what they are for."""
    preempted, evicted, shared = [], [], []
    preempt, forget, share = Engine._preempt, PrefixCache.forget, PagePool.share
    monkeypatch.setattr(Engine, "_preempt", lambda self, victim: (preempted.append(victim), preempt(self, victim)))
    monkeypatch.setattr(PrefixCache, "forget", lambda self, page: (evicted.append(page), forget(self, page)))
    monkeypatch.setattr(PagePool, "share", lambda self, pages: (shared.extend(pages), share(self, pages)))
    engine = check_conversations(model, 4, 11)
    assert preempted
    assert len(evicted) > 10
    assert len(shared) > 50
    assert engine.prefix_counts.reused > 50


@pytest.mark.heavy
def test_a_conversation_of_eight_turns_computes_little_more_than_its_new_text(model, monkeypatch):
    """Finds a border at which more is computed again than the part of a block."""
    config = replace(model.config, max_seq_len=2560)
    long_model = model_of(config)
    options = EngineOptions(cache_tokens=4096, page_tokens=PAGE, prefix_cache=True)
    engine = engine_of(long_model, options)
    computed: list[int] = []
    hidden = engine._decoder.hidden  # type: ignore[union-attr]
    monkeypatch.setattr(
        engine._decoder, "hidden", lambda tokens, *rest: (computed.append(len(tokens)), hidden(tokens, *rest))[1]
    )
    dice = random.Random(3)
    prompt: list[int] = []
    for turn in range(8):
        new = [dice.randrange(64) for _ in range(230 + turn)]
        n_before = len(prompt)
        prompt = [*prompt, *new]
        computed.clear()
        params = SamplingParams(max_new_tokens=30, ignore_eot=True)
        (answer,) = answers_of(engine, [Request(str(turn), prompt, params, seed=turn)]).values()
        in_prompt = sum(computed) - (len(answer.tokens) - 1)
        assert in_prompt == len(prompt) - answer.reused_tokens
        if turn:
            new_text = len(prompt) - n_before
            assert new_text + 30 <= 290
            # The last answer is part of the new text: decoding has computed it with other rounding.
            assert in_prompt <= 1.2 * (new_text + 30)
        prompt += answer.tokens
    assert len(prompt) > 2048


def test_requests_with_other_keys_or_other_weights_share_nothing(model):
    """Finds a cache that tells one client what another one has asked, or mixes versions of weights."""
    engine = engine_of(model)
    params = SamplingParams(max_new_tokens=2, ignore_eot=True)
    prompt = [dice % 61 for dice in range(200)]

    def reused(name: str, key: str) -> int:
        (answer,) = answers_of(engine, [Request(name, prompt, params, cache_key=key)]).values()
        return answer.reused_tokens

    assert [reused("1", "a"), reused("2", "a"), reused("3", "b"), reused("4", "b")] == [0, 192, 0, 192]
    other = model_of(replace(model.config, init_std=0.2))
    engine.load_weights(dict(other.named_parameters()), 7)
    assert reused("5", "a") == 0
    (warm,) = answers_of(engine, [Request("6", prompt, params, cache_key="a")]).values()
    (cold,) = answers_of(engine_of(other), [Request("6", prompt, params, cache_key="a")]).values()
    assert replace(warm, version=0) == cold

    engine.sleep()
    assert [reused("7", "a"), reused("8", "a")] == [0, 192]
    assert (engine.prefix_counts.looked_up, engine.prefix_counts.reused) == (8 * 200, 4 * 192)


def test_a_refused_request_leaves_the_shared_pages_of_others_whole():
    """Finds zeros that are written into pages that another request still reads, and nan that stays in the cache."""
    model = model_of(replace(CONFIG, max_seq_len=CONTEXT))
    weights = {name: value.clone() for name, value in model.named_parameters()}
    weights["embedding.weight"][63] = torch.nan
    engine = Engine(model.config, weights, eot_id=EOT, options=OPTIONS)
    params = SamplingParams(max_new_tokens=40, ignore_eot=True, logit_bias={63: -float("inf")})
    shared = [dice % 60 for dice in range(150)]
    good = [Request(f"good {i}", [*shared, i], params, seed=i) for i in range(3)]
    engine.submit(good[0])
    results = [result for _ in range(4) for result in engine.step()]
    engine.submit(Request("bad", [*shared[:140], 63, 5], params, n=2))
    engine.submit(good[1])
    results += engine.run()
    engine.submit(Request("bad again", [*shared[:140], 63, 5], params))
    results += engine.run()
    engine.submit(good[2])
    results += engine.run()

    assert sorted(result.request for result in results if isinstance(result, Refusal)) == ["bad", "bad again"]
    plain = Engine(model.config, weights, eot_id=EOT, options=replace(OPTIONS, prefix_cache=False))
    expected = answers_of(plain, good)
    assert {(a.request, a.index): a for a in results if isinstance(a, Answer)} == expected
    assert engine.free_pages == OPTIONS.n_pages


def test_a_prompt_cancelled_half_way_is_not_computed_from_its_beginning_again(model):
    """Finds an editor that cancels while it types, and so never gets a long prompt computed."""
    engine = engine_of(model)
    params = SamplingParams(max_new_tokens=2, ignore_eot=True)
    prompt = [dice % 61 for dice in range(200)]
    engine.submit(Request("cancelled", prompt, params))
    for _ in range(2):
        engine.step()
    engine.cancel("cancelled")
    answers = answers_of(engine, [Request("whole", prompt, params)])
    assert answers["whole", 0].reused_tokens == 2 * OPTIONS.piece_tokens


def test_the_least_recently_used_pages_go_first_and_the_end_of_a_prompt_before_its_beginning():
    """Finds an eviction that leaves pages which nobody can reach."""
    pool = PagePool(4, evicted=lambda page: cache.forget(page))
    cache = PrefixCache(pool, 2 * BLOCK)
    first, second = ([place * k for place in range(4 * BLOCK)] for k in (1, 2))
    for tokens in (first, second):
        digests = block_digests(tokens, "")
        pages = [pool.take(), pool.take()]
        cache.add(digests, pages, 0, len(tokens))
        pool.give_back(pages)
    assert pool.n_free == 4

    # A use makes the first prompt the newer one.
    pool.share(cache.find(block_digests(first, ""), 1000).pages)
    pool.give_back(cache.find(block_digests(first, ""), 1000).pages)
    tokens_left = []
    for _ in range(4):
        pool.take()
        tokens_left.append([cache.find(block_digests(tokens, ""), 1000).n_tokens for tokens in (first, second)])
    whole, half = 4 * BLOCK, 2 * BLOCK
    assert tokens_left == [[whole, half], [whole, 0], [half, 0], [0, 0]]


@pytest.mark.parametrize(("key", "value"), [("page_tokens", 48), ("piece_tokens", 40)])
def test_sizes_that_cut_blocks_are_refused(key, value):
    """Finds a size with which a cached prefix would be computed in other blocks than a cold one."""
    with pytest.raises(ConfigError, match=f"{key}.*{value}.*multiple of 32 for prefix_cache"):
        replace(OPTIONS, **{key: value})
