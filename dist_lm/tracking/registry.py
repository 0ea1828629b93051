"""The registry of metrics: every metric with its name, unit, better direction, meaning and stages.

Logging, dashboards, reports and docs/metrics.md are generated from it. A metrics file accepts only these names; to add
a metric, add a row here.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from dist_lm.errors import UserError

Better = Literal["lower", "higher", ""]
"""The direction that is an improvement; empty: neither is."""
Row = tuple[str, str, Better, str]
"""(name, unit, better direction, meaning)."""

TEXT_STAGES = ("language", "code", "tools")
"""Stages that predict tokens of text."""
LOOP_STAGES = (*TEXT_STAGES, "preference", "reward")
"""Stages that run the trainer's loop."""
TRAINING_STAGES = (*LOOP_STAGES, "rlhf")
"""Every stage that trains."""
MEASURED_STAGES = (*TRAINING_STAGES, "generate")
"""Every stage with metrics of its own; `evaluate` writes those of `generate`."""
PREFERENCE, REWARD, RLHF = ("preference",), ("reward",), ("rlhf",)


@dataclass(frozen=True)
class Metric:
    """A metric, or a family of metrics: a name with one `{slot}`.

    A slot stands for one or more characters; the slot `{completions}` stands for digits.
    """

    name: str
    unit: str  # "nats/token", "tokens/s", "s", "GiB"; "" for a ratio or a score
    meaning: str  # one sentence for people
    better: Better
    stages: tuple[str, ...]
    group: str  # section of a dashboard and of docs/metrics.md
    only: str = ""  # condition under which a run of these stages has the metric; empty: always

    @property
    def slot(self) -> str:
        """Returns the name of the variable part of a family; empty for a single metric."""
        return self.name.partition("{")[2].partition("}")[0]

    @property
    def stem(self) -> str:
        """Returns the name without slot: `reward/top1` for `reward/top1_{source}` and for `reward/top1_k{completions}`.

        A slot in the middle stays: `eval/{task}/pass@1`.
        """
        before, _, after_brace = self.name.partition("{")
        if not self.slot or not after_brace.endswith("}"):
            return self.name
        return before[: before.rindex("_")]


def _table(
    group: str, stages: tuple[str, ...], *rows: Row, only: str = "", parts: Sequence[tuple[str, str]] = ()
) -> tuple[Metric, ...]:
    """Returns the metrics of one group that the same stages have; `parts` are their families as (suffix, words)."""
    metrics = []

    for name, unit, better, meaning in rows:
        metrics.append(Metric(name, unit, meaning, better, stages, group, only))
        metrics += [
            Metric(name + suffix, unit, f"{meaning.removesuffix('.')}, {words}.", better, stages, group, only)
            for suffix, words in parts
        ]

    return tuple(metrics)


LEARNING = (
    *_table(
        "loss",
        LOOP_STAGES,
        ("train/loss", "nats/target", "lower", "Training loss of the global batch, with label smoothing."),
        (
            "train/loss_spikes",
            "steps",
            "lower",
            "Number of steps so far with a loss 6 standard deviations above the running mean.",
        ),
    ),
    *_table(
        "loss",
        (*PREFERENCE, *REWARD),
        ("train/accuracy", "", "higher", "Share of choices in which the preferred answer scores highest."),
    ),
    *_table(
        "preference",
        PREFERENCE,
        ("train/margin", "", "higher", "Mean difference of the implicit rewards of chosen and rejected answers."),
        ("train/chosen_reward", "", "", "Mean implicit reward of chosen answers."),
        ("train/rejected_reward", "", "", "Mean implicit reward of rejected answers."),
        ("train/chosen_logprob", "nats", "", "Mean log-probability of chosen answers."),
        ("train/rejected_logprob", "nats", "", "Mean log-probability of rejected answers."),
    ),
    *_table(
        "preference",
        PREFERENCE,
        (
            "train/kl",
            "nats",
            "",
            "KL divergence from the reference model on mismatched answers, the reference point of KTO.",
        ),
        only="with stage.preference.algorithm=kto",
    ),
    *_table(
        "loss",
        TRAINING_STAGES,
        ("train/tokens", "tokens", "", "Number of tokens trained on so far (preference, reward: choices)."),
    ),
    *_table(
        "optimizer",
        LOOP_STAGES,
        ("train/grad_norm", "", "", "L2 norm of the gradient before clipping."),
        parts=[("_{group}", "for one group of parameters")],
    ),
    *_table(
        "optimizer",
        LOOP_STAGES,
        ("train/update_ratio", "", "", "L2 norm of the update divided by the L2 norm of the parameters."),
        ("train/lr", "", "", "Learning rate."),
        (
            "train/skipped_steps",
            "steps",
            "lower",
            "Number of steps so far that were skipped because of NaN or infinite gradients.",
        ),
    ),
)

