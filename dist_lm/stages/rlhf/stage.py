"""Stage `rlhf`: PPO, GRPO and their kin with a reward model, rules or tests, from the tools checkpoint.

A step of the stage is an iteration: rollouts, rewards, updates.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_lm.config.model import ModelConfig
from dist_lm.config.root import Config
from dist_lm.errors import ArtefactError
from dist_lm.stages.continuing import FREE_KEYS, RLHF_FREE_KEYS
from dist_lm.stages.corpus_forms import require_form
from dist_lm.stages.rlhf.config import AUTO, NO_MODEL, RlhfRunConfig, check_reward_model, rlhf_config
from dist_lm.stages.stage import KeyFigure, run_of
from dist_lm.stages.training.stage import TrainingStage, before_and_after, last_samples, task_entries
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.readable import counted, percent, three_decimals
from dist_lm.training import checkpoint_files

if TYPE_CHECKING:
    from dist_lm.tracking.console import Console
    from dist_lm.training.heartbeat import Heartbeat, StopRequest

ROWS = {  # metric -> its row in the summary
    "rlhf/reward_mean": "reward: score minus KL penalty",
    "rlhf/score_mean": "score",
    "rlhf/kl": "KL from the reference, nats per rollout",
    "rlhf/entropy": "entropy, nats per token",
    "rlhf/pretrain_loss": "loss on pretraining text, nats per token",
    "rlhf/new_tokens_mean": "tokens per rollout",
    "rlhf/truncated_rate": "share of truncated rollouts",
    "rollout/tokens_per_s": "sampled tokens per second",
}
WITHOUT_REWARD = "rollout/invalid_"  # begins the name of a metric, which ends with the reason
PRINTED_ROLLOUTS = 3  # in the summary
WIDTH = 160  # characters printed of a rollout


class Rlhf(TrainingStage):
    name = "rlhf"
    schema = RlhfRunConfig
    needs = ("tokenizer", "shards", "rankings", "tools", "reward")
    starts_from = "tools"
    curve = "rlhf/reward_mean"
    writes_text = True
    answers_requests = True
    schedule_keys = ()
    free_keys = (*FREE_KEYS, *RLHF_FREE_KEYS)
    key_figures = (
        (KeyFigure("rlhf/win_rate", percent, "wins"), KeyFigure("rlhf/reward_mean", three_decimals, "reward")),
    )

    def run_rank(self, run: RunDirectory, stop: "StopRequest", heartbeat: "Heartbeat") -> None:
        from dist_lm.stages.rlhf.program import run_rank

        run_rank(run, stop, heartbeat)

    def needed(self, config: Config) -> tuple[str, ...]:
        # Another reward model, or rules alone, need no run of stage reward; prompts from files need no corpus.
        run_config = rlhf_config(config)
        read = {"rankings" if name in run_config.ranked_corpora else "shards" for name in run_config.corpus_names}
        # Corpora bring the tokenizer along; prompts from files may be the first that need it here. A given one is
        # compared with what is here: its pieces, and the layout of conversations that comes with it.
        if run_config.tokenizer.is_given or not run_of(config).work.tokenizer_model.is_file():
            read.add("tokenizer")
        if run_config.rlhf.asks_reward_model and run_config.rlhf.reward_model == AUTO:
            read.add("reward")
        return tuple(name for name in self.needs if name in read or name == self.starts_from)

    def check(self, config: Config) -> None:
        """Refuses a corpus without prompts: one of texts, which have no turn to answer, or none at all.

        Raises:
            ConfigError: stage.corpus holds no conversations or rankings, and rlhf.prompts_from is empty.
        """
        if not rlhf_config(config).rlhf.prompts_from:
            require_form(config)

    def resolved(self, config: Config, finished: bool) -> Config:
        run_config = rlhf_config(config)
        # The inputs of a finished run may be gone: it is not trained again.
        if not finished:
            check_inputs(run_config)
        return with_reward_run(run_config)

    def print_figures(self, config: Config, result: Mapping[str, Any], console: "Console") -> None:
        """Prints a table of figures of the first and the last iteration; a figure without both is left out, but not
        conversations that had no reward."""
        first, last = result["first"], result["metrics"]
        names = [*ROWS, *sorted(name for name in last if name.startswith("rlhf/part_"))]
        rows = []
        for name in names:
            # A figure of one iteration alone shows no change.
            if first.get(name) is not None and last.get(name) is not None:
                label = ROWS.get(name) or name.removeprefix("rlhf/part_")
                rows.append((label, f"{first[name]:.3f}", f"{last[name]:.3f}"))
        # A reason is a figure of the iterations alone in which it occurred.
        for name in sorted(name for name in {*first, *last} if name.startswith(WITHOUT_REWARD)):
            label = f"conversations without a reward: {name.removeprefix(WITHOUT_REWARD)}"
            rows.append((label, f"{first.get(name) or 0:.0f}", f"{last.get(name) or 0:.0f}"))
        console.table("iterations", ("", "first", "last"), rows)

    def print_samples(self, run: RunDirectory, console: "Console") -> None:
        """Prints the best, the middle and the worst rollout of the last file of samples; nothing without samples."""
        from dist_lm.chat.template import last_request

        rollouts = last_samples(run)
        if not rollouts:
            return
        last = len(rollouts) - 1
        # Samples are sorted by reward, so even distances are best, middle and worst.
        for index in sorted({i * last // (PRINTED_ROLLOUTS - 1) for i in range(PRINTED_ROLLOUTS)}):
            rollout = rollouts[index]
            console.line(f"--- reward {rollout['reward']:.3f}, {rollout['tokens']} tokens, {rollout['finish']}")
            console.line(f"    {one_line(last_request(rollout['prompt']))}")
            console.line(f"    {one_line(rollout['completion'])}")

    def entries(self, config: Config, run: RunDirectory, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yields (what, value) of the summary's last box: size, iterations, win rate, tasks and where the files are."""
        before, after = result["before"], result["metrics"]
        yield "parameters", f"{result['parameters']:,}"
        yield (
            "trained",
            f"{result['steps']:,} iterations on {result['prompts']:,} prompts, {result['tokens']:,} tokens drawn, "
            f"{counted(result['ranks'], 'rank')}",
        )
        if wins := before_and_after("rlhf/win_rate", before, after, percent):
            yield "held-out prompts", f"wins against the reference: {wins} of {after['rlhf/held_out']:,.0f}"
        yield from task_entries(result)
        yield "checkpoint", str(run.checkpoints / str(result["checkpoint"]))
        yield "rollouts", str(run.samples)
        yield "metrics", str(run.metrics)
        yield "rank logs", str(run.logs)


