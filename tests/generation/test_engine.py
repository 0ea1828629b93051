"""The engine gives every request what a plain forward gives it, whatever else it does meanwhile."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_lm.config.model import ModelConfig
from dist_lm.config.pool import CACHE_SHARE
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.generation import engine_options
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.request import Answer, Refusal, Request, RequestError, SamplingParams
from dist_lm.generation.sampling import adjusted, group_rows, sample, uniform
from dist_lm.model.keyed_random import hash_words, initialise, signed
from dist_lm.model.size import kv_bytes_per_token
from dist_lm.model.transformer import Transformer

EOT = 1
SLACK = 2e-5  # by which rounding may move a cumulative probability, or a logit
CONFIG = ModelConfig(
    name="small", d_model=40, n_layers=2, n_heads=5, d_ff=72, max_seq_len=160, vocab_size=64, init_std=0.15
)
OTHERS = {
    **{"norm": "rmsnorm", "ffn": "swiglu", "bias": False, "qkv_bias": True, "tie_embeddings": True, "qk_norm": True},
    **{"parallel_residual": True, "rotary_fraction": 0.5},
    **{"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_len": 32},
    **{"window": 20, "full_layers": [1]},
}  # than the values of CONFIG
GROUPED = replace(CONFIG, n_kv_heads=1, d_ff=50, **OTHERS)
PAGE = 16
SMALL = EngineOptions(cache_tokens=20 * PAGE, page_tokens=PAGE, max_sequences=6, piece_tokens=32, step_tokens=64)


def model_of(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    initialise(model, seed=0)
    return model.requires_grad_(requires_grad=False)


# in the second, rounding in fp32 grows to 1.2e-5, in the engine and in the plain forward alike: fp64 tells them apart
@pytest.fixture(scope="module", params=[(CONFIG, torch.float32), (GROUPED, torch.float64)], ids=["heads", "groups"])
def model(request: pytest.FixtureRequest) -> Transformer:
    config, dtype = request.param
    return model_of(config).to(dtype)


def engine_of(model: Transformer, options: EngineOptions = SMALL) -> Engine:
    weights = dict(model.named_parameters())
    return Engine(model.config, weights, eot_id=EOT, options=options, dtype=model.embedding.weight.dtype)


@torch.inference_mode()
def check_answer(model: Transformer, request: Request, answer: Answer) -> None:
    """Against one plain forward over prompt and answer: no cache, no batch."""
    params, n_prompt, drawn = request.params, len(request.prompt), torch.tensor(answer.tokens)
    row = torch.tensor([*request.prompt, *answer.tokens])
    logits = model(row[None])[0, n_prompt - 1 : -1].float()
    expected = logits.log_softmax(-1).gather(1, drawn[:, None])[:, 0]
    assert torch.allclose(torch.tensor(answer.raw_logprobs), expected, rtol=0, atol=1e-5)

    seen = [row[: n_prompt + place].tolist() for place in range(len(drawn))]
    changed = adjusted(logits, [params] * len(drawn), seen, [n_prompt] * len(drawn))
    seed = torch.full((len(drawn),), signed(hash_words(request.seed, answer.index)))
    u = uniform(seed, torch.arange(n_prompt, len(row)))
    groups = group_rows([params] * len(drawn), torch.device("cpu"))
    choices = [sample(logits, groups, (u + shift).clamp(0, 1), changed) for shift in (-SLACK, 0, SLACK)]
    same = torch.stack([choice.token_B == drawn for choice in choices]).any(dim=0)
    if params.temperature == 0:
        best = logits if changed is None else changed
        same |= best.amax(-1) - best.gather(1, drawn[:, None])[:, 0] < SLACK
    assert same.all()
    exact = choices[1].token_B == drawn
    logprobs = torch.tensor(answer.logprobs)
    assert torch.allclose(logprobs[exact], choices[1].logprob_B[exact], rtol=0, atol=1e-5)

    ends = [i for i, t in enumerate(answer.tokens) if (t == EOT and not params.ignore_eot) or t in params.stop_tokens]
    if answer.finish == "cancelled":
        assert not ends
    elif ends:
        assert (answer.finish, ends) == ("eot" if answer.tokens[-1] == EOT else "stop", [len(drawn) - 1])
    else:
        whole = len(row) == model.config.max_seq_len
        assert answer.finish == ("length" if len(drawn) == params.max_new_tokens else "context")
        assert whole or answer.finish == "length"


def check(model: Transformer, requests: Sequence[Request], done: Sequence[Answer | Refusal]) -> None:
    answers = {(answer.request, answer.index): answer for answer in done if isinstance(answer, Answer)}
    assert len(answers) == len(done) == sum(request.n for request in requests)
    for request in requests:
        for index in range(request.n):
            answer = answers[request.id, index]
            if answer.tokens:
                check_answer(model, request, answer)


def run_schedule(model: Transformer, requests: Sequence[Request], pages: int, seed: int) -> None:
    """Requests join and are cancelled at random steps; the cache is small, so that some are set aside."""
    dice = random.Random(seed)
    engine = engine_of(model, replace(SMALL, cache_tokens=PAGE * pages))
    left, done = list(requests), []
    while left or engine.busy:
        while left and dice.random() < 0.3:
            engine.submit(left.pop(0))
        if dice.random() < 0.05:
            engine.cancel(dice.choice(requests).id)
        done += engine.step()
    submitted = {answer.request for answer in done}
    check(model, [request for request in requests if request.id in submitted], done)
    assert engine._page_pool.n_free == pages, "a page has leaked"


def run_random_schedule(model: Transformer, dice: random.Random) -> None:
    """Runs requests of all kinds on a cache so small that most schedules set sequences aside."""
    requests = [
        Request(
            id=str(number),
            prompt=[dice.randrange(64) for _ in range(dice.randint(1, 150))],
            params=SamplingParams(
                max_new_tokens=dice.randint(1, 60),
                temperature=dice.choice([0, 0.7, 1]),
                top_k=dice.choice([0, 5]),
                top_p=dice.choice([0.9, 1]),
                repetition_penalty=dice.choice([1, 1, 1.3]),
                frequency_penalty=dice.choice([0, 0, 0.5]),
                ignore_eot=dice.random() < 0.8,
            ),
            seed=dice.getrandbits(63) - (1 << 62),
            n=dice.choice([1, 2, 5]),
        )
        for number in range(dice.randint(5, 8))
    ]
    run_schedule(model, requests, dice.randint(12, 14), dice.getrandbits(30))


@pytest.mark.heavy
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dice=st.randoms(use_true_random=True))
def test_any_schedule_gives_what_a_plain_forward_gives(model, dice):
    """Finds keys on another page, a shared page that is written to, and a sequence that is set aside and comes back as
    another one."""
    run_random_schedule(model, dice)


@pytest.mark.bars
@pytest.mark.timeout(1800)
def test_a_thousand_random_schedules(model):
    """Finds the same faults, at length."""
    dice = random.Random(20261125)
    for _ in range(500):  # of each model
        run_random_schedule(model, dice)


def answers_of(engine: Engine) -> dict[tuple[str, int], Answer]:
    return {(answer.request, answer.index): answer for answer in engine.run() if isinstance(answer, Answer)}


def requests_of_all_kinds(n: int = 12) -> list[Request]:
    dice = random.Random(5)
    kinds = [SamplingParams(max_new_tokens=60), SamplingParams(max_new_tokens=25, top_k=7, top_p=0.9, temperature=0.8)]
    return [
        Request(str(i), [dice.randrange(64) for _ in range(dice.randint(1, 90))], kinds[i % 2], seed=i, n=1 + i % 3)
        for i in range(n)
    ]


@pytest.mark.heavy
def test_an_answer_is_the_same_to_the_last_bit_whatever_it_is_batched_with(model, monkeypatch):
    """Finds rounding that depends on the batch, on the pages or on being set aside; and a small cache in which no page
    is shared and no sequence set aside."""
    requests = requests_of_all_kinds(8)
    together = engine_of(model, replace(SMALL, cache_tokens=10 * PAGE))
    preempted, shared = [], []
    preempt, share = together._preempt, together._page_pool.share
    monkeypatch.setattr(together, "_preempt", lambda sequence: (preempted.append(sequence), preempt(sequence)))
    monkeypatch.setattr(together._page_pool, "share", lambda pages: (shared.extend(pages), share(pages)))
    for request in requests:
        together.submit(request)
    crowded = answers_of(together)
    assert len(preempted) >= 3
    assert len(shared) > 10

    alone = engine_of(model, replace(SMALL, cache_tokens=100 * PAGE))
    for request in requests:
        alone.submit(request)
        assert all(answer == crowded[key] for key, answer in answers_of(alone).items())


def test_a_prompt_is_computed_once_for_all_its_answers_and_each_token_once(model, monkeypatch):
    engine = engine_of(model, replace(SMALL, piece_tokens=8, max_sequences=8))
    computed: list[int] = []
    hidden = engine._decoder.hidden
    monkeypatch.setattr(
        engine._decoder, "hidden", lambda tokens, *rest: (computed.append(len(tokens)), hidden(tokens, *rest))[1]
    )
    engine.submit(Request("a", [5] * 30, SamplingParams(max_new_tokens=6, ignore_eot=True), n=8))
    assert len(engine.run()) == 8
    assert computed == [8, 8, 8, 6, *[8] * 5]


def test_a_request_can_join_and_be_cancelled_while_others_run(model):
    engine = engine_of(model)
    long = SamplingParams(max_new_tokens=30, ignore_eot=True)
    engine.submit(Request("first", [3, 4], long))
    done = [answer for _ in range(5) for answer in engine.step()]
    engine.submit(Request("second", [5], long))
    done += engine.step()
    engine.cancel("first")
    done += engine.run()
    first, second = done
    assert isinstance(first, Answer)
    assert isinstance(second, Answer)
    assert (first.request, first.finish, len(first.tokens)) == ("first", "cancelled", 6)
    assert (second.request, second.finish, len(second.tokens)) == ("second", "length", 30)


def test_who_listens_may_cancel(model):
    engine = engine_of(model)
    shown: list[int] = []

    def listen(request: str, index: int, token: int, text: str) -> None:
        shown.append(token)
        if len(shown) == 7:
            engine.cancel(request)

    engine.submit(Request("a", [3, 4], SamplingParams(max_new_tokens=30, ignore_eot=True), n=2), listen)
    engine.submit(Request("b", [5], SamplingParams(max_new_tokens=9, ignore_eot=True)))
    answers = answers_of(engine)
    assert {key: answer.finish for key, answer in answers.items()} == {
        ("a", 0): "cancelled",
        ("a", 1): "cancelled",
        ("b", 0): "length",
    }
    assert len(shown) == 7


def test_new_weights_have_a_version_and_wait_for_an_idle_engine(model):
    engine = engine_of(model)
    engine.submit(Request("a", [3], SamplingParams(max_new_tokens=3)))
    engine.step()
    other = model_of(replace(model.config, init_std=0.2)).to(model.embedding.weight.dtype)
    with pytest.raises(RuntimeError, match="under way"):
        engine.load_weights(dict(other.named_parameters()), 7)
    engine.run()
    engine.load_weights(dict(other.named_parameters()), 7)
    request = Request("b", [3, 9], SamplingParams(max_new_tokens=10), seed=4)
    engine.submit(request)
    (answer,) = engine.run()
    assert isinstance(answer, Answer)
    assert answer.version == 7
    check_answer(other, request, answer)


def test_weights_that_arrive_one_by_one_are_used_only_once_all_have_come(model):
    engine = engine_of(model)
    asked = Request("a", [3, 9], SamplingParams(max_new_tokens=10), seed=4)
    other = model_of(replace(model.config, init_std=0.2)).to(model.embedding.weight.dtype)
    parameters = list(other.named_parameters())

    def cut_off():
        yield from parameters[:-2]
        raise ConnectionError("the sender is gone")

    with pytest.raises(ConnectionError):
        engine.load_weights(cut_off(), 7)
    with pytest.raises(RuntimeError, match="did not arrive completely"):
        engine.submit(asked)
    with pytest.raises(ArtefactError, match="is missing"):
        engine.load_weights(iter(parameters[:-1]), 7)
    engine.load_weights(iter(parameters), 8)
    engine.submit(asked)
    (answer,) = engine.run()
    assert isinstance(answer, Answer)
    assert answer.version == 8
    check_answer(other, asked, answer)


def cache_bytes(engine: Engine) -> int:
    cache = engine._decoder.cache  # type: ignore[union-attr]
    return cache.key.untyped_storage().nbytes() + cache.value.untyped_storage().nbytes()


@pytest.mark.parametrize("cache_tokens", [SMALL.cache_tokens, 0], ids=["fixed", "automatic"])
def test_an_engine_that_slept_answers_as_before_and_its_cache_takes_no_memory_meanwhile(model, cache_tokens):
    asked = [
        Request(str(i), [3 + i] * (20 + i), SamplingParams(max_new_tokens=30, ignore_eot=True), seed=i)
        for i in range(5)
    ]

    def answers(engine: Engine) -> list[tuple]:
        for request in asked:
            engine.submit(request)
        return sorted((one.request, one.tokens, one.logprobs) for one in engine.run() if isinstance(one, Answer))

    expected = answers(engine_of(model))
    engine = engine_of(model, replace(SMALL, cache_tokens=cache_tokens))
    for _ in range(2):
        assert answers(engine) == expected
        awake = cache_bytes(engine)
        engine.sleep()
        assert cache_bytes(engine) <= awake / 10
    engine.submit(asked[0])
    with pytest.raises(AssertionError):
        engine.sleep()


def test_a_cache_is_as_large_as_free_memory_allows_and_as_requests_need(monkeypatch):
    options = replace(SMALL, cache_tokens=0)
    page_bytes = PAGE * kv_bytes_per_token(CONFIG, CONFIG.kv_heads, 4)
    cpu, longest = torch.device("cpu"), CONFIG.max_seq_len // PAGE
    for pages, expected in ((longest, longest), (3 * longest, 3 * longest), (10**6, SMALL.max_sequences * longest)):
        monkeypatch.setattr(engine_options, "free_bytes", lambda device, n=pages: n * page_bytes / CACHE_SHARE["cpu"])
        assert engine_options.pages_that_fit(CONFIG, options, torch.float32, cpu) == expected
        assert engine_options.pages_that_fit(CONFIG, options, torch.bfloat16, cpu) >= expected
    monkeypatch.setattr(engine_options, "free_bytes", lambda device: page_bytes)
    with pytest.raises(ConfigError, match=r"cache_tokens=0: .*at least model\.max_seq_len=160"):
        engine_options.pages_that_fit(CONFIG, options, torch.float32, cpu)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("r", []), "prompt is empty"),
        (Request("r", [64]), "prompt has token 64; expected 0 to 63"),
        (Request("r", [1] * 160), r"prompt has 160 tokens and model\.max_seq_len is 160.*truncate=left"),
        (Request("r", [1], n=0), "n=0"),
        (Request("r", [1], SamplingParams(stop=("a",))), r"stop=\['a'\].*no vocabulary"),
        (Request("r", [1], SamplingParams(stop_tokens=(99,))), "stop_tokens or logit_bias name token 99"),
        (Request("r", [1] * 10, SamplingParams(max_new_tokens=30)), "take 40 tokens of a cache of cache_tokens=32"),
    ],
)
def test_what_cannot_be_answered_is_refused_and_others_go_on(model, request_, words):
    engine = engine_of(model, replace(SMALL, cache_tokens=32))
    engine.submit(Request("good", [1], SamplingParams(max_new_tokens=4, ignore_eot=True)))
    with pytest.raises(RequestError, match=words) as refusal:
        engine.submit(request_)
    assert refusal.value.request == "r"
    assert [answer.request for answer in engine.run()] == ["good"]


def test_a_long_prompt_is_cut_on_the_left_where_that_is_asked_for(model):
    engine = engine_of(model)
    params = SamplingParams(max_new_tokens=8, temperature=0, ignore_eot=True)
    engine.submit(Request("long", [i % 60 for i in range(200)], params, truncate="left"))
    (answer,) = engine.run()
    assert isinstance(answer, Answer)
    assert (answer.prompt_tokens, len(answer.tokens)) == (152, 8)
    check_answer(model, Request("long", [i % 60 for i in range(48, 200)], params), answer)


def test_logits_that_are_no_numbers_end_their_request_alone():
    model = model_of(CONFIG)  # in a model with a tied head one bad row would make the logits of all requests nan
    weights = {name: value.clone() for name, value in model.named_parameters()}
    weights["embedding.weight"][63] = torch.nan
    engine = Engine(model.config, weights, eot_id=EOT, options=replace(SMALL, cache_tokens=3 * PAGE))
    params = SamplingParams(max_new_tokens=12, ignore_eot=True, logit_bias={63: -float("inf")})
    good = [Request(f"good{i}", [3 + i], params, seed=i) for i in range(6)]
    for request in (good[0], Request("bad", [4, 63, 5], params, n=3), *good[1:]):
        engine.submit(request)
    done = engine.run()
    refused = [one for one in done if isinstance(one, Refusal)]
    assert [one.request for one in refused] == ["bad"]
    assert "nan" in refused[0].error
    for answer in done:
        if isinstance(answer, Answer):
            check_answer(model, next(request for request in good if request.id == answer.request), answer)


@pytest.mark.parametrize(("prefix_cache", "n_prompt"), [(False, 3), (True, 100)])
def test_a_request_cancelled_before_its_logits_leaves_no_nan_behind(prefix_cache, n_prompt):
    """Finds a page that goes to another request, which is then refused for the nan of the cancelled one."""
    model = model_of(CONFIG)
    weights = {name: value.clone() for name, value in model.named_parameters()}
    weights["embedding.weight"][63] = torch.nan
    options = replace(SMALL, cache_tokens=128, page_tokens=32, prefix_cache=prefix_cache)
    engine = Engine(model.config, weights, eot_id=EOT, options=options)
    params = SamplingParams(max_new_tokens=12, ignore_eot=True, logit_bias={63: -float("inf")})
    # Its last page, partly filled, is the one that the bad request has used: the first free one, or the only kept one.
    good = Request("good", [3] * n_prompt, params)

    engine.submit(Request("bad", [4] * 25 + [63] + [5] * 74, params))
    assert not engine.step()
    engine.cancel("bad")
    engine.submit(good)
    cancelled, answer = engine.run()
    assert isinstance(cancelled, Answer)
    assert cancelled.finish == "cancelled"
    assert isinstance(answer, Answer), answer
    check_answer(model, good, answer)


def test_a_listener_that_cancels_another_request_leaves_no_nan_behind():
    """Finds a row whose logits are nan and whose request is cancelled, by an earlier row, before it is refused."""
    model = model_of(CONFIG)
    weights = {name: value.clone() for name, value in model.named_parameters()}
    weights["embedding.weight"][63] = torch.nan
    engine = Engine(model.config, weights, eot_id=EOT, options=SMALL)
    params = SamplingParams(max_new_tokens=12, ignore_eot=True, logit_bias={63: -float("inf")})

    engine.submit(Request("first", [3], params), lambda *_: engine.cancel("bad"))
    engine.submit(Request("bad", [4, 63, 5], params))
    results = engine.run()
    assert [result.request for result in results if isinstance(result, Refusal)] == ["bad"]
    assert all(cache.isfinite().all() for cache in (engine.decoder.cache.key, engine.decoder.cache.value))


def test_texts_stream_and_stop(model):
    vocabulary = [b"", b"", *(bytes([65 + i % 26]) for i in range(60)), "é".encode()[:1], "é".encode()[1:]]
    engine = Engine(model.config, dict(model.named_parameters()), eot_id=EOT, vocabulary=vocabulary, options=SMALL)
    params = SamplingParams(max_new_tokens=30, ignore_eot=True)
    engine.submit(Request("free", [3, 4], params, seed=2))
    (free,) = engine.run()
    assert isinstance(free, Answer)
    stop = free.text[5:8]
    shown: list[str] = []
    stopping = Request("stopping", [3, 4], replace(params, stop=("never", stop)), seed=2)
    engine.submit(stopping, lambda request, index, token, text: shown.append(text))
    (stopped,) = engine.run()
    assert isinstance(stopped, Answer)
    assert stopped.finish == "stop"
    assert stopped.text == free.text[: free.text.index(stop)] == "".join(shown)
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
