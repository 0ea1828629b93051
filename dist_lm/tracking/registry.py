"""The registry of metrics: every metric with its name, unit, better direction, meaning and stages.

Logging, dashboards, reports and docs/metrics.md are generated from it. A metrics file accepts only these names; to add
a metric, add a row here.
"""

import difflib
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from dist_lm.errors import UserError

Better = Literal["lower", "higher", ""]
"""The direction that is an improvement; empty: neither is."""
Row = tuple[str, str, Better, str]
"""(name, unit, better direction, meaning)."""

TEXT_STAGES = ("language", "code", "sft", "tools")
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


@dataclass(frozen=True)
class Table:
    """The metrics of one group that the same stages have."""

    group: str
    stages: tuple[str, ...]
    rows: tuple[Row, ...]
    only: str = ""  # condition under which a run of these stages has them; empty: always
    parts: tuple[tuple[str, str], ...] = ()  # (suffix of the name, words for the meaning) of their families

    def metrics(self) -> list[Metric]:
        """Returns the metric of each row, and after it one for each part."""
        metrics = []
        for name, unit, better, meaning in self.rows:
            metrics.append(Metric(name, unit, meaning, better, self.stages, self.group, self.only))
            metrics += [
                replace(metrics[-1], name=name + suffix, meaning=f"{meaning.removesuffix('.')}, {words}.")
                for suffix, words in self.parts
            ]
        return metrics


LEARNING = (
    Table(
        "loss",
        LOOP_STAGES,
        (
            ("train/loss", "nats/target", "lower", "Training loss of the global batch, with label smoothing."),
            (
                "train/loss_spikes",
                "steps",
                "lower",
                "Steps so far whose loss was 6 standard deviations above the running mean.",
            ),
        ),
    ),
    Table(
        "loss",
        (*PREFERENCE, *REWARD),
        (("train/accuracy", "", "higher", "Share of choices whose preferred answer scores highest."),),
    ),
    Table(
        "preference",
        PREFERENCE,
        (
            ("train/margin", "", "higher", "Implicit reward of chosen minus rejected answers, mean."),
            ("train/chosen_reward", "", "", "Mean implicit reward of chosen answers."),
            ("train/rejected_reward", "", "", "Mean implicit reward of rejected answers."),
            ("train/chosen_logprob", "nats", "", "Mean log-probability of chosen answers."),
            ("train/rejected_logprob", "nats", "", "Mean log-probability of rejected answers."),
        ),
    ),
    Table(
        "preference",
        PREFERENCE,
        (("train/kl", "nats", "", "KL divergence from the reference on mismatched answers."),),
        only="with stage.preference.algorithm=kto",
    ),
    Table(
        "loss",
        TRAINING_STAGES,
        (("train/tokens", "tokens", "", "Tokens trained on so far (preference, reward: choices)."),),
    ),
    Table(
        "loss",
        LOOP_STAGES,
        (("train/epochs", "", "", "Passes over stage.corpus so far."),),
    ),
    Table(
        "loss",
        TEXT_STAGES,
        (("train/epochs_{corpus}", "", "", "Passes over a mixed corpus so far."),),
        only="with stage.mix",
    ),
    Table(
        "optimizer",
        LOOP_STAGES,
        (("train/grad_norm", "", "", "L2 norm of the gradient before clipping."),),
        parts=(("_{group}", "for one group of parameters"),),
    ),
    Table(
        "optimizer",
        LOOP_STAGES,
        (
            ("train/update_ratio", "", "", "L2 norm of the update / of the parameters."),
            ("train/lr", "", "", "Learning rate."),
            ("train/skipped_steps", "steps", "lower", "Steps so far skipped for NaN or infinite gradients."),
        ),
    ),
)