def one_line(text: str) -> str:
    """Returns the first `WIDTH` characters of a text, with `\\n` for its line breaks, and "..." if it was longer."""
    flat = text.replace("\n", "\\n")
    if len(flat) <= WIDTH:
        return flat
    return f"{flat[:WIDTH]}..."


def check_inputs(config: RlhfRunConfig) -> None:
    """Refuses prompts, functions, an environment, a constraint or a reward model that are missing or invalid.

    With an environment its tasks are read; the file of its class is searched for the name and not executed. Without one
    the prompts are read and the reward functions imported. A reward model is compared only if a reward asks it and the
    key names one: that of `auto` is built by the plan. The first problem is raised.

    Raises:
        ConfigError: there is no such file of prompts or environment, a function cannot be imported, or a constraint
            cannot be followed.
        ArtefactError: a prompt or task is invalid or lacks what a reward or constraint needs, or there are none. There
            is no reward model at its path, it gives no scores, or it has another vocabulary. With
            rlhf.normalise_reward, also if the path is a checkpoint and not a run, or the run has not finished.
        UserError: a constraint needs the package llguidance, which is not installed.
        OSError: a file cannot be read.
    """
    from dist_lm.stages.rlhf.constraint import check_constraint
    from dist_lm.stages.rlhf.environment_tasks import check_environment
    from dist_lm.stages.rlhf.prompts import check_prompts

    settings = config.rlhf
    if settings.environment:
        check_environment(settings)
    else:
        check_prompts(settings)
    if settings.constraint:
        check_constraint(settings, WorkDirectory(Path(config.work_dir)).tokenizer_model)
    if not settings.asks_reward_model or settings.reward_model == AUTO:
        return

    path = Path(settings.reward_model).expanduser()
    reward_checkpoint = checkpoint_files.find_checkpoint(path)
    check_reward_model(config, ModelConfig(**checkpoint_files.read_state(reward_checkpoint)[1]))
    if settings.normalise_reward and not RunDirectory(path).result.is_file():
        accepted = "the run, not a checkpoint of it"
        if reward_checkpoint.parent == RunDirectory(path).checkpoints:
            accepted = "a finished run, and this one has no result"
        raise ArtefactError(
            f"rlhf.reward_model={settings.reward_model}: expected {accepted} (or rlhf.normalise_reward=false): the "
            "result has the mean and the deviation of scores"
        )


def with_reward_run(config: RlhfRunConfig) -> RlhfRunConfig:
    """Returns `config` with rlhf.reward_model as an absolute path; `none` if no part of the reward uses it."""
    reward_model = config.rlhf.reward_model
    if not config.rlhf.asks_reward_model:
        reward_model = NO_MODEL
    elif reward_model == AUTO:
        reward_model = str(WorkDirectory(Path(config.work_dir).resolve()).run("reward", config.run_id).path)
    else:
        reward_model = str(Path(reward_model).expanduser().resolve())
    return replace(config, rlhf=replace(config.rlhf, reward_model=reward_model))


STAGE = Rlhf()
