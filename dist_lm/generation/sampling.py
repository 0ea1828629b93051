"""From logits to tokens: pure functions. The result of a row depends on that row alone, to the last bit.

One number u in (0, 1), a function of the answer's seed and the token's position, draws a token: the first one, in the
order of the vocabulary, at which the cumulative probability exceeds u.

Filters do not sort the vocabulary. A few candidates with the largest logits are extracted first; only if they do not
determine what the filters keep are more extracted, and in the end the whole row.

Dimensions: B rows, V vocabulary, M candidates, C chunks of W tokens.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.generation.request import SamplingParams
from dist_lm.model.keyed_random import hash_words

CHUNK = 128  # tokens
FEW = 1024  # `largest` splits a row into at most this many chunks
UNIFORM_BITS = 48
COLDEST = 1e-20  # smallest temperature: logits divided by less may not fit fp32
GREEDY, UNFILTERED, ALL = 0, -1, 1 << 31  # special values of `Group.candidates`; a row shorter than ALL is sorted
CANDIDATES = (64, 256, 1024, 4096)  # possible numbers of candidates; a row's parameters choose one
NUCLEUS_CANDIDATES = 256  # at least, if no top-k bounds their number


@dataclass(frozen=True)
class Choice:
    """One token for each row."""

    token_B: torch.Tensor  # int64
    logprob_B: torch.Tensor  # fp32, nats, under the distribution it was drawn from (greedy: 0)
    raw_logprob_B: torch.Tensor  # fp32, nats, under softmax(logits); nan if logits are not finite numbers


@dataclass(frozen=True)
class Group:
    """Rows drawn by the same method."""

    rows: torch.Tensor | None  # int64 indices; None: all rows
    candidates: int  # number of candidates (V or more: sort the row), or GREEDY or UNFILTERED
    temperature_B1: torch.Tensor
    top_k_B1: torch.Tensor  # int64; ALL if off
    top_p_B1: torch.Tensor
    log_min_p_B1: torch.Tensor


def group_rows(params: Sequence[SamplingParams], device: torch.device) -> list[Group]:
    """Group the rows of a batch by the method of drawing."""
    members: dict[int, list[int]] = {}
    for row, one in enumerate(params):
        members.setdefault(_candidates(one), []).append(row)

    def column(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[:, None]

    groups = []
    for candidates, rows in members.items():
        own = [params[row] for row in rows]
        groups.append(
            Group(
                rows=None if len(rows) == len(params) else torch.tensor(rows, device=device),
                candidates=candidates,
                temperature_B1=column([max(one.temperature, COLDEST) for one in own], torch.float32),
                top_k_B1=column([one.top_k or ALL for one in own], torch.int64),
                top_p_B1=column([one.top_p for one in own], torch.float32),
                log_min_p_B1=column([math.log(one.min_p) if one.min_p else -math.inf for one in own], torch.float32),
            )
        )
    return groups


def _candidates(params: SamplingParams) -> int:
    if params.temperature == 0:
        return GREEDY
    if params.top_k == 0 and params.top_p == 1 and params.min_p == 0:
        return UNFILTERED
    needed = params.top_k + 1 if params.top_k else NUCLEUS_CANDIDATES
    return next((most for most in CANDIDATES if needed <= most), ALL)


def uniform(seed_B: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
    """Numbers in (0, 1), fp64, as a function of (seed, position), both int64."""
    bits_B = hash_words(seed_B, position_B) & ((1 << UNIFORM_BITS) - 1)
    return (bits_B.double() + 0.5) / (1 << UNIFORM_BITS)


def sample(
    logits_BV: torch.Tensor, groups: Sequence[Group], uniform_B: torch.Tensor, adjusted_BV: torch.Tensor | None = None
) -> Choice:
    """Draw one token for each row.

    Args:
        logits_BV: fp32, of the model.
        groups: see `group_rows`.
        uniform_B: see `uniform`.
        adjusted_BV: logits to draw from instead, see `adjust`.
    """
    drawn_BV = logits_BV if adjusted_BV is None else adjusted_BV
    token_B = torch.empty(len(logits_BV), dtype=torch.int64, device=logits_BV.device)
    logprob_B = torch.empty(len(logits_BV), device=logits_BV.device)
    for group in groups:
        if group.rows is None:
            token_B, logprob_B = _draw(drawn_BV, group, uniform_B)
        else:
            token_B[group.rows], logprob_B[group.rows] = _draw(drawn_BV[group.rows], group, uniform_B[group.rows])
    return Choice(token_B, logprob_B, token_logprobs(logits_BV, token_B))


def adjust(logits_V: torch.Tensor, params: SamplingParams, seen: Collection[int]) -> None:
    """Apply repetition penalty and logit bias to one row, in place.

    Args:
        seen: tokens of the prompt and the answer so far.
    """
    if params.repetition_penalty != 1 and seen:
        id_S = torch.tensor(sorted(seen), device=logits_V.device)
        own_S = logits_V[id_S]
        penalty = params.repetition_penalty
        logits_V[id_S] = torch.where(own_S > 0, own_S / penalty, own_S * penalty)
    if params.logit_bias:
        id_S = torch.tensor(list(params.logit_bias), device=logits_V.device)
        logits_V[id_S] += torch.tensor(list(params.logit_bias.values()), device=logits_V.device)


def token_logprobs(logits_BV: torch.Tensor, token_B: torch.Tensor) -> torch.Tensor:
    """log softmax(logits) at one token of each row, fp32."""
    return logits_BV.gather(1, token_B[:, None])[:, 0] - log_normaliser(logits_BV)[:, 0]


def log_normaliser(x_BV: torch.Tensor) -> torch.Tensor:
    """logsumexp (B, 1) of each row, computed from softmax: its kernel is twice as fast, and its maximum is never 0."""
    return x_BV.amax(dim=-1, keepdim=True) - x_BV.softmax(dim=-1).amax(dim=-1, keepdim=True).log()


def _draw(logits_BV: torch.Tensor, group: Group, uniform_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if group.candidates == GREEDY:
        token_B = logits_BV.argmax(dim=-1)
        return token_B, torch.zeros(len(token_B), device=token_B.device)
    if group.candidates == UNFILTERED:
        return _draw_unfiltered(logits_BV / group.temperature_B1, uniform_B)
    if group.candidates >= logits_BV.shape[-1]:
        return _draw_unfiltered(filtered(logits_BV / group.temperature_B1, group), uniform_B)
    return _draw_candidates(logits_BV, group, uniform_B)


def _draw_unfiltered(x_BV: torch.Tensor, uniform_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the chunk by cumulative sums of chunks, then the token by cumulative sums inside it."""
    n_tokens = x_BV.shape[-1]
    p_BV = x_BV.softmax(dim=-1)
    if n_tokens % CHUNK:
        p_BV = F.pad(p_BV, (0, -n_tokens % CHUNK))
    p_BCW = p_BV.unflatten(-1, (-1, CHUNK))
    chunk_BC = p_BCW.sum(dim=-1).double()
    upto_BC = chunk_BC.cumsum(dim=-1)
    target_B1 = uniform_B[:, None] * upto_BC[:, -1:]
    chunk_B1 = _first_above(upto_BC, target_B1)
    inside_BW = _chunks(p_BCW, chunk_B1)[:, 0].double()
    upto_BW = inside_BW.cumsum(dim=-1)
    share_B1 = 1 - (upto_BC.gather(1, chunk_B1) - target_B1) / chunk_BC.gather(1, chunk_B1)
    place_B1 = _first_above(upto_BW, share_B1 * upto_BW[:, -1:])
    token_B = (chunk_B1 * CHUNK + place_B1)[:, 0].clamp_(max=n_tokens - 1)  # out of range only if logits are nan
    return token_B, inside_BW.gather(1, place_B1)[:, 0].log().float()


