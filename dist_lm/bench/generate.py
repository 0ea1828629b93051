"""Measures new tokens per second: our engine against other libraries, on one thread, with the same weights.
(On CUDA: on one GPU, in bf16 with flash attention, as in a user's run.)

Every prompt has 64 random tokens; sampling uses temperature 1, top-k 50 and top-p 0.95. A peer is called as its
documentation says; one that is not installed is listed without a figure.

Dimensions: B sequences, T tokens, D d_model.
"""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.bench.case import AS_USED, Case, Comparison, GroupSize, against, configurations
from dist_lm.bench.models import in_transformers, initial_model, neox_of
from dist_lm.bench.rank import Trial
from dist_lm.config.model import ModelConfig
from dist_lm.config.root import Config
from dist_lm.errors import ConfigError
from dist_lm.generation.decoder import best_page_tokens
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.paged_cache import pages_for
from dist_lm.generation.request import Answer, Request, SamplingParams
from dist_lm.interop.weights import to_theirs
from dist_lm.model.size import parameter_shapes
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.parallel.sharding import generation_dtype

OURS, CEILING = "our engine", "linear layers alone"
ONE, EIGHT = "one answer", "eight answers"

PROMPT = 64
SAMPLING = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, ignore_eot=True)
GREEDY_TOKENS = 16  # the mean log-probability of so many greedy tokens must agree between the variants
SHORTEST, LONGEST = 16, 512  # new tokens of requests of mixed lengths
PADDED_BATCH = 32  # sequences; peers need padded batches
LONG_PROMPT = 400
ROUNDS = 5

SMALLER = ("model.d_model=256", "model.n_layers=6", "model.n_heads=4", "model.d_ff=1024")
LARGER = ("model.d_model=512", "model.n_layers=8", "model.n_heads=8", "model.d_ff=2048")
SHAPE = (
    *(AS_USED, "model=nano", "model.n_heads=5", "model.qk_norm=false"),  # the peers have this shape too
    *("model.vocab_size=32000", "model.max_seq_len=1024", "model.tie_embeddings=false"),
)
MIXED, PREFILL = "mixed lengths", "prefill"


# --- peers: libraries whose models compute the same function as ours ---


