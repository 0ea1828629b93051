"""peft reads exported adapters: the logits of transformers with them are those of our model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dist_lm.config.model import AdaptedModelConfig
from dist_lm.config.stage import LoraConfig
from dist_lm.model.keyed_random import DropoutKey, SiteDropout, adapter_sites, apply_dropout
from dist_lm.model.transformer import Transformer
from dist_lm.stages.exporting.adapters import peft_config, peft_tensors
from tests.interop.hf_models import FAMILIES, architecture, our_model, small, their_model, tokens_for

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
EVERY = ["attention", "feed_forward"]
CASES = [
    *(("GPTNeoX", EVERY, "tokens"), ("GPTNeoX", ["query", "value"], "tokens"), ("Llama", ["query", "up"], "scalar")),
    *(pytest.param(family, EVERY, "tokens", marks=pytest.mark.bars) for family in FAMILIES if family != "GPTNeoX"),
    *(pytest.param("GPTNeoX", targets, "tokens", marks=pytest.mark.bars) for targets in (["key"], ["output", "down"])),
    pytest.param("GPTNeoX", ["query", "up"], "scalar", marks=pytest.mark.bars),
]


@pytest.mark.parametrize(("family", "targets", "head"), CASES, ids=str)
def test_peft_loads_adapters_and_gives_our_logits(family: str, targets: list[str], head: str, tmp_path: Path):
    config = AdaptedModelConfig.of(small(family, head=head), LoraConfig(rank=3, alpha=7.0, targets=targets))
    ours, found = our_model(config), architecture(config.plain)
    base = Transformer(config.plain)
    base.load_state_dict({name: value for name, value in ours.state_dict().items() if ".adapters." not in name})
    state = ours.state_dict()
    if base.scalar_head is not None:
        with torch.no_grad():
            base.scalar_head.weight.zero_()  # the head comes from the adapters' folder
            base.scalar_head.bias.zero_()
            state["scalar_head.bias"].zero_()
    tensors = peft_tensors(found, config, state.__getitem__)
    made = {name: tensor.make().contiguous() for name, tensor in tensors.items()}
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == {n: t.shape for n, t in tensors.items()}
    save_file(made, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_config(found, config, "the/base")))
    theirs = their_model(base)
    theirs.config.pad_token_id = config.vocab_size  # no token: scores are read at the last one
    adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
    tokens_BT = tokens_for(config)
    with torch.no_grad():
        found_logits = adapted(input_ids=tokens_BT).logits
        hidden_BTD = ours.hidden(tokens_BT)
        expected = ours.head(hidden_BTD) if ours.scalar_head is None else ours.scalar_head(hidden_BTD[:, -1])
    assert float((found_logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


KEY = DropoutKey(0.0, seed=3, step=5, adapter_rate=0.25, sequence_B=torch.arange(3))


class OurMask(torch.nn.Module):
    """Dropout of peft that drops what ours drops."""

    def __init__(self, site: SiteDropout) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = replace(self.site, channel_D=self.site.channel_D[: x.shape[-1]])
        return apply_dropout(x, channels)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", pytest.param("GPTNeoX", marks=pytest.mark.bars)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rslora_dropout_and_trained_tokens_are_those_of_peft(family: str, tied: bool, tmp_path: Path):
    """Finds settings that adapter_config.json does not say, and gradients that peft would not have."""
    lora = LoraConfig(rank=3, alpha=7.0, rslora=True, dropout=0.25, tokens=["a", "b"])
    config = AdaptedModelConfig.of(small(family, tie_embeddings=tied), lora)
    ours, found = our_model(config), architecture(config.plain)
    base = Transformer(config.plain)
    state = ours.state_dict()
    base.load_state_dict({name: value for name, value in state.items() if ".adapters." not in name})
    # Rows that only the adapter's folder has.
    for name in ("embedding.weight", "lm_head.weight"):
        if name in state:
            state[name][[4, 9]] += 0.1
    written = {
        name: tensor.make().contiguous() for name, tensor in peft_tensors(found, config, state.get, [4, 9]).items()
    }
    save_file(written, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    settings = peft_config(found, config, "the/base", [4, 9])
    assert (settings["use_rslora"], settings["lora_dropout"]) == (True, 0.25)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    adapted = peft.PeftModel.from_pretrained(their_model(base), str(tmp_path), is_trainable=True).train()
    tokens_BT = tokens_for(config)
    tokens_BT[:, :2] = torch.tensor([4, 9])

    if family != "GPTNeoX":  # whose fused weight has one mask where ours has three
        widest = max(config.d_model, config.d_ff)
        for layer, sites in enumerate(adapter_sites(KEY, config.n_layers, widest)):
            assert sites
            block = adapted.base_model.model.model.layers[layer]
            attention, mlp = block.self_attn, block.mlp
            modules = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
            modules |= {"output": attention.o_proj, "gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj}
            for weight, module in modules.items():
                module.lora_dropout["default"] = OurMask(sites[weight])
        expected = ours(tokens_BT, dropout=KEY)
    else:
        adapted.eval()
        expected = ours(tokens_BT)

    logits = adapted(input_ids=tokens_BT).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))
    logits.square().mean().backward()
    expected.square().mean().backward()
    theirs = {name: value.grad for name, value in adapted.named_parameters() if value.grad is not None}
    for name, tensor in written.items():
        grad = next(value for other, value in theirs.items() if other.replace(".default", "") == name)
        wanted = peft_tensors(found, config, lambda n: ours.get_parameter(n).grad, [4, 9])[name].make()
        assert tensor.shape == grad.shape == wanted.shape
        if family != "GPTNeoX" or "lora_" not in name:
            assert float((grad - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()), name
