"""Every option of `option_rows` in model, packed documents, engine, adapters, export and dry run.

A row finds an option that one of these forgets: the engine that scales otherwise, an export without its key, packed
documents that see each other.
"""

from dataclasses import asdict, fields, replace

import pytest
import torch

from dist_lm.config.model import LAYER_LISTS, ModelConfig
from dist_lm.errors import ConfigError
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.likelihood import Tree, likelihoods
from dist_lm.generation.request import Answer, Request, SamplingParams
from dist_lm.interop.architectures import Architecture, architecture_of, hf_config, model_of
from dist_lm.interop.gguf_file import gguf_architecture, require_gguf
from dist_lm.model.keyed_random import initialise
from dist_lm.model.size import parameter_shapes
from dist_lm.model.transformer import Transformer
from tests.model.option_rows import ELSEWHERE, ROWS, OptionRow
from tests.model.test_lora import adapted, base_and_adapted, merge, move

PAGE = 16
OPTIONS = EngineOptions(cache_tokens=24 * PAGE, page_tokens=PAGE, max_sequences=4, piece_tokens=32, step_tokens=64)
SIZES = {"d_model": 50, "n_layers": 3, "n_heads": 5, "d_ff": 77, "max_seq_len": 160, "vocab_size": 101}

rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def config_of(row: OptionRow, **changes) -> ModelConfig:
    """Five heads of width 10: no power of two, and no multiple of 8."""
    return ModelConfig(name="options", init_std=0.15, **{**SIZES, **row.changes, **changes})


def model_with(config: ModelConfig) -> Transformer:
    """Norms and biases are moved off 1 and 0, so that a forgotten one shows."""
    model = Transformer(config)
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(requires_grad=False)


def tokens_of(*shape: int) -> torch.Tensor:
    return torch.randint(2, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def test_every_option_has_a_row():
    keys = {key for row in ROWS.values() for key in row.keys}
    elsewhere = {key for keys in ELSEWHERE.values() for key in keys}
    assert keys | elsewhere == {field.name for field in fields(ModelConfig)}
    assert not keys & elsewhere


@rows
def test_its_value_changes_the_logits_and_the_parameters_are_those_that_are_counted(row: OptionRow):
    config = config_of(row)
    model = model_with(config)
    assert {name: tuple(tensor.shape) for name, tensor in model.named_parameters()} == parameter_shapes(config)

    default = {field.name: field.default for field in fields(ModelConfig)} | {key: [] for key in LAYER_LISTS}
    plain = replace(config, **{key: default[key] for key in row.keys if key != "ffn"})
    if "ffn" in row.keys:
        plain = replace(config, ffn="swiglu" if config.is_gated else "gelu")
    other = model_with(plain)
    shapes = parameter_shapes(plain)
    alike = {name: tensor for name, tensor in model.state_dict().items() if shapes.get(name) == tuple(tensor.shape)}
    other.load_state_dict(alike, strict=False)
    tokens = tokens_of(2, 60)
    assert not torch.allclose(model(tokens), other(tokens), rtol=0, atol=1e-4)


@rows
@pytest.mark.parametrize("lengths", [(70, 3, 27), (50, 50), (100,)], ids=str)
def test_packed_documents_are_those_alone(row: OptionRow, lengths: tuple[int, ...]):
    """Both with boundaries and with a mask, for rows that the choice between them sees differently."""
    model = model_with(config_of(row))
    tokens = tokens_of(2, 100)
    document = torch.tensor([number for number, length in enumerate(lengths) for _ in range(length)]).expand(2, -1)
    position = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    alone = torch.cat([model(part) for part in tokens.split(lengths, dim=1)], dim=1)
    packed = model(tokens, document_BT=document, position_BT=position)
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)

    # Branches always take a mask; a trunk alone is a document.
    trunk = torch.zeros_like(document)
    masked = model.hidden(tokens, document_BT=document, position_BT=position, branch_BT=trunk)
    torch.testing.assert_close(model.head(masked), alone, rtol=0, atol=2e-5)


