"""From logits to tokens: pure functions. The token of a row depends on that row alone, to the last bit.

u in (0, 1) is a hash of the answer's seed and the token's position. The token drawn is the first one, in the order of
the vocabulary, whose cumulative probability exceeds u.

Filters do not sort the vocabulary. A few candidates with the largest logits are extracted first. If these do not
determine which tokens pass the filters, more are extracted; at worst all tokens are sorted.

Filters compute in fp64: fp32 sums over a large vocabulary err by more than the probability of a token at the border.

Dimensions: B rows, n some of the rows, V vocabulary, M candidates, C chunks of W tokens, k largest values, U bytes with
one bit for each token of the vocabulary. In `adjusted`, n and m are the logits that change, X all B * V logits.
"""

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.generation.request import SamplingParams, TopLogprobs
from dist_lm.generation.transfer import download, upload
from dist_lm.model.keyed_random import hash_words
from dist_lm.model.token_sets import packed

CHUNK = 128  # tokens
MAX_CHUNKS = 1024  # `largest` splits a row into at most this many chunks
UNIFORM_BITS = 48
NO_MIN_P = -sys.float_info.max  # log of a min-p that is off: all logits but -inf pass
COLDEST = 1e-20  # smallest temperature: logits divided by less may not fit fp32
# Special values of `DrawGroup.candidates`. ALL is more than any vocabulary has, so the whole row is sorted.
GREEDY, UNFILTERED, ALL = 0, -1, 1 << 31
CANDIDATES = (64, 256, 1024, 4096)  # possible numbers of candidates; a row's parameters choose one
NUCLEUS_CANDIDATES = 256  # smallest number if no top-k bounds it
FP64_BLOCK_BYTES = 1 << 20  # tempered logits of this size are in memory at once on a CPU, at least a row per thread


@dataclass(frozen=True)
class Choice:
    """One token for each row, on the host."""

    token_B: torch.Tensor  # int64
    logprob_B: torch.Tensor  # fp32, nats, under the distribution it was drawn from (greedy: 0)
    raw_logprob_B: torch.Tensor  # fp32, nats, under softmax(logits); nan if logits are not finite numbers
    sets: list[bytes]  # tokens that each row was drawn from (`model.token_sets`); empty without `keep_sets`
    top_id_Bk: torch.Tensor  # int64, the k tokens that are most likely under the model, in this order
    top_logprob_Bk: torch.Tensor  # fp32, nats, their log-probabilities

    def top_logprobs(self, row: int, count: int) -> TopLogprobs:
        """Returns the `count` most likely tokens of a row, at most k."""
        if not count:
            return ()
        columns = self.top_id_Bk[row, :count].tolist(), self.top_logprob_Bk[row, :count].tolist()
        return tuple(zip(*columns, strict=True))


@dataclass(frozen=True)
class DrawGroup:
    """Rows drawn by the same method."""

    host_rows: Sequence[int]  # the rows, on the host
    rows: torch.Tensor | None  # the same on the device, int64; None: all rows of the batch
    bounded: bool  # every row has a top-k, and it is smaller than `candidates`
    candidates: int  # number of candidates (V or more: sort the row), or GREEDY or UNFILTERED
    temperature_B1: torch.Tensor  # fp64
    top_k_B1: torch.Tensor  # int64; ALL if off
    top_p_B1: torch.Tensor  # fp64
    log_min_p_B1: torch.Tensor  # fp64; NO_MIN_P if off


