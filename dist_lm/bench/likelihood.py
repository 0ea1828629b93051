"""Measures multiple-choice requests per second in lm-evaluation-harness: our engine against its `hf` backend.

A question has a context of 200 to 400 tokens and four choices of 5 to 20 tokens; a request is one choice. Texts are
tokenized beforehand, and the backend loads our export. Every variant gives the same log-likelihoods.
"""

import importlib.util
import random
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch

from dist_lm.bench.case import AS_USED, Case, Comparison, GroupSize, configurations
from dist_lm.bench.models import in_transformers, initial_model
from dist_lm.bench.rank import Trial
from dist_lm.config.root import Config
from dist_lm.generation.decoder import Decoder, best_page_tokens
from dist_lm.generation.likelihood import Tree, likelihoods
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.parallel.sharding import generation_dtype

OURS, HF = "our engine", "lm_eval hf"
QUESTIONS, CHOICES = 8, 4
CONTEXT, CHOICE = (200, 400), (5, 20)  # tokens, fewest and most
BATCHES = (1, 16)  # sequences of a forward pass of the hf backend
ROUNDS = 7
SHAPE = (
    *(AS_USED, "model=nano", "model.n_heads=4", "model.qk_norm=false", "model.n_layers=6", "model.d_model=256"),
    *("model.d_ff=1024", "model.vocab_size=8192", "model.max_seq_len=1024", "model.tie_embeddings=false"),
)


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns one case: our engine against the hf backend at each batch size, if that is installed (else it is only
    named). Overrides choose another model; `quick` changes nothing.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """
    (config,) = configurations([SHAPE], [AS_USED, *overrides] if overrides else (), quick)
    model = config.model

    # The speed of the backend depends on its batch size, which a user has to choose.
    peers = [f"{HF}, batch {batch}" for batch in BATCHES]
    variants = [OURS]
    if importlib.util.find_spec("lm_eval") and importlib.util.find_spec("accelerate"):
        variants += peers
        comparisons = [Comparison(OURS, peer) for peer in peers]
    else:
        comparisons = [Comparison(OURS, peer_name=f"{peer}: not installed") for peer in peers]

    case = Case(
        name=f"{model.d_model} x {model.n_layers} layers, {CHOICES} choices",
        config=config,
        variants=dict.fromkeys(variants, GroupSize(1)),
        comparisons=comparisons,
        same_losses=frozenset(variants),
        rounds=ROUNDS,
        amount=QUESTIONS * CHOICES,
        unit="requests/s",
    )
    return [case]


def questions(vocab_size: int) -> list[Tree]:
    """Returns random questions, the same at every call."""
    rng = random.Random(11)  # noqa: S311  no secret

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2, vocab_size) for _ in range(rng.randint(least, most)))

    return [Tree(tokens(*CONTEXT), tuple(tokens(*CHOICE) for _ in range(CHOICES))) for _ in range(QUESTIONS)]


def build(variant: str, config: Config, world: World) -> Trial:
    """Builds one variant of answering the requests, in one process.

    Raises:
        ConfigError: no architecture of transformers holds the model (for the hf backend), or bf16 is asked for on a GPU
            without it.
    """
    device, dtype = world.device, generation_dtype(config.parallel, world.device)
    model = initial_model(config).requires_grad_(requires_grad=False)
    trees = questions(config.model.vocab_size)

    if variant != OURS:
        return _hf(model, trees, int(variant.rpartition(" ")[2]), device, dtype)

    decoder = Decoder(config.model, 2, best_page_tokens(config.model, dtype, device), dtype, device)
    with torch.inference_mode():
        decoder.load(dict(model.named_parameters()))

    def totals() -> list[float]:
        return [likelihood.total for likelihood in chain.from_iterable(likelihoods(decoder, trees, device))]

    return _trial_of(totals)


def _trial_of(totals: Callable[[], list[float]]) -> Trial:
    """A trial of `totals`, which returns the log-likelihood of every request; all variants must give the same ones."""

    def step() -> float:
        totals()
        return 0.0

    return Trial(step, losses=totals)


def _hf(model: Transformer, trees: Sequence[Tree], batch: int, device: torch.device, dtype: torch.dtype) -> Trial:
    """Builds a trial of the hf backend of lm-evaluation-harness on our export, with `batch` sequences a forward pass.

    Raises:
        ConfigError: no architecture of transformers holds the model.
    """
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    # The backend asks for a tokenizer, though all texts are tokenized beforehand.
    marks = {"eos_token": "a", "pad_token": "b"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])), **marks
    )
    backend_class: Any = HFLM
    backend = backend_class(
        in_transformers(model).eval().to(device, dtype),
        tokenizer=tokenizer,
        batch_size=batch,
        max_length=model.config.max_seq_len,
        device=str(device),
    )

    # The backend sorts requests by their texts, so these must differ.
    requests: list[Any] = [
        ((f"context {number}", f"choice {index}"), list(tree.context), list(continuation))
        for number, tree in enumerate(trees)
        for index, continuation in enumerate(tree.continuations)
    ]

    def totals() -> list[float]:
        with torch.inference_mode():
            return [total for total, _ in backend._loglikelihood_tokens(requests, disable_tqdm=True)]

    return _trial_of(totals)