SPEED = (
    *_table(
        "throughput",
        TRAINING_STAGES,
        ("perf/tokens_per_s", "tokens/s", "higher", "Tokens per second of all ranks, padding excluded."),
        ("perf/tokens_per_s_per_rank", "tokens/s", "higher", "Tokens per second of one rank, padding excluded."),
    ),
    *_table(
        "throughput",
        LOOP_STAGES,
        (
            "perf/mfu",
            "",
            "higher",
            "Model FLOP/s (with padding, without recomputation) divided by the peak (data sheet or measured).",
        ),
    ),
    *_table(
        "throughput",
        RLHF,
        ("perf/samples_per_s", "samples/s", "higher", "Rollouts per second, over the time of the iteration."),
    ),
    *_table(
        "throughput",
        TEXT_STAGES,
        ("perf/bytes_per_token", "bytes/token", "higher", "UTF-8 bytes per token of the training corpora."),
    ),
    *_table(
        "throughput",
        TRAINING_STAGES,
        ("perf/eta_s", "s", "lower", "Estimated time until the last step, with evaluations and checkpoints."),
        only="from the second step of an attempt",
    ),
    *_table(
        "memory",
        TRAINING_STAGES,
        ("perf/memory_gib", "GiB", "lower", "Peak memory of rank 0 (on a CPU: resident memory)."),
    ),
)

TIME = (
    *_table(
        "time",
        TRAINING_STAGES,
        ("perf/step_s", "s", "lower", "Time of one step (rlhf: of one iteration)."),
        ("checkpoint/stall_s", "s", "lower", "Time that training waited for a checkpoint."),
    ),
    *_table(
        "time",
        LOOP_STAGES,
        ("perf/data_wait_s", "s", "lower", "Time that rank 0 waited for its batch."),
        (
            "perf/forward_s",
            "s",
            "lower",
            "Time of the forward passes of rank 0, communication of FSDP and tp included.",
        ),
        (
            "perf/backward_s",
            "s",
            "lower",
            "Time of the backward passes of rank 0, recomputation and communication included.",
        ),
        ("perf/optimizer_s", "s", "lower", "Time of gradient norm, clipping and optimizer on rank 0."),
        ("perf/communication_s", "s", "lower", "Time that rank 0 waited in the all-reduce of losses and counts."),
        (
            "perf/straggler_ratio",
            "",
            "lower",
            "Work time of the slowest rank divided by the median (on GPUs: data, blocks, optimizer).",
        ),
        ("perf/slowest_rank", "", "", "Number of the rank with the longest work time."),
    ),
    *_table(
        "time",
        RLHF,
        ("timing/rollout_s", "s", "lower", "Time that the iteration waited for rollouts and rule-based rewards."),
        ("timing/forward_s", "s", "lower", "Time of the forward passes of all models."),
        ("timing/update_s", "s", "lower", "Time of the updates of policy and critic."),
        ("timing/push_s", "s", "lower", "Time to send new weights to the engines."),
        ("timing/iteration_s", "s", "lower", "Time of the full iteration, without the report."),
    ),
)