SPEED = (
    Table(
        "throughput",
        TRAINING_STAGES,
        (
            ("perf/tokens_per_s", "tokens/s", "higher", "Tokens per second of all ranks, without padding."),
            ("perf/tokens_per_s_per_rank", "tokens/s", "higher", "Tokens per second and rank."),
        ),
    ),
    Table(
        "throughput",
        LOOP_STAGES,
        (
            (
                "perf/mfu",
                "",
                "higher",
                "Model FLOP/s (with padding, without recomputation) / peak (data sheet or measured).",
            ),
        ),
    ),
    Table(
        "throughput",
        RLHF,
        (("perf/samples_per_s", "samples/s", "higher", "Rollouts per second of the iteration."),),
    ),
    Table(
        "throughput",
        RLHF,
        (("perf/controller_restarts", "", "lower", "Restarts of the controller's process in this attempt."),),
        only="with rlhf.controller=process",
    ),
    Table(
        "throughput",
        RLHF,
        (("perf/held_again", "rollouts", "lower", "Conversations executed again after a death."),),
        only="with rlhf.environment",
    ),
    Table(
        "throughput",
        TEXT_STAGES,
        (("perf/bytes_per_token", "bytes/token", "higher", "UTF-8 bytes per token of the training corpora."),),
    ),
    Table(
        "throughput",
        TRAINING_STAGES,
        (("perf/eta_s", "s", "lower", "Estimated time to the end, with evaluations and checkpoints."),),
        only="from the second step of an attempt",
    ),
    Table(
        "memory",
        TRAINING_STAGES,
        (("perf/memory_gib", "GiB", "lower", "Peak memory of rank 0 (CPU: resident)."),),
    ),
)

TIME = (
    Table(
        "time",
        TRAINING_STAGES,
        (
            ("perf/step_s", "s", "lower", "Time of a step (rlhf: of an iteration)."),
            ("checkpoint/stall_s", "s", "lower", "Time that training waited for a checkpoint."),
        ),
    ),
    Table(
        "time",
        LOOP_STAGES,
        (
            ("perf/data_wait_s", "s", "lower", "Time that rank 0 waited for its batch."),
            ("perf/forward_s", "s", "lower", "Forward passes of rank 0, with communication of FSDP and tp."),
            ("perf/backward_s", "s", "lower", "Backward passes of rank 0, with recomputation and communication."),
            ("perf/optimizer_s", "s", "lower", "Gradient norm, clipping and optimizer of rank 0."),
            ("perf/communication_s", "s", "lower", "Time rank 0 waited for the all-reduce of losses."),
            (
                "perf/straggler_ratio",
                "",
                "lower",
                "Work time of the slowest rank / median (GPU: data, blocks, optimizer).",
            ),
            ("perf/slowest_rank", "", "", "Rank with the longest work time."),
        ),
    ),
    Table(
        "time",
        RLHF,
        (
            ("timing/rollout_s", "s", "lower", "Time waited for rollouts and rule-based rewards."),
            ("timing/forward_s", "s", "lower", "Forward passes of all models."),
            ("timing/update_s", "s", "lower", "Updates of the trained models."),
            ("timing/push_s", "s", "lower", "Time to send new weights to the engines."),
            ("timing/iteration_s", "s", "lower", "Full iteration, without the report."),
        ),
    ),
)

