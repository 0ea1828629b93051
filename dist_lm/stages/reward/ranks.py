"""Stage `reward` on ranks: rankings as data, agreement on held-out rankings, scores of samples at the end.

Dimensions: P rankings, K completions of a ranking.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_lm.chat.template import stop_tokens
from dist_lm.config.corpus import SPLITS
from dist_lm.config.root import Config
from dist_lm.data.batch import Batch, RankedPositions
from dist_lm.data.epochs import CorpusPass
from dist_lm.data.evaluation_batches import evenly_spaced
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.data.rankings.stream import Assemble, RankingBatches, RankingStream
from dist_lm.data.sequences import note_of_left_out
from dist_lm.errors import ArtefactError
from dist_lm.generation.load import load_model
from dist_lm.generation.request import Request, SamplingParams
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.messages import all_gather
from dist_lm.rlhf.reward_model import (
    RewardScale,
    last_token_scores,
    reward_metrics,
    scored_rankings,
    scores_of_rankings,
)
from dist_lm.stages.reward.config import RewardRunConfig
from dist_lm.stages.sampling import answer_all
from dist_lm.stages.training.arguments import (
    DataArguments,
    EvaluationArguments,
    StageData,
)
from dist_lm.stages.training.stage import batch_options, sequence_limit
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files

log = logging.getLogger(__name__)

EXAMPLE_COMPLETIONS = 4  # completions per ranking in the dry run


def open_data(arguments: DataArguments) -> StageData:
    """Opens the rankings of the stage's corpus, and their evaluation.

    Raises:
        ConfigError: a setting that rankings do not allow, or a batch that does not divide over the ranks.
        ArtefactError: the corpus holds no rankings, or none fits into a sequence.
        OSError: a file cannot be read.
    """
    assert isinstance(arguments.config, RewardRunConfig)
    settings = arguments.config.stage.reward
    train, val = open_rankings(arguments)

    def evaluate(model: Transformer, everything: bool, alive: Callable[[], None]) -> dict[str, float]:
        batches = ranking_batches(arguments, val, sequence_limit(arguments.config, everything))
        scores = scores_of_rankings(model, batches, arguments.world.device, arguments.data_ranks, alive)
        return reward_metrics(scored_rankings(val, scores))

    stream = ranking_stream(arguments, train, settings.learn_from, settings.label_noise)
    return StageData(stream, evaluate, passes=passes_over(arguments, stream))


def open_rankings(arguments: DataArguments, takes_labels: bool = False) -> tuple[RankingCorpus, RankingCorpus]:
    """Opens train and val of a stage that reads only rankings. The first rank warns of rankings that no sequence can
    hold.

    Args:
        takes_labels: whether the stage learns from one completion with a label.

    Raises:
        ArtefactError: the corpus is missing or damaged, holds no rankings, or labels that the stage does not learn
            from.
        OSError: a file cannot be read.
    """
    stage = arguments.config.stage
    directory = arguments.config.corpus_in(arguments.run.work, stage.corpus)
    train, val = (RankingCorpus.open(directory, split) for split in SPLITS)
    n_labels = sum(int((rankings.completions == 1).sum()) for rankings in (train, val))
    if n_labels and not takes_labels:
        raise ArtefactError(
            f"stage.corpus={stage.corpus}: {n_labels:,} of its documents are one completion with a label, which "
            "compares nothing: only stage=preference stage.preference.algorithm=kto learns from these"
        )
    if arguments.world.is_first:
        # The rankings are the same on every rank, so one warning is enough.
        for rankings in (train, val):
            if note := note_of_left_out(rankings.corpus, stage.seq_len, kind="rankings"):
                log.warning("%s", note)
    return train, val


def passes_over(arguments: DataArguments, stream: RankingStream) -> tuple[CorpusPass, ...]:
    """Returns the one corpus that a stream of rankings reads."""
    return (CorpusPass(arguments.config.stage.corpus, stream.n_sequences),)


def ranking_stream(
    arguments: DataArguments,
    train: RankingCorpus,
    learn_from: str,
    label_noise: float,
    assemble: Assemble | None = None,
) -> RankingStream:
    """Returns the steps over `train` from the position in `arguments` on; the last three arguments are those of
    `RankingStream`.

    Raises:
        ArtefactError: no ranking fits into a sequence.
        ConfigError: the batch does not divide over the ranks.
    """
    return RankingStream(
        train,
        learn_from,
        label_noise,
        seed=arguments.config.seed,
        global_batch=arguments.config.stage.global_batch,
        position=arguments.position,
        pin_memory=arguments.world.device.type == "cuda",
        assemble=assemble,
        **batch_options(arguments),
    )


def ranking_batches(
    arguments: DataArguments, rankings: RankingCorpus, limit: int = 0, assemble: Assemble | None = None
) -> RankingBatches:
    """Returns this rank's share of the rankings, each once, in batches.

    Args:
        limit: largest number of sequences; 0: all.
    """
    return RankingBatches(rankings=rankings, limit_sequences=limit, assemble=assemble, **batch_options(arguments))


def score_samples(arguments: EvaluationArguments) -> dict[str, float]:
    """Returns `reward/score_mean`, `score_std` and `scored` of the initial model's answers to prompts of val
    (collective).

    `scored` is the number of sequences. Without an initial model that generates text, with
    stage.reward.normaliser_prompts=0, or where no prompt leaves room for an answer, the completions of val are scored
    instead.

    Raises:
        ArtefactError: no completion fits into the model's context either, or corpus or initial checkpoint is missing.
        UserError: as `policy_samples`.
        OSError: a file cannot be read.
        MessageError: another rank has sent something else.
    """
    config = arguments.config
    assert isinstance(config, RewardRunConfig)
    settings = config.stage.reward
    directory = config.corpus_in(arguments.run.work, config.stage.corpus)
    val = RankingCorpus.open(directory, "val")

    # The initial model is the policy that stage rlhf starts from: its answers are what the scores will be used on.
    sequences = []
    if settings.normaliser_prompts and starts_from_policy(config.stage.init_from):
        sequences = policy_samples(arguments, config, val)
    if not sequences:
        sequences = completions_of(val, config.model.max_seq_len, arguments.tokenizer)
    if not sequences:
        raise ArtefactError(
            f"corpus {directory}: no prompt of val with a completion has at most "
            f"model.max_seq_len={config.model.max_seq_len} tokens, so no score can be normalised: add shorter ones"
        )

    # Each rank scores its share of the sequences; all ranks compute the same statistics.
    model = arguments.model()
    share = slice(arguments.world.rank, None, arguments.world.size)
    gathered = all_gather(last_token_scores(model, sequences[share]), np.ndarray)
    arguments.alive()
    scores = np.zeros(len(sequences), np.float32)
    for rank, scores_of_rank in enumerate(gathered):
        scores[rank :: arguments.world.size] = scores_of_rank

    scale = RewardScale.of(torch.from_numpy(scores))
    return {"reward/score_mean": scale.mean, "reward/score_std": scale.std, "reward/scored": float(len(sequences))}


def starts_from_policy(init_from: str) -> bool:
    """Returns whether training started from a model that generates text.

    Raises:
        ArtefactError: there is no such checkpoint.
    """
    if init_from == "none":
        return False
    start = checkpoint_files.find_checkpoint(Path(init_from))
    return checkpoint_files.read_state(start)[1]["head"] == "tokens"


def policy_samples(arguments: EvaluationArguments, config: RewardRunConfig, val: RankingCorpus) -> list[list[int]]:
    """Returns prompts of val with answers of the initial model, as token ids; empty (a warning) if no prompt leaves
    room for one.

    The answers are sampled as rollouts are: temperature 1, no filters. Every rank gets all of them (collective).

    Raises:
        ArtefactError: the initial checkpoint or the tokenizer is missing, or its logits are not numbers.
        ConfigError: bf16 is asked for on a GPU without it.
        UserError: the tokenizer lacks the mark that ends a turn.
    """
    # Sampled as rollouts are, so that the scale fits them.
    settings, tokenizer = config.stage.reward, arguments.tokenizer
    loaded = load_model(Path(config.stage.init_from), arguments.run.work.tokenizer_model)
    params = SamplingParams(max_new_tokens=settings.normaliser_new_tokens, stop_tokens=stop_tokens(tokenizer))
    longest = loaded.config.max_seq_len - settings.normaliser_new_tokens
    prompts = [prompt for prompt in prompts_of(val, settings.normaliser_prompts, tokenizer) if len(prompt) <= longest]
    if not prompts:
        log.warning(
            "stage.reward.normaliser_new_tokens=%d: no prompt of val leaves room for such answers; mean and deviation "
            "of scores are those of the completions of val",
            settings.normaliser_new_tokens,
        )
        return []

    if len(prompts) < settings.normaliser_prompts:
        log.info(
            "stage.reward.normaliser_prompts=%d: only %d prompts of val leave room for an answer; mean and deviation "
            "of scores are measured on these",
            *(settings.normaliser_prompts, len(prompts)),
        )

    requests = [
        Request(str(number), prompt, params, seed=config.seed + number) for number, prompt in enumerate(prompts)
    ]
    answers = answer_all(arguments, requests, "stage.reward.normaliser_prompts", loaded)
    return [[*prompt, *answer.tokens] for prompt, answer in zip(prompts, answers, strict=True)]


def prompts_of(rankings: RankingCorpus, limit: int, tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the prompts of `limit` rankings at even distances, as token ids."""
    return [
        tokenizer.first_token.put(rankings.tokens(number)[rankings.arrays(number).branch == 0]).tolist()
        for number in evenly_spaced(rankings.corpus.n_documents, limit).tolist()
    ]