@rows
def test_a_branch_is_the_document_of_trunk_and_branch(row: OptionRow):
    """What a branch sees depends on positions, and not on the branches that stand between."""
    model = model_with(config_of(row))
    trunk, first, second = tokens_of(3, 60)[0, :40], tokens_of(3, 60)[1, :30], tokens_of(3, 60)[2, :30]
    tokens = torch.cat([trunk, first, second])[None]
    position = torch.cat([torch.arange(40), torch.arange(40, 70), torch.arange(40, 70)])[None]
    branch = torch.cat([torch.zeros(40), torch.ones(30), torch.full((30,), 2.0)]).long()[None]
    hidden = model.hidden(tokens, document_BT=torch.zeros_like(branch), position_BT=position, branch_BT=branch)
    whole = model.hidden(torch.cat([trunk, second])[None])
    torch.testing.assert_close(hidden[:, 70:], whole[:, 40:], rtol=0, atol=2e-5)


def engine_of(model: Transformer) -> Engine:
    return Engine(model.config, dict(model.named_parameters()), eot_id=1, options=OPTIONS)


@pytest.mark.heavy
@rows
@torch.inference_mode()
def test_the_engine_writes_what_the_model_does(row: OptionRow):
    """Two prompts of several pieces and pages, one of them twice, in a cache that is too small for all: the greedy
    text of 64 tokens is the model's, and an answer has the same bits alone."""
    model = model_with(config_of(row, d_ff=64, n_kv_heads=1))
    greedy = SamplingParams(max_new_tokens=64, temperature=0.0, ignore_eot=True)
    requests = [Request(str(n), tokens_of(3, 95)[n, : 50 + 22 * n].tolist(), greedy, n=1 + n % 2) for n in range(3)]
    engine = engine_of(model)
    for request in requests:
        engine.submit(request)
    answers = [answer for answer in engine.run() if isinstance(answer, Answer)]
    assert len(answers) == 4

    for answer in answers:
        prompt = requests[int(answer.request)].prompt
        written = torch.tensor([*prompt, *answer.tokens])
        logits = model(written[None])[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.raw_logprobs), logprobs, rtol=0, atol=2e-5)
        assert list(answer.tokens) == logits.argmax(-1).tolist()

    alone = engine_of(model)
    alone.submit(requests[0])
    (answer,) = alone.run()
    assert answer == next(other for other in answers if other.request == "0")


@rows
@torch.inference_mode()
def test_likelihoods_of_continuations_are_the_models(row: OptionRow):
    model = model_with(config_of(row))
    decoder = engine_of(model)._decoder
    context, *continuations = (tuple(tokens_of(3, 60)[n, : 60 - 15 * n].tolist()) for n in range(3))
    ((first, second),) = likelihoods(decoder, [Tree(context, tuple(continuations))], torch.device("cpu"))
    for continuation, likelihood in zip(continuations, (first, second), strict=True):
        logits = model(torch.tensor([[*context, *continuation]]))[0, len(context) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(likelihood.logprobs), logprobs, rtol=0, atol=2e-5)


@rows
def test_adapters_are_merged_into_it(row: OptionRow):
    config = adapted(**row.changes_at(2))
    base, model = base_and_adapted(config)
    move(model)
    tokens = tokens_of(2, 30) % config.vocab_size
    changed = model(tokens)
    assert not torch.allclose(changed, base(tokens), rtol=1e-2)
    merge(base, model)
    torch.testing.assert_close(changed, base(tokens), rtol=1e-4, atol=1e-4)


@rows
def test_config_json_says_it_and_is_read_again(row: OptionRow):
    config = config_of(row)
    found = architecture_of(config)
    assert isinstance(found, Architecture), found
    assert found.family == row.family
    again, _ = model_of(hf_config(config, found, "float32"), "options", "config.json")

    # Biases can be said in several ways; those that the model has are the same.
    assert parameter_shapes(again) == parameter_shapes(config)
    biases = {"bias": True, "attention_bias": None, "ffn_bias": None}
    assert asdict(replace(again, **biases)) == asdict(replace(config, **biases))


@rows
def test_llama_cpp_gets_it_or_it_is_refused_by_name(row: OptionRow):
    pytest.importorskip("gguf")
    config = config_of(row)
    found = architecture_of(config)
    assert isinstance(found, Architecture)
    if not row.gguf:
        require_gguf("F16", config, gguf_architecture(config, found))
        return
    with pytest.raises(ConfigError, match=row.gguf):
        require_gguf("F16", config, gguf_architecture(config, found))