PART = ("_{corpus}", "for one language, mixed corpus or source of rankings")
HELD_OUT = (
    Table(
        "held-out",
        LOOP_STAGES,
        (("val/loss", "nats/target", "lower", "Held-out loss per token (preference, reward: per choice)."),),
        parts=(PART,),
    ),
    Table(
        "held-out",
        TEXT_STAGES,
        (("val/bits_per_byte", "bits/byte", "lower", "Held-out loss per byte; comparable between tokenizers."),),
        parts=(PART,),
    ),
    Table(
        "held-out",
        TEXT_STAGES,
        (
            ("val/infill_loss", "nats/target", "lower", "Held-out loss of a middle after prefix and suffix (PSM)."),
            ("val/infill_loss_spm", "nats/target", "lower", "Held-out loss of a middle after suffix and prefix (SPM)."),
            ("val/infill_loss_left", "nats/target", "lower", "Held-out loss of a middle after the prefix alone."),
        ),
        only="with stage.fim_rate",
    ),
    Table(
        "held-out",
        LOOP_STAGES,
        (("val/ema_loss", "nats/target", "lower", "Held-out loss of the averaged weights."),),
        only="with stage.ema_decay",
    ),
    Table(
        "held-out",
        TEXT_STAGES,
        (("val/ema_bits_per_byte", "bits/byte", "lower", "Held-out loss per byte of the averaged weights."),),
        only="with stage.ema_decay",
    ),
    Table(
        "held-out",
        RLHF,
        (
            ("rlhf/win_rate", "", "higher", "Share of answers that score above the reference's, ties counted half."),
            ("rlhf/held_out_score", "", "higher", "Mean score of the policy's held-out answers."),
            ("rlhf/held_out_score_reference", "", "", "Mean score of the reference's held-out answers."),
            ("rlhf/held_out", "prompts", "", "Number of held-out prompts."),
        ),
        only="if prompts are held out",
    ),
    Table(
        "code",
        ("code",),
        (("code/parses_{language}", "", "higher", "Share of samples that parse with their prompt."),),
        only="with a parser for the language",
    ),
    Table(
        "code",
        ("code",),
        (("code/runs_{language}", "", "higher", "Share of samples that parse and run without an error."),),
        only="with a sandbox",
    ),
    Table(
        "tools",
        ("tools",),
        (
            ("tools/parses", "", "higher", "Share of turns with a call that parses."),
            ("tools/valid_call", "", "higher", "Share of turns whose calls all fit an offered schema."),
            ("tools/name_exact", "", "higher", "Share of turns with exactly the expected tools."),
            ("tools/args_exact", "", "higher", "Share of expected calls made with equal arguments."),
            ("tools/call_exact", "", "higher", "Share of turns with exactly the expected calls."),
            ("tools/false_refusals", "", "lower", "Share of turns answered without a call."),
        ),
        only="where a call is expected",
        parts=(("_{kind}", "for one kind of conversation"),),
    ),
    Table(
        "tools",
        ("tools",),
        (("tools/parallel_exact", "", "higher", "Share of turns with exactly the expected calls."),),
        only="where several calls are expected",
    ),
    Table(
        "tools",
        ("tools",),
        (("tools/irrelevance", "", "higher", "Share of turns answered without a call."),),
        only="where no call is expected",
        parts=(("_{kind}", "for one kind of conversation"),),
    ),
)

TASKS = (
    Table(
        "tasks",
        (*TEXT_STAGES, *PREFERENCE, *RLHF),
        (
            ("eval/{task}/pass@1", "", "higher", "Share of a task's questions answered correctly."),
            ("eval/{task}/low", "", "", "Lower end of the 95 % confidence interval."),
            ("eval/{task}/high", "", "", "Upper end of the 95 % confidence interval."),
            ("timing/eval_s", "s", "lower", "Time that training waited for tasks."),
        ),
        only="with stage.eval_tasks",
    ),
    Table(
        "tasks",
        (*TEXT_STAGES, *PREFERENCE, *RLHF),
        (("eval/step", "steps", "", "Steps of the evaluated weights."),),
        only="in wandb, with stage.eval_tasks",
    ),
)

