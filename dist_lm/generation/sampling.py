"""From logits to tokens: pure functions. The result of a row depends on that row alone, to the last bit.

One number u in (0, 1), a function of the answer's seed and the token's position, draws a token: the first one, in the
order of the vocabulary, at which the cumulative probability exceeds u.

Filters do not sort the vocabulary. A few candidates with the largest logits are extracted first; only if they do not
determine what the filters keep are more extracted, and in the end the whole row.

Dimensions: B rows, V vocabulary, M candidates, C chunks of W tokens.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.generation.request import SamplingParams
from dist_lm.generation.transfer import download, upload
from dist_lm.model.keyed_random import hash_words
from dist_lm.model.token_sets import packed

CHUNK = 128  # tokens
FEW = 1024  # `largest` splits a row into at most this many chunks
UNIFORM_BITS = 48
COLDEST = 1e-20  # smallest temperature: logits divided by less may not fit fp32
GREEDY, UNFILTERED, ALL = 0, -1, 1 << 31  # special values of `Group.candidates`; a row shorter than ALL is sorted
CANDIDATES = (64, 256, 1024, 4096)  # possible numbers of candidates; a row's parameters choose one
NUCLEUS_CANDIDATES = 256  # at least, if no top-k bounds their number


@dataclass(frozen=True)
class Choice:
    """One token for each row, on the host."""

    token_B: torch.Tensor  # int64
    logprob_B: torch.Tensor  # fp32, nats, under the distribution it was drawn from (greedy: 0)
    raw_logprob_B: torch.Tensor  # fp32, nats, under softmax(logits); nan if logits are not finite numbers
    sets: list[bytes]  # of each row, the tokens it was drawn from (`model.token_sets`); empty if not asked for


@dataclass(frozen=True)
class Group:
    """Rows drawn by the same method."""

    members: Sequence[int]  # the rows
    rows: torch.Tensor | None  # the same on the device, int64; None: all rows
    bounded: bool  # the candidates of every row include all that its top-k keeps, and one more
    candidates: int  # number of candidates (V or more: sort the row), or GREEDY or UNFILTERED
    # filters compute in fp64: fp32 sums of a large vocabulary err by more than the probability of a token at the border
    temperature_B1: torch.Tensor
    top_k_B1: torch.Tensor  # int64; ALL if off
    top_p_B1: torch.Tensor
    log_min_p_B1: torch.Tensor


def group_rows(params: Sequence[SamplingParams], device: torch.device) -> list[Group]:
    """Group the rows of a batch by the method of drawing."""
    members: dict[int, list[int]] = {}
    for row, one in enumerate(params):
        members.setdefault(_candidates(one), []).append(row)

    order = [row for rows in members.values() for row in rows]
    own = [params[row] for row in order]
    columns = upload(
        device,
        torch.tensor(order),
        torch.tensor([one.top_k or ALL for one in own]),
        torch.tensor([max(one.temperature, COLDEST) for one in own], dtype=torch.float64),
        torch.tensor([one.top_p for one in own], dtype=torch.float64),
        torch.tensor([math.log(one.min_p) if one.min_p else -math.inf for one in own], dtype=torch.float64),
    )
    by_group = zip(*(column.split([len(rows) for rows in members.values()]) for column in columns), strict=True)
    return [
        Group(
            members=rows,
            rows=None if len(rows) == len(params) else row_B,
            bounded=all(0 < params[row].top_k < candidates for row in rows),
            candidates=candidates,
            temperature_B1=temperature_B[:, None],
            top_k_B1=top_k_B[:, None],
            top_p_B1=top_p_B[:, None],
            log_min_p_B1=log_min_p_B[:, None],
        )
        for (candidates, rows), (row_B, top_k_B, temperature_B, top_p_B, log_min_p_B) in zip(
            members.items(), by_group, strict=True
        )
    ]


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
    logits_BV: torch.Tensor,
    groups: Sequence[Group],
    uniform_B: torch.Tensor,
    adjusted_BV: torch.Tensor | None = None,
    keep_sets: bool = False,
) -> Choice:
    """Draw one token for each row. The host waits for the device once, and once more if a row needs more candidates.

    Args:
        logits_BV: fp32, of the model.
        groups: see `group_rows`.
        uniform_B: see `uniform`.
        adjusted_BV: logits to draw from instead, see `adjusted`.
        keep_sets: whether the sets of tokens are wanted; the host then waits once more for each group.
    """
    drawn_BV = logits_BV if adjusted_BV is None else adjusted_BV
    device = logits_BV.device
    token_B = torch.empty(len(logits_BV), dtype=torch.int64, device=device)
    logprob_B = torch.empty(len(logits_BV), device=device)
    unclear_B = torch.zeros(len(logits_BV), dtype=torch.bool, device=device)
    sets = [b""] * len(logits_BV) if keep_sets else []
    for group in groups:
        if group.rows is None:
            token_B, logprob_B, unclear_B, kept = _draw(drawn_BV, group, uniform_B)
        else:
            rows = group.rows
            token_B[rows], logprob_B[rows], unclear_B[rows], kept = _draw(drawn_BV[rows], group, uniform_B[rows])
        if keep_sets and kept is not None:
            for row, one in zip(group.members, _packed_rows(kept, logits_BV.shape[-1]), strict=True):
                sets[row] = one
    *chosen, unclear_B = download(token_B, logprob_B, token_logprobs(logits_BV, token_B), unclear_B)
    unclear = unclear_B.tolist()
    for group in groups:
        places = [place for place, row in enumerate(group.members) if unclear[row]]
        if places:
            members = [group.members[place] for place in places]
            place_n, row_n = upload(device, torch.tensor(places), torch.tensor(members))
            adjusted_nV = None if adjusted_BV is None else adjusted_BV[row_n]
            more = [_with_more(group, place_n)]
            again = sample(logits_BV[row_n], more, uniform_B[row_n], adjusted_nV, keep_sets)
            for whole, part in zip(chosen, (again.token_B, again.logprob_B, again.raw_logprob_B), strict=True):
                whole[members] = part
            for place, one in enumerate(again.sets):
                sets[members[place]] = one
    return Choice(chosen[0], chosen[1], chosen[2], sets)


_Kept = tuple[torch.Tensor, torch.Tensor]
"""Token ids and whether each is kept: (B, M) int64 and bool."""


def _packed_rows(kept: _Kept, vocab_size: int) -> list[bytes]:
    id_BM, keep_BM = (part.numpy() for part in download(*kept))
    return [packed(id_M[keep_M], vocab_size) for id_M, keep_M in zip(id_BM, keep_BM, strict=True)]


def adjusted(
    logits_BV: torch.Tensor, params: Sequence[SamplingParams], seen: Sequence[Iterable[int]]
) -> torch.Tensor | None:
    """Logits after repetition penalty and logit bias; None if no row has either.

    Args:
        seen: tokens of the prompt and the answer so far, of each row.
    """
    if not any(one.adjusts_logits for one in params):
        return None
    penalised: list[tuple[int, float]] = []  # (index in all rows, penalty)
    biased: list[tuple[int, float]] = []
    for row, (one, tokens) in enumerate(zip(params, seen, strict=True)):
        first = row * logits_BV.shape[-1]
        if one.repetition_penalty != 1:
            penalised += [(first + token, one.repetition_penalty) for token in set(tokens)]
        biased += [(first + token, bias) for token, bias in one.logit_bias.items()]
    place_n, place_m, penalty_n, bias_m = upload(
        logits_BV.device,
        *(torch.tensor([place for place, _ in pairs], dtype=torch.int64) for pairs in (penalised, biased)),
        *(torch.tensor([value for _, value in pairs], dtype=torch.float32) for pairs in (penalised, biased)),
    )
    logit_X = logits_BV.flatten().clone()
    own_n = logit_X[place_n]
    logit_X[place_n] = torch.where(own_n > 0, own_n / penalty_n, own_n * penalty_n)
    logit_X[place_m] += bias_m
    return logit_X.view_as(logits_BV)


def token_logprobs(logits_BV: torch.Tensor, token_B: torch.Tensor) -> torch.Tensor:
    """log softmax(logits) at one token of each row, fp32."""
    return logits_BV.gather(1, token_B[:, None])[:, 0] - log_normaliser(logits_BV)[:, 0]


def log_normaliser(x_BV: torch.Tensor) -> torch.Tensor:
    """logsumexp (B, 1) of each row, computed from softmax: its kernel is twice as fast, and its maximum is never 0."""
    return x_BV.amax(dim=-1, keepdim=True) - x_BV.softmax(dim=-1).amax(dim=-1, keepdim=True).log()


def _draw(
    logits_BV: torch.Tensor, group: Group, uniform_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, _Kept | None]:
    """(token, its log-probability, whether the candidates did not suffice) for each row, and what the filters kept
    (None: all)."""
    if 0 < group.candidates < logits_BV.shape[-1]:
        return _draw_candidates(logits_BV, group, uniform_B)
    clear_B = torch.zeros(len(logits_BV), dtype=torch.bool, device=logits_BV.device)
    if group.candidates == GREEDY:
        token_B = logits_BV.argmax(dim=-1)
        kept = token_B[:, None], ~clear_B[:, None]
        return token_B, torch.zeros(len(logits_BV), device=logits_BV.device), clear_B, kept
    if group.candidates == UNFILTERED:
        return *_draw_unfiltered(logits_BV / group.temperature_B1.float(), uniform_B), clear_B, None
    x_BV = filtered(logits_BV / group.temperature_B1, group)
    id_BV = torch.arange(x_BV.shape[-1], device=x_BV.device).expand_as(x_BV)
    return *_draw_unfiltered(x_BV, uniform_B), clear_B, (id_BV, x_BV > -math.inf)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, _Kept]:
    logit_BM, id_BM = largest(logits_BV, group.candidates)
    x_BM = logit_BM / group.temperature_B1
    place_M = torch.arange(group.candidates, device=x_BM.device)
    in_top_k_BM = place_M < group.top_k_B1
    norm_B1 = x_BM.masked_fill(~in_top_k_BM, -math.inf).logsumexp(-1, keepdim=True)
    if not group.bounded:
        of_all_B1 = log_normaliser(logits_BV / group.temperature_B1)
        norm_B1 = torch.where(group.top_k_B1 < group.candidates, norm_B1, of_all_B1)
    p_BM = (x_BM - norm_B1).exp()
    keep_BM = _kept(x_BM, p_BM, in_top_k_BM, group)
    # unclear: all candidates are kept, or the first dropped one ties with the last kept one: more tokens may be kept
    n_kept_B1 = keep_BM.sum(dim=-1, keepdim=True)
    next_B1 = n_kept_B1.clamp(max=group.candidates - 1)
    ties_B1 = x_BM.gather(1, next_B1) == x_BM.gather(1, next_B1 - 1)
    unclear_B = ((n_kept_B1 == group.candidates) | (ties_B1 & (n_kept_B1 > 0)))[:, 0]

    # in the order of the vocabulary: two tokens that rounding swaps do not change the draw
    id_BM, order_BM = id_BM.sort(dim=-1)
    keep_BM = keep_BM.gather(1, order_BM)
    weight_BM = (p_BM.gather(1, order_BM) * keep_BM).double()
    upto_BM = weight_BM.cumsum(dim=-1)
    chosen_B1 = _first_above(upto_BM, uniform_B[:, None] * upto_BM[:, -1:])
    token_B = id_BM.gather(1, chosen_B1)[:, 0]
    logprob_B = (weight_BM.gather(1, chosen_B1) / upto_BM[:, -1:]).log()[:, 0].float()
    return token_B, logprob_B, unclear_B, (id_BM, keep_BM)


def _with_more(group: Group, place_n: torch.Tensor) -> Group:
    """Members of a group, as a batch of their own with the next larger number of candidates."""
    columns = (group.temperature_B1, group.top_k_B1, group.top_p_B1, group.log_min_p_B1)
    more = next((most for most in CANDIDATES if most > group.candidates), ALL)
    return Group(range(len(place_n)), None, group.bounded, more, *(column[place_n] for column in columns))


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