def group_rows(params: Sequence[SamplingParams], device: torch.device) -> list[DrawGroup]:
    """Returns the rows of a batch, grouped by the method of drawing: by their number of candidates, see `DrawGroup`.

    Groups are in the order of their first rows, and the rows of a group ascend. Without rows there are no groups. For
    n rows of a group the parameters are (n, 1) on `device`, after one copy: int64 for top-k, fp64 for the others, and
    the logarithm of min-p.

    Args:
        params: of each row; a top-k of 0 becomes ALL, a min-p of 0 becomes NO_MIN_P, and the temperature is at least
            COLDEST.
    """
    rows_by_candidates: dict[int, list[int]] = {}
    for row, row_params in enumerate(params):
        rows_by_candidates.setdefault(_n_candidates(row_params), []).append(row)

    # One copy to the device carries the parameters of all rows, sorted by group.
    order = [row for rows in rows_by_candidates.values() for row in rows]
    ordered = [params[row] for row in order]
    columns = upload(
        device,
        torch.tensor(order),
        torch.tensor([p.top_k or ALL for p in ordered]),
        torch.tensor([max(p.temperature, COLDEST) for p in ordered], dtype=torch.float64),
        torch.tensor([p.top_p for p in ordered], dtype=torch.float64),
        torch.tensor([math.log(p.min_p) if p.min_p else NO_MIN_P for p in ordered], dtype=torch.float64),
    )

    groups = []
    sizes = [len(rows) for rows in rows_by_candidates.values()]
    columns_of_groups = zip(*(column_B.split(sizes) for column_B in columns), strict=True)
    for (candidates, rows), group_columns in zip(rows_by_candidates.items(), columns_of_groups, strict=True):
        row_B, top_k_B, temperature_B, top_p_B, log_min_p_B = group_columns
        groups.append(
            DrawGroup(
                host_rows=rows,
                rows=None if len(rows) == len(params) else row_B,
                bounded=all(0 < params[row].top_k < candidates for row in rows),
                candidates=candidates,
                temperature_B1=temperature_B[:, None],
                top_k_B1=top_k_B[:, None],
                top_p_B1=top_p_B[:, None],
                log_min_p_B1=log_min_p_B[:, None],
            )
        )
    return groups


def _n_candidates(params: SamplingParams) -> int:
    """Returns the number of candidates to begin with: GREEDY at temperature 0, UNFILTERED without a filter, else the
    smallest of CANDIDATES that exceeds top-k (ALL if none does), or NUCLEUS_CANDIDATES without a top-k."""
    if params.temperature == 0:
        return GREEDY
    if params.top_k == 0 and params.top_p == 1 and params.min_p == 0:
        return UNFILTERED
    # One more than top-k: it shows whether the last token ties with the next.
    needed = NUCLEUS_CANDIDATES
    if params.top_k:
        needed = params.top_k + 1
    return next((number for number in CANDIDATES if needed <= number), ALL)