REINFORCEMENT = (
    Table(
        "preference",
        PREFERENCE,
        (
            ("preference/accuracy", "", "higher", "Share of held-out pairs ordered correctly by implicit reward."),
            ("preference/kendall_tau", "", "higher", "Mean rank correlation (Kendall's tau-b) with held-out rankings."),
        ),
        parts=(
            ("_{source}", "for one source"),
            ("_k{completions}", "for one number of completions"),
        ),
    ),
    Table(
        "preference",
        PREFERENCE,
        (
            ("preference/margin", "", "higher", "Implicit reward of chosen minus rejected held-out answers, mean."),
            ("preference/chosen_reward", "", "", "Mean implicit reward of chosen held-out answers."),
            ("preference/rejected_reward", "", "", "Mean implicit reward of rejected held-out answers."),
            ("preference/chosen_logprob", "nats", "", "Mean log-probability of chosen held-out answers."),
            ("preference/rejected_logprob", "nats", "", "Mean log-probability of rejected held-out answers."),
        ),
    ),
    Table(
        "preference",
        PREFERENCE,
        (("preference/kl", "nats", "", "KL divergence from the reference on mismatched held-out answers."),),
        only="with stage.preference.algorithm=kto",
    ),
    Table(
        "reward",
        REWARD,
        (
            ("reward/accuracy", "", "higher", "Share of held-out pairs scored in the right order."),
            ("reward/kendall_tau", "", "higher", "Mean rank correlation (Kendall's tau-b) with held-out rankings."),
            ("reward/top1", "", "higher", "Share of held-out rankings whose best answer scores highest."),
            ("reward/calibration_error", "", "lower", "Expected calibration error of pair probabilities (0 to 0.5)."),
        ),
        parts=(
            ("_{source}", "for one source"),
            ("_k{completions}", "for one number of completions"),
        ),
    ),
    Table(
        "reward",
        REWARD,
        (
            ("reward/score_mean", "", "", "Mean score of answers of the initial model."),
            ("reward/score_std", "", "", "Standard deviation of the scores of these answers."),
            ("reward/scored", "samples", "", "Number of these answers."),
        ),
    ),
    Table(
        "rlhf",
        RLHF,
        (
            ("rlhf/reward_mean", "", "higher", "Mean score of the rollouts minus the KL penalty."),
            ("rlhf/score_mean", "", "higher", "Mean score of the rollouts: weighted sum of reward parts."),
            ("rlhf/part_{part}", "", "higher", "Mean score of one reward part."),
            ("rlhf/left_out", "", "lower", "Share of rollouts dropped because a rule gave no score."),
            ("rlhf/failed_{part}", "rollouts", "lower", "Rollouts without a score from this rule."),
            ("rlhf/score_p10", "", "higher", "10th percentile of the scores."),
            ("rlhf/score_p50", "", "higher", "Median of the scores."),
            ("rlhf/score_p90", "", "higher", "90th percentile of the scores."),
        ),
    ),
    Table(
        "rlhf",
        RLHF,
        (("rlhf/skipped_{part}", "rollouts", "", "Rollouts that this part leaves out."),),
        only="where a function returned None",
    ),
    Table(
        "rlhf",
        RLHF,
        (
            ("rlhf/groups_without_signal", "", "lower", "Share of groups whose rollouts all score the same."),
            ("rlhf/group_std_mean", "", "", "Standard deviation of scores within a group, mean."),
        ),
        only="with rlhf.samples > 1",
    ),
    Table(
        "rlhf",
        RLHF,
        (
            ("reward/forged", "rollouts", "lower", "Answers that look like an attack on their tests."),
            ("reward/lookups", "rollouts", "lower", "Answers that look like a table of their tests."),
        ),
        only="with a reward of kind tests",
    ),
    Table(
        "rlhf",
        RLHF,
        (
            ("rlhf/kl", "nats/rollout", "", "KL divergence from the reference, estimated on rollouts."),
            ("rlhf/kl_coefficient", "", "", "Coefficient of the KL penalty."),
        ),
        only="with rlhf.kl_coefficient > 0",
    ),
    Table(
        "rlhf",
        RLHF,
        (("rollout/set_bytes", "bytes/token", "", "Mean size of the stored sampling set of a token."),),
        only="with rlhf.top_k or rlhf.top_p",
    ),
    Table(
        "rlhf",
        RLHF,
        (("rollout/forced_rate", "", "", "Share of completion tokens drawn with probability 1."),),
        only="with rlhf.constraint",
    ),
    Table(
        "agents",
        RLHF,
        (
            ("rollout/turns", "turns", "", "Mean turns of the model in a conversation."),
            ("rollout/turn_tokens", "tokens", "", "Mean length of a turn of the model."),
            ("rollout/unreadable_turns", "", "lower", "Share of turns that are empty or have broken calls."),
            ("rollout/tool_errors", "results", "lower", "Mean number of failed calls of a conversation."),
            (
                "rollout/broken_prefixes",
                "samples",
                "",
                "Samples begun because the chat template or the environment rewrote earlier turns.",
            ),
            ("rollout/cut_{limit}", "", "lower", "Share of conversations that this limit ended."),
            ("rollout/invalid_{reason}", "rollouts", "lower", "Conversations without a verdict for this reason."),
            ("timing/environment_s", "s", "lower", "Mean wait of a conversation for its environment."),
            ("timing/model_s", "s", "lower", "Mean wait of a conversation for the model."),
        ),
        only="with rlhf.environment",
    ),
    Table(
        "rlhf",
        RLHF,
        (
            ("rlhf/entropy", "nats/token", "", "Entropy of the sampling distribution."),
            ("rlhf/new_tokens_mean", "tokens", "", "Mean length of a rollout."),
            ("rlhf/new_tokens_min", "tokens", "", "Length of the shortest rollout."),
            ("rlhf/new_tokens_max", "tokens", "", "Length of the longest rollout."),
            ("rlhf/truncated_rate", "", "lower", "Share of rollouts cut at the length limit."),
            (
                "rollout/logprob_gap",
                "nats",
                "lower",
                "Largest difference of log-probabilities between engine and trainer.",
            ),
        ),
    ),
    Table(
        "updates",
        RLHF,
        (
            ("rlhf/updates", "updates", "", "Policy updates in the iteration."),
            ("rlhf/policy_loss", "", "", "Mean policy loss, averaged as in docs/algorithms.md."),
            ("rlhf/policy_grad_norm", "", "", "Mean gradient norm of the policy before clipping."),
            ("rlhf/ratio_mean", "", "", "Mean probability ratio to the policy before the first update."),
            ("rlhf/clip_frac", "", "", "Share of tokens whose gradient was clipped away."),
            ("rlhf/approx_kl", "nats/token", "", "KL divergence from the policy before the first update."),
        ),
    ),
    Table(
        "rlhf",
        RLHF,
        (("rlhf/overlong_penalty", "", "higher", "Mean penalty for overlong rollouts."),),
        only="with rlhf.algorithm=dapo",
    ),
    Table(
        "updates",
        RLHF,
        (("rlhf/pretrain_loss", "nats/token", "lower", "Mean loss on mixed-in pretraining text."),),
        only="with rlhf.pretrain_coefficient > 0",
    ),
    Table(
        "updates",
        RLHF,
        (
            ("rlhf/value_loss", "", "lower", "Critic loss per token."),
            ("rlhf/value_grad_norm", "", "", "Mean gradient norm of the critic before clipping."),
            ("rlhf/value_clip_frac", "", "", "Share of tokens whose value gradient was clipped away."),
            ("rlhf/value_explained_var", "", "higher", "Share of the variance of returns that values explain."),
            ("rlhf/value_mean", "", "", "Mean predicted value."),
        ),
        only="with a critic",
    ),
    Table(
        "updates",
        RLHF,
        (("rlhf/return_mean", "", "", "Mean return per token."),),
        only="with rlhf.algorithm=ppo or reinforce_pp",
    ),
    Table(
        "throughput",
        RLHF,
        (
            ("rollout/tokens_per_s", "tokens/s", "higher", "Sampled tokens per second of generation."),
            ("timing/judging_s", "s", "lower", "Time of scoring by rules."),
        ),
        only="for this attempt's rollouts",
    ),
    Table(
        "throughput",
        RLHF,
        (
            ("rollout/prompts", "prompts", "lower", "Prompts sampled in the iteration, with resampled ones."),
            ("rollout/staleness", "iterations", "lower", "Mean age of the sampling weights."),
        ),
    ),
    Table(
        "agents",
        RLHF,
        (
            ("rollout/token_staleness_mean", "versions", "lower", "Mean age of the weights that drew a token."),
            ("rollout/token_staleness_max", "versions", "lower", "Largest age of the weights that drew a token."),
            ("rollout/groups_carried", "groups", "", "Groups under way or waiting when the iteration began."),
            ("rollout/refused_stale", "", "lower", "Share of tasks dropped: their first token was too old."),
        ),
        only="with rlhf.asynchronous",
    ),
    Table(
        "agents",
        RLHF,
        (("rollout/refused_reward_gap", "", "", "Mean reward in dropped tasks, minus that in trained ones."),),
        only="with rlhf.asynchronous",
    ),
)

