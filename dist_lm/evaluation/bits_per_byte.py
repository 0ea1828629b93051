"""Bits per byte of held-out text: the same text for every model, whatever its tokenizer."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_lm.config.root import Config
from dist_lm.data.evaluation_batches import spread
from dist_lm.data.manifest import manifest_path, read_manifest
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError
from dist_lm.generation.decoder import Decoder, best_page_tokens
from dist_lm.generation.likelihood import Tree, likelihoods
from dist_lm.parallel.mesh import choose_device
from dist_lm.parallel.sharding import generation_dtype
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files
from dist_lm.training.checkpoint_tensors import model_weights

Record = dict[str, Any]


@dataclass(frozen=True)
class HeldOutText:
    """A document of the val split."""

    id: str
    source: str  # CORPUS LANGUAGE
    text: str


def text_corpora(folders: Sequence[Path], may_lack: bool) -> list[Path]:
    """The corpora of text among `stage.corpora`. Conversations are left out.

    Args:
        may_lack: some of them may be missing.

    Raises:
        ArtefactError: one is missing, or none has text.
    """
    key = f"stage.corpora=[{','.join(one.name for one in folders)}]"
    missing = [folder for folder in folders if not manifest_path(folder).is_file()]
    if missing and not (may_lack and len(missing) < len(folders)):
        raise ArtefactError(
            f"{key}: no {' and no '.join(one.name for one in missing)} in {missing[0].parent}: run stage=shards, or "
            "name others"
        )
    found = [folder for folder in folders if folder not in missing]
    found = [folder for folder in found if not (val := TokenCorpus.open(folder, "val")).has_mask and len(val.lengths)]
    if not found:
        raise ArtefactError(f"{key}: no held-out text, only conversations: name a corpus of text")
    return found


def documents_of(corpora: Sequence[Path], tokenizer: Path, limit: int) -> list[HeldOutText]:
    """Documents of the val splits, evenly spread.

    Args:
        corpora: those of `text_corpora`.
        tokenizer: of the work directory, which the shards were made with.
        limit: documents of each corpus; 0: all.

    Raises:
        ArtefactError: a corpus was written with another tokenizer.
    """
    found = []
    pieces = Tokenizer.load(tokenizer)
    for folder in corpora:
        read_manifest(folder).require_tokenizer(pieces.sha256, folder)
        corpus = TokenCorpus.open(folder, "val")
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
    """Bits and bytes of each document, in this process; None if `wanted` became false.

    Raises:
        ArtefactError: the checkpoint is damaged.
    """
    device = choose_device(config.device, 0)
    dtype = generation_dtype(config.parallel, device)
    weights = model_weights(checkpoint_files.require_intact(checkpoint))
    decoder = Decoder(config.model, 2, best_page_tokens(config.model, dtype, device), dtype, device)
    with torch.inference_mode():
        decoder.load({name: torch.from_numpy(value) for name, value in weights.items()})
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
