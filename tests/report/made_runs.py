"""Run directories as a launch leaves them, made up in a moment: for what reads them."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dist_lm.chat.messages import Call, Message, Tool
from dist_lm.config.corpus import SPLITS
from dist_lm.config.root import save_config
from dist_lm.data.manifest import Counts, Manifest, Recipe, Shard, Split, shard_name, write_manifest
from dist_lm.environments.protocol import Action, Observation, Step, Verdict
from dist_lm.environments.values import action_value, observation_value, step_value
from dist_lm.rlhf.environment_rollouts import file_name
from dist_lm.rlhf.episodes import Episode, EpisodeFile, Turn
from dist_lm.rlhf.transcript import Sample
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from tests.conftest import composed

BEGAN = 1_700_000_000.0
NODES = [{"host": "alpha", "address": "10.0.0.1"}, {"host": "beta", "address": "10.0.0.2"}]
STAGES = ("language", "code", "tools", "reward", "rlhf")
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
MODEL = ("model.d_model=64", "model.n_heads=4", "model.n_layers=2", "model.d_ff=96", "model.vocab_size=512")


def make_run(
    work: WorkDirectory,
    stage: str,
    run_id: str = "default",
    *,
    steps: int = 200,
    layout: str = "dp_replicate=1 dp_shard=2 tp=2",
    began: float = BEGAN,
    finished: bool = True,
    failures: int = 0,
    overrides: Sequence[str] = (),
) -> RunDirectory:
    """A run with metrics, checkpoints, samples and a journal."""
    run = work.run(stage, run_id)
    run.create()
    save_config(
        composed(
            [f"stage={stage}", *MODEL, f"stage.steps={steps}", f"work_dir={work.path}", f"run_id={run_id}", *overrides]
        ),
        run.config,
    )
    write_lines(run.metrics, metrics_of(stage, steps, began, len(run_id)))
    for step in (steps // 2, steps):
        (run.checkpoints / f"step_{step:08d}").mkdir(exist_ok=True)
    (run.checkpoints / "LATEST").write_text(f"step_{steps:08d}\n")
    (run.checkpoints / "BEST").write_text(f"step_{steps // 2:08d}\n")
    write_lines(run.events, events(steps, layout, began, failures, finished))
    write_lines(run.samples / f"step_{steps:08d}.jsonl", samples_of(stage))
    if finished:
        durable.write_json(
            run.result, {"stage": stage, "steps": steps, "parameters": 142_720, "ranks": 4, "seconds": steps * 0.5}
        )
    return run


def make_pipeline(directory: Any, run_id: str = "default", steps: int = 200) -> WorkDirectory:
    """A work directory as the quick start leaves it: corpora, tokenizer, five runs, the command."""
    work = WorkDirectory(directory)
    make_corpora(work)
    for number, stage in enumerate(STAGES):
        make_run(work, stage, run_id, steps=steps, began=BEGAN + number * steps, failures=int(stage == "code"))
    names = ("tokenizer", "shards", "language", "code", "tools", "rankings", "reward", "rlhf")
    path = work.pipeline("rlhf", run_id)
    path.parent.mkdir()
    durable.write_json(
        path,
        {
            "run_id": run_id,
            "command": ["dist_lm.launch", "stage=rlhf"],
            "host": "alpha",
            "process": 7,
            "started": BEGAN,
            "updated": BEGAN + 9,
            "state": "done",
            "error": "",
            "stages": [{"name": name, "state": "done", "detail": ""} for name in names],
        },
    )
    return work


ZEROS = "0" * 64  # a hash
RECIPE = Recipe(ZEROS, 512, ZEROS, 256, 64_000_000)
HELD = {
    "language": {"english": 400_000},
    "code": {"python": 900_000, "bash": 300_000, "sql": 120_000},
    "tools": {"tools": 500_000},
}


def make_corpora(work: WorkDirectory, held: Mapping[str, Mapping[str, int]] = HELD) -> None:
    """Manifests alone, of tokens by corpus and language: no report reads the shards."""
    durable.write_json(
        work_file(work.tokenizer_report),
        {
            "vocab_size": 512,
            "bytes_per_token": 3.1,
            "languages": {"english": {"bytes_per_token": 3.4}, "python": {"bytes_per_token": 2.9}},
        },
    )
    for name, languages in held.items():
        counts = {language: Counts(tokens // 400, tokens, tokens * 3) for language, tokens in languages.items()}
        splits = {
            split: Split((Shard(shard_name(split, 0), 1, *[ZEROS] * 3, "", sum(counts.values(), Counts())),), counts)
            for split in SPLITS
        }
        write_manifest(work_file(work.corpus_manifest(name)).parent, Manifest(RECIPE, splits, {}))


def work_file(path: Any) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def metrics_of(stage: str, steps: int, began: float, seed: int) -> Iterator[Mapping[str, Any]]:
    """Curves that fall and jitter as those of a run do; val is measured every fifth of them."""
    jitter = np.random.default_rng(seed).normal(0, 1, (steps, 2))
    for step in range(1, steps + 1):
        falling = math.exp(-step / (steps / (seed / 2)))
        line: dict[str, Any] = {"step": step, "time": began + step * 0.5, "train/tokens": step * 4096}
        line |= {"perf/tokens_per_s": 9000 + 300 * jitter[step - 1, 0], "perf/memory_gib": 1.25, "perf/step_s": 0.45}
        if stage == "rlhf":
            line |= {"rlhf/reward_mean": 1 - falling + 0.1 * jitter[step - 1, 1], "rlhf/kl": 3 * (1 - falling)}
        else:
            line |= {
                "train/loss": 2 + 4 * falling + 0.1 * jitter[step - 1, 1],
                "train/grad_norm": 0.5 + 2 * falling + 0.05 * abs(jitter[step - 1, 0]),
                "train/lr": 1e-3 * min(1, step / 10),
            }
        yield line
        if step % (steps // 5) == 0 and stage != "rlhf":
            yield {"step": step, "time": began + step * 0.5, "val/loss": 2.2 + 3.5 * falling}
            if stage in ("language", "code"):
                parts = {
                    f"val/bits_per_byte_{n}": 1.2 + k / 5 + 2 * falling for k, n in enumerate(("sql", "python", "bash"))
                }
                yield {"step": step, "time": began + step * 0.5, "val/bits_per_byte": 1.3 + 2 * falling} | parts


def events(steps: int, layout: str, began: float, failures: int, finished: bool) -> Iterator[Mapping[str, Any]]:
    """What the launcher wrote down: so many failures, spread evenly, each after half an attempt."""
    attempt = {"nodes": NODES, "ranks_per_node": 2, "device": "cpu", "layout": layout}
    for number in range(failures + 1):
        at = began + number * steps * 0.5 / (failures + 1)
        yield {"time": at, "event": "started", "attempt": number, "step": number * steps // (failures + 1)} | attempt
        if number < failures:
            stop = at + steps * 0.4 / (failures + 1)
            words = "killed by signal 9 (fetched from https://me:hunter2@example.org/data)"
            yield {"time": stop, "event": "failed", "error": words, "type": "Killed", "rank": 3, "restarts_left": 2}
    if finished:
        yield {"time": began + steps * 0.5, "event": "finished", "steps": steps}


def samples_of(stage: str) -> list[Mapping[str, Any]]:
    """Two rows, the second of which would do harm in a page that does not escape."""
    if stage == "tools":
        row = {"kind": "one_call", "prompt": "<|im_start|>user\nAdd 1 and 2<|im_end|>\n", "expected": '{"name": "add"}'}
        return [row | {"found": '{"name": "add"}', "right": True}, row | {"found": HOSTILE, "right": False}]
    if stage in ("preference", "reward"):
        return []
    if stage == "rlhf":
        row = {"kind": "rollout", "prompt": "Write a loop", "parts": {"reward_model": 0.31}, "tokens": 14}
        return [row | {"completion": "for x in y:", "reward": 0.31}, row | {"completion": HOSTILE, "reward": -1.2}]
    row = {"language": "python", "prompt": "def add(a, b):\n", "finished": True}
    return [row | {"completion": "    return a + b\n", "parses": True}, row | {"completion": HOSTILE, "parses": False}]


def write_lines(path: Any, lines: Any) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_agent_run(
    work: WorkDirectory, run_id: str = "agent", *, iterations: int = 5, overrides: Sequence[str] = ()
) -> RunDirectory:
    """A run with an environment: two tasks an iteration, four conversations each, a cut and a failed one among them."""
    tasks = work_file(work.path / "tasks" / "train.jsonl")
    write_lines(tasks, ({"prompt": f"Add {n} and {n}", "answer": str(2 * n)} for n in range(64)))
    settings = ("rlhf.environment=python", f"rlhf.prompts_from={tasks}", "rlhf.prompts=2", "rlhf.samples=4")
    algorithm = ("rlhf.algorithm=grpo", "rlhf.reward_model=none", "stage.init_from=none")
    run = make_run(work, "rlhf", run_id, steps=20, overrides=[*settings, *algorithm, *overrides])
    for iteration in range(iterations):
        with EpisodeFile(run.conversations / file_name(2 * iteration), "settings") as file:
            # Conversations end in any order.
            for number in (5, 2, 7, 0, 3, 6, 1, 4):
                file.add(conversation_of(2 * iteration + number // 4, number % 4, iteration))
    return run


TOOL = Tool("python", "Runs code and returns what it prints.", {"type": "object", "properties": {}})
VERDICTS = (Verdict.of(0.0), Verdict.of(1.0), Verdict.of(0.25), Verdict.failed("timeout", f"no step in 30 s {HOSTILE}"))


def conversation_of(position: int, sample: int, version: int) -> Episode:
    """A recorded conversation; of each task, sample 0 is bad, 1 good, 2 cut and hostile, 3 without a verdict."""
    code, result = f"total = {position} + {position}\nprint(total)", {"output": f"{2 * position}\n"}
    answer, cut = f"The sum is\n{2 * position}", ""
    if sample == 0:
        code, result = "print(totl)", {"error": "NameError: name 'totl' is not defined\n  File <turn>, line 1"}
    if sample == 2:
        answer, cut = HOSTILE, "turns"
        result = {"output": f"{HOSTILE}\x1b]0;taken\x07 \u202etxt.exe"}

    asked = Observation(
        (Message("system", "Use the tool."), Message("user", f"Add {position} and {position}.")), (TOOL,)
    )
    call = Action("I compute it.", (Call("python", {"code": code}),))
    step = Step(Observation.results(result), done=False, turn_reward=0.1)
    verdict = VERDICTS[sample]
    end = step_value(Step(Observation(), True, verdict)) if verdict.valid else None
    turns = (
        Turn(20, True, action_value(call), step_value(step), 0.1, int(sample == 0)),
        Turn(12, True, action_value(Action(answer, (), cut or None)), end),
    )
    drawn = [False] * 8 + [True] * 20 + [False] * 6 + [True] * 12
    return Episode(
        *(position, sample, "digest", version, verdict, cut, observation_value(asked), turns),
        samples=(Sample([3] * len(drawn), drawn),) if verdict.valid else (),
        logprobs=(-1.0,) * 32 if verdict.valid else (),
    )