GENERATION = (
    Table(
        "generate",
        ("generate",),
        (
            ("generate/prompts", "prompts", "", "Prompts answered or refused so far, by all commands."),
            ("generate/answers", "answers", "", "Answers so far."),
            ("generate/refused", "prompts", "lower", "Prompts refused so far."),
            ("generate/tokens", "tokens", "", "Tokens of all answers so far."),
            ("generate/tokens_per_s", "tokens/s", "higher", "Tokens of finished answers per second."),
            ("generate/prompts_per_s", "prompts/s", "higher", "Finished prompts per second."),
            ("generate/engines", "engines", "higher", "Running engines."),
        ),
    ),
    Table(
        "generate",
        ("generate",),
        (
            ("generate/new_tokens_mean", "tokens", "", "Mean length of an answer."),
            ("generate/eta_s", "s", "lower", "Estimated time to the last prompt."),
        ),
        only="after the first answer",
    ),
)


# The load of nodes is sent to wandb only, because it belongs to no step.
SYSTEM = (
    Table(
        "system",
        TRAINING_STAGES,
        (
            ("system/cpu_percent_{node}", "%", "", "Load of all cores of a node, all processes."),
            ("system/memory_percent_{node}", "%", "", "Share of a node's memory in use."),
            ("system/memory_gib_{node}", "GiB", "", "Memory of a node in use."),
        ),
        only="in wandb",
    ),
    Table(
        "system",
        TRAINING_STAGES,
        (
            ("system/gpu_percent_{gpu}", "%", "higher", "Share of time that a GPU was busy."),
            ("system/gpu_memory_gib_{gpu}", "GiB", "", "Memory of a GPU in use."),
        ),
        only="in wandb, with nvidia-ml-py",
    ),
)