class Peer(ABC):
    """A library that generates with our weights and samples by `SAMPLING`."""

    package: ClassVar[str]
    takes_batches: ClassVar[bool]  # whether `generate` accepts more than one prompt at a time

    @abstractmethod
    def __init__(self, model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
        """Copies the weights of `model` to `device`."""

    @abstractmethod
    def generate(self, prompt_BT: torch.Tensor, n_new: int) -> None:
        """Generates `n_new` tokens for each prompt and drops them."""

    @abstractmethod
    def greedy_logprob(self, prompt_BT: torch.Tensor, n_new: int) -> float:
        """Returns the mean log-probability of `n_new` greedy tokens, nats."""


class Transformers(Peer):
    """Runs `generate` of Hugging Face transformers with its default cache and scaled dot-product attention."""

    package: ClassVar[str] = "transformers"
    takes_batches: ClassVar[bool] = True

    def __init__(self, model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
        self._model = in_transformers(model).eval().to(device, dtype)
        self._sampling = {"temperature": SAMPLING.temperature, "top_k": SAMPLING.top_k, "top_p": SAMPLING.top_p}

    def generate(self, prompt_BT: torch.Tensor, n_new: int) -> None:
        """See `Peer`."""
        self._generate(prompt_BT, n_new, do_sample=True, **self._sampling)

    def greedy_logprob(self, prompt_BT: torch.Tensor, n_new: int) -> float:
        """See `Peer`."""
        output = self._generate(prompt_BT, n_new, do_sample=False, output_logits=True, return_dict_in_generate=True)
        logits_TV = torch.stack(output.logits)[:, 0].float()
        token_T = output.sequences[0, prompt_BT.shape[1] :]
        return float(logits_TV.log_softmax(-1).gather(1, token_T[:, None]).mean())

    def _generate(self, prompt_BT: torch.Tensor, n_new: int, **options: Any) -> Any:
        """Returns what `generate` of transformers returns for exactly `n_new` tokens and these options: token ids,
        prompt included, if the options ask for nothing else."""
        return self._model.generate(
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            max_new_tokens=n_new,
            # Without an end-of-text token every answer has `n_new` tokens, and speeds are comparable.
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )


class LitGpt(Peer):
    """Runs `generate` of litgpt."""

    package: ClassVar[str] = "litgpt"
    takes_batches: ClassVar[bool] = False

    def __init__(self, model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
        litgpt = import_module("litgpt")
        convert = import_module("litgpt.scripts.convert_hf_checkpoint")
        shape = model.config
        architecture = neox_of(shape, "litgpt")
        if shape.rope_scaling != "none":
            raise ConfigError(f"model.rope_scaling={shape.rope_scaling}: litgpt is compared without scaling")

        config = litgpt.Config(
            block_size=shape.max_seq_len,
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_embd=shape.d_model,
            intermediate_size=shape.d_ff,
            rotary_percentage=shape.rotary_fraction,
            parallel_residual=shape.parallel_residual,
            rope_base=int(shape.rope_base),
        )
        # litgpt converts checkpoints of transformers, so our weights take that way too.
        hf_weights = to_theirs(architecture, parameter_shapes(shape), dict(model.named_parameters()))
        litgpt_weights: dict[str, torch.Tensor] = {}
        convert.copy_weights_gpt_neox(config, litgpt_weights, hf_weights)

        self._model = litgpt.GPT(config).eval()
        self._model.load_state_dict(litgpt_weights)
        self._model.to(device, dtype)

    def generate(self, prompt_BT: torch.Tensor, n_new: int) -> None:
        """See `Peer`."""
        (prompt_T,) = prompt_BT
        self._generate(prompt_T, n_new, SAMPLING.temperature, SAMPLING.top_k, SAMPLING.top_p)

    def greedy_logprob(self, prompt_BT: torch.Tensor, n_new: int) -> float:
        """Returns the mean log-probability, nats, of `n_new` greedy tokens after the first prompt; the cache is
        dropped."""
        prompt_T = prompt_BT[0]
        token_T = self._generate(prompt_T, n_new, 0.0, None, 1.0)

        # litgpt does not return logits, so the sequence is read once more without its cache.
        self._model.clear_kv_cache()
        with torch.inference_mode():
            logits_TV = self._model(token_T[None])[0, len(prompt_T) - 1 : -1].float()
        return float(logits_TV.log_softmax(-1).gather(1, token_T[len(prompt_T) :, None]).mean())

    def _generate(
        self, prompt_T: torch.Tensor, n_new: int, temperature: float, top_k: int | None, top_p: float
    ) -> torch.Tensor:
        """Returns prompt and `n_new` tokens, int64; greedy at temperature 0. The model gets a new cache."""
        generate = import_module("litgpt.generate.base").generate
        # litgpt keeps its cache between calls, and a cache has the size of one call.
        with torch.inference_mode():
            self._model.max_seq_length = len(prompt_T) + n_new
            self._model.clear_kv_cache()
            self._model.set_kv_cache(batch_size=1, device=prompt_T.device)
            return generate(
                self._model, prompt_T, len(prompt_T) + n_new, temperature=temperature, top_k=top_k, top_p=top_p
            )


PEERS: dict[str, type[Peer]] = {"transformers": Transformers, "litgpt": LitGpt}


# --- cases and variants ---


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns cases of batches of 1, 8 and 32 for two model sizes, 64 requests of mixed lengths, and answers that share
    a prompt; `quick`: the first alone.

    Overrides leave one batch of stage.global_batch prompts with stage.seq_len new tokens.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """
    if overrides:
        return [batch_case(configurations((), [AS_USED, *overrides], quick)[0])]

    shapes = [
        (*SHAPE, *size, f"stage.global_batch={batch}", "stage.seq_len=128")
        for size in (SMALLER, LARGER)
        for batch in (1, 8, 32)
    ]
    planned = [batch_case(config) for config in configurations(shapes, (), quick)]
    if quick:
        return planned

    mean = (SHORTEST + LONGEST) // 2
    smaller = (*SHAPE, *SMALLER)
    mixed = configurations([(*smaller, "stage.global_batch=64", f"stage.seq_len={mean}")], (), quick)[0]
    shared = configurations([(*smaller, "stage.global_batch=1", f"stage.seq_len={LONG_PROMPT}")], (), quick)[0]
    return [*planned, mixed_case(mixed), prefill_case(shared)]


def batch_case(config: Config) -> Case:
    """Returns a case of stage.global_batch prompts at once, with stage.seq_len new tokens each."""
    batch, new = config.stage.global_batch, config.stage.seq_len
    return _against_peers(f"{_shape(config.model)}, batch {batch}, {PROMPT} + {new} tokens", config, list(PEERS))


def mixed_case(config: Config) -> Case:
    """Returns a case of requests for SHORTEST to LONGEST new tokens; peers pad batches of PADDED_BATCH."""
    name = f"{_shape(config.model)}, {config.stage.global_batch} {MIXED}, {SHORTEST} to {LONGEST} new"
    return _against_peers(name, config, ["transformers"])


def prefill_case(config: Config) -> Case:
    """Returns a case of the first tokens of eight answers to one prompt, against one answer, in prompt tokens per
    second."""
    size = GroupSize(1)
    return Case(
        name=f"{_shape(config.model)}, {PREFILL} of {LONG_PROMPT} tokens",
        config=config,
        variants={EIGHT: size, ONE: size},
        comparisons=(Comparison(variant=EIGHT, peer=ONE),),
        rounds=ROUNDS,
    )


def _shape(model: ModelConfig) -> str:
    return f"{model.d_model} x {model.n_layers} layers"


def _against_peers(name: str, config: Config, peers: Sequence[str]) -> Case:
    """Returns a case of our engine against the named peers; one that cannot run is only named, with the reason."""
    absent = {peer: reason for peer in peers if (reason := _why_not(PEERS[peer], config.stage.global_batch))}
    available = [peer for peer in peers if peer not in absent]
    return Case(
        name=name,
        config=config,
        variants=dict.fromkeys([OURS, *available, CEILING], GroupSize(1)),
        comparisons=[against(OURS, peer, absent.get(peer), CEILING) for peer in peers],
        same_losses=frozenset({OURS, *available}),
        rounds=ROUNDS,
    )


def _why_not(peer: type[Peer], batch: int) -> str | None:
    if not importlib.util.find_spec(peer.package):
        return "not installed"
    if batch > 1 and not peer.takes_batches:
        return "takes one prompt"
    return None


def build(variant: str, config: Config, world: World) -> Trial:
    """Builds one variant of generating, in one process.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it, or a peer cannot hold the model.
    """
    device, dtype = world.device, generation_dtype(config.parallel, world.device)
    model = initial_model(config).requires_grad_(requires_grad=False)

    # Answers to one request share the cache of its prompt: eight should take as long as one.
    if variant in (EIGHT, ONE):
        engine = _engine(model, config, device, [config.model.max_seq_len] * 8)
        long_prompt = made_up_tokens(config, 1, LONG_PROMPT)[0].tolist()
        num_answers = 8 if variant == EIGHT else 1
        return Trial(lambda: _first_tokens(engine, long_prompt, num_answers), losses=list)

    prompts = made_up_tokens(config, config.stage.global_batch, PROMPT)
    lengths = new_tokens(config)
    if variant == OURS:
        engine = _engine(model, config, device, [PROMPT + new for new in lengths])
        return Trial(lambda: _answer(engine, prompts, lengths), losses=lambda: [_greedy(engine, prompts)])
    if variant == CEILING:
        return Trial(_linear_layers(model.to(device, dtype), lengths), losses=list)

    peer = PEERS[variant](model, device, dtype)
    prompts = prompts.to(device)
    return Trial(
        lambda: _in_batches(peer, prompts, lengths),
        losses=lambda: [peer.greedy_logprob(prompts[:1], GREEDY_TOKENS)],
    )


def made_up_tokens(config: Config, rows: int, width: int) -> torch.Tensor:
    """Returns random tokens, int64 (rows, width), the same at every call."""
    return torch.randint(2, config.model.vocab_size, (rows, width), generator=torch.Generator().manual_seed(7))


def new_tokens(config: Config) -> list[int]:
    """Returns the new tokens of each of stage.global_batch requests: all stage.seq_len, or, if that is the mean of
    SHORTEST and LONGEST, evenly spaced from one to the other and shuffled, the same at every call."""
    batch, mean = config.stage.global_batch, config.stage.seq_len
    # The case of mixed lengths is known by its mean, since a configuration has one stage.seq_len.
    if mean != (SHORTEST + LONGEST) // 2:
        return [mean] * batch
    lengths = torch.linspace(SHORTEST, LONGEST, batch).round().long()
    return lengths[torch.randperm(batch, generator=torch.Generator().manual_seed(3))].tolist()


def engine_options(config: Config, device: torch.device, lengths: Sequence[int]) -> tuple[EngineOptions, torch.dtype]:
    """Returns options and dtype of a user's engine on `device`, with a cache for sequences of `lengths` tokens.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
    """
    dtype = generation_dtype(config.parallel, device)
    page = best_page_tokens(config.model, dtype, device)
    # Answers copy the last page they share.
    pages = sum(pages_for(length, page) + 1 for length in lengths)
    return EngineOptions(page * max(pages, pages_for(config.model.max_seq_len, page)), page), dtype


def _engine(model: Transformer, config: Config, device: torch.device, lengths: Sequence[int]) -> Engine:
    options, dtype = engine_options(config, device, lengths)
    weights = dict(model.named_parameters())
    return Engine(model.config, weights, eot_id=0, options=options, dtype=dtype, device=device)


def _answer(engine: Engine, prompts: torch.Tensor, lengths: Sequence[int]) -> float:
    for index, (prompt, new) in enumerate(zip(prompts.tolist(), lengths, strict=True)):
        engine.submit(Request(str(index), prompt, replace(SAMPLING, max_new_tokens=new), seed=index))
    answers = engine.run()
    # A request that was cut short would count as speed.
    assert sum(len(answer.tokens) for answer in answers if isinstance(answer, Answer)) == sum(lengths)
    return 0.0


def _greedy(engine: Engine, prompts: torch.Tensor) -> float:
    params = SamplingParams(max_new_tokens=GREEDY_TOKENS, temperature=0, ignore_eot=True)
    engine.submit(Request("greedy", prompts[0].tolist(), params))
    (answer,) = engine.run()
    assert isinstance(answer, Answer)
    return sum(answer.raw_logprobs) / len(answer.raw_logprobs)


def _first_tokens(engine: Engine, prompt: list[int], n: int) -> float:
    engine.submit(Request("shared", prompt, replace(SAMPLING, max_new_tokens=1), n=n))
    assert len(engine.run()) == n
    return 0.0


@torch.inference_mode()
def _in_batches(peer: Peer, prompts: torch.Tensor, lengths: Sequence[int]) -> float:
    """Generates for `prompts` (B, T) in batches of at most PADDED_BATCH; each goes on until its longest answer is
    complete. Returns 0, as there is no loss."""
    for begin in range(0, len(prompts), PADDED_BATCH):
        rows = slice(begin, begin + PADDED_BATCH)
        peer.generate(prompts[rows], max(lengths[rows]))
    return 0.0


def _linear_layers(model: Transformer, lengths: Sequence[int]) -> Callable[[], float]:
    """Returns a step of all matrix products of the new tokens, with inputs of zeros, and nothing else: the lower bound
    for eager PyTorch. `lengths`: new tokens of each request."""
    # Weights of attention have three dimensions, a product needs two; flattening leaves other matrices as they are.
    matrices = [p.flatten(0, -2) for p in model.parameters() if p.ndim > 1]
    # An embedding is looked up, not multiplied; tied to the head it is multiplied there.
    weights = [matrix for matrix in matrices if matrix.data_ptr() != model.embedding.weight.data_ptr()]
    if model.config.tie_embeddings:
        weights.append(model.head_weight)

    # Requests end at different steps, so the products get fewer rows.
    rows_by_step = [sum(new > step for new in lengths) for step in range(max(lengths))]

    @torch.inference_mode()
    def step() -> float:
        for n_rows in rows_by_step:
            for weight in weights:
                F.linear(weight.new_zeros(n_rows, weight.shape[1]), weight)
        return 0.0

    return step