PART = ("_{corpus}", "for one language, mixed corpus or source of rankings")
HELD_OUT = (
    *_table(
        "held-out",
        LOOP_STAGES,
        ("val/loss", "nats/target", "lower", "Held-out loss per token (preference, reward: per choice)."),
        parts=[PART],
    ),
    *_table(
        "held-out",
        TEXT_STAGES,
        (
            "val/bits_per_byte",
            "bits/byte",
            "lower",
            "Held-out loss per byte of text; it can be compared between tokenizers.",
        ),
        parts=[PART],
    ),
    *_table(
        "held-out",
        TEXT_STAGES,
        (
            "val/infill_loss",
            "nats/target",
            "lower",
            "Held-out loss of a middle part after prefix and suffix (PSM order).",
        ),
        (
            "val/infill_loss_spm",
            "nats/target",
            "lower",
            "Held-out loss of a middle part after suffix and prefix (SPM order).",
        ),
        ("val/infill_loss_left", "nats/target", "lower", "Held-out loss of a middle part after the prefix only."),
        only="with stage.fim_rate",
    ),
    *_table(
        "held-out",
        LOOP_STAGES,
        ("val/ema_loss", "nats/target", "lower", "Held-out loss of the averaged weights."),
        only="with stage.ema_decay",
    ),
    *_table(
        "held-out",
        TEXT_STAGES,
        ("val/ema_bits_per_byte", "bits/byte", "lower", "Held-out loss of the averaged weights per byte of text."),
        only="with stage.ema_decay",
    ),
    *_table(
        "held-out",
        RLHF,
        (
            "rlhf/win_rate",
            "",
            "higher",
            "Share of the policy's answers that score above the reference model's answer; a tie counts as half.",
        ),
        ("rlhf/held_out_score", "", "higher", "Mean score of the policy's answers to held-out prompts."),
        ("rlhf/held_out_score_reference", "", "", "Mean score of the reference model's answers to held-out prompts."),
        ("rlhf/held_out", "prompts", "", "Number of held-out prompts."),
        only="if prompts are held out",
    ),
    *_table(
        "code",
        ("code",),
        ("code/parses_{language}", "", "higher", "Share of samples that parse together with their prompt."),
        only="with a parser for the language",
    ),
    *_table(
        "code",
        ("code",),
        ("code/runs_{language}", "", "higher", "Share of samples that parse and run without an error."),
        only="with a sandbox",
    ),
    *_table(
        "tools",
        ("tools",),
        ("tools/parses", "", "higher", "Share of turns that contain a call that parses."),
        ("tools/valid_call", "", "higher", "Share of turns in which every call fits the schema of an offered tool."),
        ("tools/name_exact", "", "higher", "Share of turns that call exactly the expected tools, with any arguments."),
        ("tools/args_exact", "", "higher", "Share of the expected calls that the turn makes with equal arguments."),
        ("tools/call_exact", "", "higher", "Share of turns that make exactly the expected calls."),
        ("tools/false_refusals", "", "lower", "Share of turns that answer in words, without a call."),
        only="among turns where a call is expected",
        parts=[("_{kind}", "for one kind of conversation")],
    ),
    *_table(
        "tools",
        ("tools",),
        ("tools/parallel_exact", "", "higher", "Share of turns that make exactly the expected calls."),
        only="among turns where several calls are expected",
    ),
    *_table(
        "tools",
        ("tools",),
        ("tools/irrelevance", "", "higher", "Share of turns that answer in words, without a call."),
        only="among turns where no call is expected",
        parts=[("_{kind}", "for one kind of conversation")],
    ),
)

