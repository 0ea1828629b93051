"""The model equals transformers' GPT-NeoX: logits, gradients, and a folder that loads."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.interop.gpt_neox import from_gpt_neox, save_gpt_neox, to_gpt_neox
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer

transformers = pytest.importorskip("transformers")


def model_config(**changes) -> ModelConfig:
    values = {
        "name": "small",
        "d_model": 200,
        "n_layers": 2,
        "n_heads": 5,
        "d_ff": 300,
        "max_seq_len": 64,
        "vocab_size": 96,
        "init_std": 0.05,
    }
    return ModelConfig(**(values | changes))


def our_model(config: ModelConfig) -> Transformer:
    """Norms and biases moved off 1 and 0, so that a forgotten one shows."""
    model = Transformer(config)
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def their_model(state: dict[str, torch.Tensor], hf_config: dict) -> torch.nn.Module:
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**hf_config))
    head = "lm_head.weight" if "lm_head.weight" in model.state_dict() else "embed_out.weight"
    state = {head if name == "embed_out.weight" else name: tensor for name, tensor in state.items()}
    if hf_config["tie_word_embeddings"]:
        state[head] = state["gpt_neox.embed_in.weight"]
    # buffers of older versions, made from the config, are not in our state
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not set(missing) & {name for name, _ in model.named_parameters()}
    return model.eval()


def tokens_for(config: ModelConfig, length: int = 40) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (3, length), generator=torch.Generator().manual_seed(1))


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("n_heads", [25, 5, 4])
def test_logits_and_gradients(n_heads: int, n_layers: int, tied: bool) -> None:
    config = model_config(n_heads=n_heads, n_layers=n_layers, tie_embeddings=tied, rope_base=5000.0)
    ours = our_model(config)
    theirs = their_model(*to_gpt_neox(ours.state_dict(), config))
    tokens = tokens_for(config)
    our_logits, their_logits = ours(tokens), theirs(tokens).logits
    assert float((our_logits - their_logits).detach().abs().max()) < 1e-5
    next_token_loss(our_logits, tokens).backward()
    next_token_loss(their_logits, tokens).backward()
    mapped = from_gpt_neox({name: p.grad for name, p in theirs.named_parameters()}, config)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert float((parameter.grad - mapped[name]).abs().max()) < 1e-5, name
        # the key bias shifts all scores of a query alike: its gradient is rounding in both
        if not name.endswith("key_bias"):
            assert float(parameter.grad.abs().max()) > 1e-4, name
    assert set(mapped) == {name for name, _ in ours.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back(tied: bool) -> None:
    config = model_config(tie_embeddings=tied)
    state = our_model(config).state_dict()
    back = from_gpt_neox(to_gpt_neox(state, config)[0], config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folder_loads(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    config = model_config(n_heads=25, tie_embeddings=tied)
    ours = our_model(config).to(dtype)
    save_gpt_neox(ours.state_dict(), config, tmp_path / "hf", eot_id=1, pad_id=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert (theirs.config.eos_token_id, theirs.config.pad_token_id) == (1, 0)
    assert theirs.dtype == (dtype if int(transformers.__version__.split(".")[0]) >= 5 else torch.float32)
    tokens = tokens_for(config)
    with torch.no_grad():
        difference = (ours.float()(tokens) - theirs.float().eval()(tokens).logits).abs().max()
    assert float(difference) < 1e-5
    # and what transformers saves comes back
    theirs.to(dtype).save_pretrained(tmp_path / "again")
    from safetensors.torch import load_file

    back = from_gpt_neox(load_file(tmp_path / "again" / "model.safetensors"), config)
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.to(dtype).state_dict().items())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm": "rmsnorm"}, "model.norm=rmsnorm"),
        ({"ffn": "swiglu"}, "model.ffn=swiglu"),
        ({"bias": False}, "model.bias=False"),
        ({"n_kv_heads": 1}, "model.n_kv_heads=1"),
        ({"qk_norm": True}, "model.qk_norm=True"),
    ],
)
def test_refuses_what_gpt_neox_lacks(changes: dict, named: str, tmp_path: Path) -> None:
    config = model_config(**changes)
    with pytest.raises(ConfigError, match=named):
        save_gpt_neox(Transformer(config).state_dict(), config, tmp_path / "hf", eot_id=1, pad_id=0)
    assert not (tmp_path / "hf").exists()
    with pytest.raises(ConfigError, match=named):
        from_gpt_neox({}, config)


def test_refuses_weights_of_another_model() -> None:
    config = model_config()
    state, _ = to_gpt_neox(our_model(config).state_dict(), config)
    with pytest.raises(ArtefactError, match=r"layers\.2.* is missing"):
        from_gpt_neox(state, model_config(n_layers=3))
    with pytest.raises(ArtefactError, match=r"embed_in\.weight has shape \(96, 200\), expected \(97, 200\)"):
        from_gpt_neox(state, model_config(vocab_size=97))
