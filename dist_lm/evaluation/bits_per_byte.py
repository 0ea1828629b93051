"""Bits per byte of held-out text: the same text for every model, whatever its tokenizer."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_lm.config.root import Config
from dist_lm.data.evaluation_batches import spread
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError
from dist_lm.generation.decoder import Decoder, best_page_tokens
from dist_lm.generation.likelihood import Tree, likelihoods
from dist_lm.parallel.mesh import choose_device
from dist_lm.parallel.sharding import generation_dtype
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training.checkpoint_tensors import model_weights

Record = dict[str, Any]


@dataclass(frozen=True)
class HeldOutText:
    """A document of the val split."""

    id: str
    source: str  # CORPUS LANGUAGE
    text: str


def documents_of(corpora: Sequence[Path], tokenizer: Path, limit: int) -> list[HeldOutText]:
    """Documents of the val splits, evenly spread. Conversations are left out.

    Args:
        tokenizer: of the work directory, which the shards were made with.
        limit: documents of each corpus; 0: all.

    Raises:
        ArtefactError: none of the corpora is there.
    """
    found = []
    there = [folder for folder in corpora if (folder / "manifest.json").is_file()]
    if not there:
        raise ArtefactError(
            f"stage.tasks=[bits_per_byte]: none of the corpora {', '.join(one.name for one in corpora)} is in "
            f"{corpora[0].parent}: run stage=shards, or name others in stage.corpora"
        )
    pieces = Tokenizer.load(tokenizer)
    for folder in there:
        corpus = TokenCorpus.open(folder, "val")
        if corpus.has_mask:
            continue
        for number in spread(len(corpus.lengths), limit).tolist():
            text = pieces.decode(corpus.tokens(number, 0, int(corpus.lengths[number])).tolist())
            language = corpus.languages[int(corpus.language_codes[number])]
            if text:
                found.append(HeldOutText(f"{folder.name}/{number}", f"{folder.name} {language}", text))
    return found


def windows(tokens: Sequence[int], opening: int, context: int) -> Iterator[Tree]:
    """A document as trees: each token is predicted once, by the opening and what stands before it in its window."""
    for begin in range(0, len(tokens), context):
        before = opening if begin == 0 else tokens[begin - 1]
        yield Tree((before,), (tuple(tokens[begin : begin + context]),))


def document_bits(
    checkpoint: Path,
    config: Config,
    tokenizer: Tokenizer,
    documents: Sequence[HeldOutText],
    wanted: Callable[[], bool],
) -> list[Record] | None:
    """Bits and bytes of each document, in this process; None if `wanted` became false."""
    device = choose_device(config.device, 0)
    dtype = generation_dtype(config.parallel, device)
    decoder = Decoder(config.model, 2, best_page_tokens(config.model, dtype, device), dtype, device)
    with torch.inference_mode():
        decoder.load({name: torch.from_numpy(value) for name, value in model_weights(checkpoint).items()})
    context, opening = config.model.max_seq_len, tokenizer.opening.first
    cut = [list(windows(tokenizer.encode(one.text), opening, context)) for one in documents]
    nats = [0.0] * len(documents)
    owners = [number for number, trees in enumerate(cut) for _ in trees]
    scored = likelihoods(decoder, [tree for trees in cut for tree in trees], device)
    for number, (found,) in zip(owners, scored, strict=True):
        nats[number] += found.total
        if not wanted():
            return None
    return [
        {"id": one.id, "group": one.source, "bits": -total / math.log(2), "bytes": len(one.text.encode())}
        for one, total in zip(documents, nats, strict=True)
    ]
