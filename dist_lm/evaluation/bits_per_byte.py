"""Measures bits per byte of held-out text, which is the same text for every model, whatever its tokenizer."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_lm.config.root import Config
from dist_lm.data.evaluation_batches import evenly_spaced
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
    """Returns the corpora of text among the folders of `stage.corpora`. Conversations and empty val splits are left
    out.

    Args:
        may_lack: whether some of the corpora, but not all, may be missing; those are left out.

    Raises:
        ArtefactError: a corpus is missing or damaged, or none has text.
        OSError: a file cannot be read.
    """
    key = f"stage.corpora=[{','.join(folder.name for folder in folders)}]"
    missing = [folder for folder in folders if not manifest_path(folder).is_file()]
    if missing and not (may_lack and len(missing) < len(folders)):
        names = " and no ".join(folder.name for folder in missing)
        raise ArtefactError(f"{key}: no {names} in {missing[0].parent}: run stage=shards, or name others")

    corpora = []
    for folder in folders:
        if folder not in missing:
            val = TokenCorpus.open(folder, "val")
            if not val.has_mask and len(val.lengths):
                corpora.append(folder)
    if not corpora:
        raise ArtefactError(f"{key}: no held-out text, only conversations: name a corpus of text")
    return corpora


def documents_of(corpora: Sequence[Path], tokenizer: Path, limit: int) -> list[HeldOutText]:
    """Returns documents of the val splits, evenly spread. Empty ones are left out.

    Args:
        corpora: the folders that `text_corpora` returned.
        tokenizer: path of the tokenizer of the work directory, which encoded the shards.
        limit: most documents of each corpus; 0: all.

    Raises:
        ArtefactError: a corpus was written with another tokenizer, or is damaged; or the tokenizer cannot be read.
        OSError: a file cannot be read.
        UserError: the tokenizer needs the package `tokenizers`, which is not installed.
    """
    documents = []
    corpus_tokenizer = Tokenizer.load(tokenizer)
    for folder in corpora:
        read_manifest(folder).require_tokenizer(corpus_tokenizer.sha256, folder)
        corpus = TokenCorpus.open(folder, "val")
        for index in evenly_spaced(len(corpus.lengths), limit).tolist():
            text = corpus_tokenizer.decode(corpus.tokens(index, 0, int(corpus.lengths[index])).tolist())
            language = corpus.languages[int(corpus.language_codes[index])]
            if text:
                documents.append(HeldOutText(f"{folder.name}/{index}", f"{folder.name} {language}", text))
    return documents


def windows(tokens: Sequence[int], opening: int, context: int) -> Iterator[Tree]:
    """Yields a document as trees of at most `context` predicted tokens.

    Each token is predicted once, by the tokens before it in its window. Before a window stands the last token of the
    previous one; before the first window, the opening. An empty document has no window.

    Args:
        opening: token id.
        context: tokens; the model's maximum sequence length.
    """
    for begin in range(0, len(tokens), context):
        previous = opening if begin == 0 else tokens[begin - 1]
        yield Tree((previous,), (tuple(tokens[begin : begin + context]),))


def document_bits(
    checkpoint: Path,
    config: Config,
    tokenizer: Tokenizer,
    documents: Sequence[HeldOutText],
    keep_going: Callable[[], bool],
) -> list[Record] | None:
    """Computes bits and bytes of each document, in this process; loads the model for the call.

    Args:
        tokenizer: of the model, which may be another one than that of the corpus.
        keep_going: called after each window of up to a context; the computation ends when it returns False.

    Returns:
        A record for each document, in order: id, group (its source), bits, bytes of UTF-8. None if `keep_going`
        returned False.

    Raises:
        ArtefactError: the checkpoint is damaged, or does not fit `config`.
        ConfigError: config.device asks for a GPU and there is none.
    """
    # The engine has no log-likelihoods of given text, so the weights are loaded into a decoder here.
    device = choose_device(config.device, 0)
    dtype = generation_dtype(config.parallel, device)
    weights = model_weights(checkpoint_files.require_intact(checkpoint))
    decoder = Decoder(config.model, 2, best_page_tokens(config.model, dtype, device), dtype, device)
    with torch.inference_mode():
        decoder.load({name: torch.from_numpy(array) for name, array in weights.items()})

    # All windows are scored as one list, so that short documents share a forward pass.
    trees: list[Tree] = []
    document_of: list[int] = []  # index of the document of each tree
    for index, document in enumerate(documents):
        token_ids = tokenizer.encode(document.text)
        for tree in windows(token_ids, tokenizer.first_token.id, config.model.max_seq_len):
            trees.append(tree)
            document_of.append(index)

    log_likelihoods = [0.0] * len(documents)  # nats
    scores = likelihoods(decoder, trees, device)
    for index, (continuation,) in zip(document_of, scores, strict=True):
        log_likelihoods[index] += continuation.total
        if not keep_going():
            return None

    return [
        {"id": document.id, "group": document.source, "bits": -nats / math.log(2), "bytes": len(document.text.encode())}
        for document, nats in zip(documents, log_likelihoods, strict=True)
    ]