TASKS = (
    *_table(
        "tasks",
        (*TEXT_STAGES, *PREFERENCE, *RLHF),
        ("eval/{task}/pass@1", "", "higher", "Share of the questions of a task that are answered correctly."),
        ("eval/{task}/low", "", "", "Lower end of the 95 % confidence interval of pass@1."),
        ("eval/{task}/high", "", "", "Upper end of the 95 % confidence interval of pass@1."),
        ("timing/eval_s", "s", "lower", "Time that training waited for the evaluation of tasks."),
        only="with stage.eval_tasks",
    ),
    *_table(
        "tasks",
        (*TEXT_STAGES, *PREFERENCE, *RLHF),
        ("eval/step", "steps", "", "Number of steps of the evaluated weights."),
        only="only in wandb, with stage.eval_tasks",
    ),
)

REINFORCEMENT = (
    *_table(
        "preference",
        PREFERENCE,
        (
            "preference/accuracy",
            "",
            "higher",
            "Share of held-out pairs that the implicit reward puts in the right order.",
        ),
        (
            "preference/kendall_tau",
            "",
            "higher",
            "Mean rank correlation (Kendall's tau-b) between scores and held-out rankings.",
        ),
        parts=[("_{source}", "for one source"), ("_k{completions}", "for one number of completions")],
    ),
    *_table(
        "preference",
        PREFERENCE,
        (
            "preference/margin",
            "",
            "higher",
            "Mean difference of the implicit rewards of chosen and rejected held-out answers.",
        ),
        ("preference/chosen_reward", "", "", "Mean implicit reward of chosen held-out answers."),
        ("preference/rejected_reward", "", "", "Mean implicit reward of rejected held-out answers."),
        ("preference/chosen_logprob", "nats", "", "Mean log-probability of chosen held-out answers."),
        ("preference/rejected_logprob", "nats", "", "Mean log-probability of rejected held-out answers."),
    ),
    *_table(
        "preference",
        PREFERENCE,
        ("preference/kl", "nats", "", "KL divergence from the reference model on mismatched held-out answers."),
        only="with stage.preference.algorithm=kto",
    ),
    *_table(
        "reward",
        REWARD,
        ("reward/accuracy", "", "higher", "Share of held-out pairs that the scores put in the right order."),
        (
            "reward/kendall_tau",
            "",
            "higher",
            "Mean rank correlation (Kendall's tau-b) between scores and held-out rankings.",
        ),
        ("reward/top1", "", "higher", "Share of held-out rankings in which the best answer scores highest."),
        (
            "reward/calibration_error",
            "",
            "lower",
            "Expected calibration error of the predicted pair probabilities (0 to 0.5).",
        ),
        parts=[("_{source}", "for one source"), ("_k{completions}", "for one number of completions")],
    ),
    *_table(
        "reward",
        REWARD,
        ("reward/score_mean", "", "", "Mean score of the answers that the initial model samples."),
        ("reward/score_std", "", "", "Standard deviation of the scores of the initial model's answers."),
        ("reward/scored", "samples", "", "Number of scored answers of the initial model."),
    ),
    *_table(
        "rlhf",
        RLHF,
        ("rlhf/reward_mean", "", "higher", "Mean score of the rollouts minus the KL penalty."),
        ("rlhf/score_mean", "", "higher", "Mean score of the rollouts: the weighted sum of their reward parts."),
        ("rlhf/part_{part}", "", "higher", "Mean score of the rollouts in one reward part."),
        ("rlhf/left_out", "", "lower", "Share of rollouts that are left out because a rule gave no score."),
        ("rlhf/failed_{part}", "rollouts", "lower", "Number of rollouts for which one rule gave no score."),
        ("rlhf/score_p10", "", "higher", "10th percentile of the scores of rollouts."),
        ("rlhf/score_p50", "", "higher", "Median of the scores of rollouts."),
        ("rlhf/score_p90", "", "higher", "90th percentile of the scores of rollouts."),
    ),
    *_table(
        "rlhf",
        RLHF,
        ("rlhf/groups_without_signal", "", "lower", "Share of groups in which all rollouts have the same score."),
        ("rlhf/group_std_mean", "", "", "Standard deviation of the scores within a group, mean over groups."),
        only="with rlhf.samples > 1",
    ),
    *_table(
        "rlhf",
        RLHF,
        ("rlhf/kl", "nats/rollout", "", "KL divergence from the reference model, estimated on rollouts."),
        ("rlhf/kl_coefficient", "", "", "Coefficient of the KL penalty."),
        only="with rlhf.kl_coefficient > 0",
    ),
    *_table(
        "rlhf",
        RLHF,
        (
            "rollout/set_bytes",
            "bytes/token",
            "",
            "Mean size of the stored set of tokens among which a token was sampled.",
        ),
        only="with rlhf.top_k or rlhf.top_p",
    ),
    *_table(
        "rlhf",
        RLHF,
        ("rlhf/entropy", "nats/token", "", "Entropy of the sampling distribution."),
        ("rlhf/new_tokens_mean", "tokens", "", "Mean length of a rollout."),
        ("rlhf/new_tokens_min", "tokens", "", "Length of the shortest rollout."),
        ("rlhf/new_tokens_max", "tokens", "", "Length of the longest rollout."),
        ("rlhf/truncated_rate", "", "lower", "Share of rollouts that were cut at the length limit."),
        (
            "rollout/logprob_gap",
            "nats",
            "lower",
            "Largest difference between a token's log-probability in the engine and in the trainer.",
        ),
    ),
    *_table(
        "updates",
        RLHF,
        ("rlhf/updates", "updates", "", "Number of policy updates in the iteration."),
        ("rlhf/policy_loss", "", "", "Mean policy loss; the algorithm decides what is averaged (docs/algorithms.md)."),
        ("rlhf/policy_grad_norm", "", "", "Mean L2 norm of the policy's gradient before clipping."),
        (
            "rlhf/ratio_mean",
            "",
            "",
            "Mean ratio of a token's probability to its probability before the iteration's first update.",
        ),
        ("rlhf/clip_frac", "", "", "Share of tokens whose policy gradient was removed by clipping."),
        (
            "rlhf/approx_kl",
            "nats/token",
            "",
            "Estimated KL divergence from the policy before the iteration's first update.",
        ),
    ),
    *_table(
        "rlhf",
        RLHF,
        ("rlhf/overlong_penalty", "", "higher", "Mean penalty for overlong rollouts."),
        only="with rlhf.algorithm=dapo",
    ),
    *_table(
        "updates",
        RLHF,
        ("rlhf/pretrain_loss", "nats/token", "lower", "Mean loss on the pretraining text that is mixed in."),
        only="with rlhf.pretrain_coefficient > 0",
    ),
    *_table(
        "updates",
        RLHF,
        ("rlhf/value_loss", "", "lower", "Mean loss of the critic per token."),
        ("rlhf/value_grad_norm", "", "", "Mean L2 norm of the critic's gradient before clipping."),
        ("rlhf/value_clip_frac", "", "", "Share of tokens whose value gradient was removed by clipping."),
        (
            "rlhf/value_explained_var",
            "",
            "higher",
            "Share of the variance of returns that the predicted values explain.",
        ),
        ("rlhf/value_mean", "", "", "Mean value that the critic predicts."),
        only="with a critic",
    ),
    *_table(
        "updates",
        RLHF,
        ("rlhf/return_mean", "", "", "Mean return per token."),
        only="with rlhf.algorithm=ppo or reinforce_pp",
    ),
    *_table(
        "throughput",
        RLHF,
        ("rollout/tokens_per_s", "tokens/s", "higher", "Sampled tokens per second, over the time of generation."),
        ("timing/judging_s", "s", "lower", "Time that the rules took to score rollouts."),
        only="for rollouts of this attempt",
    ),
    *_table(
        "throughput",
        RLHF,
        ("rollout/prompts", "prompts", "lower", "Number of prompts sampled in the iteration, resampled ones included."),
        ("rollout/staleness", "iterations", "lower", "Mean age of the weights that sampled the rollouts."),
    ),
)

