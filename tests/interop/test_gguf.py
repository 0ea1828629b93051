"""A GGUF file in llama.cpp: the same ids, the same probabilities, and names for what it cannot hold."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dist_lm.chat.template import chat_template
from dist_lm.config.corpus import TokenizerConfig
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.interop.architectures import model_of
from dist_lm.interop.gguf_file import gguf_architecture, require_gguf, write_gguf
from dist_lm.interop.gguf_tokenizer import gguf_vocabulary
from dist_lm.interop.weights import converted, to_theirs
from dist_lm.model.size import parameter_shapes
from dist_lm.model.transformer import Transformer
from dist_lm.stages.importing.gguf import write_snapshot
from dist_lm.tokenizer.symbols import SPECIAL_TOKENS
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tokenizer.train import train_tokenizer
from tests.interop.hf_models import FAMILIES, architecture, our_model, small
from tests.interop.llama_cpp import LlamaServer, llama_server
from tests.tokenizer.hard_texts import hard_text
from tests.tokenizer.made_json import trained_json
from tests.tokenizer.stdlib_text import stdlib_texts

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.cluster
WIDE = {"d_model": 64, "n_heads": 4, "d_ff": 96}  # rows of whole blocks of Q8_0
# texts that llama.cpp always reads as marks, or as a space
READ_OTHERWISE = ["\u2581", *(mark for mark in SPECIAL_TOKENS if not mark.startswith("<|"))]
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
KINDS_OF_TOKENIZERS = ("trained", "across scripts", "byte level")


def write(path: Path, kind: str, model: Transformer, tokenizer: Tokenizer) -> Path:
    found = gguf_architecture(model.config, architecture(model.config))
    require_gguf(kind, model.config, found)
    tensors = converted(found, parameter_shapes(model.config))
    write_gguf(path, kind, model.config, found, tensors, model.state_dict().__getitem__, tokenizer, chat_template())
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(stdlib_texts(), path, TokenizerConfig(vocab_size=1000))
    return Tokenizer.load(path)


@pytest.fixture(scope="module", params=KINDS_OF_TOKENIZERS)
def pair(
    request: pytest.FixtureRequest, trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Tokenizer, LlamaServer]]:
    """A tokenizer here and in llama.cpp."""
    folder = tmp_path_factory.mktemp("gguf")
    if request.param == "trained":
        tokenizer = trained
    elif request.param == "across scripts":
        config = TokenizerConfig(vocab_size=2000, split_by_unicode_script=False, max_piece_length=32)
        train_tokenizer(stdlib_texts(), folder / "tokenizer.model", config)
        tokenizer = Tokenizer.load(folder / "tokenizer.model")
    else:
        (folder / "tokenizer.json").write_bytes(trained_json(stdlib_texts()[:40], 1000))
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
    model = our_model(small("Llama", vocab_size=tokenizer.vocab_size + 3))  # more rows than pieces
    with llama_server(write(folder / "model.gguf", "F16", model, tokenizer)) as server:
        yield tokenizer, server


def test_ids_are_identical_over_real_code(pair: tuple[Tokenizer, LlamaServer]) -> None:
    tokenizer, server = pair
    for text in stdlib_texts()[::8]:
        assert server.tokenize(text) == tokenizer.encode(text)


@pytest.mark.heavy
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(hard_text, st.text("ab_ =-.#0\n\te", max_size=200)))
def test_ids_are_identical_over_hard_texts(pair: tuple[Tokenizer, LlamaServer], text: str) -> None:
    tokenizer, server = pair
    if not any(other in text for other in READ_OTHERWISE):
        assert server.tokenize(text) == tokenizer.encode(text)


def test_a_text_of_ours_begins_with_end_of_text(pair: tuple[Tokenizer, LlamaServer]) -> None:
    tokenizer, server = pair
    begins = [tokenizer.eot_id] if tokenizer.is_trained else []  # the other file adds nothing
    assert server.tokenize("a", add_special=True) == [*begins, *tokenizer.encode("a")]


REFUSED = (
    *("Arcee", "Squared", "Llama 3.1", "Linear", "Phi3 with partial rotation", "Gated GELU", "Gated GELU by tanh"),
    *(family for family in FAMILIES if "window" in FAMILIES[family]),
    *(
        "Olmo2",
        "SmolLM3",
        "YaRN",
        "Qwen3 with biases",
        "GPTNeoX without biases in attention",
        "Starcoder2 without biases",
    ),
)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "F32"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in REFUSED])
def test_probabilities_are_those_of_the_model(family: str, kind: str, trained: Tokenizer, tmp_path: Path) -> None:
    tied = kind == "Q8_0"
    shape = WIDE if kind == "Q8_0" else {}
    model = our_model(small(family, vocab_size=trained.vocab_size, tie_embeddings=tied, **shape)).eval()
    prompt = [trained.eot_id, *trained.encode("def f(x):\n    return x + 1\nimport os")]
    with torch.no_grad():
        wanted = model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    with llama_server(write(tmp_path / "model.gguf", kind, model, trained)) as server:
        found = server.log_probabilities(prompt, 20)
    # rounding of weights and, in llama.cpp, of activations; a wrong order of rows moves them by 0.3 and more
    bound = {"F32": 0.004, "F16": 0.004, "Q8_0": 0.05}[kind]
    assert max(abs(value - wanted[token].item()) for token, value in found.items()) < bound


@pytest.mark.parametrize(
    ("kind", "family", "changes", "words"),
    [
        ("Q4_K", "Llama", {}, "--gguf=Q4_K: expected F16 or Q8_0 or F32"),
        ("F16", "Arcee", {}, "another activation in Arcee"),
        ("F16", "Squared", {}, r"does not write Arcee \(model.ffn=relu2\)"),
        ("F16", "Llama 3.1", {}, r"model\.rope_scaling=llama3"),
        ("F16", "Phi3 with partial rotation", {}, r"does not write Phi3 \(model.rotary_fraction=0.25\)"),
        ("F16", "GPTNeoX", {"ffn": "relu2"}, r"model\.ffn=relu2: expected gelu, gelu_tanh, swiglu"),
        ("F16", "Qwen3 with biases", {}, r"model\.attention_bias=True: llama.cpp has False in Qwen3"),
        ("F16", "Starcoder2 without biases", {}, r"model\.attention_bias=False: llama.cpp has True in Starcoder2"),
        ("F16", "Mistral with a window", {}, r"model\.window=9: sliding windows are not written"),
        ("F16", "SmolLM3", {}, r"model\.rope_free_layers=\[1\]: llama.cpp has \[\], every fourth"),
        ("F16", "YaRN", {}, r"model\.rope_scaling=yarn"),
        ("F16", "Llama", {"head": "scalar"}, "model.head=scalar"),
    ],
)
def test_a_model_that_llama_cpp_lacks_is_refused(kind: str, family: str, changes: dict[str, str], words: str) -> None:
    config = small(family, **changes)
    with pytest.raises(ConfigError, match=words):
        require_gguf(kind, config, architecture(config))


def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    value = json.loads(trained_json(["a b"], 300))
    digits, byte_level = value["pre_tokenizer"]["pretokenizers"]
    punctuation = {"type": "Punctuation", "behavior": "Isolated"}
    for change, words in (
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [punctuation, byte_level]}},
            "tokenizer .*Punctuation",
        ),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, digits, byte_level]}}, "tokenizer Digits, D"),
        ({"model": value["model"] | {"ignore_merges": True}}, "ignore_merges=True"),
    ):
        content = json.dumps(value | change).encode()
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ArtefactError, match=words):
            gguf_vocabulary(Tokenizer.load(tmp_path / "tokenizer.json"), content)


@pytest.mark.parametrize("family", ["Llama", "Llama with biases", "Qwen2", "Qwen3"])
def test_what_goes_out_comes_in_again(family: str, pair: tuple[Tokenizer, LlamaServer], tmp_path: Path) -> None:
    tokenizer, _ = pair
    config = small(family, vocab_size=tokenizer.vocab_size, tie_embeddings=family == "Qwen3", norm_eps=1e-6)
    model = our_model(config).half().float()  # numbers that F16 holds
    write_snapshot(write(tmp_path / "model.gguf", "F16", model, tokenizer), tmp_path)
    value = json.loads((tmp_path / "config.json").read_text())
    assert replace(model_of(value, config.name, "")[0], init_std=config.init_std) == config
    tensors = load_file(tmp_path / "model.safetensors")
    wanted = to_theirs(architecture(config), parameter_shapes(config), model.state_dict())
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    read = Tokenizer.load(next(path for path in tmp_path.glob("tokenizer.*")))
    assert {mark: read.special_ids[mark] for mark in MARKS} == {mark: tokenizer.special_ids[mark] for mark in MARKS}
    for text in (*stdlib_texts()[:5], "<|im_end|> x  y\n\n    z 1234"):
        assert read.encode(text) == tokenizer.encode(text)
    assert (tmp_path / "chat_template.jinja").read_text() == chat_template()


def test_a_file_that_does_not_fit_is_refused(trained: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "F16", our_model(small("Llama", vocab_size=trained.vocab_size)), trained)
    content = path.read_bytes()
    for changed, words in (
        (content[: len(content) // 2], "not a whole GGUF file"),
        (b"no file of llama.cpp", "not a whole GGUF file"),
        (content.replace(b"llama.rope.freq_base", b"llama.rope.freq_bass"), "llama.rope.freq_bass=10000.0"),
        (content.replace(b"blk.1.ffn_gate.weight", b"blk.1.ffn_game.weight"), "blk.1.ffn_"),
        (content.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lemma"), "expected one of llama"),
    ):
        path.write_bytes(changed)
        with pytest.raises(ArtefactError, match=words):
            write_snapshot(path, tmp_path)