def completions_of(rankings: RankingCorpus, longest: int, tokenizer: Tokenizer) -> list[list[int]]:
    """Returns every prompt with each of its completions as token ids, if prompt and completion have at most
    `longest` tokens together."""
    sequences = []
    for number in range(rankings.corpus.n_documents):
        # Branch 0 is the prompt, each other branch one completion.
        tokens, branch = rankings.tokens(number), rankings.arrays(number).branch
        for k in range(1, int(branch.max()) + 1):
            sequences.append(tokenizer.first_token.put(tokens[(branch == 0) | (branch == k)]).tolist())
    return [sequence for sequence in sequences if len(sequence) <= longest]


# --- examples for the dry run, which needs shapes and places but no real tokens ---


def example_batch(config: RewardRunConfig) -> Batch:
    """Returns a micro-batch (B, T) on the CPU with one ranking per sequence and random tokens, for the dry run."""
    tree = example_tree(config)
    branch_BT = tree["branch_BT"]
    n_completions, stage = int(branch_BT.max()), config.stage

    # A score is read at the last token of each completion.
    end_K = torch.stack([(branch_BT[0] <= branch).sum() - 1 for branch in range(1, n_completions + 1)])
    index_PK = end_K + torch.arange(stage.micro_batch)[:, None] * stage.seq_len
    return Batch(
        targets_BT=torch.zeros_like(branch_BT),
        loss_mask_BT=torch.zeros(branch_BT.shape),
        ranked=example_places(index_PK),
        **tree,
    )


