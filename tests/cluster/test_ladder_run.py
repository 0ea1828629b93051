"""GRPO with executed rewards on the ladder of tiny tasks: held-out pass@1 of nano rises (a bar)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_lm.demo.ladder import write
from dist_lm.storage.run_directory import WorkDirectory

SEEDS = (0, 1, 2)
GAIN = 0.2
CORPUS = """
defaults: [local, _self_]
corpora:
  tools:
    - {{reader: messages, path: {folder}/solved.jsonl, language: ladder, licence: Apache-2.0}}
"""
START = (  # a policy that has seen the form of answers, and few tasks
    *("stages.tools.init_from=none", "stages.tools.mix=null", "stages.tools.steps=120", "stages.tools.seq_len=256"),
    *("stages.tools.global_batch=8", "stages.tools.micro_batch=8", "stages.tools.warmup_steps=10"),
    *("stages.tools.checkpoint_every=0", "stages.tools.eval_every=0", "stages.tools.questions.per_kind=0"),
)
GRPO = (
    *("rlhf.algorithm=grpo", "rlhf.reward_model=none", "rlhf.rewards={solved: {kind: tests, score: all, wall_s: 60}}"),
    *("rlhf.prompts=16", "rlhf.samples=8", "rlhf.minibatches=4", "rlhf.max_new_tokens=40", "rlhf.lr=3e-4"),
    *("rlhf.kl_coefficient=0", "rlhf.missing_eos_penalty=0", "rlhf.held_out_prompts=256", "rlhf.pool.actors=0"),
    *("stage.steps=40", "stage.checkpoint_every=0", "stage.eval_every=0"),
)


@pytest.mark.bars
@pytest.mark.cluster
@pytest.mark.timeout(7200)
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
def test_executed_rewards_raise_held_out_pass_at_1(tmp_path: Path) -> None:
    """From a start by supervised steps on other tasks, with the tokenizer and prompts of one work directory."""
    folder = tmp_path / "ladder"
    write(folder)
    conf = tmp_path / "conf" / "corpus" / "ladder.yaml"
    conf.parent.mkdir(parents=True)
    conf.write_text(CORPUS.format(folder=folder))
    prompts = (f"rlhf.prompts_from={folder}/train.jsonl", f"rlhf.held_out_from={folder}/held_out.jsonl")
    gains = {}
    for seed in SEEDS:
        words = (f"work_dir={tmp_path}/work", f"seed={seed}", f"run_id=seed{seed}", "tracking=none", "device=cpu")
        command = [sys.executable, "-m", "dist_lm.launch", "--config-dir", str(tmp_path / "conf"), "corpus=ladder"]
        done = subprocess.run(
            [*command, "stage=rlhf", *words, *START, *GRPO, *prompts], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        run = WorkDirectory(tmp_path / "work").run("rlhf", f"seed{seed}")
        result = json.loads(run.result.read_text())
        before, after = result["before"]["rlhf/held_out_score"], result["metrics"]["rlhf/held_out_score"]
        print(f"seed {seed}: held-out pass@1 {before:.3f} -> {after:.3f}, {result['seconds']:.0f} s", flush=True)
        gains[seed] = after - before
    assert min(gains.values()) >= GAIN, gains