GENERATION = (
    *_table(
        "generate",
        ("generate",),
        ("generate/prompts", "prompts", "", "Number of prompts answered or refused so far, by all commands."),
        ("generate/answers", "answers", "", "Number of answers so far."),
        ("generate/refused", "prompts", "lower", "Number of prompts refused so far."),
        ("generate/tokens", "tokens", "", "Number of tokens of all answers so far."),
        ("generate/tokens_per_s", "tokens/s", "higher", "Tokens of finished answers per second."),
        ("generate/prompts_per_s", "prompts/s", "higher", "Finished prompts per second."),
        ("generate/engines", "engines", "higher", "Number of running engines."),
    ),
    *_table(
        "generate",
        ("generate",),
        ("generate/new_tokens_mean", "tokens", "", "Mean length of an answer."),
        ("generate/eta_s", "s", "lower", "Estimated time until the last prompt is answered."),
        only="after the first answer",
    ),
)


# The load of nodes is sent to wandb only, because it belongs to no step.
SYSTEM = (
    *_table(
        "system",
        TRAINING_STAGES,
        ("system/cpu_percent_{node}", "%", "", "Mean load of all cores of a node, by all processes."),
        ("system/memory_percent_{node}", "%", "", "Share of a node's memory that is in use."),
        ("system/memory_gib_{node}", "GiB", "", "Memory of a node that is in use."),
        only="only in wandb",
    ),
    *_table(
        "system",
        TRAINING_STAGES,
        ("system/gpu_percent_{gpu}", "%", "higher", "Share of time that a GPU was busy."),
        ("system/gpu_memory_gib_{gpu}", "GiB", "", "Memory of a GPU that is in use."),
        only="only in wandb, with nvidia-ml-py",
    ),
)

