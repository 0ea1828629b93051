"""A training step of a reward model: all completions of a prompt in one tree, or each with its own copy of the prompt.

Every variant computes the same loss (the first steps are compared). Without the tree the prompt is read again for every
completion: in rows of one completion each, as other libraries do it (here without padding, because all have one
length), and packed one after the other. Ceiling: as many tokens as the tree has, with plain causal attention and no
mask. Speed is in tokens of the tree per second for all variants, so a ratio is a ratio of times.

Dimensions: B prompts (and sequences of the tree), T tokens, K completions of a prompt.
"""

from collections.abc import Sequence

import numpy as np
import torch

from dist_lm.bench.case import Case, Comparison, GroupSize, configurations
from dist_lm.bench.models import initial_model
from dist_lm.bench.rank import OwnTraining, Trial
from dist_lm.chat.ranking import branch_ends, branch_positions
from dist_lm.config.root import Config
from dist_lm.data.batch import Batch, RankedPositions
from dist_lm.parallel.mesh import World
from dist_lm.rlhf.reward_model import choices_of_people

TREE, ROWS, PACKED, PLAIN = "one tree", "apart, a row each", "apart, packed", "as many tokens, causal"
PROMPT_SHARE = 0.5  # share of the prompt in the tree
NANO = ("stage=reward", "model=nano", "stage.global_batch=2", "stage.seq_len=512")
SHAPES = tuple((*NANO, f"stage.micro_batch={k}") for k in (4, 8, 2))
ROUNDS = 9


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns cases of four, eight and two completions (stage.micro_batch) of a prompt that fills half of
    stage.seq_len, or the one of `overrides`; `quick`: the first.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """
    return [_case(config) for config in configurations(SHAPES, overrides, quick)]


def _case(config: Config) -> Case:
    """Returns the case of one configuration: the tree against completions apart, all in one process."""
    prompt, k, completion = tokens_of(config)
    return Case(
        name=f"{config.model.name}, {config.stage.global_batch} prompts of {prompt}, {k} completions of {completion}",
        config=config,
        variants=dict.fromkeys((TREE, ROWS, PACKED, PLAIN), GroupSize(1)),
        comparisons=[Comparison(variant=TREE, peer=peer, ceiling=PLAIN) for peer in (ROWS, PACKED)],
        same_losses=frozenset({TREE, ROWS, PACKED}),
        rounds=ROUNDS,
    )


def build(variant: str, config: Config, world: World) -> Trial:
    """Builds one variant, in one process."""
    training = OwnTraining(initial_model(config).to(world.device), config, slice(None), world)
    training.objective = choices_of_people
    training.model.document_mask = variant in (TREE, PACKED)
    training.batches = [batch_of(variant, config).to(world.device)]
    return Trial(training.step)


def tokens_of(config: Config) -> tuple[int, int, int]:
    """Returns (tokens of a prompt, its completions, tokens of a completion).

    All completions are as long, so that rows of one completion each need no padding.
    """
    k, length = config.stage.micro_batch, round(config.stage.seq_len * PROMPT_SHARE)
    prompt = length + (config.stage.seq_len - length) % k
    return prompt, k, (config.stage.seq_len - prompt) // k


def batch_of(variant: str, config: Config) -> Batch:
    """Returns random prompts with K completions each, on the CPU; the same ones at every call, as config.seed decides.

    `variant` decides on the rows:

    - TREE: a row of T = stage.seq_len tokens for each prompt, with the completions as branches.
    - PLAIN: the same rows as plain text, without branches.
    - ROWS: a row for each completion, which holds a copy of the prompt and the completion.
    - PACKED: a row for each prompt, which holds the K rows of ROWS one after the other as documents.

    Completion k (from 0) of a prompt has rank k; 0 is the best. The loss mask is 0 everywhere, because the loss is that
    of the ranks.
    """
    n_prompts, t = config.stage.global_batch, config.stage.seq_len
    generator = torch.Generator().manual_seed(config.seed)
    tokens_BT = torch.randint(2, config.model.vocab_size, (n_prompts, t), generator=generator)
    prompt, k, completion = tokens_of(config)
    branch = np.repeat(np.arange(k + 1), [prompt] + k * [completion])

    if variant in (TREE, PLAIN):
        ends = torch.from_numpy(branch_ends(branch))
        position, branch_BT = torch.arange(t), None
        # In a tree, every completion goes on from the last position of the prompt.
        if variant == TREE:
            position = torch.from_numpy(branch_positions(branch))
            branch_BT = torch.from_numpy(branch).repeat(n_prompts, 1)
        index_PK = torch.arange(n_prompts)[:, None] * t + ends
        return _batch(tokens_BT, torch.zeros_like(tokens_BT), position.repeat(n_prompts, 1), index_PK, branch_BT)

    # Each completion gets a copy of the prompt: branch 0 of the tree is the prompt, branch k completion k.
    path_indices = [torch.from_numpy(np.flatnonzero((branch == 0) | (branch == b))) for b in range(1, k + 1)]
    row = prompt + completion
    apart_BKT = torch.stack([tokens_BT[:, indices] for indices in path_indices], dim=1)
    index_PK = torch.arange(n_prompts * k).view(n_prompts, k) * row + row - 1

    shape = (n_prompts * k, row) if variant == ROWS else (n_prompts, k * row)
    document = torch.arange(k).repeat_interleave(row).repeat(n_prompts, 1)
    position = torch.arange(row).repeat(n_prompts * k)
    return _batch(apart_BKT.reshape(shape), document.view(shape), position.view(shape), index_PK, None)


def _batch(
    tokens_BT: torch.Tensor,
    document_BT: torch.Tensor,
    position_BT: torch.Tensor,
    index_PK: torch.Tensor,
    branch_BT: torch.Tensor | None,
) -> Batch:
    """Returns a batch of rankings whose completions of prompt p end at `index_PK[p]` of the flattened batch, best
    first. No target counts."""
    none = torch.zeros(0, dtype=torch.int64)
    rank_PK = torch.arange(index_PK.shape[1]).repeat(len(index_PK), 1)
    present_PK = torch.ones(index_PK.shape, dtype=torch.bool)
    return Batch(
        tokens_BT=tokens_BT,
        targets_BT=torch.zeros_like(tokens_BT),
        loss_mask_BT=torch.zeros(tokens_BT.shape),
        document_BT=document_BT,
        position_BT=position_BT,
        sequence_B=torch.arange(len(tokens_BT)),
        branch_BT=branch_BT,
        ranked=RankedPositions(index_PK, rank_PK, present_PK, none, none, torch.zeros(0)),
    )
