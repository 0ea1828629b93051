"""Generation by other libraries, each called as its documentation says, on our weights if its model can hold them.

Dimensions: B sequences, T tokens.
"""

import tempfile
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch

from dist_lm.generation.request import SamplingParams
from dist_lm.interop.gpt_neox import save_gpt_neox, to_gpt_neox
from dist_lm.model.transformer import Transformer


class Peer(ABC):
    """A library that generates."""

    package: ClassVar[str]
    batches: ClassVar[bool]  # whether it accepts more than one prompt at a time

    @abstractmethod
    def __init__(self, model: Transformer, params: SamplingParams) -> None:
        """Copy the weights of `model`; sample by `params`."""

    @abstractmethod
    def generate(self, prompt_BT: torch.Tensor, n_new: int) -> None:
        """`n_new` tokens for each prompt."""


class OnOurWeights(Peer):
    """A peer whose model computes the same function as ours."""

    @abstractmethod
    def greedy_logprob(self, prompt_BT: torch.Tensor, n_new: int) -> float:
        """Mean log-probability of the tokens of greedy decoding, nats."""


class Transformers(OnOurWeights):
    """`generate` of Hugging Face transformers with its default cache and scaled dot-product attention."""

    package: ClassVar[str] = "transformers"
    batches: ClassVar[bool] = True

    def __init__(self, model: Transformer, params: SamplingParams) -> None:
        from transformers import AutoModelForCausalLM

        with tempfile.TemporaryDirectory(prefix="dlm-bench-") as folder:
            save_gpt_neox(dict(model.named_parameters()), model.config, Path(folder), eot_id=0, pad_id=1)
            self._model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._sampling = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}

    def generate(self, prompt_BT: torch.Tensor, n_new: int) -> None:
        """See `Peer`."""
        self._generate(prompt_BT, n_new, do_sample=True, **self._sampling)

    def greedy_logprob(self, prompt_BT: torch.Tensor, n_new: int) -> float:
        """See `OnOurWeights`."""
        found = self._generate(prompt_BT, n_new, do_sample=False, output_logits=True, return_dict_in_generate=True)
        logits_TV = torch.stack(found.logits)[:, 0].float()
        token_T = found.sequences[0, prompt_BT.shape[1] :]
        return float(logits_TV.log_softmax(-1).gather(1, token_T[:, None]).mean())

    def _generate(self, prompt_BT: torch.Tensor, n_new: int, **options: Any) -> Any:
        return self._model.generate(  # type: ignore[operator]
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            max_new_tokens=n_new,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )


class LitGpt(OnOurWeights):
    """`generate` of litgpt."""

    package: ClassVar[str] = "litgpt"
    batches: ClassVar[bool] = False

    def __init__(self, model: Transformer, params: SamplingParams) -> None:
        litgpt = import_module("litgpt")
        convert = import_module("litgpt.scripts.convert_hf_checkpoint")
        shape = model.config
        config = litgpt.Config(
            block_size=shape.max_seq_len,
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_embd=shape.d_model,
            intermediate_size=shape.d_ff,
            rotary_percentage=1.0,
            parallel_residual=False,
            rope_base=int(shape.rope_base),
        )
        weights, _ = to_gpt_neox(dict(model.named_parameters()), shape)
        mapped: dict[str, torch.Tensor] = {}
        convert.copy_weights_gpt_neox(config, mapped, weights)
        self._model = litgpt.GPT(config).eval()
        self._model.load_state_dict(mapped)
        self._params = params

    def generate(self, prompt_BT: torch.Tensor, n_new: int) -> None:
        """See `Peer`."""
        (prompt_T,) = prompt_BT
        self._generate(prompt_T, n_new, self._params.temperature, self._params.top_k, self._params.top_p)

    def greedy_logprob(self, prompt_BT: torch.Tensor, n_new: int) -> float:
        """See `OnOurWeights`."""
        prompt_T = prompt_BT[0]
        token_T = self._generate(prompt_T, n_new, 0.0, None, 1.0)
        self._model.clear_kv_cache()
        with torch.inference_mode():
            logits_TV = self._model(token_T[None])[0, len(prompt_T) - 1 : -1].float()
        return float(logits_TV.log_softmax(-1).gather(1, token_T[len(prompt_T) :, None]).mean())

    def _generate(
        self, prompt_T: torch.Tensor, n_new: int, temperature: float, top_k: int | None, top_p: float
    ) -> torch.Tensor:
        generate = import_module("litgpt.generate.base").generate
        with torch.inference_mode():
            self._model.max_seq_length = len(prompt_T) + n_new
            self._model.clear_kv_cache()
            self._model.set_kv_cache(batch_size=1)
            return generate(
                self._model, prompt_T, len(prompt_T) + n_new, temperature=temperature, top_k=top_k, top_p=top_p
            )


class NanoChat(Peer):
    """The engine of nanochat (https://github.com/karpathy/nanochat) on a model of its own of the same shape.

    It samples with top-k only, and all sequences of a batch continue one prompt.
    """

    package: ClassVar[str] = "nanochat"
    batches: ClassVar[bool] = True

    def __init__(self, model: Transformer, params: SamplingParams) -> None:
        gpt, shape = import_module("nanochat.gpt"), model.config
        config = gpt.GPTConfig(
            sequence_len=shape.max_seq_len,
            vocab_size=shape.vocab_size,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_kv_head=shape.n_heads,
            n_embd=shape.d_model,
        )
        self._model = gpt.GPT(config)
        self._model.init_weights()
        self._model.float().eval()
        self._params = params

    def generate(self, prompt_BT: torch.Tensor, n_new: int) -> None:
        """See `Peer`."""
        engine = import_module("nanochat.engine").Engine(self._model, _NoTools())
        steps = engine.generate(
            prompt_BT[0].tolist(),
            num_samples=len(prompt_BT),
            max_tokens=n_new,
            temperature=self._params.temperature,
            top_k=self._params.top_k,
        )
        for _ in steps:
            pass


class _NoTools:
    """A tokenizer whose special tokens never occur, because nanochat's engine looks for calculator calls."""

    def encode_special(self, text: str) -> int:
        return -1

    def get_bos_token_id(self) -> int:
        return -1
