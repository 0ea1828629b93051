"""What stage `rlhf` ends with: reward and divergence, first and last, the win rate, rollouts, paths."""

from dist_lm.chat.template import last_request
from dist_lm.storage.durable import json_lines
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.readable import counted, percent

ROWS = {  # metric -> what the table calls it
    "rlhf/reward_mean": "reward, less the divergence",
    "rlhf/score_mean": "score",
    "rlhf/kl": "divergence from the reference, nats a rollout",
    "rlhf/entropy": "entropy, nats a token",
    "rlhf/pretrain_loss": "loss on pretraining text, nats a token",
    "rlhf/new_tokens_mean": "tokens of a rollout",
    "rlhf/truncated_rate": "rollouts cut off",
    "rollout/tokens_per_s": "tokens drawn a second",
}
SHOWN = 3  # rollouts
WIDTH = 160  # characters of one


def is_rlhf(result: dict) -> bool:
    """Whether it is the result of reinforcement learning."""
    return "rlhf/reward_mean" in result["metrics"]


def print_rlhf(result: dict, run: RunDirectory, console: Console) -> None:
    """Tables, then where everything is."""
    first, last = result["first"], result["metrics"]
    names = [*ROWS, *sorted(name for name in last if name.startswith("rlhf/part_"))]
    rows = [
        (ROWS[name] if name in ROWS else name.removeprefix("rlhf/part_"), f"{first[name]:.3f}", f"{last[name]:.3f}")
        for name in names
        if first.get(name) is not None and last.get(name) is not None
    ]
    console.table("iterations", ("", "first", "last"), rows)
    print_rollouts(run, console)
    console.summary("stage=rlhf is done", dict(entries(result, run)))


def print_rollouts(run: RunDirectory, console: Console) -> None:
    """The best, the middle and the worst one of the last table."""
    files = sorted(run.samples.glob("step_*.jsonl"))
    rollouts = list(json_lines(files[-1])) if files else []
    for place in sorted({i * (len(rollouts) - 1) // (SHOWN - 1) for i in range(SHOWN)} if rollouts else set()):
        rollout = rollouts[place]
        console.line(f"--- reward {rollout['reward']:.3f}, {rollout['tokens']} tokens, {rollout['finish']}")
        console.line(f"    {one_line(last_request(rollout['prompt']))}")
        console.line(f"    {one_line(rollout['completion'])}")


def one_line(text: str) -> str:
    """The beginning of a text, in one line."""
    flat = text.replace("\n", "\\n")
    return flat if len(flat) <= WIDTH else f"{flat[:WIDTH]}..."


def entries(result: dict, run: RunDirectory) -> list[tuple[str, str]]:
    """(what, where or how much)."""
    before, after = result["before"], result["metrics"]
    lines = [
        ("parameters", f"{result['parameters']:,}"),
        (
            "trained",
            f"{result['steps']:,} iterations on {result['prompts']:,} prompts, {result['tokens']:,} tokens drawn, "
            f"{counted(result['ranks'], 'rank')}",
        ),
    ]
    if "rlhf/win_rate" in after:
        was = f"{percent(before['rlhf/win_rate'])} -> " if "rlhf/win_rate" in before else ""
        wins = f"{was}{percent(after['rlhf/win_rate'])} of {after['rlhf/held_out']:,.0f}"
        lines.append(("held-out prompts", f"wins against the reference: {wins}"))
    lines += [
        ("checkpoint", str(run.checkpoints / str(result["checkpoint"]))),
        ("rollouts", str(run.samples)),
        ("metrics", str(run.metrics)),
        ("rank logs", str(run.logs)),
    ]
    return lines