def _chunks(x_BCW: torch.Tensor, chunk_Bk: torch.Tensor) -> torch.Tensor:
    """The chosen chunks of each row, (B, k, W)."""
    n_rows, n_chunks, width = x_BCW.shape
    first_B1 = torch.arange(0, n_rows * n_chunks, n_chunks, device=x_BCW.device)[:, None]
    return x_BCW.reshape(-1, width).index_select(0, (chunk_Bk + first_B1).flatten()).view(n_rows, -1, width)


def _first_above(upto: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Index (B, 1) of the first cumulative sum above the target, at most that of the last one with any weight."""
    last = (upto < upto[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(torch.searchsorted(upto, target, right=True), last)


def _draw_candidates(
    logits_BV: torch.Tensor, group: Group, uniform_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logit_BM, id_BM = largest(logits_BV, group.candidates)
    x_BM = logit_BM / group.temperature_B1
    place_M = torch.arange(group.candidates, device=x_BM.device)
    in_top_k_BM = place_M < group.top_k_B1
    bounded_B1 = group.top_k_B1 < group.candidates  # the candidates include all that top-k keeps, and one more
    if bool(bounded_B1.all()):
        norm_B1 = x_BM.masked_fill(~in_top_k_BM, -math.inf).logsumexp(-1, keepdim=True)
    else:
        of_all_B1 = log_normaliser(logits_BV / group.temperature_B1)
        norm_B1 = torch.where(
            bounded_B1, x_BM.masked_fill(~in_top_k_BM, -math.inf).logsumexp(-1, keepdim=True), of_all_B1
        )
    p_BM = (x_BM - norm_B1).exp()
    keep_BM = _kept(x_BM, p_BM, in_top_k_BM, group)
    # unclear: all candidates are kept, or the first dropped one ties with the last kept one: more tokens may be kept
    n_kept_B1 = keep_BM.sum(dim=-1, keepdim=True)
    next_B1 = n_kept_B1.clamp(max=group.candidates - 1)
    ties_B1 = x_BM.gather(1, next_B1) == x_BM.gather(1, next_B1 - 1)
    unclear_B = ((n_kept_B1 == group.candidates) | (ties_B1 & (n_kept_B1 > 0)))[:, 0]

    # in the order of the vocabulary: two tokens that rounding swaps do not change the draw
    id_BM, order_BM = id_BM.sort(dim=-1)
    weight_BM = (p_BM * keep_BM).gather(1, order_BM).double()
    upto_BM = weight_BM.cumsum(dim=-1)
    chosen_B1 = _first_above(upto_BM, uniform_B[:, None] * upto_BM[:, -1:])
    token_B = id_BM.gather(1, chosen_B1)[:, 0]
    logprob_B = (weight_BM.gather(1, chosen_B1) / upto_BM[:, -1:]).log()[:, 0].float()
    if bool(unclear_B.any()):
        rows = unclear_B.nonzero()[:, 0]
        token_B[rows], logprob_B[rows] = _draw(logits_BV[rows], _with_more(group, rows), uniform_B[rows])
    return token_B, logprob_B


def _with_more(group: Group, rows: torch.Tensor) -> Group:
    """Rows of a group, with the next larger number of candidates."""
    columns = (group.temperature_B1, group.top_k_B1, group.top_p_B1, group.log_min_p_B1)
    more = next((most for most in CANDIDATES if most > group.candidates), ALL)
    return Group(None, more, *(column[rows] for column in columns))


def _kept(x_BM: torch.Tensor, p_BM: torch.Tensor, in_top_k_BM: torch.Tensor, group: Group) -> torch.Tensor:
    """Mask of tokens, most likely first, that pass top-k, top-p and min-p; the first one always passes."""
    before_BM = p_BM.cumsum(dim=-1) - p_BM
    in_top_p_BM = (before_BM < group.top_p_B1) | (group.top_p_B1 == 1)  # rounding must not drop the last tokens
    keep_BM = in_top_k_BM & in_top_p_BM & (x_BM >= x_BM[:, :1] + group.log_min_p_B1)
    keep_BM[:, 0] = True
    return keep_BM


def filtered(x_BV: torch.Tensor, group: Group) -> torch.Tensor:
    """Tempered logits with dropped tokens at -inf, by sorting whole rows: the definition of the filters."""
    descending_BV, id_BV = x_BV.sort(dim=-1, descending=True, stable=True)
    smallest_B1 = descending_BV.gather(1, group.top_k_B1.clamp(max=x_BV.shape[-1]) - 1)
    in_top_k_BV = descending_BV >= smallest_B1  # ties stay
    p_BV = descending_BV.masked_fill(~in_top_k_BV, -math.inf).softmax(dim=-1)
    keep_BV = _kept(descending_BV, p_BV, in_top_k_BV, group)
    return torch.full_like(x_BV, -math.inf).scatter(1, id_BV, descending_BV.masked_fill(~keep_BV, -math.inf))


def largest(x_BV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest values of each row and their indices, both (B, k), sorted by value, ties by index.

    They are in the k chunks with the largest maxima, so most of a row is read once. Those chunks are split again.
    """
    value_Bk, id_Bk = _largest(x_BV, k)
    id_Bk, order_Bk = id_Bk.sort(dim=-1)
    value_Bk, order_Bk = value_Bk.gather(1, order_Bk).sort(dim=-1, descending=True, stable=True)
    return value_Bk, id_Bk.gather(1, order_Bk)


def _largest(x_BV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    n_tokens = x_BV.shape[-1]
    width = -(-n_tokens // FEW)
    if 2 * k * width > n_tokens:
        value_Bk, id_Bk = x_BV.topk(k, dim=-1, sorted=False)
        return value_Bk, id_Bk
    if n_tokens % width:
        x_BV = F.pad(x_BV, (0, -n_tokens % width), value=-math.inf)
    x_BCW = x_BV.unflatten(-1, (-1, width))
    # in index order, so that every level finds the same ones among equal values
    chunk_Bk = x_BCW.amax(dim=-1).topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
    value_Bk, place_Bk = _largest(_chunks(x_BCW, chunk_Bk).flatten(1), k)
    return value_Bk, chunk_Bk.gather(1, place_Bk // width) * width + place_Bk % width