TABLES: tuple[Table, ...] = (*LEARNING, *SPEED, *TIME, *HELD_OUT, *TASKS, *REINFORCEMENT, *GENERATION, *SYSTEM)
SLOTS = {"completions": r"\d+"}  # regular expression that a slot matches; any other slot matches one or more characters


class UnknownMetricError(UserError):
    """A metric that is not in the registry."""


@cache
def all_metrics() -> tuple[Metric, ...]:
    """Returns every metric and family, in the order of the registry."""
    return tuple(metric for table in TABLES for metric in table.metrics())


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

    nearest = difflib.get_close_matches(name, [metric.name for metric in all_metrics()], n=1, cutoff=0)[0]
    raise UnknownMetricError(
        f"metric {name}: not in the registry, the nearest is {nearest}; add it to dist_lm/tracking/registry.py"
    )


def metrics_of(stage: str) -> tuple[Metric, ...]:
    """Returns the metrics that runs of a stage write, in the order of the registry; empty for an unknown stage."""
    return tuple(metric for metric in all_metrics() if stage in metric.stages)


@cache
def _singles_then_families() -> tuple[Metric, ...]:
    # A family with digits in its slot is tried before one with any characters, which would match its names, too.
    def order(metric: Metric) -> tuple[bool, bool, int]:
        return bool(metric.slot), metric.slot not in SLOTS, len(metric.slot) - len(metric.name)

    return tuple(sorted(all_metrics(), key=order))


@cache
def _pattern(metric: Metric) -> re.Pattern[str]:
    before, _, after_brace = metric.name.partition("{")
    if not metric.slot:
        return re.compile(re.escape(before))

    return re.compile(re.escape(before) + SLOTS.get(metric.slot, ".+") + re.escape(after_brace.partition("}")[2]))