def uniform(seed_B: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
    """Returns numbers in (0, 1), fp64, as a function of (seed, position), both int64."""
    # 48 bits fit fp64 exactly, and the half keeps 0 and 1 out.
    bits_B = hash_words(seed_B, position_B) & ((1 << UNIFORM_BITS) - 1)
    return (bits_B.double() + 0.5) / (1 << UNIFORM_BITS)


def sample(
    logits_BV: torch.Tensor,
    groups: Sequence[DrawGroup],
    uniform_B: torch.Tensor,
    adjusted_BV: torch.Tensor | None = None,
    keep_sets: bool = False,
    n_top: int = 0,
) -> Choice:
    """Returns one token for each row, on the host. The host waits for the device once, and once more for each draw that
    repeats rows with more candidates. Nothing is changed.

    Args:
        logits_BV: fp32 logits of the model, of which `raw_logprob_B` is computed.
        groups: see `group_rows`.
        uniform_B: see `uniform`.
        adjusted_BV: logits to draw from instead, see `adjusted`.
        keep_sets: whether to return the sets of tokens; the host then waits once more for each group.
        n_top: how many of the most likely tokens to return for each row.
    """
    source_BV = logits_BV if adjusted_BV is None else adjusted_BV
    n_rows, device = len(logits_BV), logits_BV.device
    token_B = torch.empty(n_rows, dtype=torch.int64, device=device)
    logprob_B = torch.empty(n_rows, device=device)
    unclear_B = torch.zeros(n_rows, dtype=torch.bool, device=device)
    sets = [b""] * n_rows if keep_sets else []

    for group in groups:
        if group.rows is None:
            token_B, logprob_B, unclear_B, passed = _draw(source_BV, group, uniform_B)
        else:
            rows = group.rows
            token_B[rows], logprob_B[rows], unclear_B[rows], passed = _draw(source_BV[rows], group, uniform_B[rows])
        if not keep_sets:
            continue
        if passed is not None:
            packed_rows = _pack_rows(passed, logits_BV.shape[-1])
        elif adjusted_BV is not None:
            packed_rows = _pack_not_forbidden(source_BV if group.rows is None else source_BV[group.rows])
        else:
            continue
        for row, token_set in zip(group.host_rows, packed_rows, strict=True):
            sets[row] = token_set

    # The model's own log-probabilities, before any setting of the sampler. They reveal nan, and files of answers show
    # them; RLHF trains with `logprob_B`.
    raw_logprob_B = token_logprobs(logits_BV, token_B)
    top_id_Bk = torch.empty(n_rows, 0, dtype=torch.int64, device=device)
    top_logprob_Bk = torch.empty(n_rows, 0, device=device)
    if n_top:
        top_logit_Bk, top_id_Bk = largest(logits_BV, min(n_top, logits_BV.shape[-1]))
        top_logprob_Bk = top_logit_Bk - log_normaliser(logits_BV)
    token_B, top_id_Bk, logprob_B, raw_logprob_B, top_logprob_Bk, unclear_B = download(
        token_B, top_id_Bk, logprob_B, raw_logprob_B, top_logprob_Bk, unclear_B
    )

    # Rows whose candidates did not suffice are drawn again, with more candidates.
    unclear = unclear_B.tolist()
    for group in groups:
        indices = [index for index, row in enumerate(group.host_rows) if unclear[row]]
        if not indices:
            continue
        rows = [group.host_rows[index] for index in indices]
        index_n, row_n = upload(device, torch.tensor(indices), torch.tensor(rows))
        adjusted_nV = None if adjusted_BV is None else adjusted_BV[row_n]
        redrawn = sample(
            logits_BV[row_n], [_with_more_candidates(group, index_n)], uniform_B[row_n], adjusted_nV, keep_sets
        )
        token_B[rows] = redrawn.token_B
        logprob_B[rows] = redrawn.logprob_B
        raw_logprob_B[rows] = redrawn.raw_logprob_B
        if keep_sets:
            for row, token_set in zip(rows, redrawn.sets, strict=True):
                sets[row] = token_set
    return Choice(token_B, logprob_B, raw_logprob_B, sets, top_id_Bk, top_logprob_Bk)


_Passed = tuple[torch.Tensor, torch.Tensor]
"""Token ids and whether each passed the filters: (B, M) int64 and bool."""


def _pack_rows(passed: _Passed, vocab_size: int) -> list[bytes]:
    id_BM, passes_BM = (tensor.numpy() for tensor in download(*passed))
    return [packed(id_M[passes_M], vocab_size) for id_M, passes_M in zip(id_BM, passes_BM, strict=True)]


def _pack_not_forbidden(logits_BV: torch.Tensor) -> list[bytes]:
    """Returns for each row the set of an unfiltered draw: all tokens but those with a logit of -inf; 0 bytes for all
    tokens."""
    (is_allowed_BV,) = download(logits_BV > -math.inf)
    sets = []
    for is_allowed_V in is_allowed_BV.numpy():
        token_ids = is_allowed_V.nonzero()[0]
        sets.append(b"" if len(token_ids) == len(is_allowed_V) else packed(token_ids, len(is_allowed_V)))
    return sets


def adjusted(
    logits_BV: torch.Tensor,
    params: Sequence[SamplingParams],
    seen: Sequence[Sequence[int]],
    n_prompt: Sequence[int],
) -> torch.Tensor | None:
    """Returns new logits (B, V) after penalties and logit bias; None if no row has any.

    A positive logit of a seen token is divided by the repetition penalty, a negative one multiplied. From the logit of
    a token that the answer has c > 0 times, presence_penalty + c * frequency_penalty is subtracted, as OpenAI's API
    defines it; then the bias is added.

    Args:
        params: of each row.
        seen: for each row, tokens of the prompt and the answer so far.
        n_prompt: how many of them are the prompt's.
    """
    if not any(row_params.adjusts_logits for row_params in params):
        return None

    # Both change few logits: their indices in the flattened rows travel to the device, and not dense rows.
    penalties: list[tuple[int, float]] = []  # (index in the flattened rows, penalty)
    biases: list[tuple[int, float]] = []
    for row, (row_params, tokens, begin) in enumerate(zip(params, seen, n_prompt, strict=True)):
        first = row * logits_BV.shape[-1]
        if row_params.repetition_penalty != 1:
            penalties += [(first + token, row_params.repetition_penalty) for token in set(tokens)]
        # An index stands in the list once, so the sums of a token are made here.
        bias_of = dict(row_params.logit_bias)
        if row_params.counts_tokens:
            for token, count in Counter(tokens[begin:]).items():
                penalty = row_params.presence_penalty + count * row_params.frequency_penalty
                bias_of[token] = bias_of.get(token, 0.0) - penalty
        biases += [(first + token, bias) for token, bias in bias_of.items()]
    index_n, index_m, penalty_n, bias_m = upload(
        logits_BV.device,
        *(torch.tensor([index for index, _ in pairs], dtype=torch.int64) for pairs in (penalties, biases)),
        *(torch.tensor([number for _, number in pairs], dtype=torch.float32) for pairs in (penalties, biases)),
    )

    logit_X = logits_BV.flatten().clone()
    seen_logit_n = logit_X[index_n]
    logit_X[index_n] = torch.where(seen_logit_n > 0, seen_logit_n / penalty_n, seen_logit_n * penalty_n)
    logit_X[index_m] += bias_m
    return logit_X.view_as(logits_BV)


def constrained(logits_BV: torch.Tensor, allowed: Mapping[int, np.ndarray]) -> torch.Tensor:
    """Returns new logits, -inf at the tokens that a row may not draw.

    Args:
        allowed: by row, the tokens that it may draw: (ceil(V / 8),) uint8, bit t % 8 of byte t // 8 is that of token t.
            Other rows stay as they are.
    """
    bits_nU = ~np.stack([*allowed.values()])  # of the forbidden tokens
    vocab_size, device = logits_BV.shape[-1], logits_BV.device
    # On a CPU numpy unpacks bits faster than operations of torch. A GPU is sent fewer bytes if it unpacks them.
    if device.type == "cpu":
        forbidden_nV = torch.from_numpy(np.unpackbits(bits_nU, axis=1, count=vocab_size, bitorder="little").view(bool))
    else:
        (device_bits_nU,) = upload(device, torch.from_numpy(bits_nU))
        bit_8 = torch.arange(8, dtype=torch.uint8, device=device)
        forbidden_nV = (device_bits_nU[..., None] >> bit_8 & 1).flatten(1)[:, :vocab_size].bool()

    if [*allowed] == [*range(len(logits_BV))]:
        return logits_BV.masked_fill(forbidden_nV, -math.inf)
    (row_n,) = upload(device, torch.tensor([*allowed]))
    logits_BV = logits_BV.clone()
    logits_BV[row_n] = logits_BV[row_n].masked_fill(forbidden_nV, -math.inf)
    return logits_BV


def token_logprobs(logits_BV: torch.Tensor, token_B: torch.Tensor) -> torch.Tensor:
    """Returns log softmax(logits) at one token of each row, fp32, nats."""
    return logits_BV.gather(1, token_B[:, None])[:, 0] - log_normaliser(logits_BV)[:, 0]


def log_normaliser(x_BV: torch.Tensor) -> torch.Tensor:
    """Returns the logsumexp (B, 1) of each row, computed from softmax, whose kernel is twice as fast; the largest
    probability is never 0."""
    return x_BV.amax(dim=-1, keepdim=True) - x_BV.softmax(dim=-1).amax(dim=-1, keepdim=True).log()


def _draw(
    logits_BV: torch.Tensor, group: DrawGroup, uniform_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, _Passed | None]:
    """Returns for each row the token (int64), its log-probability (fp32, nats) under the distribution it was drawn from
    (greedy: 0), whether the candidates did not suffice, and which tokens passed the filters (None: all).

    A row whose candidates did not suffice must be drawn again with more.

    Args:
        uniform_B: a number in (0, 1) for each row.
    """
    # A small vocabulary is sorted completely instead.
    if 0 < group.candidates < logits_BV.shape[-1]:
        return _draw_candidates(logits_BV, group, uniform_B)

    unclear_B = torch.zeros(len(logits_BV), dtype=torch.bool, device=logits_BV.device)
    if group.candidates == GREEDY:
        token_B = logits_BV.argmax(dim=-1)
        logprob_B = torch.zeros(len(logits_BV), device=logits_BV.device)
        return token_B, logprob_B, unclear_B, (token_B[:, None], ~unclear_B[:, None])
    if group.candidates == UNFILTERED:
        return *_draw_from_softmax(logits_BV / group.temperature_B1.float(), uniform_B), unclear_B, None

    x_BV = filtered(logits_BV / group.temperature_B1, group)
    id_BV = torch.arange(x_BV.shape[-1], device=x_BV.device).expand_as(x_BV)
    return *_draw_from_softmax(x_BV, uniform_B), unclear_B, (id_BV, x_BV > -math.inf)


def _draw_from_softmax(x_BV: torch.Tensor, uniform_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a token (int64) of each row, drawn from softmax(x_BV), and its log-probability (fp32, nats).

    It finds the chunk by cumulative sums of chunks, then the token by cumulative sums inside the chunk.
    """
    n_tokens = x_BV.shape[-1]
    p_BV = x_BV.softmax(dim=-1)
    if n_tokens % CHUNK:
        p_BV = F.pad(p_BV, (0, -n_tokens % CHUNK))
    p_BCW = p_BV.unflatten(-1, (-1, CHUNK))

    chunk_p_BC = p_BCW.sum(dim=-1).double()
    chunk_cdf_BC = chunk_p_BC.cumsum(dim=-1)
    target_B1 = uniform_B[:, None] * chunk_cdf_BC[:, -1:]
    chunk_B1 = _first_above(chunk_cdf_BC, target_B1)

    # The part of the chunk's probability that lies before the target.
    token_p_BW = _chunks(p_BCW, chunk_B1)[:, 0].double()
    token_cdf_BW = token_p_BW.cumsum(dim=-1)
    share_B1 = 1 - (chunk_cdf_BC.gather(1, chunk_B1) - target_B1) / chunk_p_BC.gather(1, chunk_B1)
    offset_B1 = _first_above(token_cdf_BW, share_B1 * token_cdf_BW[:, -1:])

    token_B = (chunk_B1 * CHUNK + offset_B1)[:, 0].clamp_(max=n_tokens - 1)  # out of range only if logits are nan
    return token_B, token_p_BW.gather(1, offset_B1)[:, 0].log().float()


def _chunks(x_BCW: torch.Tensor, chunk_Bk: torch.Tensor) -> torch.Tensor:
    """Returns k chunks of each row, (B, k, W)."""
    n_rows, n_chunks, width = x_BCW.shape
    first_B1 = torch.arange(0, n_rows * n_chunks, n_chunks, device=x_BCW.device)[:, None]
    return x_BCW.reshape(-1, width).index_select(0, (chunk_Bk + first_B1).flatten()).view(n_rows, -1, width)


def _first_above(cdf: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Returns the index (B, 1) of the first cumulative sum above the target, but no entry of weight 0 at the end."""
    # Rounding may lift the target to the last sum, and no sum lies above that.
    last = (cdf < cdf[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(torch.searchsorted(cdf, target, right=True), last)


def _draw_candidates(
    logits_BV: torch.Tensor, group: DrawGroup, uniform_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, _Passed]:
    """Does the same as `_draw`, from the `group.candidates` largest logits of each row; they must be fewer than V. A
    row is unclear if all candidates passed, or the last that passed ties with the first that failed."""
    logit_BM, id_BM = largest(logits_BV, group.candidates)
    x_BM = logit_BM / group.temperature_B1

    # Probabilities after top-k. A row whose top-k is off or keeps more than the candidates is normalised over all
    # tokens.
    rank_M = torch.arange(group.candidates, device=x_BM.device)
    in_top_k_BM = rank_M < group.top_k_B1
    log_z_B1 = x_BM.masked_fill(~in_top_k_BM, -math.inf).logsumexp(-1, keepdim=True)
    if not group.bounded:
        log_z_of_all_B1 = fp64_log_normaliser(logits_BV, group.temperature_B1)
        log_z_B1 = torch.where(group.top_k_B1 < group.candidates, log_z_B1, log_z_of_all_B1)
    p_BM = (x_BM - log_z_B1).exp()
    passes_BM = _passes(x_BM, p_BM, in_top_k_BM, group)

    # A row is unclear if every candidate passes, or if the first one that fails has the same logit as the last one that
    # passes.
    n_passed_B1 = passes_BM.sum(dim=-1, keepdim=True)
    next_B1 = n_passed_B1.clamp(max=group.candidates - 1)
    ties_B1 = x_BM.gather(1, next_B1) == x_BM.gather(1, next_B1 - 1)
    unclear_B = ((n_passed_B1 == group.candidates) | (ties_B1 & (n_passed_B1 > 0)))[:, 0]

    # Draw in the order of the vocabulary, so that the draw stays the same if rounding swaps two tokens in the order of
    # their logits.
    id_BM, order_BM = id_BM.sort(dim=-1)
    passes_BM = passes_BM.gather(1, order_BM)
    weight_BM = (p_BM.gather(1, order_BM) * passes_BM).double()
    cdf_BM = weight_BM.cumsum(dim=-1)
    chosen_B1 = _first_above(cdf_BM, uniform_B[:, None] * cdf_BM[:, -1:])
    token_B = id_BM.gather(1, chosen_B1)[:, 0]
    logprob_B = (weight_BM.gather(1, chosen_B1) / cdf_BM[:, -1:]).log()[:, 0].float()
    return token_B, logprob_B, unclear_B, (id_BM, passes_BM)


def fp64_log_normaliser(logits_BV: torch.Tensor, temperature_B1: torch.Tensor) -> torch.Tensor:
    """Returns the `log_normaliser` of `logits / temperature`, (B, 1) fp64 on the device of the logits.

    Where that is a CPU, a few rows at a time are computed, so that they fit into its cache.

    Args:
        logits_BV: any dtype.
        temperature_B1: fp64, above 0.
    """
    # All rows at once do not fit the cache of a core, and their memory comes from the system again in every step, which
    # takes longer than the arithmetic.
    n_rows = len(logits_BV)
    if logits_BV.device.type == "cpu":
        n_rows = max(torch.get_num_threads(), FP64_BLOCK_BYTES // (8 * logits_BV.shape[-1]))
    blocks = zip(logits_BV.split(n_rows), temperature_B1.split(n_rows), strict=True)
    return torch.cat([log_normaliser(logits_nV / temperature_n1) for logits_nV, temperature_n1 in blocks])


def _with_more_candidates(group: DrawGroup, index_n: torch.Tensor) -> DrawGroup:
    """Returns some rows of a group as all rows of a batch, with the next larger number of candidates."""
    columns = (group.temperature_B1, group.top_k_B1, group.top_p_B1, group.log_min_p_B1)
    candidates = next((number for number in CANDIDATES if number > group.candidates), ALL)
    chosen = (column_B1[index_n] for column_B1 in columns)
    return DrawGroup(range(len(index_n)), None, group.bounded, candidates, *chosen)


def _passes(x_BM: torch.Tensor, p_BM: torch.Tensor, in_top_k_BM: torch.Tensor, group: DrawGroup) -> torch.Tensor:
    """Returns the mask (B, M) of tokens that pass top-k, top-p and min-p; the first one of each row always passes.

    Args:
        x_BM: tempered logits, largest first.
        p_BM: their probabilities after top-k.
    """
    before_BM = p_BM.cumsum(dim=-1) - p_BM
    in_top_p_BM = (before_BM < group.top_p_B1) | (group.top_p_B1 == 1)  # rounding must not drop the last tokens
    # A token that is forbidden, by a constraint or a bias of -inf, passes no filter: `NO_MIN_P` keeps the sum finite.
    in_min_p_BM = x_BM >= x_BM[:, :1] + group.log_min_p_B1
    passes_BM = in_top_k_BM & in_top_p_BM & in_min_p_BM
    passes_BM[:, 0] = True
    return passes_BM


def filtered(x_BV: torch.Tensor, group: DrawGroup) -> torch.Tensor:
    """Returns tempered logits (B, V) with dropped tokens at -inf. It sorts all tokens and so defines what the filters
    mean."""
    descending_BV, id_BV = x_BV.sort(dim=-1, descending=True, stable=True)
    smallest_B1 = descending_BV.gather(1, group.top_k_B1.clamp(max=x_BV.shape[-1]) - 1)
    in_top_k_BV = descending_BV >= smallest_B1  # ties stay
    p_BV = descending_BV.masked_fill(~in_top_k_BV, -math.inf).softmax(dim=-1)
    passes_BV = _passes(descending_BV, p_BV, in_top_k_BV, group)
    return torch.full_like(x_BV, -math.inf).scatter(1, id_BV, descending_BV.masked_fill(~passes_BV, -math.inf))


def largest(x_BV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the k largest entries of each row and their indices, both (B, k), sorted by size, ties by index.

    They are in the k chunks with the largest maxima, so most of a row is read once. Those chunks are split again.
    """
    x_Bk, id_Bk = _largest(x_BV, k)
    id_Bk, order_Bk = id_Bk.sort(dim=-1)
    x_Bk, order_Bk = x_Bk.gather(1, order_Bk).sort(dim=-1, descending=True, stable=True)
    return x_Bk, id_Bk.gather(1, order_Bk)


def _largest(x_BV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the k largest entries of each row and their indices, both (B, k), in any order; of equal ones any may be
    taken."""
    n_tokens = x_BV.shape[-1]
    width = -(-n_tokens // MAX_CHUNKS)
    # Chunks would be single tokens, or most of the row.
    if width == 1 or 2 * k * width > n_tokens:
        x_Bk, id_Bk = x_BV.topk(k, dim=-1, sorted=False)
        return x_Bk, id_Bk

    if n_tokens % width:
        x_BV = F.pad(x_BV, (0, -n_tokens % width), value=-math.inf)
    # The k largest entries are in at most k chunks, and no chunk with a smaller maximum has one.
    x_BCW = x_BV.unflatten(-1, (-1, width))
    # Chunks are in index order, so that every level finds the same entries among equal ones.
    chunk_Bk = x_BCW.amax(dim=-1).topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
    x_Bk, index_Bk = _largest(_chunks(x_BCW, chunk_Bk).flatten(1), k)
    return x_Bk, chunk_Bk.gather(1, index_Bk // width) * width + index_Bk % width
