"""Pipelines on their way, as the live view has them."""

import math

from dist_lm.tracking.live_state import GangFacts, LiveState, RankPulse, StageLine, TrainingState, Work

NOW = 742.3
WARNING = "checkpoint step_00000100: model.safetensors does not match its checksum; step_00000050 is used"


def training(steps: int = 400, upto: int = 214, nodes: int = 1, silent_s: float = 0.2) -> TrainingState:
    """A training stage that has come to step `upto`, 0.5 s each."""
    state = TrainingState(steps)
    for step in range(1, upto + 1):
        line = {"step": step, "time": 1000 + step / 2, "train/loss": 2 + 6 * math.exp(-step / 40)}
        line |= {"perf/tokens_per_s": 7000.0 + step % 7, "train/lr": 3e-3 * min(1, step / 20), "perf/mfu": 0.123}
        if step % 50 == 0:
            line |= {"val/loss": 5 - step / 100, "val/bits_per_byte": 3 - step / 200}
        state.take(line)
    state.start(GangFacts(tuple(f"node-{node}" for node in range(nodes)), 2, "cpu", "dp_shard=2"))
    state.hear([RankPulse(rank, upto, "in a step", silent_s if rank else 0.1) for rank in range(2 * nodes)], NOW)
    state.save(200, NOW - 42)
    return state


def pipeline(*works: Work) -> LiveState:
    """Three stages that are done, one at work, four to come."""
    done = (("tokenizer", 1.0, 4.1), ("shards", 5.0, 19.0), ("language", 19.0, 81.0))
    stages = [StageLine(name, "done", f"what {name} left", began, ended) for name, began, ended in done]
    stages += [StageLine(name, "waiting", f"what {name} will do") for name in ("code", "tools", "rankings", "reward")]
    state = LiveState(0.0, "reward  run default in work", stages)
    state.begin("code", 100.0)
    state.works += works
    return state


def in_training(**kwargs: float) -> LiveState:
    """Stage `code` of that pipeline in the middle of its training, after a warning."""
    state = pipeline(Work("code", 400, 101.0, training=training(**kwargs)))  # type: ignore[arg-type]
    state.warn(WARNING, NOW - 20)
    return state