METRICS: tuple[Metric, ...] = (*LEARNING, *SPEED, *TIME, *HELD_OUT, *TASKS, *REINFORCEMENT, *GENERATION, *SYSTEM)
SLOTS = {"completions": r"\d+"}  # regular expression that a slot matches; any other slot matches one or more characters


class UnknownMetricError(UserError):
    """A metric that is not in the registry."""


@cache
def metric_of(name: str) -> Metric:
    """Returns the metric or family that a name in a metrics file belongs to.

    A single metric is preferred to a family; among several matching families the longest name wins.

    Raises:
        UnknownMetricError: the name is not in the registry; the message gives the nearest one.
    """
    for metric in _singles_then_families():
        if _pattern(metric).fullmatch(name):
            return metric

    nearest = difflib.get_close_matches(name, [metric.name for metric in METRICS], n=1, cutoff=0)[0]
    raise UnknownMetricError(
        f"metric {name}: not in the registry, the nearest is {nearest}; add it to dist_lm/tracking/registry.py"
    )


def metrics_of(stage: str) -> tuple[Metric, ...]:
    """Returns the metrics that runs of a stage write, in the order of the registry; empty for an unknown stage."""
    return tuple(metric for metric in METRICS if stage in metric.stages)


@cache
def _singles_then_families() -> tuple[Metric, ...]:
    # A family with digits in its slot is tried before one with any characters, which would match its names, too.
    def order(metric: Metric) -> tuple[bool, bool, int]:
        return bool(metric.slot), metric.slot not in SLOTS, len(metric.slot) - len(metric.name)

    return tuple(sorted(METRICS, key=order))


@cache
def _pattern(metric: Metric) -> re.Pattern[str]:
    before, _, after_brace = metric.name.partition("{")
    if not metric.slot:
        return re.compile(re.escape(before))

    return re.compile(re.escape(before) + SLOTS.get(metric.slot, ".+") + re.escape(after_brace.partition("}")[2]))
