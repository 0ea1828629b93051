"""Adapters beside one base: an answer is that of the adapter alone, whatever runs and is loaded beside it."""

from dataclasses import dataclass, replace

import pytest
import torch

from dist_lm.config.model import AdaptedModelConfig, ModelConfig
from dist_lm.config.stage import LoraConfig
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.generation.adapters import AdapterWeights, Run, runs_of
from dist_lm.generation.embedding import EmbeddingRequest, embeddings
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.request import Answer, Request, RequestError, SamplingParams
from dist_lm.model.lora import adapter_of, change
from dist_lm.model.size import ADAPTERS, parameter_shapes
from tests.model.option_rows import LLAMA, ROWS
from tests.model.small_models import small_config, small_model

EOT = 1
PAGE = 16
OPTIONS = EngineOptions(cache_tokens=40 * PAGE, page_tokens=PAGE, max_sequences=32, piece_tokens=32, step_tokens=64)
MODELS = {
    "gelu with biases": {"ffn": "gelu_tanh"},
    "gated, grouped, norms of heads": {**LLAMA, "n_kv_heads": 1, "qk_norm": True, "tie_embeddings": True, "d_ff": 50},
    "norms after": ROWS["norm after, over all heads"].changes,
    "scaled branches": {**LLAMA, "residual_scale": 0.5, "attention_scale": 0.3, "head_width": 16},
}
# Each changes other weights, with another rank and scale.
LORAS = {
    "all": LoraConfig(rank=3, alpha=6.0),
    "keys and downs": LoraConfig(rank=2, alpha=5.0, targets=["key", "down"]),
    "attention": LoraConfig(rank=5, alpha=4.0, targets=["attention"], rslora=True),
    "ups": LoraConfig(rank=33, alpha=9.0, targets=["up"]),
}


@dataclass(frozen=True)
class Family:
    """A base, and adapters of it."""

    config: ModelConfig
    base: dict[str, torch.Tensor]
    adapters: dict[str, AdapterWeights]

    def engine(self, *names: str, options: EngineOptions = OPTIONS) -> Engine:
        """An engine with the base's weights and some of the adapters."""
        engine = Engine(self.config, self.base, eot_id=EOT, options=options, version=7)
        for name in names or self.adapters:
            engine.add_adapter(self.adapters[name])
        return engine

    def merged(self, name: str) -> dict[str, torch.Tensor]:
        """The weights of an adapter's model, as it is served alone."""
        adapter = self.adapters[name]
        weights: dict[str, torch.Tensor] = {}
        for parameter, weight in self.base.items():
            a, b = (adapter.factors.get(f"{adapter_of(parameter)}{factor}") for factor in "ab")
            weights[parameter] = weight
            if a is not None and b is not None:
                weights[parameter] = weight + change(parameter, a, b, adapter.config.scale)
        return weights


def family_of(changes: dict) -> Family:
    config = small_config(**changes)
    generator = torch.Generator().manual_seed(3)
    adapters: dict[str, AdapterWeights] = {}
    for version, (name, lora) in enumerate(LORAS.items(), start=20):
        adapted = AdaptedModelConfig.of(config, lora)
        shapes = {factor: shape for factor, shape in parameter_shapes(adapted).items() if ADAPTERS in factor}
        factors = {factor: 0.2 * torch.randn(shape, generator=generator) for factor, shape in shapes.items()}
        adapters[name] = AdapterWeights(name, adapted, factors, version)
    return Family(config, dict(small_model(config).requires_grad_(requires_grad=False).named_parameters()), adapters)


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest) -> Family:
    return family_of(MODELS[request.param])


@pytest.fixture(scope="module")
def plain() -> Family:
    return family_of({})


def request_of(adapter: str, number: int) -> Request:
    prompt = [(5 * number + 3 * place) % 60 + 2 for place in range(2 + 4 * number)]
    return Request(f"{adapter} {number}", prompt, SamplingParams(6, ignore_eot=True), seed=number, adapter=adapter)


def answers_of(engine: Engine, *requests: Request) -> dict[str, Answer]:
    for request in requests:
        engine.submit(request)
    answers = [answer for answer in engine.run() if isinstance(answer, Answer)]
    assert len(answers) == len(requests)
    return {answer.request: answer for answer in answers}