def example_tree(config: Config) -> dict[str, Any]:
    """Returns the fields that batches of rankings share, for an example of stage.micro_batch sequences: in each a
    prompt and its completions, as a tree. All are int64 on the CPU, (B, T) except `sequence_B`; the tokens are random.
    """
    rows, seq_len = config.stage.micro_batch, config.stage.seq_len
    n_completions = min(EXAMPLE_COMPLETIONS, seq_len - 1)
    # Prompt and completions have equal lengths.
    branch_BT = (torch.arange(seq_len) * (n_completions + 1) // seq_len).repeat(rows, 1)
    return {
        "tokens_BT": torch.randint(0, config.model.vocab_size, branch_BT.shape),
        "document_BT": torch.zeros_like(branch_BT),
        "position_BT": torch.arange(seq_len).repeat(rows, 1),
        "sequence_B": torch.arange(rows),
        "branch_BT": branch_BT,
    }


def example_places(index_PK: torch.Tensor, as_rankings: bool = True) -> RankedPositions:
    """Returns rankings of completions at these places, best first: whole, or with `as_rankings=False` no ranking but
    pairs of neighbours, the better one first.

    Args:
        index_PK: indices into the tokens of a batch.
    """
    better_N = worse_N = torch.zeros(0, dtype=torch.int64)
    if not as_rankings:
        better_N, worse_N = index_PK[:, :-1].flatten(), index_PK[:, 1:].flatten()
        index_PK = index_PK[:0]
    return RankedPositions(
        index_PK=index_PK,
        rank_PK=torch.arange(index_PK.shape[1]).repeat(len(index_PK), 1),
        exists_PK=torch.ones(index_PK.shape, dtype=torch.bool),
        better_N=better_N,
        worse_N=worse_N,
        margin_N=torch.zeros(better_N.shape),
    )
