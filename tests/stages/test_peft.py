"""peft reads exported adapters: the logits of transformers with them are those of our model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dist_lm.config.model import AdaptedModelConfig
from dist_lm.config.stage import LoraConfig
from dist_lm.model.transformer import Transformer
from dist_lm.stages.exporting.adapters import peft_config, peft_tensors
from tests.interop.hf_models import FAMILIES, architecture, our_model, small, their_model, tokens_for

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
EVERY = ["attention", "feed_forward"]
CASES = [
    *(("GPTNeoX", EVERY, "tokens"), ("GPTNeoX", ["query", "value"], "tokens"), ("Llama", ["query", "up"], "scalar")),
    *(pytest.param(family, EVERY, "tokens", marks=pytest.mark.heavy) for family in FAMILIES if family != "GPTNeoX"),
    *(pytest.param("GPTNeoX", targets, "tokens", marks=pytest.mark.heavy) for targets in (["key"], ["output", "down"])),
    pytest.param("GPTNeoX", ["query", "up"], "scalar", marks=pytest.mark.heavy),
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