def test_answers_are_those_of_the_merged_model(family: Family):
    """Finds a wrong scale, a factor of the wrong weight or on the wrong side, and rows of another adapter."""
    requests = [request_of(adapter, number) for adapter in family.adapters for number in (1, 4)]
    together = answers_of(family.engine(), *requests)
    for name in family.adapters:
        own = [request for request in requests if request.adapter == name]
        alone = Engine(family.config, family.merged(name), eot_id=EOT, options=OPTIONS)
        for request, answer in answers_of(alone, *[replace(request, adapter="") for request in own]).items():
            assert together[request].tokens == answer.tokens
            expected, found = torch.tensor(answer.raw_logprobs), torch.tensor(together[request].raw_logprobs)
            assert torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_an_answer_has_the_same_bits_alone_and_among_others(family: Family):
    """Finds a product whose rounding depends on the rows beside it or on the adapters that are loaded, a base that
    changes with adapters beside it, and pages or versions of another adapter."""
    requests = [request_of(adapter, number) for number in range(3) for adapter in ("", *family.adapters)]
    together = answers_of(family.engine(), *requests)
    base = answers_of(Engine(family.config, family.base, eot_id=EOT, options=OPTIONS, version=7), *requests[::5])
    for request in requests[::5]:
        assert together[request.id] == base[request.id]
    for request in requests[-len(family.adapters) :]:
        alone = answers_of(family.engine(request.adapter), request)[request.id]
        assert together[request.id] == alone
        assert alone.version == family.adapters[request.adapter].version


def test_a_prompt_is_cached_for_its_own_adapter_alone(plain: Family):
    """Finds keys and values of one adapter under an answer of another."""
    options = replace(OPTIONS, cache_tokens=4096, page_tokens=256, piece_tokens=256, prefix_cache=True)
    config = replace(plain.config, max_seq_len=320)
    plain = replace(plain, config=config)
    prompt = [place % 60 + 2 for place in range(300)]
    requests = [Request(name, prompt, SamplingParams(4), adapter=name) for name in ("", "all", "attention")]
    engine = plain.engine(options=options)
    first = [answers_of(engine, request)[request.id] for request in requests]
    again = [answers_of(engine, request)[request.id] for request in requests]
    assert [answer.reused_tokens for answer in first] == [0, 0, 0]
    assert [answer.reused_tokens for answer in again] == [288, 288, 288]  # complete blocks
    assert [replace(answer, reused_tokens=0) for answer in again] == first
    assert len({answer.raw_logprobs for answer in first}) == 3


def test_embeddings_are_those_of_the_adapter(plain: Family):
    """Finds an embedding of the base under the name of an adapter."""
    engine, cpu = plain.engine(), torch.device("cpu")
    merged = Engine(plain.config, plain.merged("all"), eot_id=EOT, options=OPTIONS)
    sequences = [[3, 4, 5], [6, 7]]
    (found,) = embeddings(engine.decoder, EmbeddingRequest("a", sequences, adapter="all"), cpu)
    (expected,) = embeddings(merged.decoder, EmbeddingRequest("a", sequences), cpu)
    (base,) = embeddings(engine.decoder, EmbeddingRequest("a", sequences), cpu)
    assert abs(found - expected).max() < 1e-5 < abs(found - base).max()


def test_what_an_engine_cannot_hold_is_refused(plain: Family):
    """Finds a request that is answered by the base in place of an adapter, and new weights below old adapters."""
    engine = plain.engine("all")
    with pytest.raises(RequestError, match="adapter=ups"):
        engine.submit(request_of("ups", 1))
    with pytest.raises(ConfigError, match="adapter=all: expected another name"):
        engine.add_adapter(plain.adapters["all"])
    with pytest.raises(RuntimeError, match="below adapters"):
        engine.load_weights(plain.base, 8)

    of_other = AdaptedModelConfig.of(small_config(d_model=80), LORAS["all"])
    with pytest.raises(ArtefactError, match=r"blocks\.0\.attention\.adapters\.query\.a has shape"):
        engine.add_adapter(replace(plain.adapters["all"], name="other", config=of_other))
    with pytest.raises(ArtefactError, match="is missing"):
        engine.add_adapter(replace(plain.adapters["all"], name="empty", factors={}))


def test_rows_of_one_adapter_that_stand_together_are_one_run():
    """Finds rows that no run holds, and runs where no row has an adapter."""
    assert runs_of(["", ""]) == ()
    assert runs_of(["", "a", "a", "b"]) == (Run("", slice(0, 1)), Run("a", slice(1, 3)), Run("b", slice(3, 4)))
    assert runs_of(["a", "a", ""], [2, 3, 4]) == (Run("a", slice(0, 5)), Run("", slice(5, 9)))
