"""Embeddings: one vector of length 1 for each text, from the hidden states after the model's final norm.

`mean` averages the states of all tokens, the opening one included; `last` takes that of the last token. Sequences are
packed into one row without padding, and each sees itself alone. So a vector does not depend on the others: on a CPU
not even in its last bit.

Dimensions: N packed tokens, S sequences, D d_model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.generation.decoder import Decoder
from dist_lm.generation.likelihood import PACKED_TOKENS, Tree, hidden_of_trees, packed_tree
from dist_lm.generation.transfer import upload

Pooling = Literal["mean", "last"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True)
class EmbeddingRequest:
    """Sequences whose embeddings are asked for together."""

    id: str
    sequences: Sequence[Sequence[int]]  # token ids, none empty
    pooling: Pooling = "mean"
    adapter: str = ""  # name of an adapter that the decoder holds; empty: none


def embeddings(decoder: Decoder, request: EmbeddingRequest, device: torch.device) -> Iterator[np.ndarray]:
    """Yields embeddings (S, D), fp32, of the next sequences of a request, in their order: each time those of one
    forward pass of at most PACKED_TOKENS tokens (a longer sequence has one of its own).

    Args:
        decoder: a complete model; its cache is not touched.
    """
    most_tokens = PACKED_TOKENS[device.type]
    pack: list[Sequence[int]] = []
    for sequence in request.sequences:
        if pack and sum(map(len, pack)) + len(sequence) > most_tokens:
            yield _embeddings_of_pack(decoder, pack, request, device)
            pack = []
        pack.append(sequence)
    if pack:
        yield _embeddings_of_pack(decoder, pack, request, device)


@torch.inference_mode()
def _embeddings_of_pack(
    decoder: Decoder, pack: Sequence[Sequence[int]], request: EmbeddingRequest, device: torch.device
) -> np.ndarray:
    """Returns the embeddings (S, D), fp32, of sequences from one forward pass."""
    lengths = [len(sequence) for sequence in pack]
    token_N, position_N = upload(
        device,
        torch.tensor([token for sequence in pack for token in sequence]),
        torch.cat([torch.arange(length) for length in lengths]),
    )
    trees, begin = [], 0
    for sequence in pack:
        trees.append(packed_tree(Tree(tuple(sequence), ()), begin, decoder.dtype, device, decoder.config.window))
        begin += len(sequence)

    x_ND = decoder.normalised(hidden_of_trees(decoder, trees, token_N, position_N, request.adapter)).float()
    if request.pooling == "mean":
        x_SD = torch.stack([x_nD.mean(dim=0) for x_nD in x_ND.split(lengths)])
    else:
        x_SD = torch.stack([x_nD[-1] for x_nD in x_ND.split(lengths)])
    # The length of a vector says nothing, and clients compare by products.
    return F.normalize(x_SD, dim=1).cpu().numpy()
